#pragma once
// A matrix with one interface over many stores: trainable float tensors, mapped float tensors, and mapped GGUF blocks
// that are never expanded as a whole.
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "moiety/io/tensor_view.h"
#include "moiety/kernels/dot.h"

namespace moiety {

class Beside;
class BesideStack;
class PackedMatrix;

/// A matrix [out, in] of f32, bf16 or f16 in the processor's memory, row after row; null: it is anything else.
struct PlainRows {
  const std::byte* data = nullptr;
  Format format = Format::F32;
};

/// y = x W^T + b over W [out, in]. Gradients reach x always, and W and b when they are float tensors that ask for it.
class LinearImpl : public torch::nn::Module {
 public:
  /// A float matrix [out, in], initialised U(-1/sqrt(in), 1/sqrt(in)) as torch's Linear.
  LinearImpl(int64_t in, int64_t out, bool bias = false);
  /// Over a given float tensor [out, in].
  explicit LinearImpl(torch::Tensor weight, torch::Tensor bias = {});
  /// A frozen matrix over a mapped file, blocks or plain; nothing is copied.
  explicit LinearImpl(const TensorView& mapped, torch::Tensor bias = {});
  /// A frozen matrix of blocks that `make` writes out of something else, on any thread: packed from what it returns,
  /// which is given back, or where products do not run packed kept from the first use on.
  LinearImpl(const TensorInfo& info, std::function<TensorView()> make, torch::Tensor bias = {});

  /// x [..., in] -> [..., out], in x's dtype. Error when something stands beside the matrix: project() knows of it.
  torch::Tensor forward(const torch::Tensor& x);
  /// The same by the matrix alone.
  torch::Tensor multiply(const torch::Tensor& x);
  /// Puts a part beside the matrix (nn/beside.h); several change its output one after another.
  void attach(std::shared_ptr<Beside> beside);
  struct Attached {
    std::shared_ptr<Beside> beside;
    int64_t place;  ///< of this matrix among those that the part stands beside
  };
  const std::vector<Attached>& attached() const { return attached_; }
  /// Rows `ids` of the matrix (an embedding look-up): [...] int64 -> [..., in].
  torch::Tensor rows(const torch::Tensor& ids, torch::Dtype dtype);
  /// The whole matrix in `dtype`; decoded when it is blocks.
  torch::Tensor dense(torch::Dtype dtype) const;

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  bool quantized() const { return blocks_ != nullptr && is_block(blocks_->format); }
  /// The mapped matrix, without data when that is written on demand; null when it is a float tensor of its own.
  const TensorView* mapped() const { return blocks_.get(); }
  /// A copy of a streamed matrix in memory, in the form that computes: one of these is set.
  struct Place {
    std::shared_ptr<const TensorView> blocks;
    std::shared_ptr<const PackedMatrix> packed;
    torch::Tensor weight;
  };
  /// Products read the matrix from here until the next call; null: from nowhere. Whoever does this calls stream().
  void put(std::shared_ptr<const Place> place) { place_ = std::move(place); }
  /// From now on the matrix is in memory only while it has a place: products without one are an Error, the mapped file
  /// is not read.
  void stream();
  bool streamed() const { return streamed_; }
  /// Blocks only: packs the matrix now where products would; whether it is packed.
  bool pack();
  /// Whether products may run on packed blocks: false for float weights, `exact`, a format or machine without them.
  bool packs() const { return packable_ && !exact; }
  /// The blocks packed for products, made on first use by one of the threads that ask; null where products of x run
  /// otherwise: packs() says no, a graph is to be built, another device.
  const PackedMatrix* packed_for(const torch::Tensor& x);
  /// The matrix where it lies, if it is one of plain numbers, in memory or mapped.
  PlainRows plain_rows() const;
  /// A float matrix with few rows, in f32 on the CPU (a router, a gate): see nn/dots.h.
  bool by_dots() const;
  static constexpr int64_t kDotRows = 16;
  /// Blocks only: always compute with the decoded f32 weights, never with activations rounded to 8 bits.
  bool exact = false;

  torch::Tensor weight;  ///< [out, in]; undefined when quantized
  torch::Tensor bias;    ///< [out], or undefined

 private:
  int64_t in_, out_;
  std::shared_ptr<const TensorView> blocks_;
  std::function<TensorView()> make_;  // what blocks_ lacks
  mutable std::once_flag made_once_;
  mutable std::shared_ptr<const TensorView> made_;
  std::shared_ptr<const TensorView> blocks() const;  // with their data
  bool packable_ = false;
  std::once_flag pack_once_;
  std::shared_ptr<const PackedMatrix> packed_;
  std::shared_ptr<const Place> place_;
  bool streamed_ = false;
  std::vector<Attached> attached_;
  static std::atomic<uint64_t> changes_;
  friend class LinearStackImpl;
  friend uint64_t matrices_changed();
};
TORCH_MODULE(Linear);
/// A float matrix [out, in] where it lies.
PlainRows plain_rows_of(const torch::Tensor& w);
/// Rows of activations up to which dot products are as fast as a matrix is read, and faster than anything else.
constexpr int64_t kPlainRows = 8;
/// Whether x W^T is computed as dot products in f32: at most `rows` rows x [..., in] of f32 or bf16, W large enough to
/// come from memory, both on the CPU, no graph.
bool runs_by_rows(const torch::Tensor& x, const torch::Tensor& w, int64_t rows = kPlainRows);
/// y[t * stride + r] = row r of the matrix [.., in] times row t of x [n, in] f32, for r = first ... last - 1: dot
/// products in f32, on the calling thread.
void plain_products(const PlainRows& rows, int64_t in, int64_t first, int64_t last, const float* x, int64_t n, float* y,
                    int64_t stride);

/// How often a matrix of this program was attached to or streamed, and once more: never 0.
uint64_t matrices_changed();

/// Several matrices, each alone, times one input, which is prepared for them once: x [..., in] -> [..., out] of each,
/// in x's dtype.
std::vector<torch::Tensor> multiply_all(std::initializer_list<Linear> matrices, const torch::Tensor& x);

/// E matrices [out, in] of one shape: one stacked trainable tensor [E, out, in], or mapped matrices that may lie
/// anywhere.
class LinearStackImpl : public torch::nn::Module {
 public:
  LinearStackImpl(int64_t count, int64_t in, int64_t out, bool bias = false);
  /// Over a stacked float tensor [E, out, in], bias [E, out] or undefined.
  explicit LinearStackImpl(torch::Tensor weight, torch::Tensor bias = {});
  /// Over separate mapped matrices of one shape (each float or blocks), bias [E, out] or undefined. Not trainable.
  explicit LinearStackImpl(std::vector<Linear> matrices, torch::Tensor bias = {});

  /// x [n, in] through matrix `index` -> [n, out].
  torch::Tensor forward(int64_t index, const torch::Tensor& x);
  int64_t count() const { return count_; }
  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  /// Matrix `index` in `dtype`.
  torch::Tensor dense(int64_t index, torch::Dtype dtype) const;
  /// Puts a part beside all matrices (nn/beside.h). Error when there is one.
  void attach(std::shared_ptr<BesideStack> beside);
  const std::shared_ptr<BesideStack>& beside() const { return beside_; }
  /// The separate matrices; none for a stacked tensor.
  std::vector<Linear>& matrices() { return matrices_; }
  /// How activations go with each matrix, [E], when all are separate and run as packed blocks and nothing else: nothing
  /// beside them, no bias of their own, not streamed. Null otherwise. Looked up once, and again when some matrix has
  /// been attached to or streamed: the objects of many experts lie scattered in memory.
  std::shared_ptr<const std::vector<ActivationKind>> packed_kinds();

  torch::Tensor weight;  ///< [E, out, in]; undefined when the matrices are separate
  torch::Tensor bias;    ///< [E, out], or undefined

 private:
  int64_t count_, in_, out_;
  std::vector<Linear> matrices_;
  std::shared_ptr<BesideStack> beside_;
  std::mutex packed_kinds_lock_;
  std::shared_ptr<const std::vector<ActivationKind>> packed_kinds_;
  uint64_t packed_kinds_at_ = 0;  // matrices_changed() when they were looked up
};
TORCH_MODULE(LinearStack);

}  // namespace moiety
