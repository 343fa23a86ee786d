#include "moiety/nn/beside.h"

#include <map>
#include <utility>

#include "moiety/base/error.h"

namespace moiety {

void LinearImpl::attach(std::shared_ptr<Beside> beside) {
  check(!beside_, "something stands beside the matrix already");
  beside_at_ = beside->matrices++;
  // It counts once, under the first of its matrices.
  if (beside_at_ == 0) register_module("adapter", beside);
  beside_ = std::move(beside);
}

std::vector<torch::Tensor> project(std::initializer_list<Linear> matrices, const torch::Tensor& x, Pass& pass) {
  auto out = multiply_all(matrices, x);
  std::map<Beside*, std::map<int64_t, size_t>> found;  // by place: which output
  size_t i = 0;
  for (Linear m : matrices) {
    if (m->beside()) found[m->beside().get()][m->beside_at()] = i;
    ++i;
  }
  for (const auto& [beside, places] : found) {
    check(static_cast<int64_t>(places.size()) == beside->matrices,
          "a part that stands beside {} matrices is asked for {} of them", beside->matrices, places.size());
    std::vector<torch::Tensor> own;
    for (const auto& [place, at] : places) own.push_back(out[at]);
    beside->apply(x, own, pass);
    size_t n = 0;
    for (const auto& [place, at] : places) out[at] = own[n++];
  }
  return out;
}

torch::Tensor project(Linear matrix, const torch::Tensor& x, Pass& pass) {
  if (!matrix->beside()) return matrix->multiply(x);
  return project({matrix}, x, pass)[0];
}

}  // namespace moiety
