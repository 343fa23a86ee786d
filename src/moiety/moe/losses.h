#pragma once
// Auxiliary losses of routers. Each is a plug-in of any router: it sees the routing of every pass that trains, and adds
// its weighted value to the pass. Padding never counts. Counts carry no gradient, mean scores do.
#include <torch/types.h>

#include <memory>
#include <string>
#include <vector>

#include "moiety/nn/pass.h"

namespace moiety {

/// Which tokens count, and to which sequence they belong.
struct TokenGroups {
  torch::Tensor real;      ///< [N] bool; undefined: all
  torch::Tensor sequence;  ///< [N] int64 from 0; undefined: all are one
  int64_t sequences = 1;
};
/// Of a pass over N tokens: real ones by its mask; with `per_sequence` one group a row, or a packed sequence.
TokenGroups token_groups(const Pass& pass, int64_t tokens, bool per_sequence);

/// How a router used its experts, for each of G groups.
struct Load {
  torch::Tensor counts;       ///< [G, E] choices, without gradient
  torch::Tensor probability;  ///< [G, E] mean score
  torch::Tensor tokens;       ///< [G] real tokens
};
/// experts [N, K] int64 (-1 unused), scores [N, E].
Load load_of(const torch::Tensor& experts, const torch::Tensor& scores, const TokenGroups& groups = {});

/// sum_e f_e P_e, f_e = E / (slots * T) * counts_e, averaged over the groups that have tokens: 1 when both are even and
/// `slots` is K (Switch, GShard, DeepSeekMoE; arXiv 2101.03961, 2006.16668, 2401.06066).
torch::Tensor balance_loss(const Load& load, double slots);
/// sum_g f'_g P'_g over devices: f' the mean of f over a device's experts, P' the sum of P (DeepSeekMoE, eq. 15 to 17).
/// device_of_expert [E] int64, 0..D-1.
torch::Tensor device_balance_loss(const Load& load, double slots, const torch::Tensor& device_of_expert);
/// f' of device_balance_loss, [G, D].
torch::Tensor device_load(const Load& load, double slots, const torch::Tensor& device_of_expert);
/// f of balance_loss, [G, E].
torch::Tensor load_fraction(const Load& load, double slots);
/// Mean over real tokens of the squared log-sum-exp of the logits [N, E] (ST-MoE, arXiv 2202.08906).
torch::Tensor z_loss(const torch::Tensor& logits, const TokenGroups& groups = {});
/// Mean over real tokens of the entropy of softmax(logits), nats; finite with finite gradients for one-hot limits.
torch::Tensor entropy_loss(const torch::Tensor& logits, const TokenGroups& groups = {});
/// E * sum_k sum_e F[k, e] * mean P[:, e] over all rows; F[k, e]: share of rows whose k-th choice is e. K when
/// balanced. What Mixtral, OLMoE and their kin are trained with, over the rows of all layers together.
torch::Tensor pooled_balance_loss(const torch::Tensor& experts, const torch::Tensor& scores);

/// coef * value, added to the pass under a name.
class RoutingLoss {
 public:
  /// Error: a weight below 0, or none that is finite.
  RoutingLoss(std::string name, double coef);
  virtual ~RoutingLoss() = default;
  /// Nothing happens when the weight is 0.
  void add(const Routing& routing, const Site& site, Pass& pass);
  double coef() const { return coef_; }
  const std::string& name() const { return name_; }

 protected:
  virtual void value(const Routing& routing, const Site& site, Pass& pass) = 0;
  std::string name_;
  double coef_;
};
using RoutingLosses = std::vector<std::shared_ptr<RoutingLoss>>;

/// balance_loss of this site.
class ExpertBalance : public RoutingLoss {
 public:
  enum class Slots { per_choice, per_token };  ///< f counts choices over T * K, or over T
  ExpertBalance(std::string name, double coef, bool per_sequence, Slots slots = Slots::per_choice);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;

 private:
  bool per_sequence_;
  Slots slots_;
};

class DeviceBalance : public RoutingLoss {
 public:
  DeviceBalance(std::string name, double coef, torch::Tensor device_of_expert);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;

 private:
  torch::Tensor device_of_expert_;
};

class ZLoss : public RoutingLoss {
 public:
  explicit ZLoss(double coef, std::string name = "z");

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;
};

class EntropyLoss : public RoutingLoss {
 public:
  EntropyLoss(std::string name, double coef);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;
};

/// pooled_balance_loss over the sites of the whole pass, added once at its end. Sites that share a name, a number of
/// experts and a number of choices pool.
class PooledBalance : public RoutingLoss {
 public:
  PooledBalance(std::string name, double coef);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;
};

/// Another loss over what the scores alone say: divided by their sum, the K best of every token counted as chosen,
/// whatever moved the choice besides (a bias, groups, sampling). What DeepSeek-V3 balances (arXiv 2412.19437, eq. 17 to
/// 20).
class ByScores : public RoutingLoss {
 public:
  explicit ByScores(std::shared_ptr<RoutingLoss> loss);

 protected:
  void value(const Routing& routing, const Site& site, Pass& pass) override;

 private:
  std::shared_ptr<RoutingLoss> loss_;
};

/// How a mixture is kept in balance by losses: what a family's config or a run asks for.
struct BalanceRule {
  /// none; switch (every site over the whole batch); sequence (every site, within each sequence); pooled (all sites in
  /// one table); device (every site, between `devices` groups of neighbouring experts).
  std::string kind = "none";
  double coef = 0.0;
  int64_t devices = 0;
  double z_coef = 0.0;  ///< of z_loss
};
/// The losses "balance" and "router_z" of a rule for a router of `experts` experts; those without a weight are left
/// out. `by_scores`: see ByScores. Error: an unknown kind, devices that do not divide the experts.
RoutingLosses losses_of(const BalanceRule& rule, int64_t experts, bool by_scores);

/// One step of balancing without a loss (DeepSeek-V3, arXiv 2408.15664): bias_e += rate * sign(mean load - load_e).
/// bias [E] is changed in place; counts [E] of the last step.
void update_choice_bias(torch::Tensor bias, const torch::Tensor& counts, double rate);

}  // namespace moiety
