#include "moiety/compress/low_rank_sparse.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <set>
#include <string>

#include "moiety/adapt/low_rank.h"
#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/compress/expert_layers.h"
#include "moiety/io/low_rank_sparse.h"
#include "moiety/io/overlay.h"
#include "moiety/moe/grouped.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr const char* kSlug = "low-rank-sparse";

}  // namespace

LowRankSparseStack::LowRankSparseStack(LinearStackImpl* stack, Tensor l, Tensor r, Tensor s) : stack_(stack) {
  check(l.dim() == 3 && r.dim() == 3 && s.dim() == 3 && l.size(2) == r.size(1) && s.size(1) == l.size(1) &&
            s.size(2) == r.size(2),
        "low rank + sparse needs left [E, out, r], right [E, r, in] and sparse [E, out, in]");
  left = register_parameter("left", l, l.requires_grad());
  right = register_parameter("right", r, r.requires_grad());
  sparse = register_parameter("sparse", s, s.requires_grad());
  average = register_buffer("average", torch::zeros_like(s.detach(), torch::kFloat32));
  latest = register_buffer("latest", torch::zeros_like(average));
}

Tensor LowRankSparseStack::apply(const Tensor& x, const std::vector<int64_t>& counts, Tensor) {
  const auto low = grouped_linear(grouped_linear(x, like(right, x), {}, counts), like(left, x), {}, counts);
  const Tensor bias = stack_->bias.defined() ? like(stack_->bias, x) : Tensor();
  return low + grouped_linear(x, like(sparse, x), bias, counts);
}

Tensor LowRankSparseStack::delta(int64_t expert) const {
  const torch::NoGradGuard frozen;
  const auto of = [&](const Tensor& t) { return t[expert].to(torch::kFloat32); };
  return torch::addmm(of(sparse), of(left), of(right)) - stack_->dense(expert, torch::kFloat32);
}

void RowPruner::before_step(int64_t step, int64_t steps) {
  if (rule_ && config_.total_steps == steps) return;
  config_.total_steps = steps;
  std::vector<Tensor> matrices, held;
  for (const LowRankSparseStack* s : stacks_)
    for (int64_t e = 0; e < s->sparse.size(0); ++e) {
      matrices.push_back(s->sparse.detach()[e]);
      held.push_back(s->average[e]);
      held.push_back(s->latest[e]);
    }
  rule_ = std::make_unique<RowPruning>(std::move(matrices), config_, step, held);
}

void RowPruner::after_step() {
  check(rule_ != nullptr, "{}: a step that nobody has begun", kSlug);
  std::vector<Tensor> gradients;
  for (const LowRankSparseStack* s : stacks_) {
    // No gradient: no token came by. One that is not finite moved nothing, and must not enter an average.
    const auto& g = s->sparse.grad();
    const auto used = g.defined() && torch::isfinite(g).all().item<bool>() ? g : torch::zeros_like(s->sparse.detach());
    for (int64_t e = 0; e < used.size(0); ++e) gradients.push_back(used[e]);
  }
  rule_->after_step(gradients);
}

std::shared_ptr<const Checkpoint> compact_low_rank_sparse(std::shared_ptr<const Checkpoint> trained) {
  const std::string path = trained->path().string();
  check(trained->gguf() == nullptr, "{}: a GGUF file has no place for matrices in parts", path);
  json config = trained->config();
  const json parts = config.value("moiety", json::object()).value("parts", json::array());
  check(parts.size() == 1 && parts[0].value("slug", "") == kSlug,
        "{} has {} parts: only a model whose one part is {} is made compact", path, parts.size(), kSlug);
  config["moiety"].erase("parts");
  const json plain_config = config;
  config["moiety"][kLowRankSparse] = {{"rank", parts[0].value("rank", LowRankSparseConfig().rank)}};
  std::map<std::string, TensorInfo> infos;
  std::set<std::string> removed;
  for (const TensorInfo& t : trained->tensors()) {
    infos[t.name] = t;
    if (t.name.find(".adapters.") != std::string::npos) removed.insert(t.name);
  }
  const ExpertLayers layers(overlay(trained, plain_config, {}, removed));
  const std::string name = parts[0].value("name", "");
  std::vector<OverlayTensor> tensors;
  const auto add = [&](const std::string& to, const Tensor& value, Format format) {
    OverlayTensor t;
    t.info.name = to;
    t.info.format = format;
    t.info.shape = value.sizes().vec();
    t.get = [view = view_of(value.contiguous(), t.info.format), info = t.info] {
      TensorView v = view;
      v.name = info.name;
      v.shape = info.shape;
      return v;
    };
    tensors.push_back(std::move(t));
  };
  for (size_t l = 0; l < layers.layers().size(); ++l) {
    const auto& layer = layers.layers()[l];
    for (int64_t e = 0; e < layer.experts; ++e) {
      const auto names = layers.matrices(l, e), held = layers.names(l, e);
      const char* const ends[] = {"gate_up_proj.{}_gate", "gate_up_proj.{}_up", "down_proj.{}"};
      for (size_t m = 0; m < names.size(); ++m) {
        const auto at = names[m].find("layers.");
        const std::string place = names[m].substr(0, names[m].find('.', at + 7) + 1) + "adapters." +
                                  (name.empty() ? "" : name + ".") + "experts.";
        const auto part = [&](const char* what) {
          const std::string from = place + fmt::format(fmt::runtime(ends[m]), what);
          return infos.count(from) != 0 ? as_tensor(select_first(trained->get(from), e)) : Tensor();
        };
        const Tensor left = part("left"), right = part("right"), sparse = part("sparse");
        check(left.defined() && right.defined() && sparse.defined(),
              "{}: '{}' lacks tensors: the part has to stand in place of all matrices of the experts", path, place);
        const RowSparse rows = compact_rows(sparse);
        const std::string stem = names[m].substr(0, names[m].rfind(".weight"));
        const Format was = infos.at(held[0]).format, format = is_block(was) ? Format::BF16 : was;
        add(stem + ".left", left, format);
        add(stem + ".right", right, format);
        add(stem + ".rows", rows.rows, format);
        add(stem + ".index", rows.index, Format::I64);
      }
      removed.insert(held.begin(), held.end());
    }
  }
  check(!tensors.empty(), "{}: the part has no tensors", path);
  return overlay(std::move(trained), std::move(config), std::move(tensors), removed);
}

namespace {

std::vector<std::shared_ptr<BesideStack>> make_stacks(StackSite& site, const json& settings) {
  const auto c = parse<LowRankSparseConfig>(settings, kSlug);
  auto& shared = site.shared[kSlug];
  const bool first = !shared.has_value();
  if (first) shared = std::make_pair(std::make_shared<RowPruner>(c.pruning), dump(c));
  const auto& [pruner, like_first] = std::any_cast<const std::pair<std::shared_ptr<RowPruner>, json>&>(shared);
  check(like_first == dump(c), "rows are pruned over all matrices together: every part {} needs the same settings",
        kSlug);
  std::vector<std::shared_ptr<BesideStack>> out;
  for (size_t i = 0; i < site.stacks.size(); ++i) {
    LinearStackImpl* stack = site.stacks[i];
    const int64_t experts = stack->count(), rows = stack->out(), in = stack->in();
    // Split where a tensor is new, and only once.
    auto split = std::make_shared<std::vector<LowRankSparse>>();
    const auto taken = [&](Tensor LowRankSparse::*half) -> Init {
      return [=](Tensor t) {
        for (int64_t e = 0; e < experts; ++e) {
          if (static_cast<int64_t>(split->size()) == e)
            split->push_back(split_low_rank(stack->dense(e, torch::kFloat32), c.rank, fmt::format("expert {}", e)));
          t[e].copy_((*split)[static_cast<size_t>(e)].*half);
        }
      };
    };
    const std::string end = site.stacks.size() == 1 ? "" : i == 0 ? "_gate" : "_up";
    const auto left = site.own.get("left" + end, {experts, rows, c.rank}, taken(&LowRankSparse::left)),
               right = site.own.get("right" + end, {experts, c.rank, in}, taken(&LowRankSparse::right)),
               sparse = site.own.get("sparse" + end, {experts, rows, in}, taken(&LowRankSparse::sparse));
    auto made = std::make_shared<LowRankSparseStack>(stack, left, right, sparse);
    // The trainer finds what it calls among the modules.
    if (first && i == 0) made->register_module("pruner", pruner);
    pruner->add(*made);
    out.push_back(made);
  }
  return out;
}

const RegisterMethod registered(
    {.slug = kSlug,
     .kind = "part",
     .title = "Low rank + row-sparse experts",
     .summary = "MC-SMoE's matrices in place of those of experts: rows of the sparse halves go while the model trains",
     .paper = {"Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", "Li et al.", 2023,
               "2310.01334"},
     .sites = {"linear"},
     .config = describe<LowRankSparseConfig>,
     .make = MakeBeside{.per_input = false,
                        .make = [](LinearSite&, const json&) -> std::shared_ptr<Beside> {
                          fail(
                              "it stands in place of the matrices of experts only: `target: [experts.gate_up_proj, "
                              "experts.down_proj]`");
                        },
                        .make_stack = make_stacks}});

}  // namespace
}  // namespace moiety
