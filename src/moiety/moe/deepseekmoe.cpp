#include "moiety/moe/deepseekmoe.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/moe/cut.h"
#include "moiety/moe/site_experts.h"

namespace moiety {

void DeepseekMoeConfig::fields(Fields& f) {
  f("experts", experts, "routed experts").min(1);
  f("shared", shared, "shared experts, which every token passes").min(0);
  f("top_k", top_k, "routed experts a token").min(1);
  f("width", width, "hidden units of one expert; 0 takes the dense layer's width over the active experts").min(0);
  f("norm_topk_prob", norm_topk_prob, "divide the gates of the chosen by their sum");
  f("alpha1", alpha1, "weight of the expert-level balance loss").min(0);
  f("alpha2", alpha2, "weight of the device-level balance loss").min(0);
  f("seq_aux", seq_aux, "balance within every sequence instead of the whole batch");
  f("device_of_expert", device_of_expert, "the group (device) of every routed expert, for the device-level loss")
      .min(0);
}

std::string DeepseekMoeConfig::problem() const {
  if (top_k > experts) return fmt::format("`top_k` is {}, but there are {} routed experts", top_k, experts);
  if (alpha2 > 0.0 && static_cast<int64_t>(device_of_expert.size()) != experts)
    return fmt::format("`device_of_expert` names {} experts, there are {}", device_of_expert.size(), experts);
  return "";
}

std::shared_ptr<TopKRouter> deepseek_router(Linear projection, const DeepseekMoeConfig& c, torch::Tensor choice_bias) {
  TopKRouterOptions options;
  options.top_k = c.top_k;
  options.normalize = c.norm_topk_prob && c.top_k > 1;
  options.normalize_eps = 1e-20;
  auto router = std::make_shared<TopKRouter>(std::move(projection), options, std::move(choice_bias));
  router->losses.push_back(std::make_shared<ExpertBalance>("deepseekmoe.expert_balance", c.alpha1, c.seq_aux));
  if (c.alpha2 > 0.0)
    router->losses.push_back(std::make_shared<DeviceBalance>("deepseekmoe.device_balance", c.alpha2,
                                                             torch::tensor(c.device_of_expert, torch::kInt64)));
  return router;
}

ExpertTensors segment_experts(const ExpertTensors& old, int64_t segments, const torch::Tensor& units) {
  const int64_t count = old.gate.size(0), width = old.gate.size(1);
  check(segments >= 1 && width % segments == 0, "experts of {} hidden units cannot be cut into {} of equal width",
        width, segments);
  check(!units.defined() || (units.dim() == 2 && units.size(0) == count && units.size(1) == width),
        "the order of hidden units must be [{}, {}]", count, width);
  std::vector<torch::Tensor> gate, up, down;
  for (int64_t e = 0; e < count; ++e) {
    auto sets = contiguous_sets(width, segments);
    if (units.defined()) sets = units[e].index_select(0, sets.reshape({-1})).view_as(sets);
    gate.push_back(cut_rows(old.gate[e], sets));
    up.push_back(cut_rows(old.up[e], sets));
    down.push_back(cut_columns(old.down[e], sets));
  }
  return {torch::cat(gate), torch::cat(up), torch::cat(down)};
}

namespace {

const RegisterMethod registered(
    {.slug = "deepseekmoe",
     .kind = "part",
     .title = "DeepSeekMoE",
     .summary = "fine-grained experts beside shared ones that every token passes",
     .paper = {"DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
               "Dai et al.", 2024, "2401.06066"},
     .sites = {"ffn"},
     .config = describe<DeepseekMoeConfig>,
     .make = MakeFeedForward([](PartSite& site, const nlohmann::json& settings) -> std::shared_ptr<FeedForwardBase> {
       const auto c = parse<DeepseekMoeConfig>(settings, "deepseekmoe");
       const int64_t width = width_at(site, c.width, c.top_k + c.shared);
       auto rows = site.own.linear("gate", site.hidden, c.experts, false, uniform_init());
       auto experts = experts_at(site, c.experts, width);
       const auto bias = choice_bias_at(site, "gate", c.experts, c.alpha1 > 0.0 || c.alpha2 > 0.0);
       return std::make_shared<Mixture>(deepseek_router(rows, c, bias), experts, shared_at(site, c.shared * width));
     })});

}  // namespace
}  // namespace moiety
