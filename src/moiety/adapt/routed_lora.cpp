#include "moiety/adapt/routed_lora.h"

#include <torch/torch.h>

#include <cmath>

#include "moiety/adapt/low_rank.h"
#include "moiety/base/error.h"
#include "moiety/moe/mixture.h"

namespace moiety {

torch::Tensor dropped(const torch::Tensor& x, double p, bool training) {
  return p > 0.0 && training ? torch::dropout(x, p, true) : x;
}

void report_beside(Pass& pass, const Site& site, const Routing& routing, int64_t experts, const torch::Tensor& x,
                   const torch::Tensor& y) {
  const auto flat = y.view({-1, y.size(-1)});
  report(pass, site, routing, experts, x, pass.trace && pass.trace->keep_outputs ? flat.clone() : flat);
}

RoutedLora::RoutedLora(std::string site, std::shared_ptr<Router> r, torch::Tensor first, torch::Tensor second,
                       double scale, double dropout)
    : site_(std::move(site)), scale_(scale), dropout_(dropout) {
  check(first.dim() == 3 && second.dim() == 3 && first.size(0) == second.size(0) && first.size(1) == second.size(2),
        "low-rank experts need A [E, r, in] and B [E, out, r]");
  check(r->experts() == first.size(0), "the router has {} rows for {} experts", r->experts(), first.size(0));
  router = register_module("router", std::move(r));
  a = register_parameter("lora_A", first, first.requires_grad());
  b = register_parameter("lora_B", second, second.requires_grad());
}

void RoutedLora::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) {
  if (x.dim() == 3) pass.batch = x.size(0);
  const auto flat = x.reshape({-1, x.size(-1)});
  const Routing routing = router->route(flat, pass.at(site_), pass);
  auto& y = outputs.at(0);
  y = add_routed(y, dropped(x, dropout_, pass.training), a, b, routing, scale_, expert_scale);
  report_beside(pass, pass.at(site_), routing, router->experts(), flat, y);
}

torch::Tensor RoutedLora::merged(const torch::Tensor& weight, int64_t place) const {
  if (a.size(0) != 1) return Beside::merged(weight, place);
  const torch::NoGradGuard frozen;
  const double s = expert_scale.defined() ? scale_ * expert_scale[0].item<double>() : scale_;
  return weight + s * torch::matmul(b[0].to(torch::kFloat32), a[0].to(torch::kFloat32));
}

LoraMatrices lora_experts(LinearSite& site, int64_t experts, int64_t rank) {
  const LinearTarget& t = site.targets.at(0);
  return {site.own.get("lora_A", {experts, rank, t.in}, uniform_init()),
          site.own.get("lora_B", {experts, t.out, rank}, constant_init(0.0))};
}

ExpertDistance expert_distance(const torch::Tensor& first, const torch::Tensor& second) {
  const torch::NoGradGuard frozen;
  const auto a = first.to(torch::kFloat64), b = second.to(torch::kFloat64);
  const int64_t n = a.size(0);
  // <B_i A_i, B_j A_j> = sum of (B_i^T B_j) * (A_i A_j^T)
  const auto inner = torch::einsum("iok,jol,ikd,jld->ij", {b, b, a, a});
  ExpertDistance out;
  double norms = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    norms += std::sqrt(std::max(0.0, inner[i][i].item<double>())) / static_cast<double>(n);
    for (int64_t j = 0; j < i; ++j)
      out.absolute += std::sqrt(
          std::max(0.0, inner[i][i].item<double>() + inner[j][j].item<double>() - 2.0 * inner[i][j].item<double>()));
  }
  if (n > 1) out.absolute /= static_cast<double>(n * (n - 1)) / 2.0;
  if (norms > 0.0) out.relative = out.absolute / norms;
  return out;
}

}  // namespace moiety
