#pragma once
// Safetensors: https://github.com/huggingface/safetensors#format. Lazy mapped reader, crash-safe streaming writer.
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "moiety/io/mapped_file.h"
#include "moiety/io/tensor_view.h"

namespace moiety {

class SafetensorsFile {
 public:
  /// Parses and validates the header only; trusts no length, offset or name in it. Throws Error.
  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);
  /// The same over bytes in memory (for tests and fuzzing); `owner` keeps them alive.
  static std::shared_ptr<const SafetensorsFile> parse(std::span<const std::byte> bytes, std::string where,
                                                      std::shared_ptr<const void> owner = nullptr);

  const std::vector<TensorInfo>& tensors() const { return tensors_; }  ///< in file order
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool has(const std::string& name) const { return index_.count(name) != 0; }
  TensorView get(const std::string& name) const;  ///< Throws Error when absent.

 private:
  SafetensorsFile() = default;
  std::string where_;
  std::shared_ptr<const void> owner_;
  std::span<const std::byte> data_;
  std::vector<TensorInfo> tensors_;
  std::vector<size_t> offsets_;
  std::unordered_map<std::string, size_t> index_;
  std::map<std::string, std::string> metadata_;
};

/// Writes one file whose tensor list is known beforehand: header first, then data in the given order, in pieces.
/// The file appears under its name only after finish(): written to a temporary name, synced, renamed.
class SafetensorsWriter {
 public:
  SafetensorsWriter(std::filesystem::path path, std::vector<TensorInfo> tensors, std::map<std::string, std::string> metadata = {});
  ~SafetensorsWriter();  ///< removes the temporary file unless finished
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  /// Appends the bytes of tensor `name`; tensors come in the declared order, each whole before the next.
  void write(const std::string& name, std::span<const std::byte> bytes);
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Writes a HF-style checkpoint that fills shards as it goes: model.safetensors, or model-0000i-of-0000n.safetensors with
/// model.safetensors.index.json once it passes `shard_bytes`. Peak memory is one tensor. Nothing is visible before finish().
class ShardedWriter {
 public:
  ShardedWriter(std::filesystem::path folder, int64_t shard_bytes = int64_t{5} << 30);
  ~ShardedWriter();
  ShardedWriter(const ShardedWriter&) = delete;
  ShardedWriter& operator=(const ShardedWriter&) = delete;
  void add(const TensorInfo& info, std::span<const std::byte> bytes);
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moiety
