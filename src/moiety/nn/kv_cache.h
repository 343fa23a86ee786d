#pragma once
// Keys and values of past tokens, one slot per attention call of a pass (normally one per block; repeats have their
// own).
#include <torch/types.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace moiety {

class KvCache {
 public:
  explicit KvCache(int64_t slots = 0);

  /// Room for `tokens` more in `slot`, for whoever computes them to write: views [B, H, S, D] and [B, H, S, Dv] of all
  /// that is held, of which the last `tokens` positions are not written yet. Error: another number of rows than before.
  std::pair<torch::Tensor, torch::Tensor> extend(int64_t slot, int64_t rows, int64_t heads, int64_t tokens,
                                                 int64_t size, int64_t v_size, const torch::TensorOptions& options);
  /// Appends k [B, H, T, D] and v [B, H, T, Dv] to `slot`, growing it on demand; returns views of all that is held, [B,
  /// H, S, D].
  std::pair<torch::Tensor, torch::Tensor> append(int64_t slot, const torch::Tensor& k, const torch::Tensor& v);

  int64_t length() const { return length_; }  ///< tokens of finished passes
  /// Which of the past tokens are real, [B, length] bool; undefined when all are. Maintained by the model.
  const torch::Tensor& mask() const { return mask_; }
  /// Next position of every row [B] int64, undefined before the first pass. Padding does not count.
  const torch::Tensor& next_position() const { return next_; }
  /// Called once by the model when a pass of `tokens` tokens is over.
  void advance(int64_t tokens, const torch::Tensor& mask, const torch::Tensor& next_position);

  void crop(int64_t length);               ///< forgets all tokens from `length` on
  void select(const torch::Tensor& rows);  ///< keeps rows [B'] int64, in that order (beams, finished sequences)
  KvCache fork() const;                    ///< an independent copy
  int64_t bytes() const;

 private:
  struct Slot {
    torch::Tensor k, v;  // [B, H, capacity, D]
    int64_t length = 0;
  };
  std::vector<Slot> slots_;
  int64_t length_ = 0;
  torch::Tensor mask_, next_;
};

}  // namespace moiety
