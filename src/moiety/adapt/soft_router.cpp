#include "moiety/adapt/soft_router.h"

#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {

SoftRouter::SoftRouter(Linear p) {
  projection = register_module("projection", std::move(p));
}

Routing SoftRouter::route(const torch::Tensor& x, const Site& site, Pass& pass) {
  Routing r;
  r.logits = projection(router_input(x));
  edit_logits(r.logits, site, pass);
  r.scores = torch::softmax(r.logits, -1);
  edit_scores(r.scores, site, pass);
  r.experts = every_expert(r.scores.size(0), experts(), r.scores.device());
  r.gates = r.scores;
  return finish(std::move(r), site, pass);
}

void SoftRouter::set_active(int64_t k) {
  check(k == experts(), "this router gives every token all of its {} experts", experts());
}

torch::Tensor every_expert(int64_t n, int64_t experts, torch::Device device) {
  return torch::arange(experts, torch::TensorOptions(torch::kInt64).device(device)).expand({n, experts});
}

}  // namespace moiety
