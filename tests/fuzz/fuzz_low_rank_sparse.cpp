// Matrices in parts: a safetensors file read as a checkpoint whose config says that it has them.
#include <filesystem>

#include "fuzz.h"
#include "moiety/io/low_rank_sparse.h"
#include "moiety/io/safetensors.h"

using namespace moiety;

namespace {

class InParts : public Checkpoint {
 public:
  explicit InParts(std::shared_ptr<const SafetensorsFile> file) : file_(std::move(file)), infos_(file_->tensors()) {}
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
  nlohmann::json config_ = {{"moiety", {{kLowRankSparse, nlohmann::json::object()}}}};
  nlohmann::json none_ = nlohmann::json::object();
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  fuzz::accepted([&] {
    const auto whole = with_whole_matrices(std::make_shared<InParts>(SafetensorsFile::parse(bytes, "fuzz")));
    for (const TensorInfo& info : whole->tensors()) {
      if (info.elements() > 1 << 20) continue;
      fuzz::accepted([&] {
        const auto values = whole->get(info.name).to_float();
        fuzz::require(static_cast<int64_t>(values.size()) == info.elements(), "another number of values than elements");
      });
    }
  });
  return 0;
}
