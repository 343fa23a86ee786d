#pragma once
// The one place that knows how GGUF and Hugging Face name the same things: tensors, and the values of config.json.
//
// What a GGUF file looks like through these names:
// - Layers: `model.layers.N.*` (decoders), `encoder.layer.N.*` (bert), `transformer.layer.N.*` (distilbert).
// - Stacked experts keep GGUF's layout, [E, out, in], under `model.layers.N.mlp.experts.{gate,up,down}_proj` (no
// `.weight`)
//   in every family; biases of experts (gpt-oss) are `..._proj_bias`, [E, out]. One-tensor-per-expert files of older
//   converters, and all checkpoints of the Hub, keep the family's own names (`mlp.experts.7.gate_proj.weight`,
//   `block_sparse_moe.experts.7.w1.weight`).
// - Shared experts of granitemoe are split in GGUF: `shared_mlp.{gate,up}_proj.weight` and
// `shared_mlp.output_linear.weight`.
// - DeepSeek's kv_b_proj may be split per head: `self_attn.k_b_proj` [H, kv_lora_rank, qk_nope_head_dim] and
//   `self_attn.v_b_proj` [H, v_head_dim, kv_lora_rank]; of head h, kv_b_proj's rows are k_b_proj[h] transposed, then
//   v_b_proj[h].
// - `moiety.rope_freqs`: divisors of the rope frequencies of a Llama 3 file, [head_dim / 2].
// - A tensor without a counterpart is called `gguf.` + its name in the file.
//
// Flags in the config of such a file, for what the file stores differently (nothing is copied to hide it):
// - `moiety_rope_interleaved`: rows of q_proj and k_proj are in neighbour order (2i, 2i+1) inside each head, where
// Hugging
//   Face has halves (i, i + head_dim/2). Not set for DeepSeek-V2/V3, whose Hugging Face order is neighbours already.
// - `moiety_norm_offset_folded`: norm weights of Gemma hold 1 + w where Hugging Face stores w.
// - `moiety_rope_freqs`: the frequencies must be divided by `moiety.rope_freqs`, because no rope_parameters could be
// found
//   that give the same divisors (normally the config has rope_type llama3 and the tensor repeats it).
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "moiety/io/gguf.h"

namespace moiety {

/// What is special about a `general.architecture`.
struct GgufArch {
  std::string_view name;
  bool rope_interleaved;    ///< q/k rows are permuted in files of this architecture
  bool norm_offset_folded;  ///< norms hold 1 + w
};
/// nullptr when moiety does not know the architecture.
const GgufArch* find_gguf_arch(std::string_view name);
std::vector<std::string_view> gguf_arch_names();

/// The architecture that holds a model of this HF config ("llama" for mistral and mixtral). Error when there is none.
std::string gguf_arch_of(const nlohmann::json& config);
/// The HF model_type of a GGUF file. Error for an unknown architecture.
std::string hf_model_type(const GgufFile& file);

/// GGUF tensor name -> HF name in a model of `model_type`. Names without counterpart become "gguf." + name.
std::string hf_tensor_name(std::string_view model_type, const std::string& gguf_name);
/// The other way; nullopt when one GGUF tensor does not correspond (fused layouts, heads that GGUF does not keep).
std::optional<std::string> gguf_tensor_name(std::string_view model_type, const std::string& hf_name);

/// The HF config.json of a GGUF file, with the flags above. A file written by moiety carries the config it came from
/// (key `moiety.config`), which is then returned instead, unless `derive` asks for what the standard keys say.
nlohmann::json hf_config(const GgufFile& file, bool derive = false);
/// bos, eos and pad ids and recommended sampling of the file.
nlohmann::json hf_generation_config(const GgufFile& file);

/// Declares the architecture's keys (not the tokenizer's) for an HF config.
void write_gguf_config(GgufWriter& writer, const nlohmann::json& config);
/// Divisors of the rope frequencies, [dims / 2], of a config with rope_type llama3; empty for others.
std::vector<float> llama3_rope_freqs(const nlohmann::json& config);

/// An entry of an HF config, looking into `text_config` of multimodal ones.
const nlohmann::json& text_config(const nlohmann::json& config);
/// Rope settings whatever the release of transformers wrote them: {rope_theta, rope_type, ...}; of a config with one
/// set per layer type, those of `layer_type`. `default_theta` where the config has none.
nlohmann::json rope_parameters(const nlohmann::json& config, const std::string& layer_type = "full_attention",
                               double default_theta = 10000.0);

}  // namespace moiety
