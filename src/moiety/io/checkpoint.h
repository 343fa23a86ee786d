#pragma once
// One lazy view of a model on disk, whatever holds it: an HF directory, a safetensors file, a GGUF file, or an
// installed Python package. A GGUF file is shown with Hugging Face tensor names and a Hugging Face config, so that
// models, transforms and reports know one naming only.
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/io/gguf.h"
#include "moiety/io/safetensors.h"
#include "moiety/io/tensor_view.h"

namespace moiety {

class Checkpoint {
 public:
  /// `location`: a directory with config.json and safetensors weights (one file, or shards with their index) or with
  /// one GGUF file; a .safetensors file (the config.json beside it, if any, is its config, else {}); a .gguf file (any
  /// part of a split model); or `pip:PACKAGE`. Only headers are read; weights stay mapped. Throws Error.
  static std::shared_ptr<const Checkpoint> open(const std::string& location);
  virtual ~Checkpoint() = default;

  /// HF config.json as it is. Of a GGUF file: the equivalent HF config built from its metadata, with flags for what the
  /// file stores in another order or form than HF: `moiety_rope_interleaved`, `moiety_norm_offset_folded`,
  /// `moiety_rope_freqs` (true where they apply, absent elsewhere; see gguf_names.h, which also says how its stacked
  /// experts are named).
  virtual const nlohmann::json& config() const = 0;
  virtual const nlohmann::json& generation_config() const = 0;  ///< {} when the checkpoint has none
  virtual const std::vector<TensorInfo>& tensors() const = 0;   ///< HF names
  virtual bool has(const std::string& name) const = 0;
  virtual TensorView get(const std::string& name) const = 0;  ///< Throws Error when absent.

  virtual std::filesystem::path path() const = 0;                           ///< the directory or file
  virtual std::shared_ptr<const GgufFile> gguf() const { return nullptr; }  ///< set when a GGUF file lies behind it
  virtual int64_t bytes_on_disk() const = 0;
};

/// Resolves `pip:PACKAGE` to the file or folder of the model that an installed Python package carries: a .gguf file, a
/// folder with config.json and .safetensors, or `NAME.gguf.partNN` files (in the package or in companions
/// PACKAGE_part1, ...) listed in its SHA256SUMS, which are joined once into the cache ($MOIETY_CACHE,
/// $XDG_CACHE_HOME/moiety or ~/.cache/moiety) and checked. Looked for, in this order, in the site-packages of
/// $MOIETY_PYTHON (an interpreter or a prefix), $VIRTUAL_ENV, the .venv beside or above the current folder, the .venv
/// beside or above the running program, the python3 on the path, and where that one says. Anything else is returned as
/// a path; a path that does not exist is an Error naming the nearest thing that does.
std::filesystem::path resolve_model(const std::string& location);

}  // namespace moiety
