#include "moiety/compress/eaquant_model.h"

#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/io/overlay.h"
#include "moiety/io/packed_rows.h"
#include "moiety/models/decoder.h"
#include "moiety/models/layer_walk.h"
#include "moiety/moe/mixture.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

// A permutation as two digits to the base 256, which every float type holds.
constexpr int64_t kDigits = 256;

Tensor digits_of(const Tensor& perm) {
  return torch::stack({perm.div(kDigits, "floor"), perm.remainder(kDigits)}).to(torch::kFloat32);
}

Tensor perm_of(const Tensor& digits) {
  const auto whole = digits.detach().to(torch::kCPU, torch::kInt64);
  return whole.select(0, 0) * kDigits + whole.select(0, 1);
}

Rotation rotation_of(const Tensor& first, const Tensor& digits, const Tensor& second) {
  return {first.detach().to(torch::kFloat32), perm_of(digits), second.detach().to(torch::kFloat32)};
}

Rotation identity(int64_t block, int64_t channels) {
  return {torch::eye(block), torch::arange(channels, torch::kInt64), torch::eye(block)};
}

// What matrices read, in x's dtype.
Tensor quantized(const Tensor& x, const Rotation& rotation, const EaquantPartConfig& c) {
  const auto flat = x.reshape({-1, x.size(-1)}).to(torch::kFloat32);
  return quantize_activations(rotation.apply(flat), c.activation_bits, c.lac).to(x.scalar_type());
}

}  // namespace

void EaquantPartConfig::fields(Fields& f) {
  f("activation_bits", activation_bits, "bits of what the matrices read").min(2).max(16);
  f("lac", lac, "extremes of a token are multiplied by this").min(0.01).max(1);
  f("block_size", block_size, "channels that are rotated together").min(1);
}

QuantizedInputs::QuantizedInputs(std::vector<LinearImpl*> matrices, Rotation rotation, EaquantPartConfig config)
    : matrices_(std::move(matrices)), rotation_(std::move(rotation)), config_(config) {}

void QuantizedInputs::apply(const Tensor& x, std::vector<Tensor>& outputs, Pass&) {
  const auto read = quantized(x, rotation_, config_);
  for (size_t i = 0; i < outputs.size(); ++i) outputs[i] = matrices_.at(i)->multiply(read).view(outputs[i].sizes());
}

Tensor QuantizedInputs::merged(const Tensor& weight, int64_t) const {
  return rotation_.undo(weight.to(torch::kFloat32));
}

QuantizedExpertInputs::QuantizedExpertInputs(LinearStackImpl* stack, std::vector<Rotation> rotations,
                                             EaquantPartConfig config)
    : stack_(stack), rotations_(std::move(rotations)), config_(config) {}

Tensor QuantizedExpertInputs::apply(const Tensor& x, const std::vector<int64_t>& counts, Tensor y) {
  std::vector<Tensor> pieces;
  int64_t begin = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    if (counts[e] == 0) continue;
    const auto rows = x.narrow(0, begin, counts[e]);
    pieces.push_back(stack_->forward(static_cast<int64_t>(e), quantized(rows, rotations_.at(e), config_)));
    begin += counts[e];
  }
  return pieces.empty() ? y : torch::cat(pieces);
}

Tensor QuantizedExpertInputs::delta(int64_t expert) const {
  const auto w = stack_->dense(expert, torch::kFloat32);
  return rotations_.at(static_cast<size_t>(expert)).undo(w) - w;
}

namespace {

// --- The part that a saved checkpoint names --------------------------------------------------------------------------

Init with(Tensor value) {
  return [value](Tensor t) { t.copy_(value); };
}

std::shared_ptr<Beside> make_beside(LinearSite& site, const json& settings) {
  const auto c = parse<EaquantPartConfig>(settings, "eaquant");
  const int64_t in = site.targets.at(0).in, b = c.block_size;
  check(in % b == 0, "{} channels are no multiple of blocks of {}; {} would do", in, b, std::gcd(in, b));
  std::vector<LinearImpl*> matrices;
  for (const LinearTarget& t : site.targets) matrices.push_back(t.matrix);
  const auto first = site.own.get("rotation_1", {b, b}, with(torch::eye(b))),
             perm = site.own.get("perm", {2, in}, with(digits_of(torch::arange(in, torch::kInt64)))),
             second = site.own.get("rotation_2", {b, b}, with(torch::eye(b)));
  return std::make_shared<QuantizedInputs>(std::move(matrices), rotation_of(first, perm, second), c);
}

std::vector<std::shared_ptr<BesideStack>> make_stack(StackSite& site, const json& settings) {
  const auto c = parse<EaquantPartConfig>(settings, "eaquant");
  const int64_t in = site.in, b = c.block_size, n = site.experts;
  check(in % b == 0, "{} channels are no multiple of blocks of {}; {} would do", in, b, std::gcd(in, b));
  const auto plain = digits_of(torch::arange(in, torch::kInt64));
  const auto first = site.own.get("rotation_1", {n, b, b}, with(torch::eye(b))),
             perm = site.own.get("perm", {n, 2, in}, with(plain)),
             second = site.own.get("rotation_2", {n, b, b}, with(torch::eye(b)));
  std::vector<Rotation> rotations;
  for (int64_t e = 0; e < n; ++e) rotations.push_back(rotation_of(first[e], perm[e], second[e]));
  std::vector<std::shared_ptr<BesideStack>> out;
  for (LinearStackImpl* stack : site.stacks)
    out.push_back(std::make_shared<QuantizedExpertInputs>(stack, rotations, c));
  return out;
}

// --- Calibration of one block ----------------------------------------------------------------------------------------

// Keeps what a matrix reads, sample by sample.
class Reader : public Beside {
 public:
  void apply(const Tensor& x, std::vector<Tensor>&, Pass&) override {
    if (on) seen.push_back(x.reshape({-1, x.size(-1)}));
  }
  bool on = false;
  std::vector<Tensor> seen;
};

// The maximum |x| of every channel over samples.
struct ChannelMax {
  Tensor most;
  void add(const Tensor& x) {
    if (x.size(0) == 0) return;
    const auto one = x.abs().amax(0);
    most = most.defined() ? torch::maximum(most, one) : one;
  }
};

// What a mixture saw of the samples.
struct MixtureReads {
  std::vector<Tensor> inputs, chosen, probabilities;  // [T, h], [T, k], [T, E] a sample
  void add(const Trace::Record& r) {
    inputs.push_back(r.input);
    chosen.push_back(r.routing.experts);
    probabilities.push_back(torch::softmax(r.routing.logits, -1));
  }
};

// Part tensors by name.
using Added = std::map<std::string, Tensor>;

// A matrix of the model, or one of a stack, that lies on the grid.
struct OnGrid {
  Tensor weight;       // in the model
  Tensor codes;        // [out, in]
  Tensor scale, zero;  // [out, 1]
};

class EaquantCalibration {
 public:
  EaquantCalibration(Decoder& model, const EaquantConfig& config, const std::vector<std::vector<int64_t>>& samples,
                     std::string prefix, bool keep_codes)
      : model_(model), c_(config), walk_(model, samples), prefix_(std::move(prefix)), keep_codes_(keep_codes) {
    part_.activation_bits = c_.activation_bits;
    part_.lac = c_.lac;
    part_.block_size = c_.block_size;
  }

  json run(const std::function<void(int64_t, int64_t)>& progress) {
    json layers = json::array();
    for (; !walk_.done(); walk_.next()) {
      layers.push_back(block());
      if (progress) progress(walk_.block() + 1, model_.blocks());
    }
    return layers;
  }
  Added added;
  std::vector<OnGrid> on_grid;  // if they are kept

 private:
  json block() {
    Block& block = walk_.layer();
    auto* attention = dynamic_cast<Attention*>(block.attention.get());
    check(attention != nullptr, "layer {}: its attention is none of queries, keys and values", walk_.block());
    auto* mixture = dynamic_cast<Mixture*>(block.ffn.get());
    std::vector<Tensor> inputs;
    for (int64_t w = 0; w < walk_.windows(); ++w) inputs.push_back(walk_.hidden(w));
    // In full precision: what leaves the block is what the next one is calibrated on.
    const auto reader = std::make_shared<Reader>();
    attention->parts.o->attach(reader);
    reader->on = true;
    MixtureReads whole;
    for (int64_t w = 0; w < walk_.windows(); ++w) {
      Trace trace;
      trace.keep_inputs = true;
      walk_.run(w, &trace);
      for (const auto& r : trace.records)
        if (r.site.site == "ffn") whole.add(r);
    }
    reader->on = false;
    ChannelMax heads;
    for (const Tensor& x : reader->seen) heads.add(x);
    smooth_attention(block, *attention, inputs, heads.most);
    if (mixture) smooth_mixture(block, *mixture, whole);
    // v and o may have been scaled against each other.
    reader->seen.clear();
    reader->on = true;
    std::vector<Tensor> normed;
    for (int64_t w = 0; w < walk_.windows(); ++w) {
      const auto x = block.before_attention ? block.before_attention->forward(inputs[at(w)]) : inputs[at(w)];
      normed.push_back(x.reshape({-1, x.size(-1)}));
      attention->forward(x, walk_.context(w), walk_.pass(w));
    }
    reader->on = false;
    quantize_attention(*attention, torch::stack(normed).mean(0), torch::stack(reader->seen).mean(0));
    json out = {{"layer", walk_.block()}};
    if (!mixture) return out;
    const auto& seen = whole.inputs;
    quantize_router(*mixture, torch::stack(seen).mean(0) / smoothing_, out);
    // Through the attention and the router as they will be: who gets which tokens.
    MixtureReads after;
    for (int64_t w = 0; w < walk_.windows(); ++w) {
      Trace trace;
      trace.keep_inputs = true;
      Pass pass;
      pass.batch = 1;
      pass.block = pass.slot = walk_.block();
      pass.trace = &trace;
      block.forward(inputs[at(w)], walk_.context(w), pass);
      for (const auto& r : trace.records)
        if (r.site.site == "ffn") after.add(r);
    }
    quantize_experts(*mixture, after, out);
    return out;
  }

  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  // The norm before a site, when nothing else reads it and its weights can be scaled.
  std::vector<Tensor> scalable(const std::shared_ptr<Norm>& norm, double& offset) const {
    offset = 0.0;
    if (!norm || model_.parsed.placement == Placement::parallel) return {};
    if (auto* rms = dynamic_cast<RmsNorm*>(norm.get())) {
      offset = rms->offset();
      return {rms->weight};
    }
    auto* layer = dynamic_cast<LayerNorm*>(norm.get());
    if (layer == nullptr || !layer->weight.defined()) return {};
    return layer->bias.defined() ? std::vector<Tensor>{layer->weight, layer->bias} : std::vector<Tensor>{layer->weight};
  }

  // Whether the norm could take it.
  bool fold(const std::shared_ptr<Norm>& norm, const Tensor& s, const std::vector<Tensor>& readers) const {
    double offset = 0.0;
    const auto writers = scalable(norm, offset);
    if (writers.empty()) return false;
    if (offset != 0.0) Tensor(writers[0]).add_(offset);
    fold_smoothing(s, writers, readers);
    if (offset != 0.0) Tensor(writers[0]).sub_(offset);
    return true;
  }

  void smooth_attention(Block& block, Attention& a, const std::vector<Tensor>& inputs, const Tensor& heads) {
    ChannelMax reads;
    for (const Tensor& x : inputs)
      reads.add((block.before_attention ? block.before_attention->forward(x) : x).reshape({-1, x.size(-1)}));
    const std::vector<Tensor> qkv = {a.parts.q->weight, a.parts.k->weight, a.parts.v->weight};
    if (!fold(block.before_attention, smoothing_vector(reads.most, qkv, c_.alpha), qkv))
      log::warn("layer {}: no norm before attention can take a smoothing vector", walk_.block());
    if (a.parts.v->weight.sizes() != a.parts.o->weight.sizes() || a.parts.clip > 0.0) {
      log::debug("layer {}: values and output have different shapes, nothing is moved between them", walk_.block());
      return;
    }
    const auto s = smoothing_vector(heads, {a.parts.o->weight}, c_.alpha);
    a.parts.v->weight.div_(s.unsqueeze(1));
    if (a.parts.v->bias.defined()) a.parts.v->bias.div_(s);
    a.parts.o->weight.mul_(s);
  }

  GatedExperts& experts_of(Mixture& m) const {
    auto* experts = dynamic_cast<GatedExperts*>(m.experts.get());
    check(experts != nullptr && experts->act() != nullptr && experts->gate->weight.defined(),
          "layer {}: its experts are no gated feed-forward layers with a plain activation", walk_.block());
    return *experts;
  }
  TopKRouter& router_of(Mixture& m) const {
    auto* router = dynamic_cast<TopKRouter*>(m.router.get());
    check(router != nullptr, "layer {}: its router does not choose the top k of scores", walk_.block());
    return *router;
  }

  static Tensor rows_of(const Tensor& x, const Tensor& chosen, int64_t expert) {
    return x.index_select(0, (chosen == expert).any(1).nonzero().squeeze(1));
  }
  static Tensor hidden_of(const GatedExperts& e, int64_t expert, const Tensor& x) {
    return e.act()(torch::matmul(x, e.gate->weight[expert].t())) * torch::matmul(x, e.up->weight[expert].t());
  }

  void smooth_mixture(Block& block, Mixture& m, const MixtureReads& reads) {
    GatedExperts& e = experts_of(m);
    const auto& gate_w = e.gate->weight;
    const int64_t n = e.count(), h = gate_w.size(2);
    SmoothingLayer layer;
    layer.act_max = torch::zeros({n, h});
    layer.tokens = torch::zeros({n}, torch::kInt64);
    layer.router = router_of(m).projection->weight;
    layer.gate = gate_w;
    layer.up = e.up->weight;
    layer.router_prob = torch::cat(reads.probabilities).mean(0);
    ChannelMax all;
    std::vector<ChannelExtremes> inner(at(n));
    for (size_t w = 0; w < reads.inputs.size(); ++w) {
      all.add(reads.inputs[w]);
      for (int64_t i = 0; i < n; ++i) {
        const auto rows = rows_of(reads.inputs[w], reads.chosen[w], i);
        if (rows.size(0) == 0) continue;
        layer.act_max[i] = torch::maximum(layer.act_max[i], rows.abs().amax(0));
        layer.tokens[i] += rows.size(0);
        inner[at(i)].add(hidden_of(e, i, rows));
      }
    }
    layer.router_max = all.most;
    std::vector<Tensor> readers = {layer.router, layer.gate, layer.up};
    if (m.shared) {
      layer.shared_gate = m.shared->gate->weight;
      layer.shared_up = m.shared->up->weight;
      readers.insert(readers.end(), {layer.shared_gate, layer.shared_up});
    }
    if (!m.shared_gate.is_empty()) readers.push_back(m.shared_gate->weight);
    const auto s = smoothing_scale(layer, c_.alpha, c_.aggregate, c_.with_router);
    smoothing_ = s;
    if (!fold(block.before_ffn, s, readers)) {
      log::warn("layer {}: no norm before the mixture can take a smoothing vector", walk_.block());
      smoothing_ = torch::ones_like(s);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (!inner[at(i)].high.defined()) continue;
      const auto scale = outlier_scale(inner[at(i)].high, inner[at(i)].low, c_.otsu_ratio, c_.otsu_smooth_rate);
      e.up->weight[i].div_(scale.unsqueeze(1));
      if (e.up->bias.defined()) e.up->bias[i].div_(scale);
      e.down->weight[i].mul_(scale);
    }
  }

  Rotation rotation(const Tensor& x, uint64_t stream) const {
    auto r =
        find_rotation(x, c_.block_size, c_.rotation_steps,
                      static_cast<uint64_t>(c_.seed) * 1000003 + static_cast<uint64_t>(walk_.block()) * 64 + stream);
    return {r.first.to(torch::kFloat32), r.perm, r.second.to(torch::kFloat32)};
  }
  void round(Tensor w, const Rotation& r, bool searched = true) {
    const auto q = quantize_weight(r.apply(w), c_.weight_bits, searched ? c_.weight_method : "minmax", c_.swc);
    w.copy_(q.values);
    if (keep_codes_)
      on_grid.push_back({w, q.codes.to(c_.weight_bits <= 8 ? torch::kUInt8 : torch::kInt32), q.scale, q.zero});
  }
  std::string place(const std::string& name) const {
    return fmt::format("{}layers.{}.adapters.{}.", prefix_, walk_.block(), name);
  }
  void store(const std::string& name, const Rotation& r) {
    added[place(name) + "rotation_1"] = r.first;
    added[place(name) + "rotation_2"] = r.second;
    added[place(name) + "perm"] = digits_of(r.perm);
  }

  void quantize_attention(Attention& a, const Tensor& reads, const Tensor& heads) {
    const auto set = [&](const std::string& name, const std::vector<Linear>& matrices, const Tensor& x,
                         uint64_t stream) {
      const Rotation r = rotation(x, stream);
      store(name, r);
      std::vector<LinearImpl*> all;
      for (Linear m : matrices) {
        round(m->weight, r);
        all.push_back(m.get());
      }
      const auto beside = std::make_shared<QuantizedInputs>(all, r, part_);
      for (Linear m : matrices) m->attach(beside);
    };
    set("q_proj+k_proj+v_proj", {a.parts.q, a.parts.k, a.parts.v}, reads, 0);
    set("o_proj", {a.parts.o}, heads, 2);
  }

  void quantize_router(Mixture& m, const Tensor& x, json& out) {
    TopKRouter& router = router_of(m);
    auto& w = router.projection->weight;
    const Rotation r = rotation(x, 4);
    const auto read = quantize_activations(r.apply(x), c_.router_bits, c_.lac);
    const auto found =
        calibrate_router(r.apply(w), read, c_.router_bits, router.options.top_k, c_.router_loss, c_.kl_ratio);
    w.copy_(r.undo(found.values));
    out["router_overlap"] = found.overlap;
    out["router_kl"] = found.kl;
  }

  void quantize_experts(Mixture& m, const MixtureReads& reads, json& out) {
    GatedExperts& e = experts_of(m);
    const int64_t n = e.count(), k = reads.chosen[0].size(1), length = reads.inputs[0].size(0);
    const auto tokens = torch::cat(reads.inputs);
    const auto selected = torch::stack(reads.chosen);
    const bool balanced = c_.balance_ratio > 0.0;
    const int64_t cap = balanced ? balance_cap(n, k, length, c_.balance_ratio) : tokens.size(0);
    const BalancedTokens own = balance_tokens(selected, n, std::max<int64_t>(1, cap));
    std::vector<Rotation> outer, inner;
    int64_t fewest = tokens.size(0), without = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t count = own.count[i].item<int64_t>();
      fewest = std::min(fewest, count);
      without += count == 0 ? 1 : 0;
      // An expert that no token reaches is calibrated on what the router reads.
      const bool known = count > 0 || balanced;
      const auto x = count > 0 ? tokens.index_select(0, own.index[i].narrow(0, 0, count)) : tokens.narrow(0, 0, length);
      outer.push_back(known ? rotation(x, 8) : identity(c_.block_size, e.gate->in()));
      inner.push_back(known ? rotation(hidden_of(e, i, x), 10) : identity(c_.block_size, e.down->in()));
      round(e.gate->weight[i], outer.back(), known);
      round(e.up->weight[i], outer.back(), known);
      round(e.down->weight[i], inner.back(), known);
    }
    store_stack("experts.gate_up_proj", outer);
    store_stack("experts.down_proj", inner);
    out["fewest_tokens"] = fewest;
    out["experts_without_tokens"] = without;
  }
  void store_stack(const std::string& name, const std::vector<Rotation>& all) {
    std::vector<Tensor> first, perm, second;
    for (const Rotation& r : all) {
      first.push_back(r.first);
      perm.push_back(digits_of(r.perm));
      second.push_back(r.second);
    }
    added[place(name) + "rotation_1"] = torch::stack(first);
    added[place(name) + "perm"] = torch::stack(perm);
    added[place(name) + "rotation_2"] = torch::stack(second);
  }

  Decoder& model_;
  const EaquantConfig& c_;
  LayerWalk walk_;
  std::string prefix_;
  bool keep_codes_;
  EaquantPartConfig part_;
  Tensor smoothing_;  // of the mixture of this block
};

// Sizes that blocks have to divide.
void check_blocks(const DecoderConfig& d, int64_t block) {
  const std::vector<std::pair<const char*, int64_t>> sizes = {{"hidden_size", d.hidden},
                                                              {"heads times their size", d.heads * d.head_dim},
                                                              {"the width of an expert", d.moe.width}};
  int64_t all = block;
  for (const auto& [name, size] : sizes) all = std::gcd(all, size);
  for (const auto& [name, size] : sizes)
    check(size % block == 0, "{} is {}, no multiple of the blocks of {} that are rotated; blocks of {} would do", name,
          size, block, all);
}

json part_entry(const EaquantConfig& c, const std::vector<int64_t>& layers, const std::vector<std::string>& targets) {
  return {{"slug", "eaquant"},          {"layers", layers}, {"target", targets}, {"activation_bits", c.activation_bits},
          {"block_size", c.block_size}, {"lac", c.lac}};
}

OverlayTensor overlay_tensor(std::string name, Format format, Tensor value) {
  OverlayTensor t;
  t.info.name = std::move(name);
  t.info.format = format;
  t.info.shape = value.sizes().vec();
  t.get = [value = std::move(value), format] { return view_of(value.contiguous(), format); };
  return t;
}

std::vector<float> floats_of(const Tensor& t) {
  const auto flat = t.to(torch::kFloat32).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

// What a checkpoint stores of matrices alone that lie on the grid. In their place the model is filled with one of their
// properties after another, so that each lies as the layout has the weights, joined and stacked; the weights are lost.
PackedRows packed_of(const std::vector<StoredTensor>& stored, const std::vector<OnGrid>& matrices, int64_t bits,
                     const std::function<Format(const std::string&)>& format) {
  const auto fill = [&](const auto& property) {
    for (const OnGrid& m : matrices) Tensor(m.weight).copy_(property(m));
  };
  constexpr float kMark = std::numeric_limits<float>::quiet_NaN();
  fill([](const OnGrid& m) { return torch::full_like(m.scale, kMark); });
  std::vector<StoredTensor> packed;
  for (const StoredTensor& s : stored)
    if (torch::isnan(s.value()).all().item<bool>()) packed.push_back(s);
  const auto by_row = [&](Tensor OnGrid::*property) {
    fill([&](const OnGrid& m) { return m.*property; });
    std::map<std::string, std::vector<float>> out;
    for (const StoredTensor& s : packed) out[s.name] = floats_of(s.value().detach().narrow(-1, 0, 1));
    return out;
  };
  auto scale = by_row(&OnGrid::scale), zero = by_row(&OnGrid::zero);
  fill([](const OnGrid& m) { return m.codes; });
  PackedRows out(bits);
  for (const StoredTensor& s : packed) {
    const auto codes = s.value().detach().to(torch::kInt32).contiguous();
    out.add({s.name, format(s.name), codes.sizes().vec()},
            {codes.const_data_ptr<int32_t>(), static_cast<size_t>(codes.numel())}, std::move(scale[s.name]),
            std::move(zero[s.name]));
  }
  return out;
}

}  // namespace

std::shared_ptr<const Checkpoint> eaquant_checkpoint(std::shared_ptr<const Checkpoint> base,
                                                     const EaquantConfig& config,
                                                     const std::vector<std::vector<int64_t>>& samples, json* report,
                                                     const std::function<void(int64_t, int64_t)>& progress,
                                                     bool packed) {
  const torch::NoGradGuard frozen;
  check(base->gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
        base->path().string());
  json made = base->config();
  check(made.value("moiety", json::object()).value("parts", json::array()).empty(),
        "{} has parts already: merge or leave them out first", base->path().string());
  const DecoderConfig d = parse_decoder_config(made);
  std::vector<int64_t> mixtures, all(d.layers.size());
  std::iota(all.begin(), all.end(), 0);
  for (const int64_t l : all)
    if (d.layers[static_cast<size_t>(l)].mixture) mixtures.push_back(l);
  check(!mixtures.empty(), "{} is dense: EAQuant is made for mixtures of experts", base->path().string());
  check_blocks(d, config.block_size);
  check(!samples.empty(), "there is no calibration data");
  for (const auto& s : samples)
    check(s.size() == samples[0].size(), "calibration samples have to be of one length; there are {} and {} tokens",
          samples[0].size(), s.size());
  check(static_cast<int64_t>(samples.size() * samples[0].size()) >= d.moe.experts,
        "{} calibration tokens are fewer than {} experts", samples.size() * samples[0].size(), d.moe.experts);
  const auto model = std::dynamic_pointer_cast<Decoder>(load_causal(*base, {.dtype = "f32", .trainable = true}));
  model->eval();
  std::string prefix;
  for (const TensorInfo& t : base->tensors())
    if (const auto at = t.name.find("embed_tokens.weight"); at != std::string::npos) prefix = t.name.substr(0, at);
  EaquantCalibration calibration(*model, config, samples, prefix, packed);
  json layers = calibration.run(progress);
  if (report) *report = {{"settings", dump(config)}, {"layers", std::move(layers)}};
  const auto format = [&](const std::string& name) {
    const Format was = base->has(name) ? base->get(name).format : Format::F32;
    return is_block(was) ? Format::F32 : was;
  };
  std::vector<OverlayTensor> tensors;
  std::set<std::string> removed;
  if (packed) {
    const PackedRows rows = packed_of(model->stored(), calibration.on_grid, config.weight_bits, format);
    tensors = rows.tensors();
    removed = rows.names();
    made["moiety"][kPackedRows] = rows.section();
  }
  for (const StoredTensor& s : model->stored())
    if (removed.count(s.name) == 0)
      tensors.push_back(overlay_tensor(s.name, format(s.name), s.value().detach().clone()));
  for (const auto& [name, value] : calibration.added) tensors.push_back(overlay_tensor(name, Format::F32, value));
  made["moiety"]["parts"] = json::array({part_entry(config, all, {"q_proj", "k_proj", "v_proj", "o_proj"}),
                                         part_entry(config, mixtures, {"experts.gate_up_proj", "experts.down_proj"})});
  return overlay(std::move(base), std::move(made), std::move(tensors), removed);
}

namespace {

const Paper paper = {"EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization",
                     "Fu et al.", 2025, "2506.13329"};

const RegisterMethod transform(
    {.slug = "eaquant",
     .kind = "transform",
     .title = "EAQuant",
     .summary = "weights and activations of a mixture in few bits, calibrated expert by expert",
     .paper = paper,
     .sites = {},
     .config = describe<EaquantConfig>,
     .make = {}});

const RegisterMethod part({.slug = "eaquant",
                           .kind = "part",
                           .title = "EAQuant",
                           .summary = "rotates and quantizes what matrices read that were quantized by EAQuant",
                           .paper = paper,
                           .sites = {"linear"},
                           .config = describe<EaquantPartConfig>,
                           .make = MakeBeside{.per_input = true, .make = make_beside, .make_stack = make_stack}});

}  // namespace
}  // namespace moiety
