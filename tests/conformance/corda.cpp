// CorDA: the second moment, the decomposition, compression, the way back to plain LoRA.
#include "moiety/adapt/corda.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

MOIETY_OP("corda", "corda_covariance", [](const Case& c) -> Outputs {
  CordaCovariance covariance;
  for (int n = 0; c.has(fmt::format("x_{}", n)); ++n) covariance.add(c.in(fmt::format("x_{}", n)));
  return {{"covariance", covariance.value()}};
});

MOIETY_OP("corda", "corda_decompose", [](const Case& c) -> Outputs {
  const int64_t rank = c.config.at("rank");
  const double alpha = c.config.at("lora_alpha");
  const auto d = corda_decompose(c.in("weight"), c.in("covariance"), c.config.at("method"), rank, alpha);
  return {{"S", d.s},
          {"delta", alpha / static_cast<double>(rank) * torch::matmul(d.b, d.a)},
          {"residual", d.residual},
          {"A_norm", d.a.norm(2, {1})},
          {"B_norm", d.b.norm(2, {0})},
          {"gram", torch::matmul(d.b.t(), d.b).abs()}};
});

MOIETY_OP("corda", "corda_compress", [](const Case& c) -> Outputs {
  const std::string kind = c.config.at("kind");
  torch::Tensor by;
  if (kind == "corda") by = c.in("covariance");
  if (kind == "asvd") by = c.in("scale");
  return {{"weight", corda_compress(c.in("weight"), kind, by, c.config.at("drop"), c.config.value("alpha", 0.5))}};
});

MOIETY_OP("corda", "corda_to_lora", [](const Case& c) -> Outputs {
  const auto pair = corda_to_lora({c.in("A0"), c.in("B0")}, {c.in("A1"), c.in("B1")});
  const double scale = c.config.at("lora_alpha_in").get<double>() / c.config.at("rank").get<double>();
  return {{"A", pair.a}, {"B", pair.b}, {"delta", scale * torch::matmul(pair.b, pair.a)}};
});

}  // namespace
}  // namespace moiety::conform
