#include "moiety/compress/rd_pruning.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "message_of.h"
#include "moiety/base/random.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kInfinite = std::numeric_limits<double>::infinity();

TEST(RdGrid, CountsInIntegers) {
  EXPECT_EQ(rd_pruned(29, 100, 100), 29);  // 0.29 * 100 is 28.999... in binary
  EXPECT_EQ(rd_pruned(3, 7, 10), 2);
  EXPECT_EQ(rd_pruned(10, 7, 10), 7);
  EXPECT_EQ(rd_pruned(65535, int64_t{1} << 60, 65535), int64_t{1} << 60);
  EXPECT_THROW(rd_pruned(11, 7, 10), Error);
  EXPECT_EQ(rd_min_index(0, 7, 10), 0);
  EXPECT_EQ(rd_min_index(2, 7, 10), 3);  // floor(2.1)
  EXPECT_EQ(rd_min_index(3, 7, 10), 5);  // floor(2.8) is 2, floor(3.5) is 3
  EXPECT_EQ(rd_min_index(7, 7, 10), 10);
}

TEST(RdBudget, RepairsBinaryFractions) {
  EXPECT_EQ(rd_budget({600, 400}, 0.9), 100);
  EXPECT_EQ(rd_budget({1000}, 0.0), 1000);
  EXPECT_EQ(rd_budget({10}, 0.999), 0);
  EXPECT_NE(message_of([] { rd_budget({10}, 1.0); }).find("below 1"), std::string::npos);
  EXPECT_THROW(rd_budget({10}, -0.1), Error);
  EXPECT_EQ(rd_unit(0), 1);
  EXPECT_EQ(rd_unit(65536), 1);
  EXPECT_EQ(rd_unit(65537), 2);
}

TEST(RdMask, TakesTheSmallestAndOfEqualsTheFirst) {
  const auto w = torch::tensor({{0.5f, -0.1f, 0.0f}, {0.1f, -0.5f, 2.0f}});
  EXPECT_TRUE(torch::equal(rd_mask(w, {}, 2), torch::tensor({{true, false, false}, {true, true, true}})));
  EXPECT_TRUE(torch::equal(rd_mask(w, {}, 4), torch::tensor({{false, false, false}, {false, true, true}})));
  EXPECT_TRUE(rd_mask(w, {}, 0).all().item<bool>());
  EXPECT_FALSE(rd_mask(w, {}, 6).any().item<bool>());
}

TEST(RdMask, OnlyGrows) {
  torch::manual_seed(1);
  const auto w = torch::randn({6, 7});
  // What went before is not the smallest now.
  const auto before = torch::rand({6, 7}) > 0.3;
  const int64_t gone = before.numel() - before.sum().item<int64_t>();
  const auto after = rd_mask(w, before.to(torch::kInt64), gone + 9);
  EXPECT_EQ(after.sum().item<int64_t>(), 42 - gone - 9);
  EXPECT_FALSE((after & before.logical_not()).any().item<bool>());
  const auto newly = before & after.logical_not();
  EXPECT_LE(w.abs().masked_select(newly).max().item<float>(), w.abs().masked_select(after).min().item<float>());
  EXPECT_NE(message_of([&] { rd_mask(w, before, gone - 1); }).find("masks only grow"), std::string::npos);
  EXPECT_THROW(rd_mask(w, before, 43), Error);
  EXPECT_THROW(rd_mask(w, torch::ones({7, 6}), 43), Error);
}

// ---- Curves ----

StagedModel mlp(uint64_t seed) {
  torch::manual_seed(seed);
  return relu_mlp({torch::randn({8, 5}), torch::randn({6, 8}), torch::randn({3, 6})},
                  {torch::randn({8}), torch::randn({6}), torch::randn({3})});
}

Tensor run(const StagedModel& model, Tensor x) {
  for (const auto& stage : model.stages) x = stage(x);
  return x;
}

TEST(RdCurves, MeasureEveryLayerAlone) {
  const auto model = mlp(2);
  const auto x = torch::randn({7, 5});
  std::vector<Tensor> before;
  for (const auto& l : model.layers) before.push_back(l.weight.clone());
  const auto y = run(model, x);
  for (const bool worst : {true, false}) {
    const auto curves = rd_curves(model, {x.slice(0, 0, 3), x.slice(0, 3, 7)}, 10, worst);
    for (size_t l = 0; l < 3; ++l)
      for (const int64_t j : {0, 1, 4, 10}) {
        auto w = model.layers[l].weight;
        const int64_t gone = rd_pruned(j, w.numel(), 10);
        w.mul_(rd_mask(w, {}, gone));
        const auto off = (run(model, x) - y).square().mean(1);
        w.copy_(before[l]);
        const double want = (worst ? off.max() : off.mean()).item<double>();
        const auto at = static_cast<int64_t>(l);
        EXPECT_NEAR(curves.distortion[at][j].item<double>(), want, 1e-5 * want) << l << " " << j;
        EXPECT_EQ(curves.pruned[at][j].item<int64_t>(), gone);
      }
    EXPECT_EQ(curves.distortion.select(1, 0).abs().max().item<double>(), 0.0);
    EXPECT_TRUE(torch::allclose(torch::cat(curves.output), y));
  }
  for (size_t l = 0; l < 3; ++l) EXPECT_TRUE(torch::equal(model.layers[l].weight, before[l]));
}

TEST(RdCurves, RunOnlyWhatLiesBehindALayer) {
  auto model = mlp(3);
  int64_t first = 0;
  const auto stage = model.stages[0];
  model.stages[0] = [&](const Tensor& x) {
    ++first;
    return stage(x);
  };
  rd_curves(model, {torch::randn({2, 5})}, 4, true);
  EXPECT_EQ(first, 1 + 4);  // once for all, and for its own points
}

TEST(RdCurves, PutWeightsBackAfterAnError) {
  auto model = mlp(4);
  const auto before = model.layers[1].weight.clone();
  int calls = 0;
  const auto stage = model.stages[1];
  model.stages[1] = [&](const Tensor& x) {
    check(++calls < 8, "enough");
    return stage(x);
  };
  EXPECT_EQ(message_of([&] { rd_curves(model, {torch::randn({2, 5})}, 4, true); }), "enough");
  EXPECT_TRUE(torch::equal(model.layers[1].weight, before));
}

TEST(RdCurves, WhatIsNoNumberIsInfinite) {
  auto model = mlp(5);
  const auto stage = model.stages[2];
  // Breaks as soon as the last layer has lost something.
  const auto whole = model.layers[2].weight.count_nonzero().item<int64_t>();
  model.stages[2] = [&, weight = model.layers[2].weight](const Tensor& x) {
    return weight.count_nonzero().item<int64_t>() < whole ? stage(x) / 0.0 * 0.0 : stage(x);
  };
  const auto curves = rd_curves(model, {torch::randn({2, 5})}, 3, false);
  EXPECT_EQ(curves.distortion[2][1].item<double>(), kInfinite);
  EXPECT_TRUE(torch::isfinite(curves.distortion[1]).all().item<bool>());
}

TEST(RdCurves, BadInputIsAnError) {
  const auto model = mlp(6);
  const auto says = [&](const StagedModel& m, const std::vector<Tensor>& batches, int64_t grid) {
    return message_of([&] { rd_curves(m, batches, grid, true); });
  };
  EXPECT_NE(says(model, {}, 4).find("no samples"), std::string::npos);
  EXPECT_NE(says(model, {torch::zeros({2, 5})}, 0).find("0 steps"), std::string::npos);
  EXPECT_NE(says(model, {torch::full({2, 5}, NAN)}, 4).find("not finite"), std::string::npos);
  EXPECT_NE(says({model.stages, {}}, {torch::zeros({2, 5})}, 4).find("no layer"), std::string::npos);
}

TEST(RdCurves, LayersTogetherMoveAboutAsMuchAsTheirSum) {
  const auto model = mlp(7);
  const std::vector<Tensor> batches{torch::randn({64, 5})};
  const auto curves = rd_curves(model, batches, 10, false);
  std::vector<Tensor> masks;
  double sum = 0.0;
  for (size_t l = 0; l < 3; ++l) {
    masks.push_back(rd_mask(model.layers[l].weight, {}, curves.pruned[static_cast<int64_t>(l)][2].item<int64_t>()));
    sum += curves.distortion[static_cast<int64_t>(l)][2].item<double>();
  }
  const auto before = model.layers[0].weight.clone();
  const double joint = rd_joint_distortion(model, batches, curves, masks, false);
  EXPECT_GT(joint / sum, 0.5);
  EXPECT_LT(joint / sum, 2.0);
  EXPECT_TRUE(torch::equal(model.layers[0].weight, before));
}

// ---- Allocation ----

struct Best {
  double distortion = kInfinite;
  int64_t survivors = 0;
  std::vector<int64_t> index;
};
// Every choice there is; of equals the fewest survivors, then the smallest index of the last layer, and so on.
Best brute_force(const RdProblem& p, double target) {
  const int64_t grid = p.distortion.size(1) - 1, budget = rd_budget(p.num_weights, target);
  const auto layers = static_cast<int64_t>(p.num_weights.size());
  Best best;
  std::vector<int64_t> index(p.num_weights.size(), 0);
  for (;;) {
    double d = 0.0;
    int64_t survivors = 0;
    bool allowed = true;
    for (int64_t l = 0; l < layers; ++l) {
      const auto at = static_cast<size_t>(l);
      d += p.distortion[l][index[at]].item<double>();
      survivors += p.num_weights[at] - rd_pruned(index[at], p.num_weights[at], grid);
      allowed = allowed && (p.min_index.empty() || index[at] >= p.min_index[at]);
    }
    if (allowed && survivors <= budget && std::isfinite(d)) {
      const bool better =
          d < best.distortion || (d == best.distortion && survivors < best.survivors) ||
          (d == best.distortion && survivors == best.survivors &&
           std::lexicographical_compare(index.rbegin(), index.rend(), best.index.rbegin(), best.index.rend()));
      if (better) best = {d, survivors, index};
    }
    size_t l = 0;
    while (l < index.size() && ++index[l] > grid) index[l++] = 0;
    if (l == index.size()) return best;
  }
}

RdProblem random_problem(RandomStream& random, bool ties) {
  RdProblem p;
  const auto layers = static_cast<int64_t>(2 + random.below(2));
  const int64_t grid = 5;
  p.distortion = torch::zeros({layers, grid + 1}, torch::kFloat64);
  for (int64_t l = 0; l < layers; ++l) {
    p.num_weights.push_back(static_cast<int64_t>(1 + random.below(20)));
    p.min_index.push_back(static_cast<int64_t>(random.below(3)));
    for (int64_t j = 1; j <= grid; ++j)
      p.distortion[l][j] = ties ? static_cast<double>(random.below(4)) : random.uniform();
  }
  return p;
}

TEST(RdAllocate, IsTheBestOfAllChoices) {
  RandomStream random(1, "problems");
  for (int round = 0; round < 60; ++round) {
    const auto p = random_problem(random, round % 2 == 0);
    for (const double target : {0.0, 0.35, 0.6, 0.95}) {
      const auto best = brute_force(p, target);
      const auto a = rd_allocate(p, target);
      EXPECT_EQ(a.index, best.index) << round << " " << target;
      EXPECT_EQ(a.distortion, best.distortion);
      int64_t survivors = 0;
      for (size_t l = 0; l < a.pruned.size(); ++l) survivors += p.num_weights[l] - a.pruned[l];
      EXPECT_LE(survivors, a.budget);
    }
  }
}

TEST(RdAllocate, PrunesNothingOrEverything) {
  RdProblem p;
  p.num_weights = {10, 20};
  p.distortion = torch::tensor({{0.0, 1.0, 2.0}, {0.0, 0.0, 3.0}}, torch::kFloat64);
  // What costs nothing goes even so.
  EXPECT_EQ(rd_allocate(p, 0.0).index, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(rd_allocate(p, 0.999).index, (std::vector<int64_t>{2, 2}));
  p.min_index = {1, 0};
  EXPECT_EQ(rd_allocate(p, 0.0).index, (std::vector<int64_t>{1, 1}));
}

TEST(RdAllocate, MoreBudgetIsNeverWorse) {
  RandomStream random(2, "problems");
  for (int round = 0; round < 10; ++round) {
    const auto p = random_problem(random, false);
    double before = kInfinite;
    for (const double target : {0.9, 0.7, 0.5, 0.3, 0.1, 0.0}) {
      const double d = rd_allocate(p, target).distortion;
      EXPECT_LE(d, before);
      before = d;
    }
  }
}

TEST(RdAllocate, EqualLayersShareEqually) {
  RdProblem p;
  p.num_weights = {100, 100, 100};
  const auto curve = torch::arange(0, 11, torch::kFloat64).square();
  p.distortion = torch::stack({curve, curve, curve});
  EXPECT_EQ(rd_allocate(p, 0.5).index, (std::vector<int64_t>{5, 5, 5}));
  for (const int64_t j : rd_allocate(p, 0.47).index) EXPECT_NEAR(static_cast<double>(j), 4.7, 1.0);
}

TEST(RdAllocate, BucketsAreFeasibleAndNear) {
  RandomStream random(3, "problems");
  for (int round = 0; round < 20; ++round) {
    RdProblem p;
    p.distortion = torch::zeros({3, 11}, torch::kFloat64);
    for (int64_t l = 0; l < 3; ++l) {
      p.num_weights.push_back(static_cast<int64_t>(500 + random.below(1000)));
      for (int64_t j = 1; j <= 10; ++j) p.distortion[l][j] = p.distortion[l][j - 1].item<double>() + random.uniform();
    }
    const auto exact = rd_allocate(p, 0.6), bucketed = rd_allocate(p, 0.6, 7);
    int64_t survivors = 0;
    for (size_t l = 0; l < 3; ++l) survivors += p.num_weights[l] - bucketed.pruned[l];
    EXPECT_LE(survivors, bucketed.budget);
    EXPECT_GE(bucketed.distortion, exact.distortion);
    // Never worse than the exact one with as many units less.
    const int64_t all = std::accumulate(p.num_weights.begin(), p.num_weights.end(), int64_t{0});
    const double tighter = 1.0 - static_cast<double>(exact.budget - 3 * 7) / static_cast<double>(all);
    EXPECT_LE(bucketed.distortion, rd_allocate(p, tighter).distortion);
  }
}

TEST(RdAllocate, WhatDoesNotFitIsNamed) {
  RdProblem p;
  p.names = {"first", "second"};
  p.num_weights = {100, 100};
  p.distortion = torch::ones({2, 11});
  p.max_index = {10, 2};
  const auto says = message_of([&] { rd_allocate(p, 0.9); });
  EXPECT_NE(says.find("second"), std::string::npos) << says;
  EXPECT_EQ(says.find("first"), std::string::npos) << says;
  p.max_index = {};
  p.distortion.select(0, 0).fill_(kInfinite);
  EXPECT_NE(message_of([&] { rd_allocate(p, 0.5); }).find("first: no point"), std::string::npos);
  EXPECT_THROW(rd_allocate(p, 0.5, 0), Error);
}

// ---- Baselines ----

std::vector<Tensor> small_net() {
  return {torch::tensor({{1.0f, -2.0f, 3.0f}, {0.0f, 4.0f, 5.0f}}), torch::tensor({{0.5f, -6.0f}})};
}

TEST(PruningBaseline, UniformAndGlobal) {
  EXPECT_EQ(pruning_baseline("uniform", small_net(), 0.3), (std::vector<double>{0.3, 0.3}));
  // 7 non-zeros: round(2.8) = 3 smallest are 0.5, 1 and 2.
  EXPECT_EQ(pruning_baseline("global", small_net(), 0.4), (std::vector<double>{0.4, 0.5}));
  // round(3.5) = 4 to even, round(2.5) = 2.
  EXPECT_EQ(pruning_baseline("global", small_net(), 0.5), (std::vector<double>{0.6, 0.5}));
  EXPECT_EQ(pruning_baseline("global", {torch::tensor({1.0f, 2.0f, 3.0f, 4.0f, 5.0f})}, 0.5)[0], 0.4);
}

TEST(PruningBaseline, LampSumsOverWhatIsAtLeastAsLarge) {
  // First layer: 25/25, 16/41, 9/50, 4/54, 1/55; second: 36/36, 0.25/36.25.
  const auto share = pruning_baseline("lamp", small_net(), 0.55);  // keeps round(3.15) = 3
  EXPECT_EQ(share, (std::vector<double>{0.6, 0.5}));
  // Equals count each other: 1/2 and 1/2, not 1 and 1/2.
  EXPECT_EQ(pruning_baseline("lamp", {torch::ones({2}), torch::tensor({3.0f, 1.0f, 0.9f})}, 0.75),
            (std::vector<double>{1.0, 2.0 / 3.0}));
  EXPECT_EQ(pruning_baseline("lamp", small_net(), 1.0), (std::vector<double>{1.0, 1.0}));
  EXPECT_EQ(pruning_baseline("lamp", small_net(), 0.0), (std::vector<double>{0.0, 0.0}));
}

TEST(PruningBaseline, ErkFollowsDimensionsAndFixesWhatIsFull) {
  torch::manual_seed(1);
  const std::vector<Tensor> even{torch::randn({10, 20}), torch::randn({20, 10})};
  EXPECT_EQ(pruning_baseline("erk", even, 0.5), (std::vector<double>{0.5, 0.5}));
  // 300 and 6 weights, sums 40 and 5: of 153 survivors 17 would fall on the small layer, which stays whole.
  const std::vector<Tensor> uneven{torch::randn({10, 30}), torch::randn({2, 3})};
  const auto share = pruning_baseline("erk", uneven, 0.5);
  EXPECT_EQ(share[1], 0.0);
  EXPECT_NEAR(share[0], 1.0 - 147.0 / 300.0, 1e-12);
  // Convolutions add both sides of the kernel: 4 + 2 + 3 + 3 = 12 against 4 + 8 = 12.
  const std::vector<Tensor> mixed{torch::randn({4, 2, 3, 3}), torch::randn({4, 8})};
  const auto both = pruning_baseline("erk", mixed, 0.8);
  EXPECT_NEAR(both[0], 1.0 - 10.0 / 72.0, 1e-12);
  EXPECT_NEAR(both[1], 1.0 - 10.0 / 32.0, 1e-12);
}

TEST(PruningBaseline, UniformPlusSparesTheLastLayerAndFirstConvolutions) {
  torch::manual_seed(2);
  const std::vector<Tensor> linear{torch::randn({10, 10}), torch::randn({10, 5})};
  EXPECT_EQ(pruning_baseline("uniform+", linear, 0.5), (std::vector<double>{0.5, 0.5}));
  // 135 of 150 go; the last layer keeps 10, so that 95 of 100 go in the first.
  const auto share = pruning_baseline("uniform+", linear, 0.9);
  EXPECT_NEAR(share[0], 0.95, 1e-12);
  EXPECT_NEAR(share[1], 0.8, 1e-12);
  const std::vector<Tensor> convolutional{torch::randn({2, 1, 5, 5}), torch::randn({10, 10}), torch::randn({10, 5})};
  const auto own = pruning_baseline("uniform+", convolutional, 0.5);
  EXPECT_EQ(own[0], 0.0);
  EXPECT_NEAR(own[1], 100.0 / 150.0, 1e-12);
  EXPECT_NE(message_of([&] { pruning_baseline("uniform+", convolutional, 0.9); }).find("may go"), std::string::npos);
}

TEST(PruningBaseline, SharesAreOfWhatIsLeft) {
  auto w = torch::ones({10});
  w.slice(0, 0, 4).zero_();
  EXPECT_EQ(pruned_by_share(w, 0.5), 7);
  EXPECT_EQ(pruned_by_share(w, 0.0), 4);
  EXPECT_EQ(pruned_by_share(w, 0.25), 6);  // round(1.5) = 2
  EXPECT_NE(message_of([&] { pruning_baseline("snip", {w}, 0.5); }).find("uniform, uniform+"), std::string::npos);
  EXPECT_THROW(pruning_baseline("lamp", {w}, 1.5), Error);
  EXPECT_THROW(pruning_baseline("lamp", {}, 0.5), Error);
}

}  // namespace
}  // namespace moiety
