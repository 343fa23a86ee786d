#include "moiety/train/expert_parallel.h"

#include <torch/torch.h>

#include <set>

#include "moiety/base/error.h"
#include "moiety/moe/chain_of_experts.h"
#include "moiety/moe/mixture.h"

namespace moiety {

using torch::Tensor;

Tensor share_of(const Tensor& whole, const Exchange& exchange) {
  const int64_t own = whole.size(0) / exchange.size();
  return whole.narrow(0, exchange.rank() * own, own);
}

Tensor gather_share(const Tensor& share, Exchange& exchange) {
  const auto processes = static_cast<size_t>(exchange.size());
  const bool first = exchange.rank() == 0;
  // Everything goes to the first process.
  std::vector<int64_t> send(processes, 0), receive(processes, first ? share.size(0) : 0);
  send[0] = share.size(0);
  const auto rows = exchange.all_to_all(share.detach().reshape({share.size(0), -1}), send, receive);
  if (!first) return {};
  auto shape = share.sizes().vec();
  shape[0] *= exchange.size();
  return rows.view(shape);
}

namespace {

// Cuts the matrices of a set and returns what stands for it.
std::shared_ptr<Experts> spread(const std::shared_ptr<Experts>& experts, Exchange& exchange, std::vector<Tensor>& out) {
  const int64_t count = experts->count();
  check(
      count % exchange.size() == 0,
      "parallel.experts is {}, but a mixture of the model has {} experts, which so many processes cannot share evenly",
      exchange.size(), count);
  std::vector<Tensor> parameters;
  for (const auto& part : experts->children())
    if (const auto* stack = part->as<LinearStackImpl>())
      for (const Tensor& t : {stack->weight, stack->bias})
        if (t.defined()) parameters.push_back(t);
  check(
      !parameters.empty() && parameters.size() == experts->parameters().size(),
      "parallel.experts: a mixture of the model holds its experts in another form than stacked matrices, which cannot "
      "be spread over processes");
  for (Tensor& t : parameters) {
    // The same parameter with less in it: who holds it need not know.
    t.set_data(share_of(t.detach(), exchange).clone());
    out.push_back(t);
  }
  return std::make_shared<SpreadExperts>(experts, count, exchange);
}

}  // namespace

std::vector<Tensor> split_experts(torch::nn::Module& model, Exchange& exchange) {
  std::vector<Tensor> out;
  std::set<const void*> seen;
  for (const auto& module : model.modules()) {
    if (!seen.insert(module.get()).second) continue;
    if (auto* mixture = dynamic_cast<Mixture*>(module.get()))
      mixture->experts = mixture->replace_module("experts", spread(mixture->experts, exchange, out));
    if (auto* chain = dynamic_cast<ChainOfExperts*>(module.get()))
      chain->experts = chain->replace_module("experts", spread(chain->experts, exchange, out));
  }
  check(!out.empty(), "parallel.experts is {}, but the model has no mixture whose experts could be spread",
        exchange.size());
  return out;
}

}  // namespace moiety
