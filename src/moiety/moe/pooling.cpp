#include "moiety/moe/pooling.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <iterator>
#include <vector>

namespace moiety {

void pool(Pass& pass, const std::string& key, const torch::Tensor& rows) {
  const auto first = pass.state.lower_bound(key + '#'), last = pass.state.lower_bound(key + '$');
  pass.state[fmt::format("{}#{:06}", key, std::distance(first, last))] = rows;
}

torch::Tensor pooled(const Pass& pass, const std::string& key) {
  std::vector<torch::Tensor> all;
  for (auto it = pass.state.lower_bound(key + '#'); it != pass.state.lower_bound(key + '$'); ++it)
    all.push_back(it->second);
  return all.empty() ? torch::Tensor() : torch::cat(all);
}

}  // namespace moiety
