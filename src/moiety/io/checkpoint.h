#pragma once
// One lazy view of a model on disk, whatever holds it: an HF directory, a safetensors file, a GGUF file, or an installed
// Python package. A GGUF file is shown with Hugging Face tensor names and a Hugging Face config, so that models, transforms
// and reports know one naming only.
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
  /// `location`: a directory with config.json, a .safetensors or .gguf file, or `pip:PACKAGE`. Throws Error.
  static std::shared_ptr<const Checkpoint> open(const std::string& location);
  virtual ~Checkpoint() = default;

  /// HF config.json. Of a GGUF file: the equivalent HF config built from its metadata, with `"moiety_rope_interleaved": true`
  /// where the file's q/k rows are in neighbour order (the rows are mapped, not permuted back).
  virtual const nlohmann::json& config() const = 0;
  virtual const nlohmann::json& generation_config() const = 0;  ///< {} when the checkpoint has none
  virtual const std::vector<TensorInfo>& tensors() const = 0;   ///< HF names
  virtual bool has(const std::string& name) const = 0;
  virtual TensorView get(const std::string& name) const = 0;    ///< Throws Error when absent.

  virtual std::filesystem::path path() const = 0;               ///< the directory or file
  virtual std::shared_ptr<const GgufFile> gguf() const { return nullptr; }  ///< set when a GGUF file lies behind it
  virtual int64_t bytes_on_disk() const = 0;
};

/// Resolves `pip:PACKAGE` (searching $MOIETY_PYTHON, $VIRTUAL_ENV, ./.venv and the python3 on the path for the installed package)
/// to a file or directory; joins part packages once into the cache ($MOIETY_CACHE or ~/.cache/moiety) and checks their SHA-256.
/// Anything else is returned as a path; a path that does not exist is an Error naming the nearest things that do.
std::filesystem::path resolve_model(const std::string& location);

}  // namespace moiety
