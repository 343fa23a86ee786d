#include "moiety/moe/products.h"

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

template <class T>
void by_kernel(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  const auto rows = [](const Operand& o) { return o.index.defined() ? o.index.size(0) : o.matrix.size(0); };
  const int64_t depth = a.transposed ? rows(a) : a.matrix.size(1);
  matmul(out.size(0), out.size(1), depth, view<T>(a), view<T>(b), bits<T>(out), out.stride(0), add);
}

}  // namespace

void multiply(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  const auto type = out.scalar_type();
  if (matmul_is_fast() && has_rows(out) && has_rows(a.matrix) && has_rows(b.matrix)) {
    if (type == torch::kFloat32) return by_kernel<float>(out, a, b, add);
    if (type == torch::kBFloat16) return by_kernel<at::BFloat16>(out, a, b, add);
  }
  multiply_by_torch(out, a, b, add);
}

void multiply_by_torch(const torch::Tensor& out, const Operand& a, const Operand& b, bool add) {
  auto to = out;
  if (add)
    to.addmm_(plain(a), plain(b));
  else
    at::mm_out(to, plain(a), plain(b));
}

}  // namespace moiety
