#include "moiety/nn/products.h"

#include <torch/torch.h>

#include <exception>

#include "moiety/kernels/matmul.h"
#include "moiety/nn/elements.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

template <class T>
MatrixView<Bits<T>> view(const Operand& o) {
  return {bits<T>(o.matrix), o.matrix.stride(0), o.transposed,
          o.index.defined() ? o.index.const_data_ptr<int64_t>() : nullptr};
}

bool has_rows(const torch::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1;
}

torch::Tensor plain(const Operand& o) {
  const auto t = o.index.defined() ? o.matrix.index_select(0, o.index) : o.matrix;
  return o.transposed ? t.t() : t;
}

template <class Left, class Right, class Out>
void by_kernel(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  const auto rows = [](const Operand& o) { return o.index.defined() ? o.index.size(0) : o.matrix.size(0); };
  const int64_t depth = a.transposed ? rows(a) : a.matrix.size(1);
  matmul(out.size(0), out.size(1), depth, view<Left>(a), view<Right>(b), bits<Out>(out), out.stride(0), add);
}

bool try_kernel(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  enum { kF32, kBf16, kOther };
  const auto kind = [](const torch::Tensor& t) {
    return t.scalar_type() == torch::kFloat32 ? kF32 : t.scalar_type() == torch::kBFloat16 ? kBf16 : kOther;
  };
  const auto of_a = kind(a.matrix), of_b = kind(b.matrix), of_out = kind(out);
  if (of_a == kOther || of_b == kOther || of_out == kOther) return false;
  if (of_a == kF32) {
    if (of_b != kF32 || of_out != kF32) return false;
    by_kernel<float, float, float>(out, a, b, add);
  } else if (of_b == kF32) {
    (of_out == kF32 ? by_kernel<at::BFloat16, float, float> : by_kernel<at::BFloat16, float, at::BFloat16>)(out, a, b,
                                                                                                            add);
  } else {
    (of_out == kF32 ? by_kernel<at::BFloat16, at::BFloat16, float>
                    : by_kernel<at::BFloat16, at::BFloat16, at::BFloat16>)(out, a, b, add);
  }
  return true;
}

// Runs the product of another library on this thread alone. MKL asks OpenMP, not torch, whether it is in a task, and
// OpenMP knows of a task that is the only one as little as of none: the product would take all threads and add up in
// another order than beside other tasks.
template <class Product>
void alone(const Product& product) {
  if (parallel::inside() || at::get_num_threads() == 1) return product();
  std::exception_ptr failure;
  parallel::on_threads(2, [&](int index, int) {
    if (index != 0) return;
    try {
      product();
    } catch (...) {
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void multiply(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  if (matmul_is_fast() && has_rows(out) && has_rows(a.matrix) && has_rows(b.matrix) && try_kernel(out, a, b, add))
    return;
  alone([&] { multiply_by_torch(out, a, b, add); });
}

void multiply_by_torch(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  auto to = out;
  const auto left = plain(a), right = plain(b).to(left.scalar_type());
  if (to.scalar_type() != left.scalar_type()) {
    const auto product = at::mm(left, right);
    add ? to.add_(product) : to.copy_(product);
  } else if (add) {
    to.addmm_(left, right);
  } else {
    at::mm_out(to, left, right);
  }
}

}  // namespace moiety
