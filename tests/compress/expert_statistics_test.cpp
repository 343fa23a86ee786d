#include "moiety/compress/expert_statistics.h"

#include <gtest/gtest.h>

#include "expert_tools.h"
#include "message_of.h"

namespace moiety {
namespace {

using torch::Tensor;

Tensor counts(const Tensor& logits, int64_t top_k, const Tensor& real = {}) {
  return selection_counts(route_logits(logits, top_k), logits.size(1), real);
}

Tensor mass_of(const Tensor& logits, int64_t top_k, bool normalize) {
  return gate_mass(route_logits(logits, top_k, normalize), logits.size(1));
}

TEST(SelectionCounts, AreOfTheTopOfEachToken) {
  const auto logits = torch::tensor({{3.0, 1.0, 2.0}, {0.0, 5.0, 4.0}, {1.0, 1.0, 0.0}});
  // Ties go to the lowest index.
  EXPECT_EQ(list_of(counts(logits, 1)), (std::vector<int64_t>{2, 1, 0}));
  EXPECT_EQ(list_of(counts(logits, 2)), (std::vector<int64_t>{2, 2, 2}));
  EXPECT_EQ(distance(usage_of(counts(logits, 1)), torch::tensor({2.0, 1.0, 0.0}, torch::kFloat64) / 3.0), 0);
}

TEST(SelectionCounts, LeavePaddingOut) {
  const auto logits = torch::tensor({{3.0, 1.0}, {0.0, 5.0}, {0.0, 5.0}});
  for (const auto type : {torch::kInt64, torch::kBool})
    EXPECT_EQ(list_of(counts(logits, 1, torch::tensor({1, 0, 1}).to(type))), (std::vector<int64_t>{1, 1}));
}

TEST(SelectionCounts, OfNothingAreAnError) {
  const auto padding = torch::zeros({2}, torch::kInt64);
  EXPECT_NE(message_of([&] { usage_of(counts(torch::ones({2, 3}), 1, padding)); }).find("padding"), std::string::npos);
  EXPECT_NE(message_of([&] { real_tokens(2, padding); }).find("padding"), std::string::npos);
  EXPECT_NE(message_of([&] {
              counts(torch::ones({3, 3}), 1, padding);
            }).find("2 entries for 3 tokens"),
            std::string::npos);
  EXPECT_THROW(counts(torch::ones({2, 3}), 4), Error);
}

TEST(CosineAffinity, IsOfColumnsNotCentred) {
  torch::manual_seed(1);
  const auto logits = torch::randn({20, 4}, torch::kFloat64) + 2.0;
  const auto affinity = cosine_affinity(logit_gram(logits));
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const auto a = logits.select(1, i), b = logits.select(1, j);
      EXPECT_NEAR(affinity[i][j].item<double>(),
                  i == j ? 1.0 : (a.dot(b) / a.norm() / b.norm()).item<double>() / 2 + 0.5, 1e-6);
    }
  // Far from centred ones, which would lie around one half.
  EXPECT_GT(affinity.min().item<double>(), 0.8);
}

TEST(CosineAffinity, AddsUpOverPartsOfAText) {
  torch::manual_seed(2);
  const auto logits = torch::randn({30, 5});
  const auto whole = cosine_affinity(logit_gram(logits));
  EXPECT_LT(distance(cosine_affinity(logit_gram(logits.slice(0, 0, 11)) + logit_gram(logits.slice(0, 11, 30))), whole),
            1e-12);
}

TEST(CosineAffinity, DoesNotKnowScalesAndBearsSilentExperts) {
  torch::manual_seed(3);
  auto logits = torch::randn({10, 4});
  EXPECT_LT(distance(cosine_affinity(logit_gram(logits * 8.0)), cosine_affinity(logit_gram(logits))), 1e-12);
  logits.select(1, 2).zero_();
  const auto affinity = cosine_affinity(logit_gram(logits));
  EXPECT_EQ(affinity[2][2].item<double>(), 1.0);
  EXPECT_EQ(affinity[2][0].item<double>(), 0.5);
  EXPECT_TRUE(torch::equal(affinity, affinity.t()));
}

TEST(CosineAffinity, IgnoresPadding) {
  torch::manual_seed(4);
  const auto logits = torch::randn({6, 3});
  const auto real = torch::tensor({1, 1, 0, 1, 0, 1});
  EXPECT_TRUE(torch::equal(logit_gram(logits, real), logit_gram(logits.index_select(0, torch::tensor({0, 1, 3, 5})))));
}

TEST(GateMass, IsTheGatesOfThoseChosen) {
  const auto logits = torch::tensor({{0.0, 1.0, 2.0}, {3.0, 0.0, 1.0}});
  const auto p = torch::softmax(logits.to(torch::kFloat64), -1);
  const auto raw = mass_of(logits, 2, false), shared = mass_of(logits, 2, true);
  EXPECT_NEAR(raw[0].item<double>(), p[1][0].item<double>(), 1e-6);
  EXPECT_NEAR(raw[1].item<double>(), p[0][1].item<double>(), 1e-6);
  EXPECT_NEAR(raw[2].item<double>(), (p[0][2] + p[1][2]).item<double>(), 1e-6);
  EXPECT_NEAR(shared[1].item<double>(), (p[0][1] / (p[0][1] + p[0][2])).item<double>(), 1e-6);
  // Normalised gates of a token add up to one.
  EXPECT_NEAR(shared.sum().item<double>(), 2.0, 1e-6);
}

TEST(GateMass, ChoosesByLogitsWhereTheSoftmaxIsZero) {
  const auto mass = mass_of(torch::tensor({{300.0, 0.0, 1.0}}), 2, false);
  EXPECT_EQ(mass[0].item<double>(), 1.0);
  EXPECT_EQ(list_of(counts(torch::tensor({{300.0, 0.0, 1.0}}), 2)), (std::vector<int64_t>{1, 0, 1}));
}

class Neurons : public testing::TestWithParam<bool> {};

TEST_P(Neurons, InAnotherOrderAreTheSameFunction) {
  torch::manual_seed(5);
  const auto e = random_expert(7, 5, GetParam());
  const auto x = torch::randn({9, 5});
  const auto moved = with_neurons(e, random_order(7, 1));
  EXPECT_LT(distance(output_of(moved, x), output_of(e, x)), 1e-5);
  EXPECT_GT(distance(moved.up, e.up), 0.1);
}

TEST_P(Neurons, OfAPermutedCopyAreFoundAgain) {
  torch::manual_seed(6);
  const auto e = random_expert(12, 6, GetParam());
  const auto moved = with_neurons(e, random_order(12, 2));
  for (const bool by_down : {true, false})
    EXPECT_EQ(distance(with_neurons(moved, alignment(e, moved, by_down)), e), 0.0);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Neurons, testing::Bool(),
                         [](const auto& info) { return std::string(info.param ? "gated" : "plain"); });

TEST(Alignment, LooksAtEveryMatrix) {
  torch::manual_seed(7);
  // Neurons that only one of the matrices can tell apart.
  for (int part = 0; part < 3; ++part) {
    ExpertWeights e{torch::ones({6, 8}), torch::ones({6, 8}), torch::ones({8, 6})};
    const auto own = torch::randn({6, 8});
    (part == 0 ? e.gate : part == 1 ? e.up : e.down) = part == 2 ? own.t().contiguous() : own;
    const auto moved = with_neurons(e, random_order(6, 3));
    EXPECT_LT(distance(with_neurons(moved, alignment(e, moved)), e), 1e-6) << part;
    if (part == 2) {
      EXPECT_GT(distance(with_neurons(moved, alignment(e, moved, false)), e), 0.1);
    }
  }
}

TEST(Alignment, IsByInnerProductNotByCosine) {
  ExpertWeights a{{}, torch::tensor({{1.0, 0.0}, {0.0, 1.0}}), torch::zeros({2, 2})};
  // Products 10 + 0 against 1 + 8; cosines 0.78 + 0 against 1 + 0.62.
  ExpertWeights b{{}, torch::tensor({{1.0, 0.0}, {10.0, 8.0}}), torch::zeros({2, 2})};
  EXPECT_EQ(alignment(a, b, false), (std::vector<int64_t>{1, 0}));
}

TEST(Experts, StackAndUnstack) {
  torch::manual_seed(8);
  const auto experts = random_experts(3, 4, 5);
  const auto stacked = stack_experts(experts);
  EXPECT_EQ(stacked.down.sizes(), (std::vector<int64_t>{3, 5, 4}));
  const auto back = unstack_experts(stacked.gate, stacked.up, stacked.down);
  for (size_t e = 0; e < 3; ++e) EXPECT_EQ(distance(back[e], experts[e]), 0.0);
}

TEST(Experts, ThatDoNotGoTogetherAreAnError) {
  torch::manual_seed(9);
  auto experts = random_experts(2, 4, 5);
  experts[1] = random_expert(3, 5);
  EXPECT_NE(message_of([&] { check_experts(experts); }).find("expert 1 has 3 neurons, expert 0 4"), std::string::npos);
  EXPECT_EQ(message_of([&] { check_experts(experts, false); }), "");
  experts[1] = random_expert(4, 5, false);
  EXPECT_NE(message_of([&] { check_experts(experts); }).find("expert 1 has no gate, expert 0 has one"),
            std::string::npos);
  experts[1] = random_expert(4, 6);
  EXPECT_NE(message_of([&] { check_experts(experts); }).find("reads 6 features"), std::string::npos);
  EXPECT_NE(message_of([] { check_experts({}); }).find("no experts"), std::string::npos);
  experts[1] = {torch::ones({4, 5}), torch::ones({4, 5}), torch::ones({4, 5})};
  EXPECT_NE(message_of([&] { check_experts(experts); }).find("do not go together"), std::string::npos);
}

TEST(MembersOf, AreByLabel) {
  EXPECT_EQ(members_of(torch::tensor({1, 0, 1})), (std::vector<std::vector<int64_t>>{{1}, {0, 2}}));
  EXPECT_NE(message_of([] { members_of(torch::tensor({0, 2, 2})); }).find("group 1 has no members"), std::string::npos);
  EXPECT_THROW(members_of(torch::tensor({0, -1})), Error);
  EXPECT_THROW(members_of(torch::tensor({0, 9})), Error);
}

}  // namespace
}  // namespace moiety
