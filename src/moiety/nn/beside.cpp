#include "moiety/nn/beside.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "moiety/base/error.h"

namespace moiety {

void LinearImpl::attach(std::shared_ptr<Beside> beside) {
  check(beside != nullptr, "there is nothing to put beside the matrix");
  const int64_t place = beside->matrices++;
  // It counts once, under the first of its matrices.
  if (place == 0)
    register_module(attached_.empty() ? "adapter" : fmt::format("adapter{}", attached_.size() + 1), beside);
  attached_.push_back({std::move(beside), place});
  ++changes_;
}

void LinearStackImpl::attach(std::shared_ptr<BesideStack> beside) {
  check(!beside_, "something stands beside the matrices of these experts already");
  beside_ = register_module("adapter", std::move(beside));
  ++LinearImpl::changes_;
}

torch::Tensor Beside::merged(const torch::Tensor&, int64_t) const {
  fail("it cannot be merged into one matrix: {}", not_one_matrix());
}

torch::Tensor Beside::unmerged(const torch::Tensor& weight, int64_t place) const {
  return weight - merged(torch::zeros_like(weight), place);
}

torch::Tensor Beside::merged_bias(const torch::Tensor& bias, int64_t) const {
  return bias;
}

bool Beside::set_active(int64_t) {
  return false;
}

std::vector<torch::Tensor> project(std::initializer_list<Linear> matrices, const torch::Tensor& x, Pass& pass) {
  auto out = multiply_all(matrices, x);
  // Parts in the order in which they were attached, each with its outputs by place.
  std::vector<std::pair<Beside*, std::map<int64_t, size_t>>> found;
  size_t i = 0;
  for (Linear m : matrices) {
    for (const auto& [beside, place] : m->attached()) {
      auto at = std::find_if(found.begin(), found.end(), [&](const auto& f) { return f.first == beside.get(); });
      if (at == found.end()) at = found.insert(found.end(), {beside.get(), {}});
      at->second[place] = i;
    }
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
  if (matrix->attached().empty()) return matrix->multiply(x);
  return project({matrix}, x, pass)[0];
}

}  // namespace moiety
