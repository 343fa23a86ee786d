#include "moiety/adapt/smora.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/low_rank.h"
#include "moiety/base/files.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json smora(const json& more = json::object()) {
  json part = {{"slug", "smora"}, {"rank", 6}, {"active", 2}, {"bias_rate", 0.01}};
  part.update(more);
  return part;
}

SmoraConfig config_of(int64_t rank, int64_t active, double rate = 0.0) {
  SmoraConfig c;
  c.rank = rank;
  c.active = active;
  c.alpha = 4.0;
  c.bias_rate = rate;
  return c;
}

struct Ranks {
  Tensor rows, a, b, bias;
  explicit Ranks(int64_t r, bool learns = true)
      : rows(f64({r, 4}, learns)),
        a(f64({r, 4}, learns)),
        b(f64({5, r}, learns)),
        bias(torch::randn({r}, torch::kFloat64) * 0.1) {}
  std::shared_ptr<Smora> part(const SmoraConfig& c) const {
    return std::make_shared<Smora>("q_proj", Linear(rows), a, b, bias.clone(), c);
  }
};

RC_GTEST_PROP(Smora, ChoosesTheBestOfScoresPlusBias, ()) {
  const int64_t ranks = *rc::gen::inRange(1, 9), active = *rc::gen::inRange(int64_t{1}, ranks + 1);
  torch::manual_seed(*rc::gen::inRange(0, 1000));
  const bool in_gate = *rc::gen::arbitrary<bool>();
  const auto logits = torch::randn({4, ranks}), bias = torch::randn({ranks}) * 0.2;
  const auto choice = smora_choose(logits, bias, active, in_gate);
  const auto by = torch::sigmoid(logits) + bias;
  for (int64_t n = 0; n < 4; ++n) {
    const auto kept = by[n].index_select(0, choice.indices[n]);
    RC_ASSERT(distance(kept, std::get<0>(by[n].topk(active))) == 0.0);
    const auto gates = in_gate ? kept : torch::sigmoid(logits)[n].index_select(0, choice.indices[n]);
    RC_ASSERT(distance(choice.gates[n], gates / gates.sum() * static_cast<double>(active)) < 1e-5);
  }
}

TEST(Smora, EqualsTheChosenRanksOneByOne) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const Ranks r(6, false);
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  const auto choice = smora_choose(torch::matmul(x, r.rows.t()), r.bias, 2, true);
  Pass pass;
  const auto got = applied(*r.part(config_of(6, 2)), w, x, pass);
  for (int64_t n = 0; n < 7; ++n) {
    auto want = w.mv(x[n]);
    for (int64_t k = 0; k < 2; ++k) {
      const auto i = choice.indices[n][k].item<int64_t>();
      want += 4.0 / 2.0 * choice.gates[n][k] * r.a[i].dot(x[n]) * r.b.select(1, i);
    }
    EXPECT_LT(distance(got[n], want), 1e-10);
  }
}

TEST(Smora, GradientsEqualCentralDifferences) {
  for (const bool in_gate : {true, false}) {
    torch::manual_seed(2);
    const Ranks r(6);
    auto config = config_of(6, 2);
    config.bias_in_gate = in_gate;
    const auto part = r.part(config);
    const auto w = f64({5, 4}, false), x = f64({4, 4});
    const auto f = [&] {
      Pass pass;
      return applied(*part, w, x, pass).square().sum();
    };
    for (const Tensor& t : {r.rows, r.a, r.b, x}) EXPECT_LT(gradient_error(f, t), 1e-4) << in_gate;
  }
}

TEST(Smora, AllRanksWithoutARouterArePlainLora) {
  torch::manual_seed(3);
  const torch::NoGradGuard frozen;
  Ranks r(6, false);
  r.rows.zero_();
  r.bias.zero_();
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  Pass pass;
  EXPECT_LT(distance(applied(*r.part(config_of(6, 6)), w, x, pass),
                     torch::matmul(x, (w + 4.0 / 6.0 * torch::matmul(r.b, r.a)).t())),
            1e-10);
}

TEST(Smora, RanksMayChangePlaces) {
  torch::manual_seed(4);
  const torch::NoGradGuard frozen;
  const Ranks r(6, false);
  const auto order = torch::tensor({3, 0, 5, 1, 4, 2}, torch::kInt64);
  Ranks other = r;
  for (Tensor* t : {&other.rows, &other.a, &other.bias}) *t = t->index_select(0, order);
  other.b = r.b.index_select(1, order);
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  Pass one, two;
  EXPECT_LT(distance(applied(*r.part(config_of(6, 2)), w, x, one), applied(*other.part(config_of(6, 2)), w, x, two)),
            1e-10);
}

TEST(Smora, RanksThatNobodyChoosesHaveNoGradient) {
  torch::manual_seed(5);
  Ranks r(6);
  r.bias[1] = -10.0;
  Pass pass;
  applied(*r.part(config_of(6, 2)), f64({5, 4}, false), f64({9, 4}, false), pass).square().sum().backward();
  EXPECT_EQ(r.a.grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_EQ(r.b.grad().select(1, 1).abs().max().item<double>(), 0.0);
  EXPECT_EQ(r.rows.grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_GT(r.a.grad().abs().max().item<double>(), 0.0);
}

TEST(Smora, BlocksOfRanksAreExperts) {
  torch::manual_seed(6);
  const auto x = torch::randn({2, 3, 4}), a = torch::randn({3, 2, 4}), b = torch::randn({3, 5, 2}),
             gates = torch::rand({2, 3, 3});
  const auto blocks = smora_blocks(x, a, b, gates);
  EXPECT_LT(distance(blocks.by_experts, blocks.by_ranks), 1e-5);
  EXPECT_EQ(blocks.a.sizes(), (std::vector<int64_t>{6, 4}));
  // A bias that is equal inside of blocks takes whole ones.
  const auto choice = smora_choose(torch::randn({5, 3}), torch::zeros({6}), 4, true);
  const auto order = std::get<0>(choice.indices.sort(1)).view({5, 2, 2});
  EXPECT_TRUE((order.select(2, 0) % 2 == 0).all().item<bool>());
  EXPECT_TRUE((order.select(2, 1) == order.select(2, 0) + 1).all().item<bool>());
}

TEST(Smora, ATotalOfNothingIsNoDivisionByZero) {
  const auto choice = smora_choose(torch::full({1, 2}, -1e3), torch::zeros({2}), 2, true);
  EXPECT_TRUE(choice.gates.isfinite().all().item<bool>());
}

TEST(Smora, TheBiasMovesByTheSignOfTheLoad) {
  const auto bias = torch::zeros({4});
  EXPECT_TRUE(torch::equal(moved_bias(bias, torch::tensor({0, 2, 4, 2}, torch::kInt64), 0.5),
                           torch::tensor({0.5, 0.0, -0.5, 0.0})));
  EXPECT_TRUE(torch::equal(moved_bias(bias + 1.0, torch::tensor({3, 3, 3, 3}, torch::kInt64), 0.5), torch::ones({4})));
  EXPECT_EQ(bias.abs().max().item<double>(), 0.0);
  EXPECT_TRUE(
      torch::equal(rank_counts(torch::tensor({{0, 2}, {2, 3}}, torch::kInt64), 5), torch::tensor({1, 0, 2, 1, 0})));
}

TEST(Smora, APassChoosesBeforeItMovesTheBias) {
  torch::manual_seed(7);
  const torch::NoGradGuard frozen;
  const Ranks r(6, false);
  const auto moving = r.part(config_of(6, 2, 0.1)), still = r.part(config_of(6, 2, 0.0));
  const auto w = f64({5, 4}, false), x = f64({7, 4}, false);
  Pass pass, other, evaluation;
  pass.training = other.training = true;
  EXPECT_TRUE(torch::equal(applied(*moving, w, x, pass), applied(*still, w, x, other)));
  EXPECT_NEAR((moving->bias() - r.bias).abs().max().item<double>(), 0.1, 1e-12);
  EXPECT_TRUE(torch::equal(still->bias(), r.bias));
  const auto kept = moving->bias().clone();
  applied(*moving, w, x, evaluation);
  EXPECT_TRUE(torch::equal(moving->bias(), kept));
}

TEST(Smora, PaddingDoesNotCount) {
  torch::manual_seed(8);
  const torch::NoGradGuard frozen;
  const Ranks r(6, false);
  const auto moved = [&](const Tensor& x, const Tensor& mask) {
    const auto part = r.part(config_of(6, 2, 0.1));
    Pass pass;
    pass.training = true;
    pass.mask = mask;
    applied(*part, f64({5, 4}, false), x, pass);
    return part->bias().clone();
  };
  const auto x = f64({2, 3, 4}, false), padded = torch::cat({x, x.slice(1, 0, 1).expand({2, 4, 4})}, 1);
  auto mask = torch::ones({2, 7}, torch::kBool);
  mask.slice(1, 3, 7).fill_(false);
  EXPECT_TRUE(torch::equal(moved(padded, mask), moved(x, {})));
}

TEST(Smora, BadSettingsAreErrors) {
  const auto says = [](const json& more) {
    return message_of([&] { make_causal(model_with(json::array({smora(more)}))); });
  };
  EXPECT_NE(says({{"active", 7}}).find("active is 7, and there are 6 ranks"), std::string::npos);
  EXPECT_NE(says({{"active", 0}}).find("active"), std::string::npos);
  EXPECT_NE(says({{"block", 4}}).find("no multiple of a block of 4"), std::string::npos);
  EXPECT_NE(says({{"block", 3}}).find("2 active ranks are no multiple"), std::string::npos);
  const Ranks r(6, false);
  EXPECT_THROW(Smora("q", Linear(r.rows), r.a, r.b, torch::zeros({5}), config_of(6, 2)), Error);
  EXPECT_THROW(Smora("q", Linear(r.rows), r.a, r.b, r.bias, config_of(6, 7)), Error);
}

TEST(SmoraInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(smora());
}

// As adapters that were saved without the balance, by whom it was no part of what is kept.
TEST(SmoraInModel, LoadsWithoutItsBias) {
  torch::manual_seed(7);
  const TemporaryFolder folder("moiety-test");
  const auto config = model_with(json::array({smora({{"target", "q_proj"}})}));
  const auto model = make_causal(config, {.trainable = true});
  stir(*model);
  write_file(folder / "config.json", config.dump());
  auto stored = model->stored();
  const size_t all = stored.size();
  std::erase_if(stored, [](const StoredTensor& t) { return t.name.ends_with("q_proj.bias"); });
  ASSERT_EQ(stored.size(), all - 2);
  write_stored(folder.path(), stored, "f32");
  const auto checkpoint = Checkpoint::open(folder.path().string());
  const auto ids = torch::arange(18, torch::kInt64).view({2, 9});
  // A fresh one is zero.
  const auto loaded = load_causal(*checkpoint, {.trainable = true, .frozen_base = true});
  EXPECT_TRUE(torch::equal(logits_of(*loaded, ids), logits_of(*model, ids)));
  // It moves and is saved from now on.
  Pass pass;
  train_pass(*loaded, ids, pass);
  int64_t moved = 0;
  for (const auto& t : loaded->stored())
    if (t.name.ends_with("q_proj.bias")) moved += t.value().abs().max().item<double>() > 0.0 ? 1 : 0;
  EXPECT_EQ(moved, 2);
  // Nothing else may be missing.
  std::erase_if(stored, [](const StoredTensor& t) { return t.name.ends_with("layers.0.adapters.q_proj.lora_B"); });
  write_stored(folder.path(), stored, "f32");
  EXPECT_NE(message_of([&] { load_causal(*Checkpoint::open(folder.path().string())); }).find("lora_B"),
            std::string::npos);
}

TEST(SmoraInModel, GradientsOfBlocksThatRunAgainThoughTheBiasMoves) {
  check_recomputed(smora({{"bias_rate", 0.2}, {"dropout", 0.3}}));
}

TEST(Smora, ReportsAScoreForEveryRankWhereBlocksAreRouted) {
  torch::manual_seed(11);
  const torch::NoGradGuard frozen;
  SmoraConfig config;
  config.rank = 6;
  config.active = 2;
  config.block = 2;
  Linear matrix(torch::randn({4, 5}));
  matrix->attach(std::make_shared<Smora>("q_proj", Linear(torch::randn({3, 5})), torch::randn({6, 5}),
                                         torch::randn({4, 6}), torch::zeros({6}), config));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  project(matrix, torch::randn({1, 7, 5}), pass);
  const auto& record = trace.records.at(0);
  EXPECT_EQ(record.experts, 6);
  ASSERT_EQ(record.routing.scores.sizes(), (std::vector<int64_t>{7, 6}));
  EXPECT_TRUE(torch::equal(record.routing.scores.select(1, 2), record.routing.scores.select(1, 3)));
}

}  // namespace
}  // namespace moiety
