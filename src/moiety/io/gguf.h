#pragma once
// GGUF versions 2 and 3: lazy mapped reader and crash-safe streaming writer.
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

#include "moiety/io/mapped_file.h"
#include "moiety/io/tensor_view.h"

namespace moiety {

/// Value of one metadata key. Strings of arrays point into the mapped file (a vocabulary is 200k strings: nothing is copied).
using GgufArray = std::variant<std::vector<int64_t>, std::vector<uint64_t>, std::vector<double>, std::vector<uint8_t>, std::vector<std::string_view>>;
struct GgufValue {
  int32_t type = 0;          ///< value type of the file (0 uint8 ... 12 float64), 9 for arrays
  int32_t element_type = 0;  ///< of arrays
  std::variant<int64_t, uint64_t, double, bool, std::string, GgufArray> value;
};

class GgufFile {
 public:
  /// Opens one file, or all parts of a split model when given any part's name. Throws Error.
  static std::shared_ptr<const GgufFile> open(const std::filesystem::path& path);
  static std::shared_ptr<const GgufFile> parse(std::span<const std::byte> bytes, std::string where, std::shared_ptr<const void> owner = nullptr);

  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  bool has(const std::string& name) const { return index_.count(name) != 0; }
  TensorView get(const std::string& name) const;

  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }  ///< in file order
  const GgufValue* find(std::string_view key) const;
  /// Typed access. Absent: nullopt. Present with another kind of value: Error naming the key.
  std::optional<std::string> string(std::string_view key) const;
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<bool> boolean(std::string_view key) const;
  const std::vector<std::string_view>* strings(std::string_view key) const;  ///< nullptr when absent
  std::vector<double> numbers(std::string_view key) const;                   ///< numeric array, or a scalar as one element; empty when absent
  const std::string& where() const { return where_; }
  uint32_t version() const { return version_; }

 private:
  friend struct GgufParser;
  GgufFile() = default;
  std::string where_;
  uint32_t version_ = 3;
  std::vector<std::shared_ptr<const void>> owners_;  // one a part
  std::vector<size_t> owner_of_;                     // per tensor
  std::vector<TensorInfo> tensors_;
  std::vector<std::span<const std::byte>> data_;
  std::unordered_map<std::string, size_t> index_;
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::unordered_map<std::string, size_t> keys_;
};

/// Writes a version-3 file; tensors are declared first, then written in that order. Temporary name, sync, rename.
class GgufWriter {
 public:
  GgufWriter(std::filesystem::path path, uint32_t alignment = 32);
  ~GgufWriter();
  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;
  void set(const std::string& key, std::string value);
  void set_u32(const std::string& key, uint32_t value);
  void set_f32(const std::string& key, float value);
  void set_bool(const std::string& key, bool value);
  void set_array(const std::string& key, const std::vector<std::string>& values);
  void set_array_f32(const std::string& key, const std::vector<float>& values);
  void set_array_i32(const std::string& key, const std::vector<int32_t>& values);
  void set(const std::string& key, const GgufValue& value);  ///< copies a value of another file
  void declare(const TensorInfo& info);  ///< shape slowest dimension first, as everywhere in moiety
  void write(const std::string& name, std::span<const std::byte> bytes);
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moiety
