#include "moiety/convert/upcycle.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>

#include "../compress/small_mixture.h"
#include "message_of.h"
#include "moiety/moe/mixture.h"

namespace moiety {
namespace {

using small_mixture::logits;

double distance(const torch::Tensor& a, const torch::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

class Upcycled : public testing::TestWithParam<const char*> {};

TEST_P(Upcycled, ComputesWhatTheDenseModelDid) {
  const auto dense = small_mixture::make(GetParam());
  const auto before = logits(*dense);
  EXPECT_LT(distance(before, logits(*upcycled(dense, {.experts = 4, .top_k = 2}))), 1e-5);
  // Parts are scaled by a power of two, sums run in another order.
  EXPECT_LT(distance(before, logits(*upcycled(dense, {.experts = 4, .top_k = 2, .granularity = 4}))), 1e-5);
  EXPECT_GT(distance(before, logits(*upcycled(dense, {.experts = 4, .top_k = 2, .noise = 0.1}))), 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Families, Upcycled, testing::Values("llama", "mistral", "qwen3"),
                         [](const auto& i) { return i.param; });

TEST(Upcycling, ExpertsOfOneCopyAreChosenTogetherAndCopiesDiffer) {
  const auto moe =
      upcycled(small_mixture::make("llama"), {.experts = 4, .top_k = 2, .granularity = 3, .router_std = 1.0});
  EXPECT_EQ(moe->config()["num_local_experts"], 12);
  EXPECT_EQ(moe->config()["num_experts_per_tok"], 6);
  EXPECT_EQ(moe->config()["intermediate_size"], 8);
  const auto model = load_causal(*moe, {.dtype = "f32"});
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const torch::NoGradGuard frozen;
  model->hidden(small_mixture::ids(), pass);
  const auto chosen = std::get<0>(trace.records.at(0).routing.experts.sort(1));
  EXPECT_TRUE(torch::equal(chosen.slice(1, 0, 6, 3) + 2, chosen.slice(1, 2, 6, 3)));
  EXPECT_TRUE((chosen.slice(1, 0, 6, 3) % 3 == 0).all().item<bool>());
  EXPECT_GT(std::get<0>(at::_unique(chosen)).numel(), 6);  // not one pair of copies for all tokens
}

TEST(Upcycling, TheSameSeedGivesTheSameBits) {
  const auto dense = small_mixture::make("llama");
  const auto of = [&](uint64_t seed) {
    return upcycled(dense, {.noise = 0.5, .seed = seed})
        ->get("model.layers.1.block_sparse_moe.experts.3.w2.weight")
        .to_float();
  };
  EXPECT_EQ(of(1), of(1));
  EXPECT_NE(of(1), of(2));
}

// Counts how often each tensor is asked for.
class Counted : public Checkpoint {
 public:
  explicit Counted(std::shared_ptr<const Checkpoint> base) : base_(std::move(base)) {}
  const nlohmann::json& config() const override { return base_->config(); }
  const nlohmann::json& generation_config() const override { return base_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return base_->tensors(); }
  bool has(const std::string& name) const override { return base_->has(name); }
  TensorView get(const std::string& name) const override {
    ++reads[name];
    return base_->get(name);
  }
  std::filesystem::path path() const override { return base_->path(); }
  int64_t bytes_on_disk() const override { return base_->bytes_on_disk(); }
  mutable std::map<std::string, int> reads;

 private:
  std::shared_ptr<const Checkpoint> base_;
};

TEST(Upcycling, AParentIsDecodedOnceForAllItsParts) {
  for (const double noise : {0.0, 0.1}) {
    const auto dense = std::make_shared<Counted>(small_mixture::make("llama"));
    const auto moe = upcycled(dense, {.experts = 4, .top_k = 2, .granularity = 4, .noise = noise});
    // In the order in which writers ask.
    for (const TensorInfo& t : moe->tensors()) moe->get(t.name);
    int parents = 0;
    for (const auto& [name, count] : dense->reads) {
      EXPECT_EQ(count, 1) << name;
      parents += name.find("mlp.") != std::string::npos ? 1 : 0;
    }
    EXPECT_EQ(parents, 3 * 3);
  }
}

TEST(Upcycling, WhatCannotBeUpcycledIsRefusedInWords) {
  const auto dense = small_mixture::make("llama");
  EXPECT_EQ(message_of([&] { upcycled(small_mixture::make("mixtral"), {}); }),
            "/nowhere is a mixtral model; Llama and Mistral can become Mixtral, and Qwen3 Qwen3-MoE");
  EXPECT_EQ(message_of([&] { upcycled(dense, {.experts = 2, .top_k = 3}); }), "3 of 2 experts a token is impossible");
  EXPECT_EQ(message_of([&] { upcycled(dense, {.granularity = 5}); }),
            "feed-forward layers of 24 hidden units cannot be cut into 5 equal parts");
  EXPECT_EQ(message_of([&] { upcycled(dense, {.noise = -1.0}); }), "noise of -1 deviations is impossible");
}

}  // namespace
}  // namespace moiety
