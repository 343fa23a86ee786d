#pragma once
// Keys and values of past tokens, one slot per attention call of a pass (normally one per block; repeats have their
// own). A layer that keeps a state in place of keys and values has it in its slot, too.
#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "moiety/kernels/format.h"

namespace moiety {

/// How keys and values are kept: F32, BF16, F16 or Q8_0; none: in the type that they are computed in.
struct CacheFormats {
  std::optional<Format> k, v;
};

/// Keys or values of a slot as they are kept, [B, H, S, D]: D numbers, or for Q8_0 the bytes of their blocks.
struct CacheRows {
  torch::Tensor data;
  Format format = Format::F32;
  int64_t size = 0;  ///< D, in numbers

  /// Whether `data` holds numbers of this type.
  bool is(torch::ScalarType type) const { return format != Format::Q8_0 && data.scalar_type() == type; }
  /// Some of the rows and heads.
  CacheRows narrow(int64_t row, int64_t rows, int64_t head, int64_t heads) const;
  /// All of it as numbers of `type`; `data` itself where it is of that type.
  torch::Tensor widened(torch::ScalarType type) const;
  /// Position 0 of a row and head, whose positions lie one behind the other in memory. On the CPU only.
  std::byte* at(int64_t row, int64_t head) const;
};

/// Where the keys or values of a slot lie on the CPU, until the slot grows or changes otherwise.
struct CachePlace {
  std::byte* data = nullptr;
  int64_t row = 0, head = 0;  ///< bytes from one to the next
  int64_t length = 0;         ///< positions that are held, the new ones included
  Format format = Format::F32;
  std::byte* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

class KvCache {
 public:
  explicit KvCache(int64_t slots = 0, CacheFormats formats = {});

  /// Room for `tokens` more in `slot`, for whoever computes them to write: all that is held, of which the last `tokens`
  /// positions are not written yet. `computed`: the type and device of what is computed. Error: another number of rows
  /// than before, Q8_0 for a size that is no multiple of its blocks or on another device than the CPU.
  std::pair<CacheRows, CacheRows> extend(int64_t slot, int64_t rows, int64_t heads, int64_t tokens, int64_t size,
                                         int64_t v_size, const torch::TensorOptions& computed);
  /// The same without tensors, for a token that asks every layer: where keys and values lie. On the CPU only.
  std::pair<CachePlace, CachePlace> extend_in_place(int64_t slot, int64_t rows, int64_t heads, int64_t tokens,
                                                    int64_t size, int64_t v_size, const torch::TensorOptions& computed);
  /// Appends k [B, H, T, D] and v [B, H, T, Dv] to `slot`, growing it on demand; returns all that is held. Error, too:
  /// a number that the format cannot hold, a gradient through Q8_0.
  std::pair<CacheRows, CacheRows> store(int64_t slot, const torch::Tensor& k, const torch::Tensor& v);
  /// The same, and what is held as numbers [B, H, S, D] of the type of k and v: views where it is kept so.
  std::pair<torch::Tensor, torch::Tensor> append(int64_t slot, const torch::Tensor& k, const torch::Tensor& v);

  /// What a recurrent layer left in `slot` behind the tokens of finished passes: tensors [B, ...], as they were set,
  /// whatever the formats; none before the first pass. Error: another number of rows than before.
  std::vector<torch::Tensor> state(int64_t slot, int64_t rows) const;
  /// Its state behind `tokens` more. The one that this pass began with is kept besides, so that it can be undone.
  void set_state(int64_t slot, std::vector<torch::Tensor> state, int64_t tokens);

  int64_t length() const { return length_; }  ///< tokens of finished passes
  /// Which of the past tokens are real, [B, length] bool; undefined when all are. Maintained by the model.
  const torch::Tensor& mask() const { return mask_; }
  /// Next position of every row [B] int64, undefined before the first pass. Padding does not count.
  const torch::Tensor& next_position() const { return next_; }
  /// Called once by the model when a pass of `tokens` tokens is over.
  void advance(int64_t tokens, const torch::Tensor& mask, const torch::Tensor& next_position);

  /// Forgets all tokens from `length` on. Error unless can_crop(length): a state cannot be taken apart.
  void crop(int64_t length);
  /// Keys and values can go back to any length; states to 0 and to where the last pass began.
  bool can_crop(int64_t length) const;
  void select(const torch::Tensor& rows);  ///< keeps rows [B'] int64, in that order (beams, finished sequences)
  KvCache fork() const;                    ///< an independent copy
  int64_t bytes() const;

 private:
  struct State {
    std::vector<torch::Tensor> tensors;
    int64_t length = 0;  // tokens that it has read
  };
  struct Slot {
    CacheRows k, v;  // data [B, H, capacity, D]
    int64_t length = 0;
    State now, before;  // of a recurrent layer
  };
  Slot& grow(int64_t slot, int64_t rows, int64_t heads, int64_t tokens, int64_t size, int64_t v_size,
             const torch::TensorOptions& computed);
  std::vector<Slot> slots_;
  CacheFormats formats_;
  int64_t length_ = 0;
  torch::Tensor mask_, next_;
};

}  // namespace moiety
