#include "moiety/io/overlay.h"

#include <unordered_map>

#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

class Overlay : public Checkpoint {
 public:
  Overlay(std::shared_ptr<const Checkpoint> base, nlohmann::json config, std::vector<OverlayTensor> tensors,
          const std::set<std::string>& removed)
      : base_(std::move(base)), config_(std::move(config)) {
    for (auto& t : tensors) {
      const std::string name = t.info.name;
      check(own_.emplace(name, std::move(t)).second, "tensor '{}' is there twice", shown(name));
    }
    std::set<std::string> placed;
    for (const TensorInfo& t : base_->tensors()) {
      if (removed.count(t.name) != 0) continue;
      const auto it = own_.find(t.name);
      tensors_.push_back(it == own_.end() ? t : it->second.info);
      names_.insert(t.name);
      placed.insert(t.name);
    }
    for (const auto& [name, t] : own_)
      if (placed.count(name) == 0) {
        tensors_.push_back(t.info);
        names_.insert(name);
      }
  }
  const nlohmann::json& config() const override { return config_; }
  const nlohmann::json& generation_config() const override { return base_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return names_.count(name) != 0; }
  TensorView get(const std::string& name) const override {
    check(has(name), "{}: there is no tensor '{}'", path().string(), shown(name));
    const auto it = own_.find(name);
    if (it == own_.end()) return base_->get(name);
    TensorView v = it->second.get();
    const TensorInfo& info = it->second.info;
    check(v.shape == info.shape && v.format == info.format, "tensor '{}' came out as another one", shown(name));
    v.name = name;
    return v;
  }
  std::filesystem::path path() const override { return base_->path(); }
  std::shared_ptr<const GgufFile> gguf() const override { return base_->gguf(); }
  int64_t bytes_on_disk() const override { return base_->bytes_on_disk(); }

 private:
  std::shared_ptr<const Checkpoint> base_;
  nlohmann::json config_;
  std::map<std::string, OverlayTensor> own_;
  std::vector<TensorInfo> tensors_;
  std::set<std::string> names_;
};

}  // namespace

std::shared_ptr<const Checkpoint> overlay(std::shared_ptr<const Checkpoint> base, nlohmann::json config,
                                          std::vector<OverlayTensor> tensors, const std::set<std::string>& removed) {
  return std::make_shared<Overlay>(std::move(base), std::move(config), std::move(tensors), removed);
}

bool is_overlay(const Checkpoint& checkpoint) {
  return dynamic_cast<const Overlay*>(&checkpoint) != nullptr;
}

OverlayTensor overlay_of(std::string name, std::vector<int64_t> shape, std::vector<float> values) {
  OverlayTensor t;
  t.info.name = std::move(name);
  t.info.format = Format::F32;
  t.info.shape = std::move(shape);
  const auto held = std::make_shared<std::vector<float>>(std::move(values));
  t.get = [info = t.info, held] {
    TensorView v;
    static_cast<TensorInfo&>(v) = info;
    v.data = std::as_bytes(std::span(*held));
    v.owner = held;
    return v;
  };
  return t;
}

}  // namespace moiety
