#pragma once
// MoLM checkpoints (IBM's ModuleFormer, arXiv 2306.04640; model_type `moduleformer`): GPT-2's names and keys, module
// tensors stored [N, in, out]. They are shown as every other decoder: `model.layers.N.self_attn...`, module tensors [N,
// out, in], the mixtures as parts `moduleformer` and `moduleformer-attention` in the config.
#include <memory>
#include <nlohmann/json.hpp>

#include "moiety/io/checkpoint.h"

namespace moiety {

/// A config of that model_type with the keys that decoders have in common and its mixtures under `moiety.parts`, keys
/// that are left out as the released class has them; a config that names parts already, or of another model_type, as it
/// is. Error naming the key: a value of another type; att_hidden that n_head does not divide; more modules a token than
/// there are; keys and values that are not projected (att_hidden = n_embd and one head).
nlohmann::json moduleformer_config(const nlohmann::json& config);

/// The view, for a checkpoint of that model_type with tensors under the released names; any other as it is.
std::shared_ptr<const Checkpoint> with_common_names(std::shared_ptr<const Checkpoint> checkpoint);

}  // namespace moiety
