#include "moiety/train/task.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/nn/random_state.h"

namespace moiety {

using nlohmann::json;

json to_json(const EvaluationResult& e) {
  if (e.accuracy) return {{"loss", e.loss}, {"accuracy", *e.accuracy}, {"images", e.tokens}};
  json out = {
      {"loss", e.loss}, {"perplexity", std::exp(e.loss)}, {"bits_per_byte", e.bits_per_byte}, {"tokens", e.tokens}};
  if (!e.by_source.empty()) out["by_source"] = e.by_source;
  return out;
}

EvaluationResult evaluation_from_json(const json& j) {
  if (j.contains("accuracy")) return {j.at("loss"), 0.0, j.at("images"), j.at("accuracy").get<double>(), {}};
  return {
      j.at("loss"), j.at("bits_per_byte"), j.at("tokens"), {}, j.value("by_source", std::map<std::string, double>())};
}

std::unique_ptr<TrainTask> open_task(const TrainConfig& config, const TaskContext& context) {
  return factory<MakeTrainTask>(get_method("task", config.task_slug()))(config, context);
}

std::vector<double> score_batches(torch::nn::Module& model, const HeldOut& data, torch::Device device, Ranks* ranks,
                                  const std::function<std::vector<double>(const MicroBatch&, bool)>& score) {
  const torch::NoGradGuard frozen;
  const torch::Tensor random = random_state(device);
  const bool training = model.is_training();
  model.eval();
  std::vector<double> sums;
  const size_t processes = ranks ? static_cast<size_t>(ranks->size()) : 1;
  const size_t rounds = (data.batches.size() + processes - 1) / processes * processes;
  for (size_t i = 0; i < rounds; ++i) {
    if (ranks && static_cast<int64_t>(i) % ranks->size() != ranks->rank()) continue;
    const bool counts = i < data.batches.size();
    const auto values = score(data.batches[std::min(i, data.batches.size() - 1)].to(device), counts);
    sums.resize(values.size(), 0.0);
    for (size_t v = 0; counts && v < values.size(); ++v) sums[v] += values[v];
  }
  if (ranks) {
    auto all = torch::tensor(sums, torch::kFloat64);
    ranks->sum({all});
    for (size_t v = 0; v < sums.size(); ++v) sums[v] = all[static_cast<int64_t>(v)].item<double>();
  }
  model.train(training);
  set_random_state(device, random);
  return sums;
}

}  // namespace moiety
