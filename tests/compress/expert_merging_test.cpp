#include "moiety/compress/expert_merging.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <numeric>

#include "message_of.h"

namespace moiety {
namespace {

using torch::Tensor;

struct Pieces {
  Tensor base;
  std::vector<Tensor> tasks;
};
Pieces pieces(uint64_t seed, int64_t experts = 3) {
  torch::manual_seed(seed);
  Pieces p{torch::randn({4, 5}), {}};
  for (int64_t k = 0; k < experts; ++k) p.tasks.push_back(torch::randn({4, 5}));
  return p;
}

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(MergeExperts, EveryChunkOfRowsHasItsCoefficient) {
  const auto p = pieces(1);
  const auto raw = torch::randn({3, 3});
  const auto merged = merge_experts(p.base, p.tasks, raw);
  // 20 elements in 3 chunks: 7, 7 and 6.
  auto want = p.base.flatten().clone();
  for (int64_t k = 0; k < 3; ++k)
    for (int64_t i = 0; i < 20; ++i) want[i] += raw[k][i / 7].sigmoid() * p.tasks[static_cast<size_t>(k)].flatten()[i];
  EXPECT_LT(distance(merged.flatten(), want), 1e-6);
}

TEST(MergeExperts, ItsGradientIsThatOfTheComposite) {
  const auto p = pieces(2);
  const auto dy = torch::randn({4, 5});
  for (const int64_t chunks : {1, 3, 6, 7, 20}) {
    const auto raw = torch::randn({3, chunks}).requires_grad_(true), same = raw.detach().clone().requires_grad_(true);
    (merge_experts(p.base, p.tasks, raw) * dy).sum().backward();
    const int64_t size = (20 + chunks - 1) / chunks;
    auto composite = p.base;
    for (int64_t k = 0; k < 3; ++k)
      composite = composite + same[k].sigmoid().repeat_interleave(size).slice(0, 0, 20).view({4, 5}) *
                                  p.tasks[static_cast<size_t>(k)];
    (composite * dy).sum().backward();
    EXPECT_LT(distance(raw.grad(), same.grad()), 1e-5) << chunks;
  }
}

TEST(MergeExperts, CoefficientsThatActOnNothingGetNoGradient) {
  const auto p = pieces(3);
  // 20 elements in 7 chunks of 3 make 7 pieces; in 12 of 2, 10.
  const auto raw = torch::randn({3, 12}).requires_grad_(true);
  merge_experts(p.base, p.tasks, raw).sum().backward();
  EXPECT_EQ(raw.grad().slice(1, 10, 12).abs().max().item<float>(), 0.0f);
  EXPECT_GT(raw.grad().slice(1, 0, 10).abs().min().item<float>(), 0.0f);
}

TEST(MergeExperts, EndsAtTheBaseAndAtTheExpert) {
  const auto p = pieces(4, 1);
  EXPECT_LT(distance(merge_experts(p.base, p.tasks, torch::full({1, 1}, -40.0)), p.base), 1e-6);
  EXPECT_LT(distance(merge_experts(p.base, p.tasks, torch::full({1, 4}, 40.0)), p.base + p.tasks[0]), 1e-6);
}

TEST(MergeExperts, ChunksOfOneCoefficientAreOne) {
  const auto p = pieces(5);
  const auto raw = torch::randn({3, 1});
  EXPECT_TRUE(torch::equal(merge_experts(p.base, p.tasks, raw), merge_experts(p.base, p.tasks, raw.repeat({1, 1}))));
  EXPECT_LT(distance(merge_experts(p.base, p.tasks, raw), merge_experts(p.base, p.tasks, raw.repeat({1, 6}))), 1e-6);
  EXPECT_LT(
      distance(merge_experts(p.base, p.tasks, raw), merge_experts_fixed(p.base, p.tasks, raw.sigmoid().squeeze(1))),
      1e-6);
}

TEST(MergeExperts, TheOrderOfExpertsDoesNotMatter) {
  const auto p = pieces(6);
  const auto raw = torch::randn({3, 2});
  EXPECT_LT(distance(merge_experts(p.base, p.tasks, raw), merge_experts(p.base, {p.tasks[2], p.tasks[0], p.tasks[1]},
                                                                        torch::stack({raw[2], raw[0], raw[1]}))),
            1e-6);
}

TEST(MergeExperts, BadInputIsAnError) {
  const auto p = pieces(7);
  EXPECT_NE(message_of([&] { merge_experts(p.base, {}, torch::zeros({0, 1})); }).find("no expert"), std::string::npos);
  EXPECT_NE(message_of([&] {
              merge_experts(p.base, p.tasks, torch::zeros({3, 21}));
            }).find("21 chunks"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              merge_experts(p.base, p.tasks, torch::zeros({2, 1}));
            }).find("2 experts for 3"),
            std::string::npos);
  EXPECT_THROW(merge_experts(p.base, {torch::zeros({5, 4})}, torch::zeros({1, 1})), Error);
  EXPECT_THROW(initial_coefficients(torch::tensor({0.5f, 1.0f}), 1), Error);
  EXPECT_THROW(initial_coefficients(torch::tensor({0.0f}), 1), Error);
}

// ---- The loss ----

MergeSample sample(uint64_t seed, bool same = false) {
  torch::manual_seed(seed);
  MergeSample s;
  s.teacher_logits = torch::randn({2, 3, 7});
  s.student_logits = same ? s.teacher_logits.clone() : torch::randn({2, 3, 7});
  for (int l = 0; l < 4; ++l) {
    s.teacher_hidden.push_back(torch::randn({2, 3, 5}));
    s.student_hidden.push_back(same ? s.teacher_hidden.back().clone() : torch::randn({2, 3, 5}));
  }
  return s;
}

ExpertMergingConfig loss_config() {
  ExpertMergingConfig c;
  c.temperature = 2.0;
  c.reg_weight = 3.0;
  c.hidden_weight = 0.5;
  c.hidden_layers = {1, 3};
  return c;
}

TEST(ExpertMergingLoss, IsMadeOfItsParts) {
  const auto s = sample(1);
  const std::vector<Tensor> raw{torch::randn({3, 1}), torch::randn({3, 2})};
  const auto init = torch::tensor({0.1f, 0.2f, 0.3f});
  const auto loss = expert_merging_loss(s, raw, init, loss_config(), 1.5);
  const auto p = (s.teacher_logits / 2.0).softmax(-1);
  const auto entropy = -(p * (s.student_logits / 2.0).log_softmax(-1)).sum() / 6.0;
  EXPECT_NEAR(loss.logits.item<double>(), 1.5 * 4.0 * entropy.item<double>(), 1e-4);
  const auto square = [&](size_t l) { return (s.student_hidden[l] - s.teacher_hidden[l]).square().mean(); };
  EXPECT_NEAR(loss.hidden.item<double>(), 1.5 * 0.5 * (square(1) + square(3)).item<double>() / 2.0, 1e-5);
  double off = 0.0;
  for (const Tensor& a : raw) off += (a.sigmoid() - init.unsqueeze(1)).abs().sum().item<double>();
  EXPECT_NEAR(loss.reg.item<double>(), 3.0 * off / (9.0 / 3.0), 1e-5);
  EXPECT_NEAR(loss.total.item<double>(), (loss.logits + loss.hidden + loss.reg).item<double>(), 1e-5);
}

TEST(ExpertMergingLoss, HoldsNothingAtTheBeginning) {
  const auto init = torch::tensor({0.1f, 0.37f, 0.9f});
  std::vector<Tensor> raw;
  for (const int64_t m : {1, 3}) raw.push_back(initial_coefficients(init, m).requires_grad_(true));
  const auto loss = expert_merging_loss(sample(2), raw, init, loss_config(), 1.0);
  EXPECT_EQ(loss.reg.item<double>(), 0.0);
  loss.reg.backward();
  for (const Tensor& a : raw) EXPECT_EQ(a.grad().abs().max().item<float>(), 0.0f);
}

TEST(ExpertMergingLoss, IsLeastWhereTheStudentIsItsTeacher) {
  auto s = sample(3, true);
  const auto init = torch::tensor({0.5f});
  const auto best = expert_merging_loss(s, {}, init, loss_config(), 1.0);
  EXPECT_EQ(best.hidden.item<double>(), 0.0);
  EXPECT_EQ(best.reg.item<double>(), 0.0);
  s.student_logits = s.student_logits + 0.3 * torch::randn_like(s.student_logits);
  EXPECT_GT(expert_merging_loss(s, {}, init, loss_config(), 1.0).logits.item<double>(), best.logits.item<double>());
}

TEST(ExpertMergingLoss, TeachersGetNoGradient) {
  auto s = sample(4);
  s.teacher_logits.requires_grad_(true);
  s.teacher_hidden[1].requires_grad_(true);
  s.student_logits.requires_grad_(true);
  expert_merging_loss(s, {}, torch::tensor({0.5f}), loss_config(), 1.0).total.backward();
  EXPECT_FALSE(s.teacher_logits.grad().defined());
  EXPECT_FALSE(s.teacher_hidden[1].grad().defined());
  EXPECT_TRUE(s.student_logits.grad().defined());
}

TEST(ExpertMergingLoss, BadInputIsAnError) {
  const auto init = torch::tensor({0.5f});
  auto c = loss_config();
  c.hidden_layers = {4};
  EXPECT_NE(message_of([&] { expert_merging_loss(sample(5), {}, init, c, 1.0); }).find("0 to 3"), std::string::npos);
  c.hidden_layers = {-1};
  EXPECT_THROW(expert_merging_loss(sample(5), {}, init, c, 1.0), Error);
  EXPECT_THROW(expert_merging_loss(sample(5), {}, init, loss_config(), -1.0), Error);
  c = loss_config();
  c.reg_weight = -1.0;
  EXPECT_THROW(expert_merging_loss(sample(5), {}, init, c, 1.0), Error);
  EXPECT_THROW(expert_merging_loss(sample(5), {torch::zeros({2, 1})}, init, loss_config(), 1.0), Error);
}

// ---- Chunks ----

TEST(LayerImportance, WeighsCoefficientsSizesAndElements) {
  // Tensor 0: 0.5 * 2 + 0.25 * 4 = 2; tensor 1: 0.1 * 10 + 0.5 * 10 = 6.
  const auto i =
      layer_importance(torch::tensor({{0.5f, 0.1f}, {-0.25f, 0.5f}}), torch::tensor({{2.0f, 10.0f}, {4.0f, 10.0f}}));
  EXPECT_NEAR(i[0], 0.25, 1e-7);
  EXPECT_NEAR(i[1], 0.75, 1e-7);
  EXPECT_NE(message_of([] {
              layer_importance(torch::ones({1, 2}), torch::zeros({1, 2}));
            }).find("differs"),
            std::string::npos);
}

TEST(LayerImportance, DoesNotKnowScales) {
  torch::manual_seed(8);
  const auto alpha = torch::rand({3, 5}), sizes = torch::rand({3, 5});
  const auto one = layer_importance(alpha, sizes);
  EXPECT_NEAR(std::accumulate(one.begin(), one.end(), 0.0), 1.0, 1e-12);
  const auto other = layer_importance(0.5 * alpha, 8.0 * sizes);
  for (size_t i = 0; i < one.size(); ++i) EXPECT_NEAR(one[i], other[i], 1e-7);
}

TEST(AllocateChunks, TakesTheFloorOfEveryShare) {
  const std::vector<int64_t> many(4, 1000);
  EXPECT_EQ(allocate_chunks({0.7, 0.2, 0.06, 0.04}, many, 2.5, 1.0), (std::vector<int64_t>{7, 2, 0, 0}));
  EXPECT_EQ(allocate_chunks({0.7, 0.2, 0.06, 0.04}, {5, 1, 9, 9}, 2.5, 1.0), (std::vector<int64_t>{5, 1, 0, 0}));
  EXPECT_EQ(allocate_chunks({0.7, 0.2, 0.06, 0.04}, many, 1.0, 0.0), (std::vector<int64_t>{1, 1, 1, 1}));
  EXPECT_EQ(allocate_chunks({0.7, 0.2, 0.06, 0.04}, many, 0.9, 0.0), (std::vector<int64_t>{0, 0, 0, 0}));
  // Squares 0.49, 0.04, 0.0036, 0.0016 of 0.5352.
  EXPECT_EQ(allocate_chunks({0.7, 0.2, 0.06, 0.04}, many, 2.5, 2.0), (std::vector<int64_t>{9, 0, 0, 0}));
  EXPECT_THROW(allocate_chunks({1.0}, {1}, -1.0, 1.0), Error);
  EXPECT_THROW(allocate_chunks({1.0}, {1}, 1.0, -1.0), Error);
}

TEST(AllocateChunks, NeverPassesTheBudget) {
  torch::manual_seed(9);
  for (int round = 0; round < 20; ++round) {
    const auto shares = torch::rand({9}, torch::kFloat64).softmax(0).contiguous();
    const std::vector<double> i(shares.data_ptr<double>(), shares.data_ptr<double>() + 9);
    const auto m = allocate_chunks(i, std::vector<int64_t>(9, 100), 1.2, 1.0);
    EXPECT_LE(std::accumulate(m.begin(), m.end(), int64_t{0}), 10);
  }
}

}  // namespace
}  // namespace moiety
