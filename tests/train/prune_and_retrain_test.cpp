#include "moiety/train/prune_and_retrain.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include "message_of.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/train/run_folder.h"
#include "tiny.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

RC_GTEST_PROP(RoundTargets, PruneTheSameShareOfWhatIsLeft, ()) {
  const double before = *rc::gen::inRange(0, 90) / 100.0,
               sparsity = before + (1.0 - before) * *rc::gen::inRange(0, 99) / 100.0;
  const auto rounds = *rc::gen::inRange<int64_t>(1, 12);
  double left = 1.0 - before, share = -1.0;
  for (int64_t round = 1; round <= rounds; ++round) {
    const double now = 1.0 - rd_round_target(before, sparsity, round, rounds);
    if (share >= 0) RC_ASSERT(std::abs(now / left - share) < 1e-6);
    share = now / left;
    left = now;
  }
  RC_ASSERT(std::abs(1.0 - left - sparsity) < 1e-9);
}

std::string dense_model(const TemporaryFolder& folder) {
  return Trainer(tiny::run(folder, "dense", 10)).run().model.string();
}

std::map<std::string, Tensor> zeros_of(const fs::path& model) {
  const PrunableModel opened = open_prunable(model.string());
  std::map<std::string, Tensor> out;
  for (const auto& l : opened.staged.layers) out[l.name] = l.weight == 0;
  return out;
}

// Pruned to 40 %, by shares.
std::string sparse_model(const TemporaryFolder& folder) {
  PrunableModel model = open_prunable(dense_model(folder));
  RdPruningConfig c;
  c.sparsity = 0.4;
  prune_layers(model.staged, {}, "global", c);
  write_hf(*model.now(), folder / "sparse");
  return (folder / "sparse").string();
}

TEST(KeepZeros, WhatIsZeroStaysAndTheRestLearns) {
  const TemporaryFolder folder;
  const std::string sparse = sparse_model(folder);
  for (const std::string optimizer : {"adamw", "sgd", "lion"}) {
    auto c = tiny::run(folder, "run-" + optimizer, 6);
    c.model = {};
    c.model.checkpoint = sparse;
    c.optimizer.name = optimizer;
    c.train.ema.decay = 0.5;
    c.train.keep_zeros = true;
    const fs::path model = Trainer(c).run().model;
    const auto before = zeros_of(sparse), after = zeros_of(model);
    for (const auto& [name, zero] : before) EXPECT_TRUE(torch::equal(zero, after.at(name))) << name;
    c.output.folder += "-free";
    c.train.keep_zeros = false;
    const auto free = zeros_of(Trainer(c).run().model);
    for (const auto& [name, zero] : before)
      EXPECT_LT(free.at(name).sum().item<int64_t>(), zero.sum().item<int64_t>()) << name;
  }
}

TEST(KeepZeros, ZerosHaveNoPartInTheGradientsNorm) {
  const TemporaryFolder folder;
  const std::string sparse = sparse_model(folder);
  const auto norm = [&](bool keep) {
    auto c = tiny::run(folder, keep ? "keep" : "free", 1);
    c.model = {};
    c.model.checkpoint = sparse;
    c.train.keep_zeros = keep;
    Trainer(c).run();
    return tiny::trace(c.output.folder)[0]["grad_norm"].get<double>();
  };
  EXPECT_LT(norm(true), norm(false));
}

TEST(KeepZeros, GoesOnBitForBit) {
  const TemporaryFolder folder;
  const std::string sparse = sparse_model(folder);
  const auto make = [&](const std::string& name) {
    auto c = tiny::run(folder, name, 6);
    c.model = {};
    c.model.checkpoint = sparse;
    c.train.keep_zeros = true;
    return c;
  };
  const auto whole = Trainer(make("whole")).run();
  TrainOptions options;
  int steps = 0;
  options.stop = [&] { return ++steps == 2; };
  EXPECT_EQ(Trainer(make("stopped"), options).run().ended, "stopped");
  const auto stopped = Trainer(make("stopped")).run();
  const auto a = read_tensors(whole.model / "model.safetensors"), b = read_tensors(stopped.model / "model.safetensors");
  for (const auto& [name, t] : a) EXPECT_TRUE(torch::equal(t, b.at(name))) << name;
}

TEST(KeepZeros, WantsACheckpointAndNoParts) {
  const auto problem = [](const std::string& more) {
    return message_of(
        [&] { read_train_config("data: a.txt\noutput: o\ntrain: {steps: 1, keep_zeros: true}\n" + more, "run.yaml"); });
  };
  EXPECT_NE(problem("model: {tokenizer: bytes, config: {model_type: llama}}").find("the zeros of a checkpoint"),
            std::string::npos);
  EXPECT_NE(problem("model: m\nparts: [{slug: lora, target: [q_proj]}]").find("train.keep_zeros and parts exclude"),
            std::string::npos);
  EXPECT_EQ(problem("model: m"), "");
}

RdPruningConfig three_rounds() {
  RdPruningConfig c;
  c.sparsity = 0.7;
  c.grid = 5;
  c.iterations = 3;
  return c;
}

RetrainingOptions on_noise() {
  RetrainingOptions o;
  o.batches = [](const PrunableModel& m) {
    torch::manual_seed(4);
    return std::vector<Tensor>{torch::randint(m.causal->vocab_size(), {4, 8}, torch::kInt64)};
  };
  return o;
}

TEST(PruneAndRetrain, MasksGrowAndTrainingHoldsThem) {
  const TemporaryFolder folder;
  const std::string dense = dense_model(folder);
  auto run = tiny::run(folder, "rounds", 4);
  std::vector<int64_t> seeds;
  auto options = on_noise();
  options.on_run = [&](int64_t, const Trainer& t) { seeds.push_back(t.config().train.seed); };
  const auto result = prune_and_retrain(dense, "rd", three_rounds(), run, options);
  ASSERT_TRUE(result.complete);
  ASSERT_EQ(result.rounds.size(), 3u);
  EXPECT_EQ(seeds, (std::vector<int64_t>{0, 1, 2}));
  std::map<std::string, Tensor> before;
  for (int64_t round = 1; round <= 3; ++round) {
    const fs::path here = folder / "rounds" / fmt::format("round-{}", round);
    const auto pruned = zeros_of(here / "pruned"), trained = zeros_of(here / "run/last");
    int64_t zeros = 0, all = 0;
    for (const auto& [name, zero] : pruned) {
      EXPECT_TRUE(torch::equal(zero, trained.at(name))) << name;
      if (!before.empty()) {
        EXPECT_TRUE(zero.masked_select(before.at(name)).all().item<bool>()) << name;
      }
      zeros += zero.sum().item<int64_t>();
      all += zero.numel();
    }
    EXPECT_GE(static_cast<double>(zeros) + 1.0, result.rounds[static_cast<size_t>(round - 1)].target * all);
    before = pruned;
  }
  EXPECT_DOUBLE_EQ(result.rounds[2].target, 0.7);
  EXPECT_EQ(result.model, folder / "rounds/round-3/run/last");
}

TEST(PruneAndRetrain, AStoppedCallGoesOnToTheSameModel) {
  const TemporaryFolder folder;
  const std::string dense = dense_model(folder);
  const auto whole = prune_and_retrain(dense, "rd", three_rounds(), tiny::run(folder, "whole", 4), on_noise());
  RetrainingResult last;
  for (int sitting = 0; sitting < 10 && !last.complete; ++sitting) {
    auto options = on_noise();
    int steps = 0;
    options.train.stop = [&] { return ++steps == 3; };
    last = prune_and_retrain(dense, "rd", three_rounds(), tiny::run(folder, "stopped", 4), options);
  }
  ASSERT_TRUE(last.complete);
  const auto a = read_tensors(whole.model / "model.safetensors"), b = read_tensors(last.model / "model.safetensors");
  for (const auto& [name, t] : a) EXPECT_TRUE(torch::equal(t, b.at(name))) << name;
}

TEST(PruneAndRetrain, NamesWhatDoesNotFit) {
  const TemporaryFolder folder;
  const std::string dense = dense_model(folder);
  auto c = three_rounds();
  c.iterations = 1;
  prune_and_retrain(dense, "uniform", c, tiny::run(folder, "rounds", 1));
  c.sparsity = 0.8;
  EXPECT_NE(message_of([&] {
              prune_and_retrain(dense, "uniform", c, tiny::run(folder, "rounds", 1));
            }).find("rounds of another pruning"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              prune_and_retrain(dense, "uniform", c, tiny::run(folder, "dense", 1));
            }).find("holds a run of its own"),
            std::string::npos);
  auto lost = tiny::run(folder, "lost", 1);
  lost.data.sources[0].path = (folder / "nowhere.txt").string();
  auto options = on_noise();
  options.on_point = [](int64_t, int64_t, int64_t) { ADD_FAILURE() << "measured before the run was looked at"; };
  EXPECT_NE(message_of([&] { prune_and_retrain(dense, "rd", c, lost, options); }).find("nowhere.txt"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "lost"));
  c.sparsity = 0.1;
  EXPECT_NE(message_of([&] {
              prune_and_retrain((folder / "rounds/round-1/run/last").string(), "uniform", c,
                                tiny::run(folder, "other", 1));
            }).find("the model is already 70.0 % sparse"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
