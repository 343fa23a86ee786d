// Adapter folders: adapter_config.json up to a NUL byte, then adapter_model.safetensors. Read alone, then put beside a
// dense model, one of experts and one whose rows lie in the order of GGUF files, and written again.
// libFuzzer: -max_len=4096
#include <filesystem>

#include "folder.h"
#include "fuzz.h"
#include "moiety/io/peft.h"

using namespace moiety;
namespace fs = std::filesystem;

namespace {

class Outline : public Checkpoint {
 public:
  explicit Outline(nlohmann::json config) : config_(std::move(config)) {
    infos_.push_back({"model.embed_tokens.weight", Format::F32, {4, 8}});
    for (const char* layer : {"0", "1"})
      for (const char* matrix : {"self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"})
        infos_.push_back({std::string("model.layers.") + layer + "." + matrix + ".weight", Format::F32, {8, 8}});
  }
  const nlohmann::json& config() const override { return config_; }
  const nlohmann::json& generation_config() const override { return none_; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  bool has(const std::string& name) const override {
    for (const auto& t : infos_)
      if (t.name == name) return true;
    return false;
  }
  TensorView get(const std::string& name) const override { fail("nobody asks for {}", name); }
  fs::path path() const override { return "outline"; }
  int64_t bytes_on_disk() const override { return 0; }

 private:
  nlohmann::json config_, none_ = nlohmann::json::object();
  std::vector<TensorInfo> infos_;
};

std::shared_ptr<const Checkpoint> base(nlohmann::json more) {
  nlohmann::json config = {{"hidden_size", 8},         {"num_hidden_layers", 2}, {"num_attention_heads", 2},
                           {"num_key_value_heads", 1}, {"head_dim", 4},          {"intermediate_size", 6}};
  config.update(more);
  return std::make_shared<Outline>(config);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fuzz::Folder folder("peft"), written("peft-written");
  static const std::shared_ptr<const Checkpoint> bases[] = {
      base({{"model_type", "llama"}}), base({{"model_type", "gpt_oss"}, {"num_local_experts", 3}}),
      base({{"model_type", "llama"}, {"moiety_rope_interleaved", true}})};
  fuzz::Input input(data, size);
  const auto text = input.text();
  const auto weights = input.rest();
  fuzz::put(folder.path / "adapter_config.json", text.data(), text.size());
  fuzz::put(folder.path / "adapter_model.safetensors", weights.data(), weights.size());
  fuzz::accepted([&] {
    const auto adapter = PeftAdapter::open(folder.path);
    for (const PeftMatrix& m : adapter->matrices()) {
      fuzz::require(m.rank >= 1 && adapter->find(m.path) != nullptr, "a matrix without a rank or a path");
      fuzz::require(m.a.shape[0] % m.rank == 0 && m.a.shape[0] == m.b.shape[1], "matrices that do not fit each other");
    }
  });
  for (const auto& one : bases)
    fuzz::accepted([&] {
      const auto adapted = with_adapters(one, {{folder.path, 0.5}, {folder.path, 1.0}});
      for (const TensorInfo& info : adapted->tensors()) {
        if (one->has(info.name)) continue;
        const auto values = adapted->get(info.name).to_float();
        fuzz::require(static_cast<int64_t>(values.size()) == info.elements(), "another number of values than elements");
      }
    });
  fuzz::accepted([&] {
    const auto adapted = with_adapters(bases[0], {{folder.path, 1.0}});
    std::vector<AdapterTensor> tensors;
    for (const TensorInfo& info : adapted->tensors())
      if (!bases[0]->has(info.name)) tensors.push_back({info.name, info.shape, adapted->get(info.name).to_float()});
    const bool readable =
        write_adapter(written.path, adapted->config().at("moiety").at("parts"), tensors, *bases[0], "base");
    if (readable && !tensors.empty()) PeftAdapter::open(written.path);
  });
  return 0;
}
