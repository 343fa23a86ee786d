#pragma once
// AdaMoE (Zeng et al. 2024, arXiv 2406.13233): null experts that compute nothing make the number of true experts a
// token's own, and a balance loss that treats them as one class fixes how many there are on average.
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/router.h"
#include "moiety/nn/beside.h"

namespace moiety {

struct AdaMoeConfig {
  int64_t experts = 8;  ///< true ones, n, of a layer that is not a mixture already
  int64_t width = 0;    ///< hidden units of one expert; 0: the dense layer's over the true experts that a token gets
  int64_t null_experts = 16;  ///< m
  int64_t top_k = 6;          ///< slots, of all n + m
  double coef = 0.001;
  std::string variant = "per_layer";  ///< or pooled: all layers in one table, no class of null experts
  double jitter = 0.0;                ///< while training, inputs times U(1 - jitter, 1 + jitter)
  void fields(Fields& f);
};

/// What a token's slots hold.
struct NullChoice {
  torch::Tensor slots;  ///< [N, K] int64 by descending probability, null experts at n and above
  Routing routing;      ///< experts -1 and gate 0 in null slots; gates of the true ones sum to 1, or to 0 without any
};
/// logits [N, n + m], true experts first.
NullChoice adamoe_choose(const torch::Tensor& logits, int64_t true_experts, int64_t top_k);

/// One layer: (n + m) sum_e f_e P_e with f averaged over the null experts; 1 when balanced. logits [N, n + m]; `real`
/// [N] bool or undefined.
torch::Tensor adamoe_balance_loss(const torch::Tensor& logits, int64_t true_experts, int64_t top_k,
                                  const torch::Tensor& real = {});

/// The official large-model variant: logits [L, N, n + m] of all layers in one table, f per slot and not over K, null
/// experts each on its own; K when balanced. Error: top_k above n.
torch::Tensor adamoe_pooled_loss(const torch::Tensor& logits, int64_t true_experts, int64_t top_k,
                                 const torch::Tensor& real = {});

class NullRouter : public Router {
 public:
  /// `gate` [n, d], `null_gate` [m, d]. Error: top_k above n + m; pooled with top_k above n.
  NullRouter(Linear gate, Linear null_gate, AdaMoeConfig config);
  Routing route(const torch::Tensor& x, const Site& site, Pass& pass) override;
  int64_t experts() const override { return gate->out(); }  ///< true ones
  void set_active(int64_t k) override {
    check_active(k);
    config.top_k = k;
  }
  bool has_rule() const override { return true; }
  Linear gate{nullptr}, null_gate{nullptr};
  AdaMoeConfig config;
};

/// Null rows of a router that is already trained: its own rows, again and again (m a multiple of n, else Error).
torch::Tensor null_rows_of(const torch::Tensor& gate, int64_t null_experts);

struct AdaMoeLinearConfig {
  int64_t experts = 4;              ///< true ones, n
  nlohmann::json null_experts = 4;  ///< m: a number, or a list with one for every layer of the model
  nlohmann::json top_k = 4;         ///< slots, of all n + m; the same
  int64_t rank = 8;
  double alpha = 16.0, dropout = 0.05, coef = 0.001, jitter = 0.0;
  void fields(Fields& f);
};

/// Low-rank experts beside a frozen matrix, with a router of their own that knows null experts: y = W x + sum gate *
/// (alpha / r) B (A x). Routing is reported under (block, round, the matrix's name).
class AdaMoeBeside : public Beside {
 public:
  AdaMoeBeside(std::string site, std::shared_ptr<NullRouter> router, std::shared_ptr<LoraExperts> experts,
               double jitter = 0.0);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  torch::Tensor merged(const torch::Tensor& weight, int64_t place) const override;  ///< of one expert that all take
  std::shared_ptr<NullRouter> router;
  std::shared_ptr<LoraExperts> experts;

 protected:
  std::string not_one_matrix() const override { return "its router gives every token experts of its own, or none"; }

 private:
  std::string site_;
  double jitter_;
};

}  // namespace moiety
