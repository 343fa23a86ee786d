#include "moiety/moe/widenet.h"

#include <gtest/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

constexpr int64_t kHidden = 8, kWidth = 6;

WideNetConfig small(int64_t experts, int64_t top_k, double capacity) {
  WideNetConfig c;
  c.experts = experts;
  c.top_k = top_k;
  c.capacity_factor = capacity;
  c.noise = false;
  c.dropout = 0.0;
  return c;
}

std::shared_ptr<MlpExperts> experts_of(int64_t count) {
  return std::make_shared<MlpExperts>(LinearStack(count, kHidden, kWidth, true),
                                      LinearStack(count, kWidth, kHidden, true), activation("gelu_new"));
}

std::shared_ptr<Norm> fresh_norm() {
  return std::make_shared<LayerNorm>((torch::rand({kHidden}) + 0.5).requires_grad_(),
                                     torch::randn({kHidden}).requires_grad_(), 1e-6);
}

std::shared_ptr<WideNet> stack_of(
    int64_t blocks, const WideNetConfig& config, std::shared_ptr<MlpExperts> experts,
    std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>>* norms = nullptr) {
  std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>> own;
  for (int64_t i = 0; i < blocks; ++i) own.emplace_back(fresh_norm(), fresh_norm());
  if (norms) *norms = own;
  return std::make_shared<WideNet>(
      std::make_shared<BidirectionalAttention>(Linear(kHidden, kHidden, true), Linear(kHidden, kHidden, true),
                                               Linear(kHidden, kHidden, true), Linear(kHidden, kHidden, true), 2),
      std::make_shared<Mixture>(std::make_shared<CapacityRouter>(Linear(kHidden, config.experts), config), experts),
      own);
}

TEST(WideNet, OneExpertIsThePlainLayer) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  auto experts = experts_of(1);
  Mixture layer(std::make_shared<CapacityRouter>(Linear(kHidden, 1), small(1, 1, 1.0)), experts);
  const auto x = torch::randn({2, 5, kHidden});
  Pass pass;
  EXPECT_LT(distance(layer.forward(x, pass).view({10, kHidden}), experts->forward(x.view({10, kHidden}), {10})), 1e-6);
}

TEST(WideNet, CapacityFollowsTheFormulaInItsOrder) {
  CapacityRouter router(Linear(kHidden, 4), small(4, 2, 1.2));
  EXPECT_EQ(router.capacity(7), static_cast<int64_t>(std::floor(7.0 * 1.2 * 2.0 / 4.0)));
  CapacityRouter all(Linear(kHidden, 4), small(4, 2, std::numeric_limits<double>::infinity()));
  EXPECT_EQ(all.capacity(7), 7);
}

TEST(WideNet, NobodyIsDroppedWithRoomForAll) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  auto config = small(4, 2, std::numeric_limits<double>::infinity());
  Mixture layer(std::make_shared<CapacityRouter>(Linear(kHidden, 4), config), experts_of(4));
  const auto x = torch::randn({1, 6, kHidden});
  Pass pass;
  const auto all = layer.forward(x, pass);
  for (int64_t t = 0; t < 6; ++t) {
    Pass one;
    EXPECT_LT(distance(layer.forward(x.narrow(1, t, 1), one), all.narrow(1, t, 1)), 1e-6);
  }
}

TEST(WideNet, WithoutRoomTheInputPasses) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  Mixture layer(std::make_shared<CapacityRouter>(Linear(kHidden, 4), small(4, 2, 1e-6)), experts_of(4));
  Pass pass;
  EXPECT_TRUE((layer.forward(torch::randn({1, 6, kHidden}), pass) == 0).all().item<bool>());
}

TEST(WideNet, SharedTensorsGetTheSumOfAllBlocksGradients) {
  torch::manual_seed(4);
  auto experts = experts_of(4);
  std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>> norms;
  const auto config = small(4, 2, 1.5);
  auto stack = stack_of(3, config, experts, &norms);
  const auto x = torch::randn({2, 4, kHidden}), grad = torch::randn({2, 4, kHidden});
  Pass pass;
  stack->forward(x, pass).backward(grad);
  // The same with a copy of every shared module a block.
  auto sum = torch::zeros_like(experts->w1->weight);
  std::vector<std::shared_ptr<MlpExperts>> copies;
  auto h = x;
  for (int64_t i = 0; i < 3; ++i) {
    const auto copy = [](const torch::Tensor& t) { return t.detach().clone().requires_grad_(); };
    auto own = std::make_shared<MlpExperts>(LinearStack(copy(experts->w1->weight), copy(experts->w1->bias)),
                                            LinearStack(copy(experts->w2->weight), copy(experts->w2->bias)),
                                            activation("gelu_new"));
    copies.push_back(own);
    const auto& shared = stack->blocks()[static_cast<size_t>(i)];
    Mixture layer(std::dynamic_pointer_cast<Mixture>(shared.ffn)->router, own);
    Pass inner;
    h = h + shared.attention->forward(norms[static_cast<size_t>(i)].first->forward(h), inner);
    h = h + layer.forward(norms[static_cast<size_t>(i)].second->forward(h), inner);
  }
  h.backward(grad);
  for (const auto& own : copies) sum += own->w1->weight.grad();
  EXPECT_LT(distance(sum, experts->w1->weight.grad()), 1e-5);
}

TEST(WideNet, SecondNormsChangeRoutingFromTheirBlockOn) {
  torch::manual_seed(5);
  torch::NoGradGuard frozen;
  std::vector<std::pair<std::shared_ptr<Norm>, std::shared_ptr<Norm>>> norms;
  auto stack = stack_of(3, small(4, 2, 2.0), experts_of(4), &norms);
  const auto x = torch::randn({1, 6, kHidden});
  const auto logits = [&] {
    Trace trace;
    Pass pass;
    pass.trace = &trace;
    stack->forward(x, pass);
    std::vector<torch::Tensor> out;
    for (const auto& record : trace.records) out.push_back(record.routing.logits);
    return out;
  };
  const auto before = logits();
  std::dynamic_pointer_cast<LayerNorm>(norms[1].second)->weight.mul_(1.5);
  const auto after = logits();
  ASSERT_EQ(before.size(), 3u);
  EXPECT_TRUE(torch::equal(before[0], after[0]));
  EXPECT_GT(distance(before[1], after[1]), 1e-5);
  EXPECT_GT(distance(before[2], after[2]), 1e-5);
}

TEST(WideNet, ParametersDoNotGrowWithDepthButForTheNorms) {
  const auto count = [](int64_t blocks) {
    int64_t n = 0;
    for (const auto& p : stack_of(blocks, small(4, 2, 1.2), experts_of(4))->parameters()) n += p.numel();
    return n;
  };
  const int64_t d = kHidden, f = kWidth;
  EXPECT_EQ(count(1), 4 * d * d + 4 * d + 4 * (2 * d * f + f + d) + 4 * d + 2 * 2 * d);
  EXPECT_EQ(count(7) - count(1), 6 * 2 * 2 * d);
}

TEST(WideNet, NoiseActsInTrainingOnly) {
  auto config = small(4, 2, 2.0);
  config.noise = true;
  CapacityRouter router(Linear(kHidden, 4), config);
  const auto x = torch::randn({5, kHidden});
  Pass quiet, loud;
  loud.training = true;
  const auto a = router.route(x, quiet.at("ffn"), quiet).logits, b = router.route(x, quiet.at("ffn"), quiet).logits;
  EXPECT_TRUE(torch::equal(a, b));
  router.noise = torch::ones({5, 4});
  EXPECT_LT(distance(router.route(x, loud.at("ffn"), loud).logits, a + 0.25), 1e-6);
}

TEST(MlpExperts, DropoutStandsBehindBothLayers) {
  torch::manual_seed(6);
  MlpExperts experts(LinearStack(1, kHidden, 64, true), LinearStack(1, 64, kHidden, true), activation("gelu_new"),
                     nullptr, 0.5);
  const auto x = torch::randn({50, kHidden});
  const double zeros = (experts.forward(x, {50}) == 0).to(torch::kFloat64).mean().item<double>();
  EXPECT_GT(zeros, 0.3);
  EXPECT_LT(zeros, 0.7);
  experts.eval();
  EXPECT_FALSE((experts.forward(x, {50}) == 0).any().item<bool>());
}

TEST(WideNet, ImpossibleSettingsAreErrors) {
  EXPECT_THROW(CapacityRouter(Linear(kHidden, 4), small(4, 5, 1.0)), Error);
  EXPECT_THROW(CapacityRouter(Linear(kHidden, 4), small(4, 2, 0.0)), Error);
  EXPECT_THROW(BidirectionalAttention(Linear(8, 8), Linear(8, 8), Linear(8, 8), Linear(8, 8), 3), Error);
  EXPECT_THROW(parse<WideNetConfig>({{"output_activation", "relu"}}, "run.yaml"), Error);
}

}  // namespace
}  // namespace moiety
