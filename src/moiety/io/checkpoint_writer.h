#pragma once
// Writes any checkpoint as an HF directory or as a GGUF file, one tensor (one stack of experts) in memory at a time.
// Layouts that differ are converted: rows of q/k (rope order), Gemma's norms, stacked and fused experts, DeepSeek's
// kv_b_proj, gpt-oss' interleaved gate and up and its MXFP4 nibbles. Output appears whole or not at all.
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "moiety/io/checkpoint.h"

namespace moiety {

struct WriteOptions {
  /// GGUF: a format ("q8_0", "f16", ...), a mixture ("q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s"), or "" to keep each
  /// tensor's own. Norms, routers, biases and position tables stay F32; the output matrix (or the embedding, when it
  /// serves as one) gets Q6_K under all formats below 8 bits; rows that a format's blocks do not divide get the nearest
  /// format that fits.
  std::string type;
  /// GGUF: regular expressions (searched in the GGUF and the HF name, case counts) and the format of the tensors they
  /// match; the first that matches counts. Vectors stay F32 all the same.
  std::vector<std::pair<std::string, std::string>> tensor_types;
  /// HF: "f32", "f16", "bf16", or "" to keep floating tensors as they are (block formats become bf16).
  std::string dtype;
  std::function<bool(const std::string& gguf_name)> leave_out;  ///< GGUF: tensors that are not written
  std::function<void(GgufWriter&)> keys;                        ///< GGUF: declares further keys
  int64_t shard_bytes = int64_t{5} << 30;  ///< HF: size of a safetensors file
  int threads = 0;                         ///< 0: all cores
  bool overwrite = false;                  ///< replace a model that is there; without it, that is an Error
  bool dry_run = false;                    ///< plan and report only
  /// Called after each tensor with bytes written so far and in all.
  std::function<void(int64_t done, int64_t total)> progress;
};

struct WriteReport {
  std::vector<TensorInfo> tensors;  ///< as written
  int64_t bytes = 0;                ///< of tensor data
  int64_t elements = 0;
  std::vector<std::string> warnings;
};

/// Names that `WriteOptions::type` takes, lower case.
std::vector<std::string> gguf_type_names();

WriteReport write_gguf(const Checkpoint& checkpoint, const std::filesystem::path& file,
                       const WriteOptions& options = {});
/// `folder` is created if need be.
WriteReport write_hf(const Checkpoint& checkpoint, const std::filesystem::path& folder,
                     const WriteOptions& options = {});

/// gpt-oss stores MXFP4 as `*_blocks` [.., 16] (neighbouring nibbles) and `*_scales` [..]: to one GGUF block of 17
/// bytes.
void mxfp4_to_gguf(const std::byte* blocks, std::byte scale, std::byte* out);
/// The other way.
void mxfp4_from_gguf(const std::byte* block, std::byte* blocks, std::byte& scale);

}  // namespace moiety
