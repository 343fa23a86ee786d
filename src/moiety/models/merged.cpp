#include "moiety/models/merged.h"

#include <torch/torch.h>

#include <map>
#include <set>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/io/finite.h"
#include "moiety/io/overlay.h"
#include "moiety/io/peft.h"
#include "moiety/models/model.h"
#include "moiety/models/vision.h"
#include "moiety/models/weights_source.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;

// Trained biases are f32: as the weight beside them is stored.
Format format_in(const Checkpoint& adapted, const TensorInfo& t) {
  if (is_block(t.format)) return Format::F32;
  const std::string weight = t.name.substr(0, t.name.rfind('.') + 1) + "weight";
  if (!is_bias(t.name) || !adapted.has(weight)) return t.format;
  const Format format = adapted.get(weight).format;
  return format == Format::F16 || format == Format::BF16 ? format : t.format;
}

// "holds nan at [3, 5]", or nothing.
std::string problem_of(const torch::Tensor& t) {
  if (!t.is_floating_point() || torch::isfinite(t).all().item<bool>()) return "";
  const auto f = t.to(torch::kCPU, torch::kFloat32).contiguous();
  return not_finite({f.const_data_ptr<float>(), static_cast<size_t>(f.numel())}, f.sizes().vec());
}

// What is stored of a sum. Error where it is not finite, and where it was not before it was rounded.
TensorView finite_view(const torch::Tensor& sum, const Checkpoint& before, const TensorInfo& info) {
  if (const auto problem = problem_of(sum); !problem.empty()) {
    const TensorView was = before.get(info.name);
    const auto own = problem_of(is_block(was.format) ? dequantize(was) : as_tensor(was));
    fail("{} {}: it cannot be merged", own.empty() ? "the sum" : "the model's weight", own.empty() ? problem : own);
  }
  TensorView view = view_of(sum, info.format);
  const auto problem = info.format == Format::F16 ? problem_of(as_tensor(view)) : "";
  check(problem.empty(), "the sum, in f16, {}: convert the model to bf16 or f32 first", problem);
  return view;
}

// Everything that the model stores, merged, in the base's formats.
std::shared_ptr<const Checkpoint> merged(std::shared_ptr<const Checkpoint> adapted, json config, bool backwards) {
  std::shared_ptr<torch::nn::Module> model;
  std::vector<StoredTensor> all;
  if (is_vision(adapted->config())) {
    const auto vision = load_vision(*adapted);
    all = vision->stored();
    model = vision;
  } else {
    const auto causal = load_causal(*adapted);
    all = causal->stored();
    model = causal;
  }
  std::map<std::string, std::function<torch::Tensor()>> values;
  for (auto& stored : all) values[stored.name] = std::move(stored.value);
  std::vector<OverlayTensor> tensors;
  std::set<std::string> removed;
  for (const TensorInfo& t : adapted->tensors()) {
    if (t.name.find(".adapters.") != std::string::npos) {
      removed.insert(t.name);
      continue;
    }
    const auto value = values.find(t.name);
    if (value == values.end()) continue;
    OverlayTensor out;
    out.info = t;
    out.info.format = format_in(*adapted, t);
    // The model lives as long as its values.
    out.get = [model, adapted, value = value->second, info = out.info, backwards] {
      const torch::NoGradGuard frozen;
      const StoreMerged all(backwards);
      try {
        return finite_view(value(), *adapted, info);
      } catch (const Error& e) {
        fail("{}: {}", info.name, e.what());
      }
    };
    tensors.push_back(std::move(out));
  }
  return overlay(std::move(adapted), std::move(config), std::move(tensors), removed);
}

std::shared_ptr<const Checkpoint> without_parts(std::shared_ptr<const Checkpoint> adapted, bool backwards) {
  json config = adapted->config();
  const json list = config.value("moiety", json::object()).value("parts", json::array());
  json rest = json::array();
  const int64_t layers = is_vision(config) ? parse_vision_config(config, adapted->path().string()).blocks
                                           : config.value("num_hidden_layers", int64_t{0});
  const auto entries = parse_parts(config, layers);
  for (size_t i = 0; i < entries.size(); ++i)
    if (entries[i].site != "linear") rest.push_back(list[i]);
  check(rest.size() < list.size(), "{}: nothing stands beside its matrices that could be merged",
        adapted->path().string());
  check(adapted->gguf() == nullptr, "{}: a GGUF file has to be converted before something is merged into it",
        adapted->path().string());
  config["moiety"]["parts"] = rest;
  if (rest.empty()) config["moiety"].erase("parts");
  if (config["moiety"].empty()) config.erase("moiety");
  return merged(std::move(adapted), std::move(config), backwards);
}

}  // namespace

std::shared_ptr<const Checkpoint> merged_checkpoint(std::shared_ptr<const Checkpoint> adapted) {
  return without_parts(std::move(adapted), false);
}

std::shared_ptr<const Checkpoint> unmerged_checkpoint(std::shared_ptr<const Checkpoint> adapted) {
  check(!biases_learn(parts_of(adapted->config())),
        "{}: an adapter that trained all biases cannot be taken out again: what the biases were is gone",
        adapted->path().string());
  return without_parts(std::move(adapted), true);
}

}  // namespace moiety
