#include "moiety/adapt/loramoe.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"

namespace moiety {

void LoraMoeConfig::fields(Fields& f) {
  f("experts", experts, "experts beside every matrix, half of them for each kind of sample").min(1);
  f("rank", rank, "rank of an expert").min(1);
  f("alpha", alpha, "what an expert adds is multiplied by alpha / rank").min(0);
  f("dropout", dropout, "on what the experts read, while training").min(0).max(0.99);
  f("coef", coef, "weight of the balancing constraint (the paper's beta, 0.1); sources need a label 0 or 1 then")
      .min(0);
  f("delta", delta, "how far the constraint pulls the two halves apart").min(0).max(0.999);
  f("form", form, "the variance over the squared mean (cv2, as the authors' code), or over the mean (paper)")
      .choices({"cv2", "paper"});
}

std::string LoraMoeConfig::problem() const {
  return coef > 0.0 && experts % 2 != 0 ? "the halves of the constraint need an even number of experts" : "";
}

LocalizedBalance localized_balance(const torch::Tensor& gates, const torch::Tensor& types, double delta,
                                   const std::string& form) {
  const int64_t rows = gates.size(0), experts = gates.size(2);
  check(experts % 2 == 0, "the halves need an even number of experts, and there are {}", experts);
  check(types.dim() == 1 && types.size(0) == rows, "{} rows need as many types", rows);
  check(((types == 0) | (types == 1)).all().item<bool>(), "types of samples are 0 and 1: there is a {}",
        types.max().item<int64_t>() > 1 ? types.max().item<int64_t>() : types.min().item<int64_t>());
  const auto of_expert = (torch::arange(experts, gates.device()) < experts / 2).to(torch::kInt64);
  const auto same = of_expert.unsqueeze(0) == types.to(gates.device()).unsqueeze(1);
  const auto weight = torch::where(same, 1.0 + delta, 1.0 - delta).to(gates.scalar_type());
  LocalizedBalance out;
  out.z = weight * gates.sum(1);
  if (out.z.numel() == 1) {
    out.loss = out.z.sum() * 0.0;
    return out;
  }
  const auto mean = out.z.mean();
  out.loss = out.z.var() / ((form == "paper" ? mean : mean.square()) + 1e-10);
  return out;
}

LocalizedBalanceLoss::LocalizedBalanceLoss(double coef, double delta, std::string form)
    : RoutingLoss("loramoe.balance", coef), delta_(delta), form_(std::move(form)) {}

void LocalizedBalanceLoss::value(const Routing& r, const Site&, Pass& pass) {
  check(pass.labels.defined(),
        "loramoe's constraint (coef) needs the kind of every sample: give every source a `label`, 0 or 1");
  auto gates = r.scores.view({pass.labels.size(0), -1, r.scores.size(1)});
  if (pass.mask.defined()) gates = gates * pass.mask.unsqueeze(-1).to(gates.scalar_type());
  pass.add_loss(name_, coef_ * localized_balance(gates, pass.labels, delta_, form_).loss);
}

namespace {

const RegisterMethod registered(
    {.slug = "loramoe",
     .kind = "part",
     .title = "LoRAMoE",
     .summary = "soft mixtures of LoRA experts; a loss gives each half of them to one kind of sample",
     .paper =
         {"LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model Alignment",
          "Dou et al.", 2023, "2312.09979"},
     .sites = {"linear"},
     .config = describe<LoraMoeConfig>,
     .make = MakeBeside{
         .per_input = false, .make = [](LinearSite& site, const nlohmann::json& settings) -> std::shared_ptr<Beside> {
           const auto c = parse<LoraMoeConfig>(settings, "loramoe");
           const LinearTarget& t = site.targets.at(0);
           auto router =
               std::make_shared<SoftRouter>(site.own.linear("router", t.in, c.experts, false, uniform_init()));
           if (c.coef > 0.0) router->losses.push_back(std::make_shared<LocalizedBalanceLoss>(c.coef, c.delta, c.form));
           const auto [a, b] = lora_experts(site, c.experts, c.rank);
           return std::make_shared<RoutedLora>(t.name, router, a, b, c.alpha / static_cast<double>(c.rank), c.dropout);
         }}});

}  // namespace
}  // namespace moiety
