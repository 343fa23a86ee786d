#pragma once
// SMoE-Dropout (Chen et al. 2023, arXiv 2303.01610): a router that stays random, and a number of active experts that
// grows while training; at inference any number gives a working model.
#include <memory>
#include <optional>
#include <string>

#include "moiety/base/config.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/router.h"
#include "moiety/nn/scheduled.h"

namespace moiety {

struct SmoeDropoutConfig {
  int64_t experts = 16;
  int64_t k_min = 8, k_max = 16;
  std::string mode = "linear_increase";
  int64_t total_steps = 0;  ///< 0: the run's
  bool rescale = false;     ///< experts cut from a dense layer give N times their part
  void fields(Fields& f);
  std::string problem() const;
};

/// k of the step that follows `finished` optimizer steps. Modes: linear_increase, linear_decrease, cosine_increase,
/// cosine_decrease, exp_increase, multi_step_increase, multi_step_decrease. Halves round to even. Error: unknown mode,
/// k_min above k_max, total < 1 (< 300 for exp_increase).
int64_t smoe_dropout_k(const std::string& mode, int64_t k_min, int64_t k_max, int64_t total, int64_t finished);

/// logits = W x + b with frozen W, b; the k largest; gates are a softmax over these. Gradient reaches x, never W or b.
class FixedRouter : public Router, public Scheduled {
 public:
  FixedRouter(Linear projection, int64_t top_k);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return projection->out(); }
  void set_active(int64_t k) override {
    check_active(k);
    top_k = k;
  }
  bool has_rule() const override { return true; }  // nothing could train it
  /// Sets k by the schedule, when there is one.
  void before_step(int64_t step, int64_t steps) override;
  /// Evaluations see all experts, then k is what it was.
  void before_evaluation() override;
  void after_evaluation() override;
  std::optional<SmoeDropoutConfig> schedule;
  Linear projection{nullptr};
  int64_t top_k;  ///< may change between passes

 private:
  int64_t trained_k_ = 0;  // during an evaluation
};

struct MlpTensors {
  torch::Tensor w1, b1, w2, b2;  ///< dense [D, d], [D], [d, D], [d]; experts [N, f, d], [N, f], [N, d, f], [N, d]
};
/// A dense layer cut into N experts of equal width; b2 goes whole to every one. `rescale`: w2 times N, so that even
/// gates over all experts give the dense layer.
MlpTensors modularize(const MlpTensors& dense, int64_t experts, bool rescale);

}  // namespace moiety
