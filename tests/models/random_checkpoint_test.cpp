#include "moiety/models/random_checkpoint.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstring>

#include "moiety/base/error.h"
#include "moiety/models/model.h"

namespace moiety {
namespace {

using nlohmann::json;

TEST(RandomCheckpoint, IsOfTheSizeThatWasAskedFor) {
  for (const char* family : {"llama", "mixtral", "qwen3_moe"})
    for (const double size : {5e7, 3e8}) {
      const auto config = config_of_size(family, size, json::object());
      EXPECT_NEAR(static_cast<double>(parameters_of(config)) / size, 1.0, 0.25) << family;
    }
  const auto fixed = config_of_size("mixtral", 1e8, {{"experts", 16}, {"top_k", 3}, {"hidden_size", 512}});
  EXPECT_EQ(fixed["num_local_experts"], 16);
  EXPECT_EQ(fixed["num_experts_per_tok"], 3);
  EXPECT_EQ(fixed["hidden_size"], 512);
  EXPECT_FALSE(fixed.contains("experts"));
}

TEST(RandomCheckpoint, LoadsAndIsTheSameForASeed) {
  const json config = {{"model_type", "qwen3_moe"},  {"hidden_size", 32},        {"num_hidden_layers", 2},
                       {"num_attention_heads", 2},   {"num_key_value_heads", 1}, {"head_dim", 16},
                       {"vocab_size", 50},           {"num_experts", 4},         {"num_experts_per_tok", 2},
                       {"moe_intermediate_size", 8}, {"intermediate_size", 16},  {"max_position_embeddings", 32}};
  const auto one = random_checkpoint(config, "/nowhere", 1), again = random_checkpoint(config, "/nowhere", 1),
             other = random_checkpoint(config, "/nowhere", 2);
  int64_t elements = 0;
  for (const auto& t : one->tensors()) {
    const auto a = one->get(t.name), b = again->get(t.name), c = other->get(t.name);
    elements += a.elements();
    EXPECT_EQ(std::memcmp(a.data.data(), b.data.data(), a.data.size()), 0) << t.name;
    EXPECT_EQ(std::memcmp(a.data.data(), c.data.data(), a.data.size()) == 0, t.shape.size() < 2) << t.name;
    if (t.shape.size() < 2) continue;
    double square = 0;
    for (const float v : a.to_float()) square += static_cast<double>(v) * v;
    EXPECT_NEAR(std::sqrt(square / static_cast<double>(a.elements())), 0.02, 0.006) << t.name;
  }
  EXPECT_EQ(elements, parameters_of(config));
  const torch::NoGradGuard frozen;
  const auto model = load_causal(*one, {.dtype = "f32"});
  Pass pass;
  EXPECT_TRUE(model->forward(torch::zeros({1, 4}, torch::kInt64), pass).isfinite().all().item<bool>());
}

TEST(RandomCheckpoint, ImpossibleSizesAreErrors) {
  EXPECT_THROW(config_of_size("llama", 10.0, json::object()), Error);
  EXPECT_THROW(config_of_size("lama", 1e8, json::object()), Error);
  EXPECT_THROW(config_of_size("llama", 1e9, {{"hidden_size", 256}, {"num_hidden_layers", 2}}), Error);
}

}  // namespace
}  // namespace moiety
