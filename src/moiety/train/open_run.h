#pragma once
// What a run trains: the model with f32 parameters, its tokenizer, and the files that go into every checkpoint beside
// the weights.
#include <torch/types.h>

#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "moiety/io/chat_template.h"
#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"
#include "moiety/train/config.h"
#include "moiety/train/optimizer.h"
#include "moiety/train/run_folder.h"

namespace moiety {

struct OpenRun {
  std::shared_ptr<CausalModel> model;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;
  nlohmann::json config;                     ///< config.json of the checkpoints
  nlohmann::json generation_config;          ///< their generation_config.json
  std::map<std::string, std::string> files;  ///< name -> content: tokenizer.json and what else belongs to it
  /// Parts beside matrices of a frozen base are all that learns: what is written is an adapter of this base.
  std::shared_ptr<const Checkpoint> adapted;
  std::string adapted_name;
};

/// Builds or loads the model that `config` describes, with all float parameters asking for gradients. `weights` false:
/// random ones always (to look at shapes). A GGUF checkpoint is converted once to Hugging Face's layout in `scratch`,
/// so that what is saved is an ordinary checkpoint. Throws Error.
OpenRun open_run(const TrainConfig& config, torch::Device device, const std::filesystem::path& scratch,
                 bool weights = true);

/// Whether parts beside the matrices of a frozen base are all that a run learns, so that it writes an adapter: all of
/// `parts` (null: those that the checkpoint has) stand there, and the run does not say itself what learns.
bool adapts(const TrainConfig& config, const Checkpoint& checkpoint);
/// What an adapter of the model at `location` is to call its base: that of an adapter, or the location itself.
std::string base_name(const std::string& location);

/// Name of a parameter or buffer as patterns see it: that of the module tree, with "layers.3." for block 3 of a
/// decoder and "blocks.3." for what block 3 of a vision model was the first to have.
std::string parameter_name(const std::string& name);

/// The parameters that learn, with their rates and decays: what the run's patterns say, else everything, or, where
/// parts stand beside matrices, those parts only. Gradients of all others are switched off. Throws Error for patterns
/// that do not compile or match nothing.
std::vector<Slot> trained_slots(torch::nn::Module& model, const TrainConfig& config);

/// Writes tensors as model.safetensors (in shards when large) in `dtype`: f32, bf16, f16.
void write_stored(const std::filesystem::path& folder, const std::vector<StoredTensor>& tensors,
                  const std::string& dtype);
/// `dtype` as config.json spells it: "float32", "bfloat16", "float16".
std::string dtype_name(const std::string& dtype);

/// Writes what stands beside the matrices of `base` as an adapter: tensors of `parts` among `stored`, and the base's
/// biases where a part trains them.
void write_stored_adapter(const std::filesystem::path& folder, const std::vector<StoredTensor>& stored,
                          const nlohmann::json& parts, const Checkpoint& base, const std::string& base_name);

/// Writes the model into `folder` as transformers reads it, or its adapter alone, as PEFT does where it can. `dtype`:
/// f32, bf16, f16, of a model.
void write_model(const std::filesystem::path& folder, const OpenRun& run, const std::string& dtype);

}  // namespace moiety
