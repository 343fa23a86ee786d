// Expert Merging: merged tensors, the loss, chunks by importance.
#include <fmt/format.h>
#include <torch/torch.h>

#include "conform.h"
#include "moiety/compress/expert_merging.h"

namespace moiety::conform {
namespace {

MOIETY_OP("expert-merging", "merge", [](const Case& c) -> Outputs {
  Outputs out;
  for (const auto& [name, chunks] : c.config.at("chunks").items()) {
    const auto base = c.in("base." + name);
    const auto tasks = c.in("task." + name).unbind(0);
    if (chunks.get<int64_t>() == 0) {
      const auto alpha = torch::full({static_cast<int64_t>(tasks.size())}, c.config.at("init").get<double>());
      out["merged." + name] = merge_experts_fixed(base, tasks, alpha);
      continue;
    }
    const auto raw = c.leaf("raw." + name);
    const auto merged = merge_experts(base, tasks, raw);
    (merged * c.in("dy." + name)).sum().backward();
    out["merged." + name] = merged.detach();
    out["d_raw." + name] = raw.grad();
  }
  return out;
});

MOIETY_OP("expert-merging", "loss", [](const Case& c) -> Outputs {
  ExpertMergingConfig config;
  config.temperature = c.config.at("temperature");
  config.reg_weight = c.config.at("reg_weight");
  config.hidden_weight = c.config.at("hidden_weight");
  config.hidden_layers = c.config.at("hidden_layers").get<std::vector<int64_t>>();
  const auto logits = c.leaf("student_logits"), hidden = c.leaf("student_hidden");
  std::map<std::string, torch::Tensor> raw;
  std::vector<torch::Tensor> list;
  for (const auto& [name, value] : c.inputs)
    if (name.rfind("raw.", 0) == 0) list.push_back(raw[name] = c.leaf(name));
  MergeSample sample{c.in("teacher_logits"), logits, c.in("teacher_hidden").unbind(0), hidden.unbind(0)};
  const auto loss = expert_merging_loss(sample, list, c.in("init"), config, c.config.at("beta"));
  loss.total.backward();
  const auto gradient = [](const torch::Tensor& t) { return t.grad().defined() ? t.grad() : torch::zeros_like(t); };
  Outputs out{{"total", loss.total.detach()}, {"logits", loss.logits.detach()}, {"hidden", loss.hidden.detach()},
              {"reg", loss.reg.detach()},     {"d_logits", gradient(logits)},   {"d_hidden", gradient(hidden)}};
  for (const auto& [name, value] : raw) out["d_" + name] = gradient(value);
  return out;
});

MOIETY_OP("expert-merging", "chunks", [](const Case& c) -> Outputs {
  const auto alpha = c.in("alpha");
  std::vector<torch::Tensor> sizes;
  std::vector<int64_t> elements;
  for (int64_t i = 0; i < alpha.size(1); ++i) {
    const auto task = c.in(fmt::format("task.{}", i)).to(torch::kFloat64);
    sizes.push_back(task.abs().sum(1));
    elements.push_back(task.size(1));
  }
  const auto importance = layer_importance(alpha, torch::stack(sizes, 1));
  const auto chunks = allocate_chunks(importance, elements, c.config.at("budget_ratio"), c.config.at("kappa"));
  return {{"importance", torch::tensor(importance, torch::kFloat64)}, {"chunks", torch::tensor(chunks, torch::kInt64)}};
});

}  // namespace
}  // namespace moiety::conform
