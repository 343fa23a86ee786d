#pragma once
// The folder of a run: checkpoints that are there whole or not at all.
//
//   FOLDER/log.jsonl, report.html, tensorboard/     see run_log.h
//   FOLDER/checkpoints/step-00000100/               a model as transformers reads it, with its tokenizer
//   FOLDER/checkpoints/step-00000100/training/      state.json, state.safetensors: what a run goes on from
//   FOLDER/last, FOLDER/best                        links to checkpoints
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace moiety {

using NamedTensors = std::map<std::string, torch::Tensor>;

/// One file, synced and renamed into place; tensors of any device and layout.
void write_tensors(const std::filesystem::path& file, const NamedTensors& tensors);
/// Copies of all tensors of a file, on the CPU. Throws Error.
NamedTensors read_tensors(const std::filesystem::path& file);

class RunFolder {
 public:
  /// Creates the folder if need be and removes what a killed run left half-written. `clean` false: only looks at it.
  explicit RunFolder(std::filesystem::path path, bool clean = true);

  /// Writes checkpoint `step` by `write`, which gets an empty folder; the checkpoint appears under its name when all of
  /// it is on the disk. One that is there already is replaced. `last` points to it afterwards.
  void save(int64_t step, const std::function<void(const std::filesystem::path&)>& write);
  /// Lets `best` point to the checkpoint of that step.
  void mark_best(int64_t step);
  /// Removes all but the newest `keep` checkpoints and the one that `best` points to.
  void prune(int64_t keep);
  /// Steps of the checkpoints that are there, in order.
  std::vector<int64_t> steps() const;
  std::filesystem::path checkpoint(int64_t step) const;
  /// Removes checkpoints and logs: a fresh start.
  void clear();
  const std::filesystem::path& path() const { return path_; }

 private:
  void link(const std::string& name, int64_t step);
  std::filesystem::path path_;
};

}  // namespace moiety
