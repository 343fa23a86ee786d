#include "moiety/adapt/peft_experts.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/io/peft.h"
#include "moiety/nn/weights.h"

namespace moiety {

PeftExperts read_peft_experts(const std::vector<std::string>& folders, const std::string& path, int64_t in, int64_t out,
                              int64_t rank) {
  const torch::NoGradGuard frozen;
  const auto n = static_cast<int64_t>(folders.size());
  PeftExperts e{torch::zeros({n, rank, in}), torch::zeros({n, out, rank}), torch::zeros({n})};
  for (int64_t i = 0; i < n; ++i) {
    const auto adapter = PeftAdapter::open(folders[static_cast<size_t>(i)]);
    check(!adapter->dora(), "{} is DoRA, whose magnitudes are no LoRA expert: merge it into a base instead",
          adapter->path().string());
    check(adapter->biases().empty(),
          "{} was trained with biases, which no LoRA expert has: merge it into a base instead",
          adapter->path().string());
    const PeftMatrix* m = adapter->find(path);
    if (m == nullptr) continue;
    const auto a = as_tensor(m->a).to(torch::kFloat32), b = as_tensor(m->b).to(torch::kFloat32);
    check(a.size(1) == in && b.size(0) == out, "{}: {} is [{}, {}] there, and the model's is [{}, {}]",
          adapter->path().string(), path, b.size(0), a.size(1), out, in);
    const int64_t own = a.size(0);
    check(own <= rank, "{} has rank {} at {}: set `rank` to {} at least", adapter->path().string(), own, path, own);
    e.a[i].narrow(0, 0, own).copy_(a);
    e.b[i].narrow(1, 0, own).copy_(b);
    e.scale[i] = m->scale;
  }
  return e;
}

}  // namespace moiety
