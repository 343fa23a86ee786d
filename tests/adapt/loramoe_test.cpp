#include "moiety/adapt/loramoe.h"

#include <gtest/gtest.h>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/lora.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json loramoe(const json& more = json::object()) {
  json part = {{"slug", "loramoe"}, {"experts", 4}, {"rank", 2}, {"dropout", 0.0}};
  part.update(more);
  return part;
}

Tensor types() {
  return torch::tensor({1, 0}, torch::kInt64);
}

double loss(const Tensor& gates, const Tensor& of, double delta, const std::string& form = "cv2") {
  return localized_balance(gates, of, delta, form).loss.item<double>();
}

std::shared_ptr<RoutedLora> part_of(const Tensor& rows, const Tensor& a, const Tensor& b) {
  return std::make_shared<RoutedLora>("up_proj", std::make_shared<SoftRouter>(Linear(rows)), a, b, 2.0);
}

TEST(LoraMoe, MixesAllExperts) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const auto w = f64({5, 4}, false), rows = f64({3, 4}, false), a = f64({3, 2, 4}, false), b = f64({3, 5, 2}, false),
             x = f64({2, 3, 4}, false);
  Pass pass;
  auto want = torch::matmul(x, w.t());
  const auto g = torch::softmax(torch::matmul(x, rows.t()), -1);
  for (int64_t e = 0; e < 3; ++e)
    want += 2.0 * g.select(-1, e).unsqueeze(-1) * torch::matmul(x, torch::matmul(b[e], a[e]).t());
  EXPECT_LT(distance(applied(*part_of(rows, a, b), w, x, pass), want), 1e-6);
}

TEST(LoraMoe, GradientsEqualCentralDifferences) {
  torch::manual_seed(2);
  const auto w = f64({5, 4}, false), rows = f64({3, 4}), a = f64({3, 2, 4}), b = f64({3, 5, 2}), x = f64({4, 4});
  const auto part = part_of(rows, a, b);
  const auto f = [&] {
    Pass pass;
    return applied(*part, w, x, pass).square().sum();
  };
  for (const Tensor& t : {rows, a, b, x}) EXPECT_LT(gradient_error(f, t), 1e-5);
}

TEST(LoraMoe, OneExpertIsPlainLora) {
  torch::manual_seed(3);
  const torch::NoGradGuard frozen;
  const auto w = torch::randn({5, 4}), a = torch::randn({1, 2, 4}), b = torch::randn({1, 5, 2}),
             x = torch::randn({6, 4});
  Lora plain(a[0], b[0], 2.0);
  Pass pass;
  EXPECT_LT(distance(applied(*part_of(torch::randn({1, 4}), a, b), w, x, pass), applied(plain, w, x, pass)), 1e-5);
}

TEST(LoraMoe, ConstraintOfEvenGates) {
  const auto even = torch::full({3, 5, 4}, 0.25);
  const auto of = torch::tensor({1, 0, 0}, torch::kInt64);
  EXPECT_NEAR(loss(even, of, 0.0), 0.0, 1e-6);
  // delta^2 n / (n - 1), n = 12 numbers.
  EXPECT_NEAR(loss(even, of, 0.3), 0.09 * 12.0 / 11.0, 1e-5);
  // Their mean is 5 / 4.
  EXPECT_NEAR(loss(even, of, 0.3, "paper"), 0.09 * 12.0 / 11.0 * 1.25, 1e-5);
}

TEST(LoraMoe, ConstraintIsZeroWhereTheMatchingHalfGetsLess) {
  auto gates = torch::zeros({2, 3, 4});
  gates[0].slice(1, 0, 2).fill_(0.7 / 4.0);
  gates[0].slice(1, 2, 4).fill_(1.3 / 4.0);
  gates[1] = gates[0].flip(1);
  EXPECT_NEAR(loss(gates, types(), 0.3), 0.0, 1e-6);
  // And not where it gets more.
  EXPECT_GT(loss(gates.flip(0), types(), 0.3), 0.1);
}

TEST(LoraMoe, ConstraintDoesNotKnowScalesOrNames) {
  torch::manual_seed(4);
  const auto gates = torch::softmax(torch::randn({2, 5, 4}), -1);
  const double at = loss(gates, types(), 0.2);
  EXPECT_GT(at, 0.0);
  EXPECT_NEAR(loss(gates * 7.0, types(), 0.2), at, 1e-5);
  // Both halves and all types change places; so do two experts of one half.
  EXPECT_NEAR(loss(gates.roll(2, -1), 1 - types(), 0.2), at, 1e-6);
  EXPECT_NEAR(loss(gates.index_select(2, torch::tensor({1, 0, 2, 3})), types(), 0.2), at, 1e-6);
}

TEST(LoraMoe, ConstraintOfOneNumberIsZero) {
  const auto gates = torch::rand({1, 3, 2});
  EXPECT_GT(loss(gates, torch::tensor({1}, torch::kInt64), 0.2), 0.0);
  EXPECT_THROW(localized_balance(torch::rand({1, 3, 1}), torch::tensor({1}, torch::kInt64), 0.2), Error);
}

TEST(LoraMoe, ConstraintHasTheGradientOfItsFormula) {
  torch::manual_seed(5);
  for (const char* form : {"cv2", "paper"}) {
    const auto logits = f64({2, 3, 4});
    EXPECT_LT(
        gradient_error([&] { return localized_balance(torch::softmax(logits, -1), types(), 0.2, form).loss; }, logits),
        1e-7);
  }
}

TEST(LoraMoe, ConstraintTeachesTheRouterAlone) {
  torch::manual_seed(6);
  const auto rows = torch::randn({4, 4}).requires_grad_(), a = torch::randn({4, 2, 4}).requires_grad_(),
             b = torch::randn({4, 5, 2}).requires_grad_();
  const auto part = part_of(rows, a, b);
  part->router->losses.push_back(std::make_shared<LocalizedBalanceLoss>(0.5, 0.2, "cv2"));
  Pass pass;
  pass.training = true;
  pass.labels = types();
  applied(*part, torch::randn({5, 4}), torch::randn({2, 3, 4}), pass);
  const auto value = loss_of(pass, "loramoe.balance");
  value.backward();
  EXPECT_GT(rows.grad().abs().max().item<double>(), 1e-5);
  EXPECT_FALSE(a.grad().defined() || b.grad().defined());
}

TEST(LoraMoe, PaddingDoesNotCount) {
  torch::manual_seed(7);
  const auto rows = torch::randn({4, 4});
  const auto value = [&](const Tensor& x, const Tensor& mask) {
    const auto part = part_of(rows, torch::zeros({4, 2, 4}), torch::zeros({4, 5, 2}));
    part->router->losses.push_back(std::make_shared<LocalizedBalanceLoss>(1.0, 0.2, "cv2"));
    Pass pass;
    pass.training = true;
    pass.labels = types();
    pass.mask = mask;
    applied(*part, torch::zeros({5, 4}), x, pass);
    return loss_of(pass, "loramoe.balance").item<double>();
  };
  const auto x = torch::randn({2, 3, 4});
  const auto padded = torch::cat({x, torch::randn({2, 2, 4})}, 1);
  auto mask = torch::ones({2, 5}, torch::kBool);
  mask.slice(1, 3, 5).fill_(false);
  EXPECT_NEAR(value(padded, mask), value(x, {}), 1e-6);
  EXPECT_GT(std::abs(value(padded, {}) - value(x, {})), 1e-4);
}

TEST(LoraMoe, MatricesAreAddedUp) {
  torch::manual_seed(8);
  const auto model = make_causal(
      model_with(json::array({loramoe({{"coef", 0.5}, {"target", {"gate_proj", "up_proj", "down_proj"}}})})),
      {.trainable = true});
  Pass pass;
  pass.labels = types();
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass);
  EXPECT_EQ(pass.losses.size(), 6u);
}

TEST(LoraMoe, BadInputIsAnError) {
  const auto says = [](const json& part, const Tensor& labels) {
    return message_of([&] {
      const auto model = make_causal(model_with(json::array({part})), {.trainable = true});
      Pass pass;
      pass.labels = labels;
      train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass);
    });
  };
  EXPECT_NE(says(loramoe({{"coef", 0.1}}), {}).find("give every source a `label`"), std::string::npos);
  EXPECT_NE(says(loramoe({{"coef", 0.1}}), torch::tensor({2, 0}, torch::kInt64)).find("there is a 2"),
            std::string::npos);
  EXPECT_NE(says(loramoe({{"coef", 0.1}}), torch::tensor({0, -1}, torch::kInt64)).find("there is a -1"),
            std::string::npos);
  EXPECT_NE(says(loramoe({{"coef", 0.1}, {"experts", 3}}), types()).find("even number"), std::string::npos);
  EXPECT_NE(says(loramoe({{"delta", 1.0}}), types()).find("delta"), std::string::npos);
  EXPECT_NE(says(loramoe({{"rank", 0}}), types()).find("rank"), std::string::npos);
  // Without the constraint neither is needed.
  EXPECT_EQ(says(loramoe({{"experts", 3}}), {}), "");
}

TEST(LoraMoeInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(loramoe({{"coef", 0.1}}), types());
}

TEST(LoraMoeInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(loramoe({{"coef", 0.1}, {"dropout", 0.3}}), types());
}

}  // namespace
}  // namespace moiety
