#pragma once
// What every expert of a running model computes, seen before its gates are applied: for calibration and profiles.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "moiety/moe/dispatch.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/pass.h"

namespace moiety {

/// One call of one mixture's experts. Rows are (token, expert) pairs sorted by expert; pairs of padding are among them.
struct ExpertCall {
  Site site;
  const Dispatch& dispatch;
  const torch::Tensor& in;   ///< [P, d]
  const torch::Tensor& out;  ///< [P, d], without gates
  torch::Tensor real;        ///< [P] bool; undefined: all are
  GatedExperts* experts;     ///< null where they are of another kind
};

/// While it lives, `see` is called for every mixture of `model` that runs; results stay those of the model to rounding.
class WatchExperts {
 public:
  WatchExperts(torch::nn::Module& model, std::function<void(const ExpertCall&)> see);
  ~WatchExperts();
  WatchExperts(const WatchExperts&) = delete;
  WatchExperts& operator=(const WatchExperts&) = delete;
  int64_t mixtures() const { return static_cast<int64_t>(held_.size()); }

 private:
  std::vector<std::pair<std::shared_ptr<Mixture>, std::shared_ptr<Experts>>> held_;
};

}  // namespace moiety
