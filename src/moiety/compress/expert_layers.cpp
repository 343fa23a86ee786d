#include "moiety/compress/expert_layers.h"

#include <torch/torch.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/gguf_names.h"
#include "moiety/io/overlay.h"
#include "moiety/models/decoder_config.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"

namespace moiety {

using nlohmann::json;

namespace {

// What a tensor holds of an expert. Halves of one tensor: gate first, or gate and up in turns along the last dimension.
enum class Holds { gate, up, down, gate_up, other };

Holds meaning(const std::string& leaf) {
  static const std::map<std::string, Holds> names = {
      {"gate_proj.weight", Holds::gate},
      {"w1.weight", Holds::gate},
      {"gate_proj", Holds::gate},
      {"up_proj.weight", Holds::up},
      {"w3.weight", Holds::up},
      {"up_proj", Holds::up},
      {"down_proj.weight", Holds::down},
      {"w2.weight", Holds::down},
      {"down_proj", Holds::down},
      {"gate_up_proj", Holds::gate_up},
      {"gate_up_proj.weight", Holds::gate_up},
      {"input_linear.weight", Holds::gate_up},
      {"output_linear.weight", Holds::down},
  };
  const auto it = names.find(leaf);
  return it == names.end() ? Holds::other : it->second;
}

std::string prefix_of(const Checkpoint& checkpoint, int64_t block) {
  const std::string end = fmt::format("layers.{}.", block);
  for (const std::string& start : {std::string("model."), std::string("model.language_model."),
                                   std::string("language_model.model."), std::string()})
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"})
      if (checkpoint.has(start + end + norm)) return start + end;
  return "model." + end;
}

TensorView view_of_bytes(const TensorInfo& info, std::shared_ptr<std::vector<std::byte>> bytes) {
  TensorView v;
  static_cast<TensorInfo&>(v) = info;
  v.data = *bytes;
  v.owner = std::move(bytes);
  return v;
}

// Elements `from` of the first dimension, as they are stored.
TensorView picked(const TensorView& whole, const std::vector<int64_t>& from) {
  TensorInfo info = whole;
  info.shape[0] = static_cast<int64_t>(from.size());
  const size_t one = whole.data.size() / static_cast<size_t>(std::max<int64_t>(1, whole.shape[0]));
  const auto bytes = std::make_shared<std::vector<std::byte>>(one * from.size());
  for (size_t n = 0; n < from.size(); ++n)
    std::memcpy(bytes->data() + n * one, whole.data.data() + static_cast<size_t>(from[n]) * one, one);
  return view_of_bytes(info, bytes);
}

Format made_format(Format old) {
  return is_block(old) ? Format::BF16 : old;
}

bool any_made(const NewExperts& n) {
  return std::any_of(n.from.begin(), n.from.end(), [](int64_t f) { return f < 0; });
}

// The experts that `made` gives, for one layer at a time.
class Made {
 public:
  std::shared_ptr<const std::vector<ExpertWeights>> of(const NewExperts& plan, const ExpertLayers::Layer& layer) {
    const std::lock_guard lock(mutex_);
    if (held_ && block_ == plan.block) return held_;
    held_ = nullptr;
    auto made = std::make_shared<std::vector<ExpertWeights>>(plan.made());
    check(made->size() == plan.from.size(), "block {}: {} experts were made, not {}", plan.block, made->size(),
          plan.from.size());
    for (size_t n = 0; n < made->size(); ++n) {
      if (plan.from[n] >= 0) continue;
      const ExpertWeights& w = (*made)[n];
      const std::vector<int64_t> in = {layer.width, layer.hidden}, out = {layer.hidden, layer.width};
      check(w.gate.defined() && w.up.defined() && w.down.defined() && w.gate.sizes() == in && w.up.sizes() == in &&
                w.down.sizes() == out,
            "block {}: expert {} was made in another shape than {} x {}", plan.block, n, layer.width, layer.hidden);
    }
    block_ = plan.block;
    held_ = std::move(made);
    return held_;
  }

 private:
  std::mutex mutex_;
  int64_t block_ = -1;
  std::shared_ptr<const std::vector<ExpertWeights>> held_;
};

torch::Tensor held_part(const ExpertWeights& w, Holds holds) {
  switch (holds) {
    case Holds::gate:
      return w.gate;
    case Holds::up:
      return w.up;
    case Holds::down:
      return w.down;
    case Holds::gate_up:
      return torch::cat({w.gate, w.up}, 0);
    default:
      fail("tensors of experts beside their matrices cannot be made anew");
  }
}

// The settings object of the language model inside a config.
json& text_settings(json& config) {
  return config.contains("text_config") && config["text_config"].is_object() ? config["text_config"] : config;
}

const char* count_key(const json& settings, const std::string& family) {
  for (const char* key : {"num_local_experts", "n_routed_experts", "num_experts"})
    if (settings.contains(key) && !settings[key].is_null()) return key;
  if (family == "mixtral" || family == "phimoe" || family == "gpt_oss" || family.rfind("granitemoe", 0) == 0)
    return "num_local_experts";
  return family.rfind("deepseek", 0) == 0 || family == "dots1" || family == "glm4_moe" ? "n_routed_experts"
                                                                                       : "num_experts";
}

}  // namespace

struct ExpertLayers::Places {
  struct Stack {
    std::string name;
    Holds holds;
  };
  std::string experts;              // "model.layers.3.mlp.experts."
  std::vector<std::string> leaves;  // of one expert, where every expert has tensors of its own
  std::vector<Stack> stacks;        // or tensors whose first dimension counts experts
  std::string router;               // its weight
  std::vector<std::string> by_row;  // tensors whose first dimension counts rows of the router
  bool alternating = false;         // gpt-oss: not to be made anew
};

ExpertLayers::~ExpertLayers() = default;

ExpertLayers::ExpertLayers(std::shared_ptr<const Checkpoint> checkpoint) : checkpoint_(std::move(checkpoint)) {
  const json& config = checkpoint_->config();
  const DecoderConfig c = parse_decoder_config(config);
  const auto parts = parse_parts(config, static_cast<int64_t>(c.layers.size()));
  // Names by what stands before a layer's own: one pass over all tensors.
  std::map<std::string, std::vector<std::string>> by_layer;
  for (const TensorInfo& t : checkpoint_->tensors()) {
    infos_[t.name] = t;
    const auto at = t.name.find("layers.");
    if (at == std::string::npos) continue;
    const auto end = t.name.find('.', at + 7);
    if (end != std::string::npos) by_layer[t.name.substr(0, end + 1)].push_back(t.name.substr(end + 1));
  }
  for (int64_t block = 0; block < static_cast<int64_t>(c.layers.size()); ++block) {
    if (!c.layers[static_cast<size_t>(block)].mixture) continue;
    const MixtureConfig m = c.mixture_of(block);
    for (const PartEntry& p : parts)
      check(p.site != "ffn" || !std::binary_search(p.layers.begin(), p.layers.end(), block),
            "layer {} has the part {} in place of its mixture: its experts are not the family's own", block, p.slug);
    Layer layer{.block = block,
                .experts = m.matrices > 0 ? m.matrices : m.experts,
                .rows = m.experts,
                .map = m.expert_map,
                .top_k = m.router.top_k,
                .width = m.width,
                .hidden = c.hidden,
                .groups = std::max<int64_t>(1, m.router.groups)};
    auto places = std::make_unique<Places>();
    const std::string prefix = prefix_of(*checkpoint_, block);
    std::set<std::string> leaves;
    for (const std::string& name : by_layer[prefix]) {
      check(name.find("adapters.experts.") == std::string::npos,
            "layer {} has an adapter beside its experts: merge it first (moiety merge)", block);
      for (const char* half : {"mlp.", "block_sparse_moe."}) {
        if (name.rfind(half, 0) != 0) continue;
        const std::string rest = name.substr(std::char_traits<char>::length(half));
        for (const char* row : {"gate.weight", "router.weight", "router.layer.weight"})
          if (rest == row) places->router = prefix + name;
        for (const char* row : {"gate.weight", "router.weight", "router.layer.weight", "gate.bias", "router.bias",
                                "gate.e_score_correction_bias"})
          if (rest == row) places->by_row.push_back(prefix + name);
        if (rest == "input_linear.weight" || rest == "output_linear.weight")
          places->stacks.push_back({prefix + name, meaning(rest)});
        if (rest.rfind("experts.", 0) != 0) continue;
        const std::string own = rest.substr(8);
        const auto dot = own.find('.');
        places->experts = prefix + half + "experts.";
        if (dot != std::string::npos && own.find_first_not_of("0123456789") == dot)
          leaves.insert(own.substr(dot + 1));
        else
          places->stacks.push_back({prefix + name, meaning(own)});
      }
    }
    places->leaves.assign(leaves.begin(), leaves.end());
    places->alternating = m.clamped;
    check(!places->router.empty(), "layer {} has no tensor of a router under '{}'", block, prefix);
    check(!places->leaves.empty() || !places->stacks.empty(), "layer {} has no tensors of experts under '{}'", block,
          prefix);
    for (const auto& s : places->stacks) {
      const auto& shape = infos_.at(s.name).shape;
      check(!shape.empty() && shape[0] == layer.experts, "tensor '{}' holds {} experts, the config says {}", s.name,
            shape.empty() ? 0 : shape[0], layer.experts);
    }
    for (const auto& leaf : places->leaves)
      for (int64_t e = 0; e < layer.experts; ++e)
        check(checkpoint_->has(fmt::format("{}{}.{}", places->experts, e, leaf)),
              "the tensor '{}{}.{}' of an expert is missing", places->experts, e, leaf);
    for (const auto& name : places->by_row) {
      const auto& shape = infos_.at(name).shape;
      check(!shape.empty() && shape[0] == layer.rows, "tensor '{}' has {} rows, the config says {} experts", name,
            shape.empty() ? 0 : shape[0], layer.rows);
    }
    layers_.push_back(std::move(layer));
    places_.push_back(std::move(places));
  }
  check(!layers_.empty(), "{} has no layers with experts: it is a dense model", checkpoint_->path().string());
}

size_t ExpertLayers::of_block(int64_t block) const {
  for (size_t i = 0; i < layers_.size(); ++i)
    if (layers_[i].block == block) return i;
  fail("layer {} has no experts", block);
}

torch::Tensor ExpertLayers::router(size_t layer) const {
  return dequantize(checkpoint_->get(places_.at(layer)->router));
}

ExpertWeights ExpertLayers::expert(size_t layer, int64_t e) const {
  const Layer& l = layers_.at(layer);
  const Places& p = *places_[layer];
  check(e >= 0 && e < l.experts, "layer {} has no expert {}: it has {}", l.block, e, l.experts);
  check(!p.alternating, "layer {}: clamped experts with biases can be taken out, but not computed with", l.block);
  ExpertWeights w;
  const auto place = [&](Holds holds, const torch::Tensor& t) {
    if (holds == Holds::gate) w.gate = t;
    if (holds == Holds::up) w.up = t;
    if (holds == Holds::down) w.down = t;
    if (holds == Holds::gate_up) {
      w.gate = t.narrow(0, 0, l.width).contiguous();
      w.up = t.narrow(0, l.width, l.width).contiguous();
    }
    check(holds != Holds::other, "layer {}: its experts have tensors beside gate, up and down", l.block);
  };
  for (const auto& leaf : p.leaves)
    place(meaning(leaf), dequantize(checkpoint_->get(fmt::format("{}{}.{}", p.experts, e, leaf))));
  for (const auto& s : p.stacks) place(s.holds, dequantize(select_first(checkpoint_->get(s.name), e)));
  const std::vector<int64_t> in = {l.width, l.hidden}, out = {l.hidden, l.width};
  check(w.gate.defined() && w.up.defined() && w.down.defined() && w.gate.sizes() == in && w.up.sizes() == in &&
            w.down.sizes() == out,
        "layer {}: expert {} has no gate, up and down of {} x {}", l.block, e, l.width, l.hidden);
  return w;
}

std::vector<std::string> ExpertLayers::names(size_t layer, int64_t e) const {
  const Places& p = *places_.at(layer);
  std::vector<std::string> out;
  for (const auto& leaf : p.leaves) out.push_back(fmt::format("{}{}.{}", p.experts, e, leaf));
  for (const auto& s : p.stacks) out.push_back(s.name);
  return out;
}

std::vector<std::string> ExpertLayers::matrices(size_t layer, int64_t e) const {
  const Places& p = *places_.at(layer);
  std::vector<std::string> out;
  for (const Holds holds : {Holds::gate, Holds::up, Holds::down})
    for (const auto& leaf : p.leaves)
      if (meaning(leaf) == holds) out.push_back(fmt::format("{}{}.{}", p.experts, e, leaf));
  const bool stacked = p.leaves.empty() && !p.experts.empty() && !p.alternating;
  if (stacked)
    for (const char* name : {"gate_proj", "up_proj", "down_proj"})
      out.push_back(fmt::format("{}{}.{}.weight", p.experts, e, name));
  check(out.size() == 3, "layer {}: its experts cannot have tensors of their own for gate, up and down",
        layers_[layer].block);
  return out;
}

int64_t ExpertLayers::expert_bytes(size_t layer) const {
  const Places& p = *places_.at(layer);
  int64_t bytes = 0;
  for (const auto& leaf : p.leaves) bytes += infos_.at(fmt::format("{}0.{}", p.experts, leaf)).bytes();
  for (const auto& s : p.stacks) bytes += infos_.at(s.name).bytes() / layers_[layer].experts;
  return bytes;
}

int64_t ExpertLayers::expert_parameters(size_t layer) const {
  return 3 * layers_.at(layer).width * layers_[layer].hidden;
}

NewExperts NewExperts::keep(const ExpertLayers::Layer& layer, std::vector<int64_t> kept) {
  std::sort(kept.begin(), kept.end());
  NewExperts n;
  n.block = layer.block;
  n.from = kept;
  if (layer.map.empty()) {
    n.rows = std::move(kept);
    return n;
  }
  // Rows of experts that stay, in their order.
  for (size_t row = 0; row < layer.map.size(); ++row) {
    const auto it = std::lower_bound(kept.begin(), kept.end(), layer.map[row]);
    if (it == kept.end() || *it != layer.map[row]) continue;
    n.rows.push_back(static_cast<int64_t>(row));
    n.map.push_back(it - kept.begin());
  }
  return n;
}

namespace {

bool identity(const std::vector<int64_t>& map, int64_t experts) {
  if (static_cast<int64_t>(map.size()) != experts) return map.empty();
  for (int64_t i = 0; i < experts; ++i)
    if (map[static_cast<size_t>(i)] != i) return false;
  return true;
}

void check_plan(const NewExperts& n, const ExpertLayers::Layer& l, const TopKRouterOptions& router) {
  const int64_t groups = l.groups;
  check(!n.rows.empty() && !n.from.empty(), "layer {} would be left without experts", l.block);
  std::set<int64_t> seen;
  for (const int64_t r : n.rows) {
    check(r >= 0 && r < l.rows, "layer {} has no expert {}: its router has {} rows", l.block, r, l.rows);
    check(seen.insert(r).second, "layer {}: expert {} is named twice", l.block, r);
  }
  for (const int64_t f : n.from)
    check(f >= -1 && f < l.experts, "layer {} has no expert {}: it has {}", l.block, f, l.experts);
  check(!any_made(n) || n.made, "layer {}: nothing makes its new experts", l.block);
  if (n.router.defined())
    check(
        n.router.dim() == 2 && n.router.size(0) == static_cast<int64_t>(n.rows.size()) && n.router.size(1) == l.hidden,
        "layer {}: the new router must be {} x {}", l.block, n.rows.size(), l.hidden);
  const auto count = static_cast<int64_t>(n.from.size());
  if (n.map.empty()) {
    check(n.rows.size() == n.from.size(), "layer {}: {} rows of the router do not fit {} experts", l.block,
          n.rows.size(), n.from.size());
  } else {
    check(n.map.size() == n.rows.size(), "layer {}: a map of {} entries does not fit {} rows of the router", l.block,
          n.map.size(), n.rows.size());
    for (const int64_t e : n.map)
      check(e >= 0 && e < count, "layer {}: the map names expert {} of {}", l.block, e, count);
  }
  if (groups <= 1) return;
  // Groups are equal parts of the rows in their order.
  check(std::is_sorted(n.rows.begin(), n.rows.end()) && static_cast<int64_t>(n.rows.size()) % groups == 0,
        "layer {} routes in {} groups: as many experts of each have to stay", l.block, groups);
  std::vector<int64_t> left(static_cast<size_t>(groups));
  for (const int64_t r : n.rows) ++left[static_cast<size_t>(r / (l.rows / groups))];
  const int64_t each = static_cast<int64_t>(n.rows.size()) / groups;
  for (int64_t g = 0; g < groups; ++g)
    check(left[static_cast<size_t>(g)] == each,
          "layer {} routes in {} groups: as many experts of each have to stay, but {} of group {} and {} on average",
          l.block, groups, left[static_cast<size_t>(g)], g, each);
  check(!router.group_by_top2 || each >= 2,
        "layer {} ranks its {} groups by their two best experts: at least two of each have to stay", l.block, groups);
  check(l.top_k <= router.top_groups * each,
        "layer {}: a token takes {} experts of {} groups, which would have {} each", l.block, l.top_k,
        router.top_groups, each);
}

}  // namespace

std::shared_ptr<const Checkpoint> with_experts(const ExpertLayers& layers, std::vector<NewExperts> plan) {
  const auto& base = layers.checkpoint();
  json config = base->config();
  const DecoderConfig parsed = parse_decoder_config(config);
  const auto made = std::make_shared<Made>();
  std::vector<OverlayTensor> tensors;
  std::set<std::string> removed;
  std::map<int64_t, std::pair<int64_t, std::vector<int64_t>>> own;  // block -> experts, map
  for (const auto& l : layers.layers()) own[l.block] = {l.experts, l.map};
  std::set<int64_t> seen;
  for (NewExperts& entry : plan) {
    const size_t at = layers.of_block(entry.block);
    const ExpertLayers::Layer& l = layers.layers()[at];
    check(seen.insert(entry.block).second, "layer {} is named twice", entry.block);
    check_plan(entry, l, parsed.moe.router);
    const ExpertLayers::Places& p = *layers.places_[at];
    check(!any_made(entry) || !p.alternating,
          "layer {}: clamped experts with biases can be taken out, but not computed with", entry.block);
    const auto count = static_cast<int64_t>(entry.from.size());
    if (identity(entry.map, count)) entry.map.clear();
    own[entry.block] = {count, entry.map};
    const auto n = std::make_shared<const NewExperts>(std::move(entry));
    for (const auto& leaf : p.leaves) {
      for (int64_t e = count; e < l.experts; ++e) removed.insert(fmt::format("{}{}.{}", p.experts, e, leaf));
      for (int64_t e = 0; e < count; ++e) {
        const int64_t from = n->from[static_cast<size_t>(e)];
        const TensorInfo& old = layers.infos_.at(fmt::format("{}{}.{}", p.experts, std::max<int64_t>(from, 0), leaf));
        OverlayTensor t{old, {}};
        t.info.name = fmt::format("{}{}.{}", p.experts, e, leaf);
        if (from == e) continue;
        if (from >= 0) {
          t.get = [base, name = old.name] { return base->get(name); };
        } else {
          t.info.format = made_format(old.format);
          t.get = [made, n, l, e, holds = meaning(leaf), format = t.info.format] {
            return view_of(held_part((*made->of(*n, l))[static_cast<size_t>(e)], holds).contiguous(), format);
          };
        }
        tensors.push_back(std::move(t));
      }
    }
    for (const auto& s : p.stacks) {
      OverlayTensor t{layers.infos_.at(s.name), {}};
      t.info.shape[0] = count;
      if (any_made(*n)) {
        t.info.format = made_format(t.info.format);
        t.get = [base, made, n, l, s, format = t.info.format] {
          const TensorView old = base->get(s.name);
          std::vector<torch::Tensor> all;
          for (size_t e = 0; e < n->from.size(); ++e)
            all.push_back(n->from[e] >= 0 ? dequantize(select_first(old, n->from[e]))
                                          : held_part((*made->of(*n, l))[e], s.holds));
          return view_of(torch::stack(all), format);
        };
      } else {
        t.get = [base, n, name = s.name] { return picked(base->get(name), n->from); };
      }
      tensors.push_back(std::move(t));
    }
    for (const auto& name : p.by_row) {
      OverlayTensor t{layers.infos_.at(name), {}};
      t.info.shape[0] = static_cast<int64_t>(n->rows.size());
      if (name == p.router && n->router.defined()) {
        t.info.format = made_format(t.info.format);
        t.get = [n, format = t.info.format] { return view_of(n->router.contiguous(), format); };
      } else {
        t.get = [base, n, name] { return picked(base->get(name), n->rows); };
      }
      tensors.push_back(std::move(t));
    }
  }
  int64_t most = 0, least = std::numeric_limits<int64_t>::max();
  for (const auto& [block, what] : own) {
    const int64_t rows = what.second.empty() ? what.first : static_cast<int64_t>(what.second.size());
    most = std::max(most, rows);
    least = std::min(least, rows);
  }
  json entries = json::object();
  for (const auto& [block, what] : own) {
    if (what.first == most && what.second.empty()) continue;
    json& entry = entries[fmt::format("{}", block)];
    entry["count"] = what.first;
    if (!what.second.empty()) entry["map"] = what.second;
  }
  json& settings = text_settings(config);
  settings[count_key(settings, parsed.family)] = most;
  for (const char* key : {"num_experts_per_tok", "experts_per_token"})
    if (settings.contains(key) || (key[0] == 'n' && !settings.contains("experts_per_token")))
      settings[key] = std::min(parsed.moe.router.top_k, entries.empty() ? least : most);
  if (config.contains("moiety") && config["moiety"].is_object()) config["moiety"].erase("experts");
  if (!entries.empty()) config["moiety"]["experts"] = std::move(entries);
  if (config.contains("moiety") && config["moiety"].empty()) config.erase("moiety");
  const DecoderConfig after = parse_decoder_config(config);
  check(after.moe.experts == most, "the config of {} does not say how many experts a layer has in a known way",
        base->path().string());
  return overlay(base, std::move(config), std::move(tensors), removed);
}

bool uniform_experts(const json& config) {
  const auto own = config.find("moiety");
  return own == config.end() || !own->is_object() || !own->contains("experts");
}

}  // namespace moiety
