#include "moiety/tasks/scoring.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {

TokenScores score_tokens(CausalModel& model, const torch::Tensor& ids, const torch::Tensor& mask, int64_t first,
                         bool greedy, bool stepwise) {
  check(ids.dim() == 2 && ids.size(1) >= 2, "scoring needs ids [batch, tokens] with at least two tokens");
  torch::NoGradGuard no_grad;
  const int64_t batch = ids.size(0), tokens = ids.size(1) - 1;
  const bool padded = mask.defined() && !mask.all().item<bool>();
  torch::Tensor logits;
  if (stepwise) {
    auto cache = model.make_cache();
    std::vector<torch::Tensor> steps;
    for (int64_t t = 0; t < tokens; ++t) {
      Pass pass;
      pass.cache = &cache;
      if (padded) pass.mask = mask.narrow(1, t, 1);
      steps.push_back(model.forward(ids.narrow(1, t, 1), pass));
    }
    logits = torch::cat(steps, 1);
  } else {
    // What is kept in another type than it is computed in shows in the score.
    auto cache = model.make_cache();
    Pass pass;
    if (model.cache_formats.k || model.cache_formats.v) pass.cache = &cache;
    if (padded) pass.mask = mask.narrow(1, 0, tokens);
    logits = model.forward(ids.narrow(1, 0, tokens), pass);
  }
  const torch::Tensor targets = ids.narrow(1, 1, tokens).to(logits.device());
  TokenScores out{torch::zeros({batch, tokens}), torch::zeros({batch, tokens}, torch::kBool)};
  // Pieces: log-softmax of the whole would need the memory of the logits once more.
  constexpr int64_t kPiece = 64;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = first; t < tokens; t += kPiece) {
      const int64_t n = std::min(kPiece, tokens - t);
      const auto piece = logits[b].narrow(0, t, n).to(torch::kFloat32);
      const auto target = targets[b].narrow(0, t, n);
      const auto chosen = piece.gather(1, target.unsqueeze(1)).squeeze(1);
      out.logprob[b].narrow(0, t, n).copy_(chosen - piece.logsumexp(1));
      if (!greedy) continue;
      const auto top = (chosen >= std::get<0>(piece.max(1))).to(torch::kCPU);
      for (int64_t i = 0; i < n; ++i) {
        if (!top[i].item<bool>()) continue;
        // A token of a lower id with the same logit would be taken first.
        const auto id = target[i].item<int64_t>();
        if (id == 0 || piece[i].narrow(0, 0, id).max().item<float>() < chosen[i].item<float>())
          out.greedy[b][t + i] = true;
      }
    }
  }
  return out;
}

int64_t rows_that_fit(const CausalModel& model, int64_t tokens, int64_t wanted) {
  check(wanted > 0, "batch size {} must be at least 1", wanted);
  const int64_t row = std::max<int64_t>(1, tokens) * model.vocab_size() * 4;
  return std::clamp<int64_t>((int64_t{1} << 30) / row, 1, wanted);
}

bool adds_bos(const Tokenizer& tokenizer) {
  const auto bos = tokenizer.bos();
  if (!bos) return false;
  const auto with = tokenizer.encode("a", true), without = tokenizer.encode("a", false);
  return with.size() > without.size() && with.front() == *bos;
}

}  // namespace moiety
