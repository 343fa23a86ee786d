#pragma once
// A safetensors file read as a checkpoint whose config has one section of `moiety`: what the file's metadata says under
// "section", or nothing.
#include <filesystem>

#include "fuzz.h"
#include "moiety/base/config.h"
#include "moiety/io/safetensors.h"
#include "moiety/io/whole_matrices.h"

namespace moiety::fuzz {

class InParts : public Checkpoint {
 public:
  InParts(std::shared_ptr<const SafetensorsFile> file, const char* section)
      : file_(std::move(file)), infos_(file_->tensors()) {
    const auto given = file_->metadata().find("section");
    config_["moiety"][section] =
        given == file_->metadata().end() ? nlohmann::json::object() : parse_json(given->second, "section");
  }
  const nlohmann::json& config() const override { return config_; }
  const nlohmann::json& generation_config() const override { return none_; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  bool has(const std::string& name) const override { return file_->has(name); }
  TensorView get(const std::string& name) const override { return file_->get(name); }
  std::filesystem::path path() const override { return "fuzz"; }
  int64_t bytes_on_disk() const override { return 0; }

 private:
  std::shared_ptr<const SafetensorsFile> file_;
  std::vector<TensorInfo> infos_;
  nlohmann::json config_, none_ = nlohmann::json::object();
};

/// Opens the bytes as such a checkpoint and asks for every matrix.
inline void read_in_parts(std::span<const std::byte> bytes, const char* section) {
  accepted([&] {
    const auto whole = with_whole_matrices(std::make_shared<InParts>(SafetensorsFile::parse(bytes, "fuzz"), section));
    for (const TensorInfo& info : whole->tensors()) {
      if (info.elements() > 1 << 20) continue;
      accepted([&] {
        const auto values = whole->get(info.name).to_float();
        require(static_cast<int64_t>(values.size()) == info.elements(), "another number of values than elements");
      });
    }
  });
}

}  // namespace moiety::fuzz
