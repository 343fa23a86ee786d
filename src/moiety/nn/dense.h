#pragma once
// Products with whole float matrices on the CPU, forward and backward, as tasks (tasks.h) over our own kernels: blocks
// of all matrices that read one input side by side, and in the backward pass the blocks of the input's gradient beside
// those of the weights'. Internal to linear.cpp.
#include <torch/types.h>

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace moiety {

/// W [out, in] and b [out] or undefined.
struct DenseMatrix {
  torch::Tensor weight, bias;
};

/// Matrices that one call takes.
constexpr size_t kMostDense = 3;

/// More rows than a product has that is done when the matrix is read.
bool many_rows(const torch::Tensor& x);

/// Whether dense_products() takes x [..., in] and the matrix: f32 or bf16 on the CPU, W of x's type or f32, whole rows,
/// many of them, and a machine whose kernels are fast.
bool runs_dense(const torch::Tensor& x, const DenseMatrix& matrix);

/// x [..., in] -> x W^T + b [..., out] of each matrix, in x's type. Gradients have the types of what they belong to:
/// those of f32 weights are never rounded to bf16. The same bits for any number of threads, and for a row whatever is
/// beside it.
std::vector<torch::Tensor> dense_products(const torch::Tensor& x, std::span<const DenseMatrix> matrices);

/// A block of one of several matrices [rows, width] that products fill.
struct OutputBlock {
  size_t matrix;
  std::pair<int64_t, int64_t> rows, columns;  ///< [first, last)
};
/// Blocks that cover the matrices, enough of them for all threads, none too small for the kernels. How they are cut
/// changes no bit of what a product gives.
std::vector<OutputBlock> output_blocks(int64_t rows, const std::vector<int64_t>& widths);
/// Indices [first, last) of one dimension.
torch::Tensor part_of(const torch::Tensor& t, int64_t dim, std::pair<int64_t, int64_t> range);
/// The block of `t` [rows, width].
torch::Tensor block_of(const torch::Tensor& t, const OutputBlock& block);

/// Ranges [first, last) of `total`, `parts` of them or fewer, in steps of the kernels' tiles.
std::vector<std::pair<int64_t, int64_t>> tile_ranges(int64_t total, int64_t parts);

}  // namespace moiety
