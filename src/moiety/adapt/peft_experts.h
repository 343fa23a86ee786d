#pragma once
// LoRA adapters of PEFT as experts beside one matrix.
#include <torch/types.h>

#include <string>
#include <vector>

namespace moiety {

struct PeftExperts {
  torch::Tensor a, b, scale;  ///< [E, rank, in], [E, out, rank], [E]
};
/// Of the adapters in these folders what each has at a matrix ("model.layers.3.self_attn.q_proj"), padded with zeros to
/// `rank`; zeros and a scale of 0 where it has nothing. Error: an adapter of another kind or base, DoRA, trained
/// biases, a larger rank.
PeftExperts read_peft_experts(const std::vector<std::string>& folders, const std::string& path, int64_t in, int64_t out,
                              int64_t rank);

}  // namespace moiety
