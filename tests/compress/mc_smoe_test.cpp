#include "moiety/compress/mc_smoe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "expert_tools.h"
#include "message_of.h"
#include "moiety/base/registry.h"

namespace moiety {
namespace {

using torch::Tensor;

class Align : public testing::TestWithParam<bool> {};

TEST_P(Align, BringsPermutedCopiesBackAndKeepsEveryFunction) {
  torch::manual_seed(1);
  auto experts = random_experts(3, 9, 6, GetParam());
  experts[2] = with_neurons(experts[0], random_order(9, 1));
  const auto aligned = align_experts(experts);
  EXPECT_EQ(distance(aligned.experts[2], experts[0]), 0.0);
  const auto x = torch::randn({8, 6});
  for (size_t e = 0; e < 3; ++e) {
    EXPECT_LT(distance(output_of(aligned.experts[e], x), output_of(experts[e], x)), 1e-5);
    EXPECT_EQ(distance(aligned.experts[e], with_neurons(experts[e], list_of(aligned.order[static_cast<int64_t>(e)]))),
              0.0);
  }
  EXPECT_TRUE(torch::equal(aligned.order[0], torch::arange(9)));
}

INSTANTIATE_TEST_SUITE_P(Kinds, Align, testing::Bool(),
                         [](const auto& info) { return std::string(info.param ? "gated" : "plain"); });

TEST(MSmoeAlign, IsToTheReferenceThatIsAskedFor) {
  torch::manual_seed(2);
  auto experts = random_experts(3, 7, 5);
  experts[0] = with_neurons(experts[1], random_order(7, 2));
  const auto aligned = align_experts(experts, 1);
  EXPECT_EQ(distance(aligned.experts[0], experts[1]), 0.0);
  EXPECT_TRUE(torch::equal(aligned.order[1], torch::arange(7)));
  EXPECT_THROW(align_experts(experts, 3), Error);
}

Tensor similar(int64_t layers, int64_t experts) {
  auto s = torch::rand({layers, experts, experts});
  return (s + s.transpose(1, 2)) / 2;
}

TEST(Groups, AreAsManyAsUseOverAllLayersSays) {
  // Layer 1 needs more experts than layer 2; layer 0 is not merged.
  const auto usage = torch::tensor({{0.7, 0.1, 0.1, 0.1}, {0.3, 0.28, 0.22, 0.2}, {0.9, 0.06, 0.03, 0.01}});
  const auto g = group_experts(usage, similar(3, 4), 2, {1, 2});
  // Four ones of layer 0, then 1, 1, 0.28, 0.22, 0.2, ...: the threshold is the ninth, for 4 + 2 * 2 are to stay.
  EXPECT_EQ(list_of(g.groups), (std::vector<int64_t>{4, 3, 1}));
}

TEST(Groups, ThresholdIsStrictAndOneStepOn) {
  // Sorted: 1, 1, 0.25, 0.25, 0.2, ...: with 1 group on average the threshold is the third, 0.25, which is not above
  // itself.
  const auto usage = torch::tensor({{0.3, 0.25, 0.25, 0.2}, {0.5, 0.2, 0.2, 0.1}});
  EXPECT_EQ(list_of(group_experts(usage, similar(2, 4), 1, {0, 1}).groups), (std::vector<int64_t>{1, 1}));
  // With 2 the fifth, 0.2.
  EXPECT_EQ(list_of(group_experts(usage, similar(2, 4), 2, {0, 1}).groups), (std::vector<int64_t>{3, 1}));
}

TEST(Groups, LeadersAreNumberedByUseAndTheOthersJoinTheMostSimilar) {
  const auto usage = torch::tensor({{0.1, 0.5, 0.05, 0.35}, {0.4, 0.3, 0.2, 0.1}});
  auto s = torch::full({2, 4, 4}, 0.5);
  s[0][0][3] = 0.9;
  s[0][2][1] = 0.8;
  // What is similar but no leader does not count.
  s[0][2][0] = 1.0;
  const auto g = group_experts(usage, s, 2, {0, 1});
  EXPECT_EQ(list_of(g.groups), (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(list_of(g.labels[0]), (std::vector<int64_t>{1, 0, 0, 1}));
  EXPECT_EQ(list_of(g.dominant[0]), (std::vector<int64_t>{0, 1, 0, 1}));
  // Ties go to the first leader.
  EXPECT_EQ(list_of(g.labels[1]), (std::vector<int64_t>{0, 1, 0, 0}));
}

TEST(Groups, LayersThatAreNotMergedKeepAGroupAnExpert) {
  const auto usage = torch::tensor({{0.2, 0.5, 0.3}, {0.6, 0.3, 0.1}});
  const auto g = group_experts(usage, similar(2, 3), 1, {1});
  EXPECT_EQ(list_of(g.labels[0]), (std::vector<int64_t>{2, 0, 1}));
  EXPECT_TRUE(g.dominant[0].all().item<bool>());
  EXPECT_EQ(list_of(g.groups), (std::vector<int64_t>{3, 1}));
}

TEST(Groups, AsManyAsExpertsMergeOneAway) {
  torch::manual_seed(3);
  const auto usage = torch::softmax(torch::randn({3, 5}), -1);
  const auto g = group_experts(usage, similar(3, 5), 5, {0, 1, 2});
  EXPECT_EQ(g.groups.sum().item<int64_t>(), 14);
}

TEST(Groups, StayWithinWhatIsAskedFor) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    torch::manual_seed(seed);
    const auto usage = torch::softmax(2 * torch::randn({4, 6}), -1);
    for (int64_t groups = 1; groups < 6; ++groups) {
      const auto g = group_experts(usage, similar(4, 6), groups, {1, 2, 3});
      EXPECT_LE(g.groups.sum().item<int64_t>(), groups * 3 + 6);
      EXPECT_GE(g.groups.min().item<int64_t>(), 1);
      for (int64_t l = 0; l < 4; ++l)
        EXPECT_EQ(members_of(g.labels[l]).size(), static_cast<size_t>(g.groups[l].item<int64_t>()));
    }
  }
}

TEST(Groups, ThatAreFullLeaveTheCandidates) {
  const auto usage = torch::tensor({{0.4, 0.3, 0.2, 0.1}, {0.4, 0.3, 0.2, 0.1}});
  auto s = torch::full({2, 4, 4}, 0.5);
  s.select(2, 0).fill_(0.9);
  // Both of the others resemble expert 0; the more used one comes first.
  EXPECT_EQ(list_of(group_experts(usage, s, 2, {0, 1}, 2).labels[0]), (std::vector<int64_t>{0, 1, 0, 1}));
  EXPECT_NE(message_of([&] {
              group_experts(usage, s, 1, {0, 1}, 2);
            }).find("at most 2 experts do not hold 4"),
            std::string::npos);
}

TEST(Groups, BadInputIsAnError) {
  const auto usage = torch::tensor({{0.5, 0.3, 0.2}, {0.5, 0.3, 0.2}});
  const auto s = similar(2, 3);
  EXPECT_NE(message_of([&] { group_experts(usage, s, 0, {0}); }).find("1 to 3 are possible"), std::string::npos);
  EXPECT_THROW(group_experts(usage, s, 4, {0}), Error);
  EXPECT_NE(message_of([&] { group_experts(usage, s, 2, {2}); }).find("no layer 2"), std::string::npos);
  EXPECT_NE(message_of([&] { group_experts(usage, s, 2, {}); }).find("no layer to merge"), std::string::npos);
  EXPECT_THROW(group_experts(usage, similar(2, 4), 2, {0}), Error);
  // An expert that takes everything has a use of 1 as it is: with too few below, the threshold is 1.
  EXPECT_NE(message_of([&] {
              group_experts(torch::ones({2, 3}), s, 2, {0, 1});
            }).find("too many groups"),
            std::string::npos);
}

TEST(Merge, WeighsByUseInsideTheGroup) {
  torch::manual_seed(4);
  const auto experts = random_experts(3, 4, 5);
  const auto usage = torch::tensor({0.2, 0.5, 0.3});
  const auto merged = merge_groups(experts, torch::tensor({1, 0, 1}), usage);
  EXPECT_LT(distance(merged[0], experts[1]), 1e-5);
  const ExpertWeights want{0.4 * experts[0].gate + 0.6 * experts[2].gate, 0.4 * experts[0].up + 0.6 * experts[2].up,
                           0.4 * experts[0].down + 0.6 * experts[2].down};
  EXPECT_LT(distance(merged[1], want), 1e-5);
}

TEST(Merge, DoesNotKnowTheOrderOfExpertsOrTheScaleOfUse) {
  torch::manual_seed(5);
  const auto experts = random_experts(4, 4, 5, false);
  const auto usage = torch::rand({4}) + 0.1, labels = torch::tensor({0, 1, 0, 0});
  const auto merged = merge_groups(experts, labels, usage);
  const auto scaled = merge_groups(experts, labels, usage * 100);
  const auto order = torch::tensor({3, 2, 1, 0});
  const auto turned = merge_groups({experts[3], experts[2], experts[1], experts[0]}, labels.index_select(0, order),
                                   usage.index_select(0, order));
  for (size_t g = 0; g < 2; ++g) {
    EXPECT_LT(distance(scaled[g], merged[g]), 1e-5);
    EXPECT_LT(distance(turned[g], merged[g]), 1e-5);
  }
}

TEST(Merge, AGroupWithoutUseIsZero) {
  torch::manual_seed(6);
  const auto experts = random_experts(3, 4, 5);
  for (const double eps : {1e-7, 0.0}) {
    const auto merged = merge_groups(experts, torch::tensor({0, 1, 1}), torch::tensor({1.0, 0.0, 0.0}), eps);
    EXPECT_EQ(merged[1].down.abs().max().item<double>(), 0.0);
  }
}

TEST(LowRank, AndTheRestAreTheMatrix) {
  torch::manual_seed(7);
  for (const auto& w : {torch::randn({9, 6}), torch::randn({5, 11})}) {
    const auto split = split_low_rank(w, 3);
    EXPECT_LT(distance(torch::matmul(split.left, split.right) + split.sparse, w), 1e-5);
    EXPECT_EQ(split.left.size(1), 3);
    // The root of the singular values on both sides, and no smaller rest.
    const auto s = std::get<1>(torch::linalg_svd(w, false));
    EXPECT_LT(distance(split.left.square().sum(0), s.slice(0, 0, 3)), 1e-4);
    EXPECT_LT(distance(split.right.square().sum(1), s.slice(0, 0, 3)), 1e-4);
    EXPECT_NEAR(split.sparse.square().sum().item<double>(), s.slice(0, 3).square().sum().item<double>(), 1e-3);
  }
}

TEST(LowRank, BadRanksAreAnError) {
  EXPECT_NE(message_of([] {
              split_low_rank(torch::ones({4, 6}), 4, "experts.0.up");
            }).find("rank of 4 for experts.0.up, which is [4, 6]: 1 to 3"),
            std::string::npos);
  EXPECT_THROW(split_low_rank(torch::ones({4, 6}), 0), Error);
  EXPECT_THROW(split_low_rank(torch::full({4, 6}, NAN), 2), Error);
}

TEST(RowSparse, ComputesWhatTheMaskedMatrixDoes) {
  torch::manual_seed(8);
  auto s = torch::randn({7, 5});
  s.index_fill_(0, torch::tensor({0, 3, 6}), 0.0);
  s[4][2] = 0.0;
  const auto compact = compact_rows(s);
  EXPECT_EQ(list_of(compact.index), (std::vector<int64_t>{1, 2, 4, 5}));
  EXPECT_TRUE(torch::equal(dense_rows(compact), s));
  const auto x = torch::randn({2, 3, 5});
  EXPECT_LT(distance(multiply(compact, x), torch::matmul(x, s.t())), 1e-6);
  const auto none = compact_rows(torch::zeros({4, 5}));
  EXPECT_EQ(multiply(none, x).abs().max().item<double>(), 0.0);
  EXPECT_EQ(multiply(none, x).sizes(), (std::vector<int64_t>{2, 3, 4}));
}

TEST(RowSparse, HasGradients) {
  torch::manual_seed(9);
  RowSparse compact{torch::randn({2, 3}, torch::kFloat64).requires_grad_(), torch::tensor({1, 3}), 4};
  const auto x = torch::randn({5, 3}, torch::kFloat64).requires_grad_();
  const auto w = torch::randn({5, 4}, torch::kFloat64);
  const auto f = [&] { return (multiply(compact, x).sin() * w).sum(); };
  EXPECT_LT(gradient_error(f, compact.rows), 1e-6);
  EXPECT_LT(gradient_error(f, x), 1e-6);
}

RowPruningConfig steps(int64_t total, double final_threshold) {
  RowPruningConfig c;
  c.total_steps = total;
  c.final_threshold = final_threshold;
  c.warmup_steps = 1;
  c.initial_warmup = 2;
  c.final_warmup = 2;
  return c;
}

TEST(RemainingShare, FallsByACubic) {
  const auto c = steps(12, 0.2);
  double before = 1.0;
  for (int64_t t = 0; t < 12; ++t) {
    const double v = remaining_share(c, t);
    EXPECT_LE(v, before);
    before = v;
  }
  EXPECT_EQ(remaining_share(c, 2), 1.0);
  EXPECT_NEAR(remaining_share(c, 6), 0.2 + 0.8 * 0.125, 1e-12);
  EXPECT_EQ(remaining_share(c, 11), 0.2);
}

TEST(RowPruning, ZeroesTheRowsOfLeastImportanceOverAllMatrices) {
  // Constant gradients and entries of one: a row's importance is its gradient.
  auto one = torch::ones({3, 2}), other = torch::ones({2, 4});
  RowPruning pruning({one, other}, steps(6, 0.5));
  const auto g1 = torch::tensor({{0.1, 0.1}, {9.0, 0.0}, {3.0, 3.0}}),
             g2 = torch::tensor({{1.0, 1.0, 1.0, 1.0}, {5.0, 5.0, 5.0, 5.0}});
  RowPruning::Step step;
  for (int t = 0; t < 6; ++t) step = pruning.after_step({g1, g2});
  // 14 entries, half of them: the 7th smallest is in the row of 3, whose mean is 3; below are those of 0.1 and 1.
  EXPECT_EQ(step.remaining, 0.5);
  EXPECT_EQ(list_of(one.select(1, 0)), (std::vector<int64_t>{0, 1, 1}));
  EXPECT_EQ(list_of(other.select(1, 0)), (std::vector<int64_t>{0, 1}));
  EXPECT_GT(step.mask_threshold, 1.0);
}

TEST(RowPruning, LagsByAStepAndSmoothes) {
  auto s = torch::tensor({{2.0, 2.0}, {1.0, 1.0}});
  auto config = steps(6, 0.5);
  config.initial_warmup = 0;
  config.final_warmup = 0;
  RowPruning pruning({s}, config);
  const auto g = torch::tensor({{3.0, 5.0}, {0.0, 0.0}});
  pruning.after_step({g});
  // Nothing yet of this step's.
  EXPECT_EQ(pruning.state()[0].abs().max().item<double>(), 0.0);
  EXPECT_LT(distance(pruning.state()[1], torch::tensor({{6.0, 10.0}, {0.0, 0.0}})), 1e-6);
  pruning.after_step({g * 0});
  EXPECT_LT(distance(pruning.state()[0], 0.15 * torch::tensor({{6.0, 10.0}, {0.0, 0.0}})), 1e-6);
  pruning.after_step({g * 0});
  EXPECT_LT(distance(pruning.state()[0], 0.85 * 0.15 * torch::tensor({{6.0, 10.0}, {0.0, 0.0}})), 1e-6);
}

TEST(RowPruning, LetsRowsGrowAgain) {
  auto s = torch::ones({2, 2});
  RowPruning pruning({s}, steps(40, 0.1));
  const auto first = torch::tensor({{1.0, 1.0}, {5.0, 5.0}}), then = torch::tensor({{50.0, 50.0}, {0.0, 0.0}});
  int t = 0;
  for (; t < 39 && s[0][0].item<double>() != 0.0; ++t) pruning.after_step({first});
  ASSERT_LT(t, 39);
  for (; t < 40; ++t) {
    s.add_(0.1);  // the optimizer's
    pruning.after_step({then});
  }
  EXPECT_NE(s[0][0].item<double>(), 0.0);
  EXPECT_EQ(s[1][0].item<double>(), 0.0);
}

TEST(RowPruning, EndsWithTheShareAskedForAndARowAtMost) {
  torch::manual_seed(10);
  std::vector<Tensor> m = {torch::randn({20, 6}), torch::randn({10, 9})};
  RowPruning pruning(m, steps(12, 0.3));
  for (int t = 0; t < 12; ++t) pruning.after_step({torch::randn({20, 6}), torch::randn({10, 9})});
  const auto left = m[0].count_nonzero().item<int64_t>() + m[1].count_nonzero().item<int64_t>();
  EXPECT_LE(left, static_cast<int64_t>(0.3 * 210) + 9);
  EXPECT_GT(left, 30);
}

TEST(RowPruning, MasksNowAndThenWhereAskedAndAlwaysAtTheEnd) {
  auto config = steps(14, 0.5);
  config.delta_t = 4;
  RowPruning pruning({torch::ones({4, 2})}, config);
  std::vector<int> masked;
  for (int t = 0; t < 14; ++t)
    if (pruning.after_step({torch::rand({4, 2})}).mask_threshold >= 0.0) masked.push_back(t);
  EXPECT_EQ(masked, (std::vector<int>{4, 8, 12, 13}));
}

TEST(RowPruning, WithNothingToPruneChangesNothing) {
  auto s = torch::ones({2, 2});
  RowPruning pruning({s}, steps(5, 1.0));
  for (int t = 0; t < 5; ++t) EXPECT_EQ(pruning.after_step({torch::rand({2, 2})}).mask_threshold, -1.0);
  EXPECT_EQ(s.count_nonzero().item<int64_t>(), 4);
}

TEST(RowPruning, GoesOnFromItsState) {
  torch::manual_seed(11);
  std::vector<Tensor> gradients;
  for (int t = 0; t < 10; ++t) gradients.push_back(torch::randn({8, 3}));
  const auto start = torch::randn({8, 3});
  auto whole = start.clone(), parts = start.clone();
  RowPruning through({whole}, steps(10, 0.4)), first({parts}, steps(10, 0.4)), second({parts}, steps(10, 0.4));
  for (int t = 0; t < 10; ++t) through.after_step({gradients[static_cast<size_t>(t)]});
  for (int t = 0; t < 5; ++t) first.after_step({gradients[static_cast<size_t>(t)]});
  second.restore(first.step(), first.state());
  for (int t = 5; t < 10; ++t) second.after_step({gradients[static_cast<size_t>(t)]});
  EXPECT_TRUE(torch::equal(whole, parts));
  EXPECT_LT(whole.count_nonzero().item<int64_t>(), 24);
}

TEST(RowPruning, TakesTheMatricesOwnGradients) {
  auto s = torch::ones({2, 2}).requires_grad_();
  RowPruning pruning({s}, steps(5, 0.5));
  EXPECT_NE(message_of([&] { pruning.after_step(); }).find("no gradient"), std::string::npos);
  (s * torch::tensor({{1.0, 2.0}, {3.0, 4.0}})).sum().backward();
  pruning.after_step();
  EXPECT_LT(distance(pruning.state()[1], torch::tensor({{1.0, 2.0}, {3.0, 4.0}})), 1e-6);
}

TEST(RowPruning, BadSettingsAreAnError) {
  const auto says = [](const std::function<void(RowPruningConfig&)>& change) {
    auto config = steps(12, 0.2);
    change(config);
    return message_of([&] { RowPruning({torch::ones({2, 2})}, config); });
  };
  EXPECT_EQ(says([](auto&) {}), "");
  EXPECT_NE(says([](auto& c) { c.total_steps = 4; }).find("schedule longer than training"), std::string::npos);
  EXPECT_NE(says([](auto& c) { c.final_threshold = 0.0; }).find("above 0"), std::string::npos);
  EXPECT_NE(says([](auto& c) { c.final_threshold = 1.2; }).find("final_threshold"), std::string::npos);
  EXPECT_NE(says([](auto& c) { c.beta2 = 0.9; }).find("beta2"), std::string::npos);
  EXPECT_THROW(RowPruning({}, steps(12, 0.2)), Error);
}

TEST(Recovery, OfTheTeacherItselfIsTheTaskAlone) {
  torch::manual_seed(12);
  const auto logits = torch::randn({2, 3, 7});
  const auto labels = torch::tensor({{1, -100, 3}, {0, 6, -100}});
  const auto task = torch::nn::functional::cross_entropy(logits.reshape({-1, 7}), labels.reshape({-1}));
  EXPECT_NEAR(recovery_loss(logits, logits, labels).item<double>(), task.item<double>(), 1e-6);
}

TEST(Recovery, DividesTheDivergenceByTheBatchAndLeavesPaddingOut) {
  torch::manual_seed(13);
  const auto student = torch::randn({2, 3, 7}), teacher = torch::randn({2, 3, 7});
  const auto labels = torch::tensor({{1, -100, 3}, {0, 6, -100}});
  RecoveryConfig config;
  config.task = 0.0;
  config.distillation = 0.5;
  double sum = 0.0;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 3; ++t) {
      if (labels[b][t].item<int64_t>() < 0) continue;
      const auto p = torch::softmax(teacher[b][t] / 2.0, -1), q = torch::softmax(student[b][t] / 2.0, -1);
      sum += (p * (p / q).log()).sum().item<double>();
    }
  EXPECT_NEAR(recovery_loss(student, teacher, labels, config).item<double>(), 0.5 * sum / 2.0, 1e-5);
}

TEST(Recovery, HasGradientsForTheStudentAlone) {
  torch::manual_seed(14);
  const auto student = torch::randn({1, 2, 5}, torch::kFloat64).requires_grad_(),
             teacher = torch::randn({1, 2, 5}, torch::kFloat64).requires_grad_();
  const auto labels = torch::tensor({{1, 2}});
  EXPECT_LT(gradient_error([&] { return recovery_loss(student, teacher, labels); }, student), 1e-7);
  EXPECT_FALSE(teacher.grad().defined());
}

TEST(Recovery, AnotherVocabularyIsAnError) {
  EXPECT_NE(message_of([] {
              recovery_loss(torch::ones({1, 2, 5}), torch::ones({1, 2, 6}), torch::tensor({{1, 2}}));
            }).find("teacher has a vocabulary of 6, the student of 5"),
            std::string::npos);
  EXPECT_THROW(recovery_loss(torch::ones({1, 2, 5}), torch::ones({1, 2, 5}), torch::tensor({{-100, -100}})), Error);
}

TEST(McSmoe, IsRegistered) {
  EXPECT_EQ(get_method("transform", "mc-smoe").paper.arxiv, "2310.01334");
  EXPECT_EQ(get_method("rule", "mc-smoe").config().front().name, "total_steps");
}

}  // namespace
}  // namespace moiety
