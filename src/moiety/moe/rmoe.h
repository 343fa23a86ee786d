#pragma once
// RMoE (Qiu et al. 2024, arXiv 2408.06793): routers in a row through a recurrent state. Each token carries h from
// mixture to mixture over depth, never over the sequence; one cell serves all layers; experts are chosen from h.
#include <memory>
#include <string>

#include "moiety/base/config.h"
#include "moiety/moe/router.h"

namespace moiety {

struct RmoeConfig {
  std::string cell = "gru";  ///< or rnn
  int64_t width = 128;       ///< r
  int64_t experts = 8;
  int64_t expert_width = 0;  ///< hidden units of one expert; 0: the dense layer's over top_k
  int64_t top_k = 2;
  double aux_coef = 0.001;   ///< of the balance loss over all layers in one table
  bool detach = false;       ///< ablation: no gradient from layer to layer
  bool shared_cell = true;   ///< false: every layer has a cell of its own (ablation)
  bool carry = true;         ///< false: every layer starts from a state of zeros (ablation: no recurrence)
  bool bias = false;         ///< [d], added to the routed sum
  int64_t shared_width = 0;  ///< hidden units of a shared expert; 0: none
  /// y = moe_weight * (routed + bias) + share_weight * shared where the part has a shared expert.
  double moe_weight = 0.5, share_weight = 0.5;
  void fields(Fields& f);
  std::string problem() const;
};

/// torch's GRUCell, or a tanh cell that has the `in` and `hn` parts only. Weights [r, r], biases [r], both named as the
/// official checkpoints name them.
class RecurrentCell : public torch::nn::Module {
 public:
  RecurrentCell(const std::string& kind, int64_t width);
  /// By name: weight_ir, weight_hr, bias_ir, bias_hr, ..._iz, ..._hz, ..._in, ..._hn.
  RecurrentCell(const std::string& kind, const std::map<std::string, torch::Tensor>& tensors);
  /// u [T, r], h [T, r] or undefined (zeros) -> the new state [T, r].
  torch::Tensor forward(const torch::Tensor& u, const torch::Tensor& h);
  int64_t width() const;

 private:
  void keep(const std::string& name, torch::Tensor t);
  bool gru_;
  // In the order r, z, n (rnn: n).
  std::vector<torch::Tensor> weight_i_, weight_h_, bias_i_, bias_h_;
};

/// Logits W2 h with h = cell(W1 x, h of the mixture before). The state is `Pass::state["rmoe.h"]`. Softmax over all,
/// the K best, gates over their sum. Loss "rmoe.balance", pooled over all mixtures of the pass.
class RecurrentRouter : public Router {
 public:
  /// `project` W1 [r, d], `head` W2 [E, r]. `own_cell`: the cell's weights count as this router's (one router of a
  /// model).
  RecurrentRouter(Linear project, Linear head, std::shared_ptr<RecurrentCell> cell, bool own_cell, RmoeConfig config);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return head->out(); }
  void set_active(int64_t k) override {
    check_active(k);
    config.top_k = k;
  }
  static constexpr const char* kState = "rmoe.h";

  Linear project{nullptr}, head{nullptr};
  std::shared_ptr<RecurrentCell> cell;
  RmoeConfig config;
};

}  // namespace moiety
