#pragma once
// A checkpoint with some tensors changed: what transforms hand to the writers, one tensor in memory at a time.
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"

namespace moiety {

struct OverlayTensor {
  TensorInfo info;
  std::function<TensorView()> get;  ///< called when somebody asks; has to fit `info`
};

/// `base` under another config, without the tensors named in `removed`, and with `tensors` in place of those of one
/// name or behind them. Throws Error: two tensors of one name; from get(), a value of another shape or format.
std::shared_ptr<const Checkpoint> overlay(std::shared_ptr<const Checkpoint> base, nlohmann::json config,
                                          std::vector<OverlayTensor> tensors,
                                          const std::set<std::string>& removed = {});

/// Whether a checkpoint comes of overlay(): a GGUF file behind it then does not hold what it is.
bool is_overlay(const Checkpoint& checkpoint);

/// A tensor of numbers in memory.
OverlayTensor overlay_of(std::string name, std::vector<int64_t> shape, std::vector<float> values);

}  // namespace moiety
