#pragma once
// Low-precision copies of experts beside the originals in a GGUF file: what HOBBIT reads where an expert matters less.
#include <filesystem>
#include <functional>
#include <span>

#include "moiety/io/checkpoint.h"

namespace moiety {

struct LowExpertsReport {
  int64_t tensors = 0;                  ///< copies written
  int64_t bytes_before = 0, bytes = 0;  ///< of the file's tensors
  int64_t narrow = 0;                   ///< copies in Q4_0 because their rows are no multiple of 256
};

/// Writes `file`: the GGUF checkpoint as it is, and for every stacked expert tensor blk.N.ffn_gate_exps.weight a copy
/// blk.N.ffn_gate_exps.low.weight in `format`, Q4_0 or TQ2_0 (rows that are no multiple of 256 then get Q4_0). Error:
/// no GGUF file; no stacked experts; copies that are there already, or would not be smaller than the original.
LowExpertsReport add_low_experts(const Checkpoint& checkpoint, Format format, const std::filesystem::path& file,
                                 bool overwrite, const std::function<void(int64_t done, int64_t total)>& progress = {});

/// A row [cols] for TQ2_0 with the scale of least squared error for signs: in every block of 256, g = mean |w|, t =
/// clip(round(w / g), -1, 1), d = sum w t / sum t^2; replaced by d t, which TQ2_0 holds exactly but for d's rounding.
void fit_ternary(std::span<float> row);

}  // namespace moiety
