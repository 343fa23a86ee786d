#include "moiety/models/merged.h"

#include <torch/torch.h>

#include <map>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/models/model.h"
#include "moiety/models/weights_source.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;

class MergedCheckpoint : public Checkpoint {
 public:
  MergedCheckpoint(std::shared_ptr<const Checkpoint> adapted, json config)
      : adapted_(std::move(adapted)), config_(std::move(config)), model_(load_causal(*adapted_)) {
    for (auto& stored : model_->stored()) values_[stored.name] = std::move(stored.value);
    for (TensorInfo t : adapted_->tensors()) {
      if (t.name.find(".adapters.") != std::string::npos) continue;
      if (is_block(t.format)) t.format = Format::F32;
      infos_[t.name] = t;
      tensors_.push_back(std::move(t));
    }
  }
  const json& config() const override { return config_; }
  const json& generation_config() const override { return adapted_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return infos_.count(name) != 0; }
  TensorView get(const std::string& name) const override {
    const auto value = values_.find(name);
    const auto info = infos_.find(name);
    check(info != infos_.end(), "{}: there is no tensor '{}'", path().string(), name);
    if (value == values_.end()) return adapted_->get(name);
    const torch::NoGradGuard frozen;
    torch::Tensor t;
    {
      const StoreMerged merged;
      t = value->second();
    }
    auto held =
        std::make_shared<torch::Tensor>(t.detach().to(torch::kCPU, torch_dtype(info->second.format)).contiguous());
    TensorView v;
    static_cast<TensorInfo&>(v) = info->second;
    check(v.shape == held->sizes().vec(), "tensor '{}' has changed its shape", name);
    v.data = {static_cast<const std::byte*>(held->const_data_ptr()), static_cast<size_t>(held->nbytes())};
    v.owner = held;
    return v;
  }
  std::filesystem::path path() const override { return adapted_->path(); }
  int64_t bytes_on_disk() const override { return adapted_->bytes_on_disk(); }

 private:
  std::shared_ptr<const Checkpoint> adapted_;
  json config_;
  std::shared_ptr<CausalModel> model_;
  std::map<std::string, std::function<torch::Tensor()>> values_;
  std::map<std::string, TensorInfo> infos_;
  std::vector<TensorInfo> tensors_;
};

}  // namespace

std::shared_ptr<const Checkpoint> merged_checkpoint(std::shared_ptr<const Checkpoint> adapted) {
  json config = adapted->config();
  const json list = config.value("moiety", json::object()).value("parts", json::array());
  json rest = json::array();
  const auto layers = config.value("num_hidden_layers", int64_t{0});
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
  return std::make_shared<MergedCheckpoint>(std::move(adapted), std::move(config));
}

}  // namespace moiety
