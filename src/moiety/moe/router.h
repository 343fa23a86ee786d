#pragma once
// Routers: hidden states to Routing. The linear router here covers the pretrained families; routing systems derive from
// Router.
#include <torch/nn/module.h>
#include <torch/types.h>

#include "moiety/moe/losses.h"
#include "moiety/nn/linear.h"
#include "moiety/nn/pass.h"
#include "moiety/nn/scheduled.h"

namespace moiety {

class Router : public torch::nn::Module {
 public:
  /// x [N, d] -> Routing, after every edit of the pass; adds `losses` to a pass that trains. Computes in f32.
  virtual Routing route(const torch::Tensor& x, const Site& site, Pass& pass) = 0;
  virtual int64_t experts() const = 0;
  /// From now on a token takes k experts (slots, where a slot may also hold a null expert). Error unless 1 <= k <=
  /// experts, or where a rule of the router leaves fewer to choose from.
  virtual void set_active(int64_t k) = 0;
  /// True when the system that this router belongs to says how it is kept in balance: a run's own settings then leave
  /// it alone.
  virtual bool has_rule() const;
  /// Gives a router of a family, or one without a rule, the losses of `rule`. Error: see losses_of.
  void set_balance(const BalanceRule& rule);

  RoutingLosses losses;
  bool of_family = false;  ///< of a family's own mixture: the losses are what the model's config asks for

 protected:
  void check_active(int64_t k) const;
  /// Losses look at the scores alone, not at the choice: see ByScores.
  virtual bool balance_by_scores() const { return false; }
  /// What every router does around its own rule: edits of the logits, of the scores, of the choice, then the losses.
  static void edit_logits(torch::Tensor& logits, const Site& site, Pass& pass);
  static void edit_scores(torch::Tensor& scores, const Site& site, Pass& pass);
  Routing finish(Routing routing, const Site& site, Pass& pass);
};

enum class Scoring {
  softmax,       ///< over all experts, then the choice
  softmax_kept,  ///< gates are a softmax over the kept logits (gpt-oss, GraniteMoE)
  sigmoid,       ///< DeepSeek-V3
};

struct TopKRouterOptions {
  int64_t top_k = 2;
  Scoring scoring = Scoring::softmax;
  bool normalize = false;      ///< gates divided by their sum over the chosen
  double normalize_eps = 0.0;  ///< added to that sum
  double normalize_min = 0.0;  ///< lower bound of that sum (ERNIE 4.5)
  double scale = 1.0;          ///< of the gates, after normalization
  int64_t groups = 0;          ///< experts are chosen only inside the best groups; 0: no groups
  int64_t top_groups = 0;
  bool group_by_top2 = false;  ///< group score: sum of its two best (DeepSeek-V3) instead of its best (V2)
};

/// logits = W x (+ b); scores; choice (by scores + choice bias, inside the best groups); gates from the scores. With a
/// rate, the bias moves once a training step towards experts that were chosen less than others (auxiliary-loss-free
/// balancing, arXiv 2408.15664).
class TopKRouter : public Router, public Scheduled {
 public:
  /// `choice_bias` [E] f32 or undefined moves the choice only.
  TopKRouter(Linear projection, TopKRouterOptions options, torch::Tensor choice_bias = {});
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return projection->out(); }
  void set_active(int64_t k) override;
  void before_step(int64_t step, int64_t steps) override;
  std::vector<torch::Tensor> counts() override;
  void after_step() override;
  /// What route() makes of logits [N, E] f32 where nobody edits them.
  Routing decide(const torch::Tensor& logits) const;
  /// Whether `choose_row` says all that the rule does: no groups.
  bool chooses_by_rows() const { return options.groups <= 1; }
  /// Logits of experts first ... last - 1 of one row x [d]; the projection is by_dots().
  void row_logits(const float* x, int64_t first, int64_t last, float* logits) const;
  /// Scores, choice and gates of one row without a graph: logits [E] -> scores [E], experts and gates [top_k].
  void choose_row(const float* logits, float* scores, int64_t* experts, float* gates) const;
  /// From now on the bias is updated. Error: a router without a bias, a rate that is no number above 0.
  void set_bias_rate(double rate);

  Linear projection{nullptr};
  TopKRouterOptions options;
  torch::Tensor choice_bias;

 protected:
  bool balance_by_scores() const override { return options.scoring == Scoring::sigmoid || choice_bias.defined(); }

 private:
  void choose(Routing& r) const;                // experts and gates from the scores
  Routing by_rows(torch::Tensor logits) const;  // f32 on the CPU

  double bias_rate_ = 0.0;
  torch::Tensor load_;  // [E] choices of real tokens since the step began
};

/// SparseMixer-v2 (Phi-3.5-MoE, arXiv 2409.12136): k rounds of a softmax over the experts whose logits are within 2 *
/// jitter of the best one left. While training it samples the expert and estimates the router's gradient by Heun's
/// third-order method.
class SparseMixerRouter : public Router {
 public:
  SparseMixerRouter(Linear projection, int64_t top_k, double jitter);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return projection->out(); }
  void set_active(int64_t k) override;

  Linear projection{nullptr};

 protected:
  bool balance_by_scores() const override { return true; }  // the choice is sampled

 private:
  int64_t top_k_;
  double jitter_;
};

/// set_active of every router of a model. Error: there is none; see set_active.
void set_active_experts(torch::nn::Module& model, int64_t k);

}  // namespace moiety
