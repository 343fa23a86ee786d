#pragma once
// Writing a checkpoint with a progress bar, for the verbs that do.
#include <memory>
#include <string>

#include "moiety/base/progress.h"
#include "moiety/io/checkpoint_writer.h"

namespace moiety::cli {

inline bool is_gguf(const std::string& out) {
  return out.ends_with(".gguf");
}

/// A GGUF file where `out` ends in .gguf, a directory else. `verb` names the bar.
inline WriteReport write_checkpoint(const Checkpoint& checkpoint, const std::string& out, WriteOptions options,
                                    const std::string& verb) {
  std::unique_ptr<Progress> progress;
  if (!options.dry_run)
    options.progress = [&](int64_t done, int64_t total) {
      if (!progress) progress = std::make_unique<Progress>(verb, total, "byte");
      progress->set(done);
    };
  return is_gguf(out) ? write_gguf(checkpoint, out, options) : write_hf(checkpoint, out, options);
}

}  // namespace moiety::cli
