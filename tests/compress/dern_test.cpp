#include "moiety/compress/dern.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "expert_tools.h"
#include "message_of.h"
#include "moiety/base/registry.h"
#include "threads.h"

namespace moiety {
namespace {

using torch::Tensor;

Tensor f64(std::vector<double> values) {
  return torch::tensor(values, torch::kFloat64);
}

TEST(DernRetained, AreTheMostImportantInOrderOfIndex) {
  const auto s = f64({0.1, 0.3, 0.2, 0.3, 0.1});
  EXPECT_EQ(dern_retained(s, 1), (std::vector<int64_t>{1}));
  EXPECT_EQ(dern_retained(s, 3), (std::vector<int64_t>{1, 2, 3}));
  // Ties go to the lower index.
  EXPECT_EQ(dern_retained(s, 4), (std::vector<int64_t>{0, 1, 2, 3}));
}

TEST(DernRetained, HoldThoseThatAreProtected) {
  const auto s = f64({0.1, 0.3, 0.2, 0.3, 0.1});
  EXPECT_EQ(dern_retained(s, 3, {4}), (std::vector<int64_t>{1, 3, 4}));
  EXPECT_EQ(dern_retained(s, 2, {4, 0, 4}), (std::vector<int64_t>{0, 4}));
}

TEST(DernRetained, BadInputIsAnError) {
  const auto s = f64({0.1, 0.3, 0.2});
  EXPECT_NE(message_of([&] { dern_retained(s, 0); }).find("0 of 3 experts cannot be kept: 1 to 3"), std::string::npos);
  EXPECT_THROW(dern_retained(s, 4), Error);
  EXPECT_NE(message_of([&] {
              dern_retained(s, 1, {0, 1});
            }).find("2 experts are protected, but 1 are kept"),
            std::string::npos);
  EXPECT_NE(message_of([&] { dern_retained(s, 1, {3}); }).find("expert 3"), std::string::npos);
  EXPECT_NE(message_of([&] { dern_retained(f64({0.0, NAN}), 1); }).find("finite"), std::string::npos);
}

// Neurons as rows [gate, up, down] of h = 2.
ExpertWeights expert(const std::vector<std::vector<double>>& neurons) {
  std::vector<Tensor> gate, up, down;
  for (const auto& n : neurons) {
    const auto row = f64(n).to(torch::kFloat32);
    gate.push_back(row.slice(0, 0, 2));
    up.push_back(row.slice(0, 2, 4));
    down.push_back(row.slice(0, 4, 6));
  }
  return {torch::stack(gate), torch::stack(up), torch::stack(down).t().contiguous()};
}

TEST(DernReassign, ComparesNeuronsByTheCosineOfAllPartsTogether) {
  const auto dropped = expert({{0, 0, 1, 0, 0, 1}});
  // The mean of cosines is 0.5 with the first; of both parts together it is about 0.
  const auto first = expert({{0, 0, 1, 0, 100, 0}}), second = expert({{0, 0, 3, 4, 8, 3}});
  const auto moves = dern_reassign({first, second, dropped}, torch::zeros({3, 2}), {0, 1}, {});
  EXPECT_EQ(moves.dropped, (std::vector<int64_t>{2}));
  EXPECT_NEAR(moves.similarity[0][0].item<double>(), 6.0 / std::sqrt(2.0 * 98.0), 1e-6);
}

TEST(DernReassign, ANeuronGoesToTheExpertWithTheNearestNeuron) {
  // On average expert 0 is nearer, but expert 1 holds a copy.
  const auto zero = expert({{0, 0, 1, 0.4, 1, 0.4}, {0, 0, 1, 0.4, 1, 0.4}}),
             one = expert({{0, 0, 1, 0, 1, 0}, {0, 0, -1, 0, -1, 0}}),
             dropped = expert({{5, 5, 3, 0, 3, 0}, {0, 0, 0, 1, 0, -1}});
  const auto moves = dern_reassign({zero, dropped, one}, torch::zeros({3, 2}), {0, 2}, {});
  EXPECT_EQ(list_of(moves.target[0]), (std::vector<int64_t>{2, -1}));
  EXPECT_NEAR(moves.similarity[0][0].item<double>(), 1.0, 1e-6);
}

TEST(DernReassign, TiesGoToTheFirstRetainedExpert) {
  torch::manual_seed(1);
  const auto one = random_expert(9, 5);
  const auto moves = dern_reassign({with_neurons(one, random_order(9, 1)), one, with_neurons(one, random_order(9, 2))},
                                   torch::zeros({3, 5}), {0, 2}, {});
  EXPECT_TRUE(moves.target[0].eq(0).all().item<bool>());
}

TEST(DernReassign, TheThresholdIsStrictAndCosinesEndAtOne) {
  torch::manual_seed(2);
  const auto one = random_expert(40, 33);
  const auto copy = with_neurons(one, random_order(40, 1));
  DernConfig config;
  config.threshold = 1.0;
  const auto moves = dern_reassign({one, copy}, torch::zeros({2, 33}), {0}, config);
  EXPECT_TRUE(moves.target[0].eq(-1).all().item<bool>());
  EXPECT_LE(moves.similarity[0].max().item<double>(), 1.0);
  config.threshold = 0.999;
  EXPECT_TRUE(dern_reassign({one, copy}, torch::zeros({2, 33}), {0}, config).target[0].eq(0).all().item<bool>());
}

TEST(DernReassign, ScaledNeuronsGoWhereTheyWent) {
  torch::manual_seed(3);
  auto experts = random_experts(4, 6, 5);
  DernConfig config;
  config.threshold = 0.2;
  const auto before = dern_reassign(experts, torch::zeros({4, 5}), {0, 3}, config);
  const auto scale = torch::rand({6, 1}) * 10 + 0.1;
  for (const size_t e : {1, 2})
    experts[e] = {experts[e].gate * scale, experts[e].up * scale, experts[e].down * scale.t()};
  const auto after = dern_reassign(experts, torch::zeros({4, 5}), {0, 3}, config);
  for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(torch::equal(before.target[i], after.target[i]));
}

TEST(DernReassign, HandsRoutingOverByTheShareOfNeurons) {
  const auto to = expert({{0, 0, 1, 0, 1, 0}}), other = expert({{0, 0, 0, 1, 0, 1}}),
             from = expert({{0, 0, 1, 0, 1, 0}, {0, 0, 2, 0, 2, 0}, {0, 0, 0, 3, 0, 3}, {0, 0, -1, 0, -1, 0}});
  const auto router = torch::tensor({{1.0, 2.0}, {10.0, 20.0}, {4.0, 8.0}});
  DernConfig config;
  const auto moves = dern_reassign({to, other, from}, router, {0, 1}, config);
  EXPECT_LT(distance(moves.router, torch::tensor({{3.0, 6.0}, {11.0, 22.0}})), 1e-6);
  config.router_transfer = false;
  EXPECT_TRUE(torch::equal(dern_reassign({to, other, from}, router, {0, 1}, config).router, router.slice(0, 0, 2)));
}

TEST(DernReassign, LooksAtTheComponentsThatAreAskedFor) {
  const auto one = expert({{1, 0, 0, 0, 0, 0}}), dropped = expert({{1, 0, 0, 1, 0, 1}});
  DernConfig config;
  config.components = {"gate"};
  EXPECT_NEAR(dern_reassign({one, dropped}, torch::zeros({2, 2}), {0}, config).similarity[0][0].item<double>(), 1,
              1e-6);
  config.components = {"down", "gate", "up"};
  EXPECT_NEAR(dern_reassign({one, dropped}, torch::zeros({2, 2}), {0}, config).similarity[0][0].item<double>(),
              1.0 / std::sqrt(3.0), 1e-6);
}

TEST(DernReassign, BadInputIsAnError) {
  torch::manual_seed(4);
  const auto experts = random_experts(3, 4, 5);
  const auto router = torch::zeros({3, 5});
  DernConfig config;
  EXPECT_NE(message_of([&] {
              dern_reassign(experts, torch::zeros({2, 5}), {0}, config);
            }).find("2 rows for 3 experts"),
            std::string::npos);
  EXPECT_NE(message_of([&] { dern_reassign(experts, router, {1, 0}, config); }).find("ascending"), std::string::npos);
  EXPECT_THROW(dern_reassign(experts, router, {}, config), Error);
  EXPECT_THROW(dern_reassign(experts, router, {3}, config), Error);
  config.threshold = 1.5;
  EXPECT_NE(message_of([&] { dern_reassign(experts, router, {0}, config); }).find("1.5"), std::string::npos);
  config = {};
  config.components = {"gate"};
  EXPECT_NE(message_of([&] { dern_reassign(random_experts(3, 4, 5, false), router, {0}, config); }).find("have none"),
            std::string::npos);
  auto broken = experts;
  broken[1].up = broken[1].up / 0.0;
  EXPECT_NE(message_of([&] { dern_reassign(broken, router, {0}, {}); }).find("not finite"), std::string::npos);
  EXPECT_NE(message_of([] { parse<DernConfig>({{"threshold", -1.1}}, "x"); }).find("threshold"), std::string::npos);
  EXPECT_NE(message_of([] { parse<DernConfig>({{"components", {"router"}}}, "x"); }).find("router"), std::string::npos);
}

TEST(DernRecluster, AnExpertThatNothingMovedToStays) {
  torch::manual_seed(5);
  const auto e = random_expert(6, 4);
  const auto done = dern_recluster(e, torch::ones({6}), 6, 6, "peak");
  EXPECT_EQ(distance(done.expert, e), 0.0);
  EXPECT_EQ(list_of(done.label), (std::vector<int64_t>{0, 1, 2, 3, 4, 5}));
}

TEST(DernRecluster, EvensNormsOutAndWeighsDirections) {
  // Two own neurons and a foreign one near the second, all in the plane of gates.
  const auto neurons = expert({{5, 0, 0, 0, 0, 0}, {0, 2, 0, 0, 0, 0}, {3, 4, 0, 0, 0, 0}});
  const auto done = dern_recluster(neurons, f64({1.0, 3.0, 1.0}), 2, 2);
  EXPECT_EQ(list_of(done.label), (std::vector<int64_t>{0, 1, 1}));
  // Norms 2 and 5: their plain mean times the mean direction by weight, which is shorter than 1.
  const auto want = 3.5 * (3.0 * f64({0, 1}) + f64({0.6, 0.8})) / 4.0;
  EXPECT_LT(distance(done.expert.gate[1], want), 1e-6);
  EXPECT_LT(distance(done.expert.gate[0], f64({5, 0})), 1e-6);
}

TEST(DernRecluster, AssignsByDirectionNotByDistance) {
  // The third is nearer to the second by distance, and of the first's direction.
  const auto neurons = expert({{100, 0, 0, 0, 0, 0}, {0, 1, 0, 0, 0, 0}, {1, 0.5, 0, 0, 0, 0}});
  EXPECT_EQ(list_of(dern_recluster(neurons, torch::ones({3}), 2, 2).label), (std::vector<int64_t>{0, 1, 0}));
}

TEST(DernRecluster, BeginsWithTheLargestPeaksOfTheGateInOrderOfPosition) {
  // Peaks 3, 1, 2, 9; the second has the largest `up`.
  const auto neurons = expert({{3, 0, 0, 0, 0, 0}, {0, -1, 50, 0, 0, 0}, {2, -2, 0, 0, 0, 0}, {0, 9, 0, 0, 0, 0}});
  // Centres are neurons 0 and 2 of the own ones, 0 and 3 of all.
  EXPECT_EQ(list_of(dern_recluster(neurons, torch::ones({4}), 3, 2, "own", 1).label),
            (std::vector<int64_t>{0, 1, 1, 0}));
  EXPECT_EQ(list_of(dern_recluster(neurons, torch::ones({4}), 3, 2, "peak", 1).label),
            (std::vector<int64_t>{0, 0, 0, 1}));
}

TEST(DernRecluster, PeakOfExpertsWithoutGatesIsThatOfUp) {
  const ExpertWeights neurons{{}, torch::tensor({{1.0, 0.0}, {0.0, 3.0}, {2.0, 2.0}}), torch::zeros({2, 3})};
  const auto done = dern_recluster(neurons, torch::ones({3}), 3, 2, "own", 1);
  EXPECT_FALSE(done.expert.gate.defined());
  // From the second and the third.
  EXPECT_EQ(list_of(done.label), (std::vector<int64_t>{1, 0, 1}));
  EXPECT_EQ(done.expert.down.sizes(), (std::vector<int64_t>{2, 2}));
}

TEST(DernRecluster, EmptyAndWeightlessClustersKeepTheirCentre) {
  // The second is a copy of the first: all of the first's direction go to the first.
  const auto copies = expert({{2, 0, 0, 0, 0, 0}, {2, 0, 0, 0, 0, 0}, {4, 0, 0, 0, 0, 0}});
  const auto empty = dern_recluster(copies, torch::ones({3}), 2, 2);
  EXPECT_EQ(list_of(empty.label), (std::vector<int64_t>{0, 0, 0}));
  EXPECT_LT(distance(empty.expert.gate, torch::tensor({{8.0 / 3.0, 0.0}, {2.0, 0.0}})), 1e-6);
  const auto weightless = dern_recluster(copies, torch::zeros({3}), 2, 2);
  EXPECT_EQ(distance(weightless.expert.gate, torch::tensor({{2.0, 0.0}, {2.0, 0.0}})), 0.0);
}

TEST(DernRecluster, DirectionsWithoutLengthBelongToTheFirst) {
  const auto neurons = expert({{1, 0, 0, 0, 0, 0}, {0, 1, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0}});
  const auto done = dern_recluster(neurons, torch::ones({3}), 2, 2);
  EXPECT_EQ(list_of(done.label), (std::vector<int64_t>{0, 1, 0}));
  EXPECT_TRUE(torch::isfinite(done.expert.gate).all().item<bool>());
}

TEST(DernRecluster, BadInputIsAnError) {
  torch::manual_seed(6);
  const auto e = random_expert(6, 4);
  const auto w = torch::ones({6});
  EXPECT_NE(message_of([&] { dern_recluster(e, w, 3, 4); }).find("4 neurons cannot begin with 3"), std::string::npos);
  EXPECT_NE(message_of([&] { dern_recluster(e, w, 7, 4); }).find("7 of 6"), std::string::npos);
  EXPECT_NE(message_of([&] { dern_recluster(e, torch::ones({5}), 3, 3); }).find("5 weights for 6"), std::string::npos);
  EXPECT_NE(message_of([&] { dern_recluster(e, -w, 3, 3); }).find("negative"), std::string::npos);
  EXPECT_NE(message_of([&] { dern_recluster(e, w, 3, 3, "random"); }).find("own and peak"), std::string::npos);
  EXPECT_THROW(dern_recluster(e, w, 3, 3, "own", 0), Error);
  EXPECT_THROW(dern_recluster(e, w, 3, 0), Error);
  EXPECT_EQ(message_of([&] { dern_recluster(e, w, 3, 4, "peak"); }), "");
}

// What a layer with retained experts computes for given gates.
Tensor mixed(const std::vector<ExpertWeights>& experts, const Tensor& gates, const Tensor& x) {
  auto y = torch::zeros_like(x);
  for (size_t e = 0; e < experts.size(); ++e) y += gates[static_cast<int64_t>(e)] * output_of(experts[e], x);
  return y;
}

TEST(DernLayer, WithAllExpertsIsItself) {
  torch::manual_seed(7);
  const auto experts = random_experts(4, 6, 5);
  const auto router = torch::randn({4, 5});
  const auto done = dern_layer(experts, router, torch::rand({4}), {0, 1, 2, 3}, {});
  EXPECT_TRUE(torch::equal(done.moves.router, router));
  for (size_t e = 0; e < 4; ++e) EXPECT_EQ(distance(done.experts[e], experts[e]), 0.0);
}

TEST(DernLayer, WithAThresholdOfOneIsPlainPruning) {
  torch::manual_seed(8);
  auto experts = random_experts(4, 6, 5);
  experts[3] = with_neurons(experts[0], random_order(6, 1));
  const auto router = torch::randn({4, 5});
  DernConfig config;
  config.threshold = 1.0;
  const auto done = dern_layer(experts, router, torch::rand({4}), {0, 2}, config);
  EXPECT_TRUE(torch::equal(done.moves.router, router.index_select(0, torch::tensor({0, 2}))));
  EXPECT_EQ(distance(done.experts[0], experts[0]), 0.0);
  EXPECT_EQ(distance(done.experts[1], experts[2]), 0.0);
  EXPECT_EQ(done.moves.lost, 12);
  EXPECT_EQ(done.moves.moved + done.mixed, 0);
}

TEST(DernLayer, AbsorbsAPermutedCopyWholly) {
  for (const bool gated : {true, false}) {
    torch::manual_seed(9);
    auto experts = random_experts(3, 8, 6, gated);
    experts[2] = with_neurons(experts[1], random_order(8, 1));
    const auto router = torch::randn({3, 6});
    const auto done = dern_layer(experts, router, f64({0.5, 0.3, 0.2}), {0, 1}, {});
    EXPECT_TRUE(done.moves.target[0].eq(1).all().item<bool>());
    EXPECT_EQ(done.moves.lost, 0);
    EXPECT_EQ(done.mixed, 8);
    const auto x = torch::randn({7, 6});
    EXPECT_LT(distance(output_of(done.experts[1], x), output_of(experts[1], x)), 1e-5);
    EXPECT_LT(distance(done.moves.router[1], router[1] + router[2]), 1e-6);
  }
}

// Experts that share neurons, as those of an upcycled model do.
std::vector<ExpertWeights> related(int64_t count, int64_t d, int64_t h, double noise) {
  const auto base = random_expert(d, h);
  std::vector<ExpertWeights> out;
  for (int64_t e = 0; e < count; ++e)
    out.push_back(with_neurons(noisy(base, noise), random_order(d, static_cast<uint64_t>(e) + 10)));
  return out;
}

TEST(DernLayer, DoesNotKnowTheOrderOfNeuronsOrExperts) {
  torch::manual_seed(10);
  const auto experts = related(5, 8, 6, 0.8);
  const auto router = torch::randn({5, 6}), x = torch::randn({9, 6});
  const auto s = f64({0.3, 0.1, 0.25, 0.05, 0.2});
  const auto plain = dern_layer(experts, router, s, dern_retained(s, 3), {});
  EXPECT_GT(plain.moves.moved, 4);
  EXPECT_GT(plain.moves.lost, 0);

  auto shuffled = experts;
  for (size_t e = 0; e < 5; ++e) shuffled[e] = with_neurons(experts[e], random_order(8, e + 40));
  const auto inside = dern_layer(shuffled, router, s, dern_retained(s, 3), {});
  EXPECT_LT(distance(inside.moves.router, plain.moves.router), 1e-6);
  const auto gates = torch::rand({3});
  EXPECT_LT(distance(mixed(inside.experts, gates, x), mixed(plain.experts, gates, x)), 1e-4);

  const auto order = random_order(5, 50);
  std::vector<ExpertWeights> moved;
  for (const int64_t e : order) moved.push_back(experts[static_cast<size_t>(e)]);
  const auto by = torch::tensor(order);
  const auto s_moved = s.index_select(0, by);
  const auto among = dern_layer(moved, router.index_select(0, by), s_moved, dern_retained(s_moved, 3), {});
  for (size_t i = 0; i < 3; ++i) {
    const int64_t before = order[static_cast<size_t>(among.retained[i])];
    const auto at =
        static_cast<size_t>(std::find(plain.retained.begin(), plain.retained.end(), before) - plain.retained.begin());
    ASSERT_LT(at, 3U);
    EXPECT_LT(distance(output_of(among.experts[i], x), output_of(plain.experts[at], x)), 1e-4);
    EXPECT_LT(distance(among.moves.router[static_cast<int64_t>(i)], plain.moves.router[static_cast<int64_t>(at)]),
              1e-6);
  }
}

TEST(DernLayer, LosesOrMovesEveryNeuron) {
  torch::manual_seed(11);
  const auto experts = related(4, 8, 6, 0.5);
  const auto router = torch::zeros({4, 6});
  for (const double threshold : {-1.0, 0.4, 0.8}) {
    DernConfig config;
    config.threshold = threshold;
    const auto done = dern_layer(experts, router, f64({0.1, 0.4, 0.3, 0.2}), {1, 2}, config);
    EXPECT_EQ(done.moves.moved + done.moves.lost, 16);
    EXPECT_EQ(done.experts.size(), 2U);
    EXPECT_EQ(done.experts[0].up.sizes(), experts[0].up.sizes());
    if (threshold == -1.0) {
      EXPECT_EQ(done.moves.lost, 0);
    }
  }
}

TEST(DernLayer, MakesExpertsNarrower) {
  torch::manual_seed(12);
  auto experts = related(3, 8, 6, 0.5);
  DernConfig config;
  config.width = 5;
  const auto done = dern_layer(experts, torch::zeros({3, 6}), f64({0.5, 0.3, 0.2}), {0, 1}, config);
  EXPECT_EQ(done.experts[1].down.sizes(), (std::vector<int64_t>{6, 5}));
  config.width = 9;
  EXPECT_NE(message_of([&] {
              dern_layer(experts, torch::zeros({3, 6}), f64({0.5, 0.3, 0.2}), {0, 1}, config);
            }).find("8 neurons, fewer than the 9"),
            std::string::npos);
  // Dropped experts may be of another width.
  config.width = 8;
  experts[2] = random_expert(3, 6);
  EXPECT_EQ(dern_layer(experts, torch::zeros({3, 6}), f64({0.5, 0.3, 0.2}), {0, 1}, config).moves.target[0].size(0), 3);
}

TEST(DernLayer, IsBetterThanDroppingWhereExpertsShareNeurons) {
  torch::manual_seed(13);
  // Experts are the same neurons at other sizes and with noise: what is dropped holds another look at the same.
  const auto experts = related(4, 24, 16, 0.5);
  const auto x = torch::randn({200, 16}), s = f64({0.25, 0.25, 0.25, 0.25});
  DernConfig config;
  config.threshold = 0.5;
  const auto done = dern_layer(experts, torch::zeros({4, 16}), s, {0, 1}, config);
  config.threshold = 1.0;
  const auto dropped = dern_layer(experts, torch::zeros({4, 16}), s, {0, 1}, config);
  const auto want = (output_of(experts[2], x) + output_of(experts[3], x)) / 2;
  const auto error = [&](const DernLayer& l) {
    return (output_of(l.experts[0], x) + output_of(l.experts[1], x) - 2 * want).norm().item<double>();
  };
  EXPECT_LT(error(done), 0.9 * error(dropped));
}

TEST(DernLayer, IsTheSameWhateverTheNumberOfThreads) {
  torch::manual_seed(14);
  const auto experts = related(4, 64, 32, 0.4);
  const auto run = [&](int threads) {
    const test::Threads limit(threads);
    return dern_layer(experts, torch::zeros({4, 32}), f64({0.4, 0.3, 0.2, 0.1}), {0, 1}, {});
  };
  const auto one = run(1), three = run(3);
  for (size_t e = 0; e < 2; ++e) {
    EXPECT_EQ(distance(one.experts[e], three.experts[e]), 0.0);
    EXPECT_TRUE(torch::equal(one.label[e], three.label[e]));
  }
}

TEST(Dern, IsRegistered) {
  const auto& method = get_method("transform", "dern");
  EXPECT_EQ(method.paper.arxiv, "2509.10377");
  EXPECT_EQ(method.config().front().value, 0.6);
}

}  // namespace
}  // namespace moiety
