#pragma once
// Adapter folders: PEFT's LoRA (adapter_config.json, adapter_model.safetensors), and the same layout for systems that
// PEFT does not know. A checkpoint with adapters is a checkpoint: its config names the parts, its tensors are theirs
// too.
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// One adapted matrix, or those of all experts of a layer, as stored.
struct PeftMatrix {
  std::string path;      ///< "model.layers.3.self_attn.q_proj"; of experts "model.layers.3.mlp.experts"
  bool experts = false;  ///< A [E r, in], B [out, r E], rank slowest in B
  TensorView a, b;       ///< [r, in], [out, r]
  bool has_magnitude = false;
  TensorView magnitude;  ///< DoRA: [out]
  int64_t rank = 0;
  double scale = 0.0;  ///< alpha / rank, or over its root (rsLoRA)
};

/// A bias that was trained with an adapter, of an adapted matrix or any other of the model.
struct PeftBias {
  std::string path;  ///< "model.layers.3.self_attn.q_proj.bias"
  TensorView value;
};

/// A LoRA adapter as PEFT writes it.
class PeftAdapter {
 public:
  /// Throws Error: not an adapter, not LoRA, something that LoRA here has no word for (trained modules beside it, a
  /// base that was changed, ...), numbers that are not finite.
  static std::shared_ptr<const PeftAdapter> open(const std::filesystem::path& folder);
  const nlohmann::json& config() const { return config_; }
  const std::filesystem::path& path() const { return path_; }
  const std::vector<PeftMatrix>& matrices() const { return matrices_; }
  const PeftMatrix* find(const std::string& path) const;
  /// Which biases were trained: none, lora_only or all; and those that are stored.
  const std::string& bias() const { return bias_; }
  const std::vector<PeftBias>& biases() const { return biases_; }
  bool dora() const;

 private:
  nlohmann::json config_;
  std::filesystem::path path_;
  std::vector<PeftMatrix> matrices_;
  std::string bias_ = "none";
  std::vector<PeftBias> biases_;
};

/// Whether a pattern of `rank_pattern` or `alpha_pattern` means a path, as PEFT reads it: it matches the whole path, or
/// what follows a dot of it. Throws Error naming `where`: it is no regular expression, or takes too many steps.
bool means_path(const std::string& pattern, const std::string& path, const std::string& where);

/// Whether an entry of `moiety.parts` takes the site `linear`, said or by its slug; false for what is no part.
bool stands_beside_matrices(const nlohmann::json& part);

/// The list `moiety.parts` of a model's config; null where it has none.
nlohmann::json parts_of(const nlohmann::json& config);
/// That list without those that stand beside matrices, as an array.
nlohmann::json other_parts_of(const nlohmann::json& config);
/// The parts of a model when `parts` are named for it: where all of them stand beside matrices, what the model has at
/// other sites stays, in front of them.
nlohmann::json parts_beside(const nlohmann::json& config, const nlohmann::json& parts);
/// Whether a tensor or parameter of this name is a bias, by its last part, as PEFT tells them.
bool is_bias(const std::string& name);
/// Whether a LoRA of these parts trains all biases of its base (`bias: all`).
bool biases_learn(const nlohmann::json& parts);

/// A folder that holds an adapter and no model.
bool is_adapter(const std::filesystem::path& folder);

struct AdapterChoice {
  std::filesystem::path folder;
  double strength = 1.0;  ///< times what it adds; 1 for systems other than LoRA and FlyLoRA
};
/// `base` with these adapters: one alone has no name, others are called by their folders. Throws Error naming adapter
/// and tensor where they do not fit or hold numbers that are not finite.
std::shared_ptr<const Checkpoint> with_adapters(std::shared_ptr<const Checkpoint> base,
                                                const std::vector<AdapterChoice>& adapters);
/// Where the base of an adapter lies: as the adapter names it, or as seen from its folder. Throws Error: it names none.
std::string adapter_base(const std::filesystem::path& folder);
/// The adapter with its base, or with another one in its place. What stands beside the base's own matrices is what the
/// adapter was trained on, and gives way to it.
std::shared_ptr<const Checkpoint> open_adapter(const std::filesystem::path& folder,
                                               std::shared_ptr<const Checkpoint> base = nullptr);

/// A tensor of a part as the model has it: "model.layers.3.adapters.q_proj.lora_A", f32; or a bias of the base by its
/// own name, where `bias: all` trained it.
struct AdapterTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
};
/// Writes the parts that stand beside matrices: as PEFT reads it where they are one LoRA that it knows, else
/// in the same layout with a section `moiety`. `base_name`: what the user calls the base. Returns whether PEFT reads
/// it. Throws Error, and writes nothing, for numbers that are not finite.
bool write_adapter(const std::filesystem::path& folder, const nlohmann::json& parts, std::vector<AdapterTensor> tensors,
                   const Checkpoint& base, const std::string& base_name);

}  // namespace moiety
