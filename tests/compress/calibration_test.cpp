#include "moiety/compress/calibration.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/compress/expert_selection.h"
#include "moiety/moe/mixture.h"
#include "small_mixture.h"

namespace moiety {
namespace {

using torch::Tensor;
namespace fs = std::filesystem;

std::vector<int64_t> text(int64_t tokens, int64_t step = 7) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < tokens; ++i) out.push_back((i * step + i * i) % 40);
  return out;
}

class Calibrating : public testing::Test {
 protected:
  void TearDown() override { fs::remove(file_); }
  Calibration run(const std::vector<std::vector<int64_t>>& texts, CalibrationOptions options = {}) {
    if (options.windows.context == 512) options.windows = {16, 2, -1};
    return calibrate(*model_, layers_, texts, options);
  }
  std::shared_ptr<const Checkpoint> base_ = small_mixture::make("mixtral");
  std::shared_ptr<CausalModel> model_ = load_causal(*base_, {.dtype = "f32"});
  ExpertLayers layers_{base_};
  fs::path file_ = fs::path(testing::TempDir()) / "moiety_calibration.safetensors";
};

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

void expect_same(const Calibration& a, const Calibration& b) {
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t i = 0; i < a.layers.size(); ++i) {
    EXPECT_EQ(a.layers[i].tokens, b.layers[i].tokens);
    EXPECT_TRUE(torch::equal(a.layers[i].load, b.layers[i].load));
    EXPECT_TRUE(torch::equal(a.layers[i].gates, b.layers[i].gates));
    EXPECT_TRUE(torch::equal(a.layers[i].gram, b.layers[i].gram));
    EXPECT_TRUE(torch::equal(a.layers[i].output, b.layers[i].output));
  }
}

TEST_F(Calibrating, CountsWhatRoutersAndExpertsDo) {
  const auto ids = text(32);
  const auto c = run({ids});
  // The same from traces of both windows, expert by expert.
  Trace trace;
  trace.keep_inputs = true;
  Pass pass;
  pass.trace = &trace;
  const torch::NoGradGuard frozen;
  model_->hidden(torch::tensor(ids).view({2, 16}), pass);
  ASSERT_EQ(c.layers.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    const auto& record = trace.records[i];
    const auto& l = c.layers[i];
    EXPECT_EQ(l.tokens, 32);
    EXPECT_EQ(l.load.sum().item<int64_t>(), 64);
    EXPECT_NEAR(l.importance().sum().item<double>(), 1.0, 1e-6);  // gates of a token sum to 1
    EXPECT_LT(
        distance(l.gram, record.routing.logits.t().to(torch::kFloat64).mm(record.routing.logits.to(torch::kFloat64))),
        1e-5);  // watched experts add up in another order: layers above differ in their last digits
    for (int64_t e = 0; e < 6; ++e) {
      const auto w = layers_.expert(i, e);
      double sum = 0;
      int64_t pairs = 0;
      for (int64_t n = 0; n < 32; ++n)
        for (int64_t k = 0; k < 2; ++k) {
          if (record.routing.experts[n][k].item<int64_t>() != e) continue;
          const auto x = record.input[n];
          const auto y = w.down.mv(torch::silu(w.gate.mv(x)) * w.up.mv(x));
          sum += record.routing.gates[n][k].item<double>() * y.norm().item<double>();
          ++pairs;
        }
      EXPECT_EQ(l.pairs[e].item<int64_t>(), pairs);
      EXPECT_NEAR(l.saliency()[e].item<double>(), pairs > 0 ? sum / static_cast<double>(pairs) : 0.0, 1e-4);
    }
  }
}

TEST_F(Calibrating, PaddingAndBatchesChangeNothing) {
  const auto ids = text(39);  // three windows, the last of 7
  auto options = CalibrationOptions{};
  options.windows = {16, 1, -1};
  const auto one = run({ids}, options);
  options.windows.batch_size = 3;
  const auto all = run({ids}, options);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(one.layers[i].tokens, 39);
    EXPECT_EQ(all.layers[i].tokens, 39);
    EXPECT_TRUE(torch::equal(one.layers[i].load, all.layers[i].load));
    EXPECT_TRUE(torch::equal(one.layers[i].pairs, all.layers[i].pairs));
    // Sums of f32 values that a batch rounds another way.
    EXPECT_LT(distance(one.layers[i].output, all.layers[i].output), 1e-3);
  }
}

TEST_F(Calibrating, StoppedAndTakenUpAgainGivesTheSameBits) {
  const std::vector<std::vector<int64_t>> texts = {text(70), text(50, 3)};
  const auto whole = run(texts);
  CalibrationOptions options;
  options.file = file_;
  options.save_every = 0.0;
  options.progress = [](int64_t done, int64_t) {
    if (done >= 4) throw std::runtime_error("stopped");
  };
  EXPECT_THROW(run(texts, options), std::runtime_error);
  EXPECT_FALSE(Calibration::load(file_).complete());
  int64_t batches = 0;
  options.progress = [&](int64_t, int64_t) { ++batches; };
  expect_same(run(texts, options), whole);
  EXPECT_LT(batches, whole.batches);
  batches = 0;
  expect_same(run(texts, options), whole);  // complete: nothing is read again
  EXPECT_EQ(batches, 0);
  expect_same(Calibration::load(file_), whole);
}

TEST_F(Calibrating, FilesOfOtherModelsAndTextsAreRefused) {
  CalibrationOptions options;
  options.file = file_;
  run({text(32)}, options);
  EXPECT_NE(message_of([&] { run({text(33)}, options); }).find("with other texts or windows"), std::string::npos);
  const auto other = small_mixture::make("mixtral", 6, 2, 9);
  const auto model = load_causal(*other, {.dtype = "f32"});
  options.windows = {16, 2, -1};
  EXPECT_NE(message_of([&] { calibrate(*model, ExpertLayers(other), {text(32)}, options); }).find("with another model"),
            std::string::npos);
  write_file(file_, "not a file");
  EXPECT_FALSE(message_of([&] { run({text(32)}, options); }).empty());
  EXPECT_EQ(message_of([&] { run({{}}); }), "there is no token to read");
}

TEST_F(Calibrating, BestExpertsStayInEveryLayerOrWhereTheyMatter) {
  const auto scores = [](std::vector<double> v) { return torch::tensor(v, torch::kFloat64); };
  const std::vector<Tensor> s = {scores({.1, .2, .2, .1, .2, .2}), scores({.9, .02, .02, .02, .02, .02}),
                                 scores({3, 3, 3, 0, 0, 0})};
  EXPECT_EQ(select_experts(layers_, s, {.keep = 3}),
            (std::vector<std::vector<int64_t>>{{1, 2, 4}, {0, 1, 2}, {0, 1, 2}}));
  EXPECT_EQ(select_experts(layers_, s, {.keep = 0.5}), select_experts(layers_, s, {.keep = 3}));
  // 9 of 18: two a layer, then the largest shares: 1/3 in the last, 0.2 in the first.
  EXPECT_EQ(select_experts(layers_, s, {.keep = 0.5, .across = true}),
            (std::vector<std::vector<int64_t>>{{1, 2, 4, 5}, {0, 1}, {0, 1, 2}}));
  const auto protect = protected_experts(layers_, parse_experts("1,5;0,0"));
  EXPECT_EQ(select_experts(layers_, s, {.keep = 1}, protect), (std::vector<std::vector<int64_t>>{{0}, {5}, {0}}));
  EXPECT_EQ(protected_experts(layers_, {{1, 5}, {0, 0}, {2, -1}}), protect);
}

TEST_F(Calibrating, BadSelectionsAreRefusedInWords) {
  const auto even = random_scores(layers_, 3);
  const auto refused = [&](double keep, const ProtectedExperts& p = {}) {
    return message_of([&] { select_experts(layers_, even, {.keep = keep}, p); });
  };
  EXPECT_EQ(refused(0), "0 experts cannot be kept: give a number, or a share below 1");
  EXPECT_EQ(refused(2.5), "2.5 experts cannot be kept: give a whole number, or a share below 1");
  EXPECT_EQ(refused(7), "layer 0 has 6 experts, 7 cannot be kept");
  EXPECT_EQ(refused(1, protected_experts(layers_, parse_experts("2,1;2,0"))),
            "layer 2 keeps 1 experts, but 2 are protected");
  EXPECT_EQ(message_of([&] { parse_experts("2,1;x"); }),
            "'2,1;x' names no experts: LAYER,EXPERT;LAYER,EXPERT is wanted, as 1,68;2,92");
  EXPECT_EQ(message_of([&] { protected_experts(layers_, parse_experts("0,6")); }), "layer 0 has no expert 6: it has 6");
}

TEST(KeptInGroups, TheBestOfEveryGroupStay) {
  auto config = small_mixture::config_of("deepseek_v3", 8, 2);
  config.update({{"n_group", 2}, {"topk_group", 1}});
  const ExpertLayers layers(random_checkpoint(config, "/nowhere", 2));
  const auto s = torch::tensor({8, 7, 6, 5, 4, 3, 2, 1}, torch::kFloat64);
  EXPECT_EQ(select_experts(layers, {s, s}, {.keep = 0.5}),
            (std::vector<std::vector<int64_t>>{{0, 1, 4, 5}, {0, 1, 4, 5}}));
  EXPECT_EQ(select_experts(layers, {s, s}, {.keep = 6}, protected_experts(layers, {{2, 7}}))[1],
            (std::vector<int64_t>{0, 1, 2, 4, 5, 7}));
  EXPECT_EQ(message_of([&] {
              select_experts(layers, {s, s}, {.keep = 3});
            }),
            "layer 1 routes in 2 groups, which cannot share 3 experts");
  EXPECT_NE(message_of([&] {
              select_experts(layers, {s, s}, {.keep = 0.5, .across = true});
            }).find("not across layers"),
            std::string::npos);
}

TEST_F(Calibrating, RowsThatShareAnExpertCountOnce) {
  NewExperts shared;
  shared.rows = {0, 1, 2, 3, 4, 5};
  shared.map = {0, 0, 0, 1, 1, 1};
  shared.from = {0, 3};
  const auto small = with_experts(layers_, {shared});
  const ExpertLayers layers(small);
  const auto model = load_causal(*small, {.dtype = "f32"});
  CalibrationOptions options;
  options.windows = {16, 2, -1};
  const auto c = calibrate(*model, layers, {text(32)}, options);
  EXPECT_EQ(c.layers[0].load.sum().item<int64_t>(), 64);
  EXPECT_LT(c.layers[0].pairs.sum().item<int64_t>(), 64);
  EXPECT_EQ(expert_scores(layers, c, "importance")[0].numel(), 2);
  EXPECT_NEAR(expert_scores(layers, c, "importance")[0].sum().item<double>(), 1.0, 1e-6);
}

}  // namespace
}  // namespace moiety
