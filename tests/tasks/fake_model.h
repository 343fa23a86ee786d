#pragma once
// A causal model whose distribution is a known function of everything before a token: a mistake of one position shows.
#include <torch/torch.h>

#include <cmath>

#include "moiety/base/error.h"
#include "moiety/models/model.h"

namespace moiety {

class FakeModel : public CausalModel {
 public:
  FakeModel(int64_t vocabulary, int64_t context) : vocabulary_(vocabulary), context_(context) {}

  /// Logits after `prefix`.
  std::vector<float> after(const std::vector<int64_t>& prefix) const {
    uint64_t h = 1469598103934665603ull;
    for (const int64_t id : prefix) h = (h ^ static_cast<uint64_t>(id + 1)) * 1099511628211ull;
    std::vector<float> logits(static_cast<size_t>(vocabulary_));
    for (auto& l : logits) {
      h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9ull;
      l = static_cast<float>(h >> 40) / static_cast<float>(1 << 22);  // 0 .. 4
    }
    return logits;
  }
  double logprob(const std::vector<int64_t>& prefix, int64_t target) const {
    const auto logits = after(prefix);
    double sum = 0.0;
    for (const float l : logits) sum += std::exp(static_cast<double>(l));
    return static_cast<double>(logits[static_cast<size_t>(target)]) - std::log(sum);
  }

  torch::Tensor forward(const torch::Tensor& ids, Pass& pass) override {
    check(ids.size(1) <= context_, "{} tokens do not fit", ids.size(1));
    largest_batch = std::max(largest_batch, ids.size(0));
    auto out = torch::zeros({ids.size(0), ids.size(1), vocabulary_});
    for (int64_t b = 0; b < ids.size(0); ++b) {
      std::vector<int64_t> prefix;
      for (int64_t t = 0; t < ids.size(1); ++t) {
        if (!pass.mask.defined() || pass.mask[b][t].item<bool>()) prefix.push_back(ids[b][t].item<int64_t>());
        out[b][t].copy_(torch::tensor(after(prefix)));
      }
    }
    return out;
  }
  torch::Tensor hidden(const torch::Tensor&, Pass&) override { fail("a fake model has no hidden states"); }
  KvCache make_cache() const override { return KvCache(0); }
  int64_t vocab_size() const override { return vocabulary_; }
  int64_t context_length() const override { return context_; }
  int64_t blocks() const override { return 0; }
  int64_t experts(int64_t) const override { return 0; }
  const nlohmann::json& config() const override { return config_; }

  int64_t largest_batch = 0;

 private:
  int64_t vocabulary_, context_;
  nlohmann::json config_ = nlohmann::json::object();
};

}  // namespace moiety
