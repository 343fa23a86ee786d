#pragma once
// What tests of parts beside matrices share.
#include <torch/torch.h>

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "moe/moe_tools.h"
#include "moiety/io/peft.h"
#include "moiety/models/model.h"
#include "moiety/nn/beside.h"

namespace moiety {

/// A tiny dense model with parts, behind those of `more`.
inline nlohmann::json model_with(nlohmann::json parts, const nlohmann::json& more = nlohmann::json::object()) {
  nlohmann::json config = {{"model_type", "llama"},      {"vocab_size", 40},
                           {"hidden_size", 16},          {"intermediate_size", 24},
                           {"num_hidden_layers", 2},     {"num_attention_heads", 4},
                           {"num_key_value_heads", 2},   {"max_position_embeddings", 64},
                           {"tie_word_embeddings", true}};
  config.update(more);
  for (auto& part : parts) config["moiety"]["parts"].push_back(std::move(part));
  return config;
}

/// The same config without its parts beside matrices.
inline nlohmann::json without_parts(nlohmann::json config) {
  auto rest = other_parts_of(config);
  config.erase("moiety");
  if (!rest.empty()) config["moiety"]["parts"] = std::move(rest);
  return config;
}

/// Copies by name whatever both models store.
inline void copy_stored(const CausalModel& from, CausalModel& to) {
  const torch::NoGradGuard frozen;
  std::map<std::string, torch::Tensor> values;
  for (const auto& t : from.stored()) values[t.name] = t.value();
  for (const auto& t : to.stored())
    if (const auto it = values.find(t.name); it != values.end()) t.value().copy_(it->second);
}

/// Every zero of what parts store becomes random, so that what they add is not nothing.
inline void stir(CausalModel& model, double size = 0.3) {
  const torch::NoGradGuard frozen;
  for (const auto& t : model.stored())
    if (t.name.find("lora_B") != std::string::npos) t.value().normal_(0.0, size);
}

inline torch::Tensor logits_of(CausalModel& model, const torch::Tensor& ids, const torch::Tensor& labels = {}) {
  const torch::NoGradGuard frozen;
  model.eval();
  Pass pass;
  pass.labels = labels;
  return model.forward(ids, pass);
}

/// One training pass over a model: sum of all losses.
inline torch::Tensor train_pass(CausalModel& model, const torch::Tensor& ids, Pass& pass) {
  model.train();
  pass.training = true;
  auto loss = model.forward(ids, pass).logsumexp(-1).square().mean();
  for (const auto& [name, value] : pass.losses) loss = loss + value;
  return loss;
}

/// What a part beside one matrix gives for x, W given apart.
inline torch::Tensor applied(Beside& beside, const torch::Tensor& weight, const torch::Tensor& x, Pass& pass) {
  std::vector<torch::Tensor> outputs = {torch::matmul(x, weight.t())};
  beside.matrices = 1;
  beside.apply(x, outputs, pass);
  return outputs[0];
}

inline torch::Tensor f64(std::vector<int64_t> shape, bool learns = true) {
  return torch::randn(shape, torch::kFloat64).requires_grad_(learns);
}

/// A part in a whole model: a fresh one changes no bit, only what it brings learns, nothing of the base moves over
/// steps, and what is saved and loaded computes the same, up to `rounding`. `labels` [2] for those that need them.
void check_in_model(const nlohmann::json& part, const torch::Tensor& labels = {},
                    const nlohmann::json& model = nlohmann::json::object(), double rounding = 0.0);

/// Gradients of a pass whose blocks are run again equal those of one whose blocks are not, and so does what moves
/// outside of the gradient.
void check_recomputed(const nlohmann::json& part, const torch::Tensor& labels = {});

}  // namespace moiety
