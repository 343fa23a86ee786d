#include "moiety/compress/module_pruning.h"

#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/models/decoder_config.h"
#include "moiety/nn/part.h"

namespace moiety {

using nlohmann::json;

std::vector<KeptModules> plan_module_pruning(const std::vector<ModuleUse>& use, double tau, int64_t at_least) {
  check(tau >= 0.0 && tau <= 1.0, "tau is {}; it must lie between 0 and 1", tau);
  check(at_least >= 0, "at least {} modules cannot be kept", at_least);
  std::vector<KeptModules> plan;
  for (const auto& u : use) {
    const auto frequency = u.frequency.to(torch::kFloat64).contiguous();
    const double* f = frequency.data_ptr<double>();
    KeptModules k{u.layer, u.site, frequency.numel(), {}};
    std::vector<int64_t> order(static_cast<size_t>(k.modules));
    for (int64_t i = 0; i < k.modules; ++i) order[static_cast<size_t>(i)] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return f[a] > f[b]; });
    for (const int64_t i : order)
      if (f[i] >= tau || static_cast<int64_t>(k.keep.size()) < at_least) k.keep.push_back(i);
    check(static_cast<int64_t>(k.keep.size()) >= u.top_k,
          "layer {}, {}: only {} of {} modules are chosen by {} of the tokens or more, but a token chooses {}; take a "
          "lower tau, or keep at least {} of every mixture",
          u.layer, u.site, k.keep.size(), k.modules, tau, u.top_k, u.top_k);
    std::sort(k.keep.begin(), k.keep.end());
    plan.push_back(std::move(k));
  }
  return plan;
}

namespace {

// The tensors of a part whose first dimension counts modules, relative to its layer, and those of modules that were
// added behind them.
using Names = std::vector<std::pair<std::string, std::string>>;
const std::map<std::string, Names>& module_tensors() {
  static const std::map<std::string, Names> names = {
      {"moduleformer",
       {{"mlp.gate.w_gate.3.weight", "mlp.new.gate.weight"},
        {"mlp.gate.w_gate.weight", "mlp.new.gate.weight"},
        {"mlp.gate.expert_centroids", "mlp.new.gate.weight"},
        {"mlp.experts.weight", "mlp.new.experts.weight"},
        {"mlp.output_experts.weight", "mlp.new.output_experts.weight"}}},
      {"moduleformer-attention",
       {{"self_attn.gate.w_gate.3.weight", "self_attn.new.gate.weight"},
        {"self_attn.gate.w_gate.weight", "self_attn.new.gate.weight"},
        {"self_attn.gate.expert_centroids", "self_attn.new.gate.weight"},
        {"self_attn.q_proj.experts.weight", "self_attn.new.experts.weight"},
        {"self_attn.q_proj.output_experts.weight", "self_attn.new.output_experts.weight"}}}};
  return names;
}

class Pruned : public Checkpoint {
 public:
  Pruned(std::shared_ptr<const Checkpoint> whole, const std::vector<KeptModules>& plan)
      : whole_(std::move(whole)), config_(whole_->config()) {
    const auto layers = static_cast<int64_t>(parse_decoder_config(config_).layers.size());
    const auto entries = parse_parts(config_, layers);
    std::map<std::pair<std::string, int64_t>, const KeptModules*> kept;
    for (const auto& k : plan) kept[{k.site, k.layer}] = &k;
    json parts = json::array();
    std::set<const KeptModules*> used;
    for (const auto& entry : entries)
      for (const int64_t layer : entry.layers) {
        json one = entry.settings;
        one.update({{"slug", entry.slug}, {"site", entry.site}, {"layers", layer}});
        const auto names = module_tensors().find(entry.slug);
        const auto it = kept.find({entry.site, layer});
        if (it != kept.end() && names != module_tensors().end()) {
          const KeptModules& k = *it->second;
          one["modules"] = k.keep.size();
          // What was added is a module like any other from now on.
          const int64_t added = one.value("new_modules", int64_t{0});
          one.erase("new_modules");
          used.insert(&k);
          const bool gmm = entry.settings.value("gate_type", "mlp") == "gmm";
          for (const auto& [name, behind] : names->second)
            // What a gate by centroids projects with has no rows of modules.
            if (!(gmm && name.ends_with("w_gate.weight")))
              cut_.push_back({fmt::format(".{}.{}", layer, name),
                              added > 0 ? fmt::format(".{}.{}", layer, behind) : std::string(), &k});
        }
        parts.push_back(std::move(one));
      }
    for (const auto& k : plan)
      check(used.count(&k) > 0, "layer {} has no ModuleFormer part at its site {}", k.layer, shown(k.site));
    plan_ = plan;
    for (Cut& cut : cut_) cut.plan = &plan_[static_cast<size_t>(cut.plan - plan.data())];
    config_["moiety"]["parts"] = std::move(parts);
    for (TensorInfo t : whole_->tensors()) {
      if (is_added(t.name)) continue;
      if (const Cut* cut = cut_of(t.name)) {
        int64_t modules = t.shape.empty() ? 0 : t.shape[0];
        if (!cut->behind.empty()) modules += whole_->get(behind(t.name, *cut)).shape.at(0);
        check(modules == cut->plan->modules, "{} holds {} modules, not {}", t.name, modules, cut->plan->modules);
        t.shape[0] = static_cast<int64_t>(cut->plan->keep.size());
      }
      tensors_.push_back(std::move(t));
    }
  }

  const json& config() const override { return config_; }
  const json& generation_config() const override { return whole_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return whole_->has(name) && !is_added(name); }
  TensorView get(const std::string& name) const override {
    TensorView v = whole_->get(name);
    const Cut* cut = cut_of(name);
    if (!cut) return v;
    const KeptModules& k = *cut->plan;
    TensorView more;
    if (!cut->behind.empty()) {
      more = whole_->get(behind(name, *cut));
      check(more.format == v.format, "{} and {} are of different types", name, more.name);
    }
    const auto first = static_cast<size_t>(v.shape[0]), one = v.data.size() / first;
    const auto kept = std::make_shared<std::vector<std::byte>>();
    kept->reserve(one * k.keep.size());
    for (const int64_t i : k.keep) {
      const auto at = static_cast<size_t>(i);
      const auto module = at < first ? v.data.subspan(at * one, one) : more.data.subspan((at - first) * one, one);
      kept->insert(kept->end(), module.begin(), module.end());
    }
    v.shape[0] = static_cast<int64_t>(k.keep.size());
    v.data = *kept;
    v.owner = kept;
    return v;
  }
  std::filesystem::path path() const override { return whole_->path(); }
  int64_t bytes_on_disk() const override { return whole_->bytes_on_disk(); }

 private:
  struct Cut {
    std::string end;          // of the name of a tensor
    std::string behind;       // end of the name of that with the modules behind it; empty: there are none
    const KeptModules* plan;  // what of both together stays
  };

  const Cut* cut_of(const std::string& name) const {
    for (const Cut& cut : cut_)
      if (name.ends_with(cut.end)) return &cut;
    return nullptr;
  }
  static std::string behind(const std::string& name, const Cut& cut) {
    return name.substr(0, name.size() - cut.end.size()) + cut.behind;
  }
  bool is_added(const std::string& name) const {
    return std::any_of(cut_.begin(), cut_.end(),
                       [&](const Cut& cut) { return !cut.behind.empty() && name.ends_with(cut.behind); });
  }

  std::shared_ptr<const Checkpoint> whole_;
  json config_;
  std::vector<KeptModules> plan_;
  std::vector<Cut> cut_;
  std::vector<TensorInfo> tensors_;
};

}  // namespace

std::shared_ptr<const Checkpoint> prune_modules(std::shared_ptr<const Checkpoint> checkpoint,
                                                const std::vector<KeptModules>& plan) {
  return std::make_shared<Pruned>(std::move(checkpoint), plan);
}

}  // namespace moiety
