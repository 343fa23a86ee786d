#include "moiety/nn/products.h"

#include <torch/torch.h>

#include "moiety/kernels/matmul.h"
#include "moiety/nn/elements.h"

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

// f32, f32, f32; bf16, bf16, bf16 or f32; bf16, f32, bf16: as matmul() has them.
bool try_kernel(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  const bool f32_out = out.scalar_type() == torch::kFloat32, f32_b = b.matrix.scalar_type() == torch::kFloat32;
  if ((!f32_out && out.scalar_type() != torch::kBFloat16) || (!f32_b && b.matrix.scalar_type() != torch::kBFloat16))
    return false;
  if (a.matrix.scalar_type() == torch::kFloat32 && f32_b && f32_out)
    by_kernel<float, float, float>(out, a, b, add);
  else if (a.matrix.scalar_type() != torch::kBFloat16 || (f32_b && f32_out))
    return false;
  else if (f32_b)
    by_kernel<at::BFloat16, float, at::BFloat16>(out, a, b, add);
  else if (f32_out)
    by_kernel<at::BFloat16, at::BFloat16, float>(out, a, b, add);
  else
    by_kernel<at::BFloat16, at::BFloat16, at::BFloat16>(out, a, b, add);
  return true;
}

}  // namespace

void multiply(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  if (matmul_is_fast() && has_rows(out) && has_rows(a.matrix) && has_rows(b.matrix) && try_kernel(out, a, b, add)) return;
  multiply_by_torch(out, a, b, add);
}

void multiply_by_torch(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  auto to = out;
  const auto left = plain(a), right = plain(b).to(left.scalar_type());
  if (to.scalar_type() != left.scalar_type()) {
    const auto product = at::mm(left.to(to.scalar_type()), right.to(to.scalar_type()));
    add ? to.add_(product) : to.copy_(product);
  } else if (add) {
    to.addmm_(left, right);
  } else {
    at::mm_out(to, left, right);
  }
}

}  // namespace moiety
