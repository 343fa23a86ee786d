#pragma once
// Experts of their own bit widths beside a GGUF file, as `moiety compress --method edgemoe` writes them: NAME.gguf
// holds everything but the experts and the keys `edgemoe.*`, NAME.experts.safetensors the experts, one after the
// other, so that one contiguous read fetches one:
//   blk.{block}.ffn_{gate,up,down}.{expert}.scale  F16 [out]
//   blk.{block}.ffn_{gate,up,down}.{expert}.q      U8 [out, ceil(in * bits / 8)], rows as in kernels/channel_quant.h
//   blk.{block}.ffn_{gate,up,down}.{expert}.weight F16 or F32 [out, in] where an expert has 16 or 32 bits
//   blk.{block}.ffn_pad.{expert}                   U8, up to 7 bytes where the next expert would not be aligned
// gate and up are [width, hidden], down is [hidden, width].
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/gguf.h"
#include "moiety/kernels/channel_quant.h"

namespace moiety {

/// What tells the parts of one model: the mixture blocks in order, sizes, and the width of every expert.
struct EdgeLayout {
  std::vector<int64_t> blocks;  ///< block of mixture layer l
  int64_t experts = 0;          ///< E, of every layer
  int64_t hidden = 0, width = 0;
  std::vector<int64_t> bits;  ///< [L * E]
  bool bf16 = false;          ///< experts compute in bf16; else f32
  std::string router_hash;    ///< of the model that the experts belong to

  int64_t layers() const { return static_cast<int64_t>(blocks.size()); }
  /// Bytes of one expert at these bits, without padding.
  int64_t stored_bytes(int64_t bits_of_expert) const;
  /// Error: sizes that do not fit together, widths other than 2, 4, 8, 16 and 32.
  void validate(const std::string& where) const;
};

/// The file of the experts that belongs to a model file: NAME.gguf -> NAME.experts.safetensors.
std::filesystem::path edge_experts_path(const std::filesystem::path& model);
/// Declares the keys of a layout in a model file.
void write_edge_keys(GgufWriter& writer, const EdgeLayout& layout);

/// Writes everything of `source` but the matrices of its experts, with the keys of `layout`, as a GGUF file; `options`
/// as for write_gguf, its leave_out and keys are set here.
WriteReport write_edge_model(const Checkpoint& source, const std::filesystem::path& file, const EdgeLayout& layout,
                             WriteOptions options = {});

struct EdgeExpert {
  std::vector<float> gate, up, down;  ///< row by row
};

/// Writes the file of the experts; `expert` gives layer, expert -> its weights. The file appears whole or not at all.
/// Error naming layer, expert and projection where a row cannot be quantized.
void write_edge_experts(const std::filesystem::path& file, const EdgeLayout& layout, Int2Scale int2,
                        const std::function<EdgeExpert(int64_t layer, int64_t expert)>& expert,
                        const std::function<void(int64_t done, int64_t total)>& progress = {});

/// One expert's row values after its width: what it computes with, before the compute dtype. In place; 16: rounded to
/// half, 32: unchanged.
void round_to_width(std::span<float> weights, int64_t columns, int64_t bits, Int2Scale int2);

class EdgeExperts {
 public:
  /// Null when the model has no key `edgemoe.bits`. Error: the file of the experts is missing, belongs to another
  /// model, or does not hold what the keys say.
  static std::shared_ptr<const EdgeExperts> open(const GgufFile& model, const std::filesystem::path& path);

  const EdgeLayout& layout() const { return layout_; }
  const std::filesystem::path& path() const { return path_; }
  struct Range {
    int64_t offset = 0, bytes = 0;
  };
  /// Where an expert lies in the file.
  Range range(int64_t layer, int64_t expert) const { return ranges_[index(layer, expert)]; }
  /// Bytes of one matrix of an expert as it computes: f32 or bf16, the same for gate, up and down.
  int64_t matrix_bytes() const { return layout_.hidden * layout_.width * (layout_.bf16 ? 2 : 4); }
  /// The bytes of range() as they compute: gate, up and down, matrix_bytes each; null: not wanted.
  void decode(int64_t layer, int64_t expert, std::span<const std::byte> stored,
              const std::array<std::byte*, 3>& out) const;
  /// The mapped bytes of an expert.
  std::span<const std::byte> stored(int64_t layer, int64_t expert) const;

 private:
  size_t index(int64_t layer, int64_t expert) const { return static_cast<size_t>(layer * layout_.experts + expert); }
  EdgeLayout layout_;
  std::filesystem::path path_;
  std::shared_ptr<const MappedFile> file_;
  std::vector<Range> ranges_;
};

/// The model with its experts back, decoded when asked for, in stacks as every GGUF file has them
/// (`model.layers.N.mlp.experts.gate_proj`, ...).
std::shared_ptr<const Checkpoint> with_edge_experts(std::shared_ptr<const Checkpoint> model,
                                                    std::shared_ptr<const EdgeExperts> experts);
/// The same whose stacks are places that nothing decodes and that take no memory unless they are read: zeros. For
/// models whose experts come from elsewhere. Other checkpoints are returned as they are.
std::shared_ptr<const Checkpoint> edge_outline(std::shared_ptr<const Checkpoint> checkpoint);
/// The experts behind a checkpoint of with_edge_experts; null for others.
std::shared_ptr<const EdgeExperts> edge_experts_of(const Checkpoint& checkpoint);

}  // namespace moiety
