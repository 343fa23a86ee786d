// FlyLoRA: the sparse projection, the ranks beside a matrix, the step of the bias, adapters as one.
#include "moiety/adapt/flylora.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

MOIETY_OP("flylora", "fly_projection", [](const Case& c) -> Outputs {
  const auto a = fly_projection(c.in("perm"), c.in("normal"), c.config.at("k"));
  return {{"A", a}, {"nnz_per_row", (a != 0).sum(1)}};
});

MOIETY_OP("flylora", "flylora_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), b = c.leaf("lora_B");
  FlyLoraConfig config;
  config.rank = b.size(1);
  config.top_k = c.config.at("top_k");
  config.alpha = c.config.at("lora_alpha");
  config.select = c.config.at("select");
  config.grad_through_a = c.config.at("grad_through_A");
  Linear matrix(c.in("weight"));
  matrix->attach(std::make_shared<FlyLora>("q_proj", c.in("lora_A"), b, c.in("topk_bias"), config));
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  return {{"y", y},
          {"indices", trace.records.at(0).routing.experts.view({x.size(0), x.size(1), -1})},
          {"grad_x", x.grad()},
          {"grad_lora_B", b.grad()}};
});

MOIETY_OP("flylora", "fly_bias_update", [](const Case& c) -> Outputs {
  const auto bias = c.in("topk_bias");
  const auto counts = rank_counts(c.in("indices"), bias.size(0));
  return {{"topk_bias", moved_bias(bias, counts, c.config.at("bias_u"))}, {"counts", counts}};
});

MOIETY_OP("flylora", "fly_merge", [](const Case& c) -> Outputs {
  std::vector<FlyAdapter> adapters;
  const auto name = [](const char* what, int i) { return fmt::format("{}_{}", what, i); };
  for (int i = 0; c.has(name("lora_A", i)); ++i)
    adapters.push_back({c.in(name("lora_A", i)), c.in(name("lora_B", i)), c.in(name("topk_bias", i))});
  const int64_t k = c.config.at("top_k");
  const double scale = c.config.at("lora_alpha").get<double>() / static_cast<double>(adapters.at(0).a.size(0));
  const std::string select = c.config.at("select");
  const auto x = c.in("x");
  if (c.config.at("method") == "stack") return {{"delta", fly_stack(x, adapters, k, scale, select)}};
  const auto one = fly_average(adapters);
  return {{"delta", fly_delta(x, one, k, scale, select)}, {"lora_B", one.b}};
});

}  // namespace
}  // namespace moiety::conform
