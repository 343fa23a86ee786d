#pragma once
// ModuleFormer (Shen et al. 2023, arXiv 2306.04640): mixtures of attention heads and of feed-forward experts,
// stick-breaking attention, a mutual-information loss for specialisation, and a concentration loss after which modules
// can be pruned.
#include <memory>
#include <string>

#include "moiety/moe/experts.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/router.h"
#include "moiety/nn/attention.h"

namespace moiety {

/// loss(logits [T, N], choices [T, k], gates [T, k]) of one mixture, unweighted. Kinds: "mi": -(mean negative entropy +
/// entropy of the mean), in [-ln N, 0]; "switch": balance plus 0.1 mean squared log-sum-exp; "concentration": entropy
/// of the mean. Error: another kind. `real` [T] bool or undefined.
torch::Tensor moduleformer_loss(const std::string& kind, const torch::Tensor& logits, const torch::Tensor& choices,
                                const torch::Tensor& gates, const torch::Tensor& real = {});

/// A gate: gelu MLP, linear, or cosine to centroids ("gmm"). The k largest probabilities are the gates as they are.
class ModuleGate : public Router {
 public:
  struct Weights {
    std::string type = "mlp";   ///< mlp, linear, gmm
    torch::Tensor w1, b1;       ///< [r, d], [r]: mlp; w1 of gmm
    torch::Tensor w2;           ///< [N, r] of mlp, [N, d] of linear
    torch::Tensor centroids;    ///< [N, r] of gmm
    torch::Tensor added;        ///< [N', ...]: rows of w2, or centroids, of modules that are added; undefined: none
    torch::Tensor temperature;  ///< [1] of gmm
  };
  /// Loss "moduleformer.NAME" of kind `loss` ("" for none), times `coef`. Error: tensors that do not belong to the
  /// type.
  ModuleGate(Weights weights, int64_t top_k, std::string loss = "mi", double coef = 0.0, int64_t sample_top_k = 0);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return count_; }
  void set_active(int64_t k) override {
    check_active(k);
    top_k_ = k;
  }
  bool has_rule() const override { return (!loss_.empty() && coef_ > 0.0) || Router::has_rule(); }
  /// Logits [T, N].
  torch::Tensor logits(const torch::Tensor& x) const;
  double added_decay = 0.0;  ///< weight of loss "moduleformer.added": the squared norm of the added rows
  double dropout = 0.0;      ///< of an mlp gate, behind its gelu, while the module trains

 private:
  Weights w_;
  int64_t count_, top_k_, sample_top_k_;
  std::string loss_;
  double coef_;
};

struct StickBreaking {
  torch::Tensor output;   ///< like q
  torch::Tensor weights;  ///< [B, k, heads, T, C], when kept
};
/// alpha_j = beta_j prod_{j < l <= i} (1 - beta_l), beta = sigmoid(q k / sqrt(size)): weight goes to the nearest
/// relevant key first, the query's own position included. q [B, T, k, heads, size], keys and values [B, C, heads,
/// size], queries are the last T of C positions; mask [B, C] bool (true: real), [1 or B, 1, T, C] (true: may be seen),
/// or undefined.
StickBreaking stick_breaking_attention(const torch::Tensor& q, const torch::Tensor& keys, const torch::Tensor& values,
                                       const torch::Tensor& mask = {}, bool keep_weights = true);

/// Attention whose query and output matrices are modules; keys and values are shared by all. The cache keeps one head
/// of width a.
class ModuleAttention : public AttentionBase {
 public:
  struct Parts {
    std::shared_ptr<Router> gate;
    LinearStack q{nullptr}, o{nullptr};              ///< [N, a, d], [N, d, a]
    LinearStack added_q{nullptr}, added_o{nullptr};  ///< [N', a, d], [N', d, a] of modules that are added, behind those
    Linear k{nullptr}, v{nullptr};                   ///< [a, d] with biases; both empty: the identity (a = d, one head)
    int64_t heads = 1;
  };
  explicit ModuleAttention(Parts parts);
  torch::Tensor forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) override;
  /// The same with past keys and values [B, P, a] (undefined: none) given and returned.
  torch::Tensor forward(const torch::Tensor& x, torch::Tensor& past_k, torch::Tensor& past_v, const torch::Tensor& mask,
                        Pass& pass);
  Parts parts;

 private:
  torch::Tensor attend(const torch::Tensor& x, const torch::Tensor& keys, const torch::Tensor& values,
                       const torch::Tensor& mask, Pass& pass);
  torch::Tensor project(Linear& linear, const torch::Tensor& x);
};

/// Modules that were trained, and behind them such as are added for something new. Their parameters are children "old"
/// and "new".
class GrownExperts : public Experts {
 public:
  GrownExperts(std::shared_ptr<Experts> old, std::shared_ptr<Experts> added);
  int64_t count() const override { return old_->count() + added_->count(); }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;

 private:
  std::shared_ptr<Experts> old_, added_;
};

/// Which modules of one mixture stay, by how often tokens choose them.
struct ModulePruning {
  torch::Tensor frequency;  ///< [N] share of tokens that choose the module
  torch::Tensor keep;       ///< [N] bool: frequency >= tau
};
/// logits [T, N]. Error: tau outside [0, 1].
ModulePruning module_pruning(const torch::Tensor& logits, int64_t top_k, double tau);
/// The gate over the kept modules alone: logits [T, N] -> routing with indices among the kept. Error: fewer than k are
/// kept.
Routing pruned_choice(const torch::Tensor& logits, const torch::Tensor& keep, int64_t top_k);

}  // namespace moiety
