#include "moiety/nn/dense.h"

#include <torch/torch.h>

#include <algorithm>
#include <optional>

#include "moiety/base/error.h"
#include "moiety/kernels/matmul.h"
#include "moiety/nn/products.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// Rows from which the products are bound by arithmetic: below, torch reads the matrix as fast as it can be read.
constexpr int64_t kManyRows = 16;
// A block of fewer rows or columns is packed for too little work.
constexpr int64_t kBlockRows = 7 * kMatmulRows, kBlockColumns = 128;

bool fits(const Tensor& t) {
  return t.is_cpu() && t.layout() == torch::kStrided;
}

// Blocks of `matrices` products of `rows` rows, so that there are enough of them for all threads.
int64_t row_parts(int64_t rows, int64_t matrices) {
  const int64_t wanted = (many_tasks() + matrices - 1) / matrices;
  return std::clamp<int64_t>(rows / kBlockRows, 1, wanted);
}

Tensor rows_of(const Tensor& t) {
  return t.reshape({-1, t.size(-1)});
}

using Optional = const std::optional<Tensor>&;

struct Dense : torch::autograd::Function<Dense> {
  static tensor_list forward(AutogradContext* context, const Tensor& x, const Tensor& w0, Optional w1, Optional w2,
                             Optional b0, Optional b1, Optional b2) {
    context->set_materialize_grads(false);
    tensor_list saved = {x, w0}, bias = {b0.value_or(Tensor()), b1.value_or(Tensor()), b2.value_or(Tensor())};
    for (Optional w : {w1, w2})
      if (w) saved.push_back(*w);
    context->save_for_backward(saved);
    std::vector<int64_t> biased, widths;
    for (size_t m = 0; m < kMostDense; ++m) biased.push_back(bias[m].defined());
    context->saved_data["biased"] = biased;
    tensor_list out, flat;
    auto shape = x.sizes().vec();
    const auto input = rows_of(x);
    for (size_t m = 0; m + 1 < saved.size(); ++m) {
      widths.push_back(saved[m + 1].size(0));
      shape.back() = widths[m];
      out.push_back(torch::empty(shape, x.options().requires_grad(false)));
      flat.push_back(out[m].view({-1, widths[m]}));
    }
    const auto blocks = output_blocks(input.size(0), widths);
    run_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const auto& block = blocks[static_cast<size_t>(i)];
      const auto& [m, rows, columns] = block;
      const auto to = block_of(flat[m], block);
      if (bias[m].defined()) to.copy_(part_of(bias[m], 0, columns).expand_as(to));
      multiply(to, {part_of(input, 0, rows)}, {part_of(saved[m + 1], 0, columns), true}, bias[m].defined());
    });
    return out;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const auto biased = context->saved_data["biased"].toIntVector();
    const auto& x = saved[0];
    const auto input = rows_of(x);
    const size_t count = saved.size() - 1;
    tensor_list dy(count), dw(count), result(1 + 2 * kMostDense);
    Tensor dx;
    bool any = false;
    for (size_t m = 0; m < count; ++m) {
      if (!grads[m].defined()) continue;
      any = true;
      dy[m] = rows_of(grads[m]).contiguous();
      if (context->needs_input_grad(1 + m)) {
        dw[m] = torch::empty_like(saved[m + 1], torch::MemoryFormat::Contiguous);
        result[1 + m] = dw[m];
      }
    }
    if (any && context->needs_input_grad(0)) {
      result[0] = torch::empty(x.sizes(), x.options());
      dx = rows_of(result[0]);
    }
    // Of the input's gradient, then of one matrix'.
    std::vector<OutputBlock> blocks;
    if (dx.defined())
      for (const auto& r : tile_ranges(dx.size(0), row_parts(dx.size(0), 1))) blocks.push_back({count, r, {}});
    for (size_t m = 0; m < count; ++m) {
      if (!dw[m].defined()) continue;
      for (OutputBlock b : output_blocks(dw[m].size(0), {dw[m].size(1)})) {
        b.matrix = m;
        blocks.push_back(b);
      }
    }
    run_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
      const auto& block = blocks[static_cast<size_t>(i)];
      const auto& [m, rows, columns] = block;
      if (m < count) {
        multiply(block_of(dw[m], block), {part_of(dy[m], 1, rows), true}, {part_of(input, 1, columns)});
        return;
      }
      bool add = false;
      for (size_t j = 0; j < count; ++j) {
        if (!dy[j].defined()) continue;
        multiply(part_of(dx, 0, rows), {part_of(dy[j], 0, rows)}, {saved[j + 1]}, add);
        add = true;
      }
    });
    size_t edge = 1 + count;
    for (size_t m = 0; m < kMostDense; ++m) {
      if (!biased[m]) continue;
      if (m < count && dy[m].defined() && context->needs_input_grad(edge))
        result[1 + kMostDense + m] = dy[m].sum(0, false, saved[1 + m].scalar_type());  // a bias has its matrix' type
      ++edge;
    }
    return result;
  }
};

}  // namespace

bool many_rows(const Tensor& x) {
  return x.size(-1) > 0 && x.numel() >= kManyRows * x.size(-1);
}

bool runs_dense(const Tensor& x, const DenseMatrix& matrix) {
  const auto &w = matrix.weight, &b = matrix.bias;
  const auto type = x.scalar_type();
  if ((type != torch::kFloat32 && type != torch::kBFloat16) || !fits(x) || !fits(w) || !matmul_is_fast()) return false;
  if (w.scalar_type() != type && w.scalar_type() != torch::kFloat32) return false;
  if (b.defined() && (!fits(b) || b.scalar_type() != w.scalar_type())) return false;
  return w.stride(1) == 1 && w.size(0) > 0 && many_rows(x);
}

std::vector<Tensor> dense_products(const Tensor& x, std::span<const DenseMatrix> matrices) {
  check(!matrices.empty() && matrices.size() <= kMostDense, "dense_products takes 1 to {} matrices, not {}", kMostDense,
        matrices.size());
  const auto at = [&](size_t i, torch::Tensor DenseMatrix::*member) -> std::optional<Tensor> {
    if (i >= matrices.size() || !(matrices[i].*member).defined()) return std::nullopt;
    return matrices[i].*member;
  };
  const auto input = x.stride(-1) == 1 ? x : x.contiguous();
  return Dense::apply(input, matrices[0].weight, at(1, &DenseMatrix::weight), at(2, &DenseMatrix::weight),
                      at(0, &DenseMatrix::bias), at(1, &DenseMatrix::bias), at(2, &DenseMatrix::bias));
}

std::vector<OutputBlock> output_blocks(int64_t rows, const std::vector<int64_t>& widths) {
  const auto count = static_cast<int64_t>(widths.size());
  const int64_t parts = row_parts(rows, count);
  const int64_t more = (many_tasks() + parts * count - 1) / (parts * count);
  std::vector<OutputBlock> blocks;
  for (size_t m = 0; m < widths.size(); ++m) {
    const int64_t across = std::clamp<int64_t>(widths[m] / kBlockColumns, 1, more);
    for (const auto& r : tile_ranges(rows, parts))
      for (int64_t c = 0; c < across; ++c)
        blocks.push_back({m, r, {widths[m] * c / across, widths[m] * (c + 1) / across}});
  }
  return blocks;
}

Tensor part_of(const Tensor& t, int64_t dim, std::pair<int64_t, int64_t> range) {
  return t.narrow(dim, range.first, range.second - range.first);
}

Tensor block_of(const Tensor& t, const OutputBlock& block) {
  return part_of(part_of(t, 0, block.rows), 1, block.columns);
}

std::vector<std::pair<int64_t, int64_t>> tile_ranges(int64_t total, int64_t parts) {
  const int64_t tiles = (total + kMatmulRows - 1) / kMatmulRows;
  parts = std::clamp<int64_t>(parts, 1, std::max<int64_t>(tiles, 1));
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t i = 0; i < parts; ++i)
    ranges.emplace_back(std::min(total, tiles * i / parts * kMatmulRows),
                        std::min(total, tiles * (i + 1) / parts * kMatmulRows));
  return ranges;
}

}  // namespace moiety
