#include "moiety/nn/dots.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/kernels/token.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

torch::Tensor times_dots(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias) {
  const auto from = x.contiguous();
  const int64_t in = weight.size(1), out = weight.size(0), rows = in == 0 ? 0 : from.numel() / in;
  auto shape = x.sizes().vec();
  shape.back() = out;
  auto y = bias.defined() ? bias.expand(shape).clone(at::MemoryFormat::Contiguous) : torch::zeros(shape, x.options());
  const float *a = from.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  parallel_for(0, out, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, in * rows)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t i = 0; i < rows; ++i) {
        float sum = 0.f;
        rows_times(w + r * in, 1, in, a + i * in, &sum);
        to[i * out + r] += sum;
      }
  });
  return y;
}

}  // namespace

torch::Tensor multiply_narrow(Linear matrix, const torch::Tensor& x) {
  const LinearImpl& m = *matrix;
  const bool few = x.size(-1) == m.in() && x.numel() <= LinearImpl::kDotRows * m.in();
  if (m.by_dots() && m.attached().empty() && few && x.is_cpu() && x.scalar_type() == torch::kFloat32 &&
      may_shorten({x, m.weight, m.bias}))
    return times_dots(x, m.weight, m.bias);
  return matrix(x);
}

}  // namespace moiety
