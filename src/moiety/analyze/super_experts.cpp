#include "moiety/analyze/super_experts.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/models/decoder.h"
#include "moiety/models/layer_walk.h"
#include "moiety/moe/mixture.h"
#include "moiety/moe/topk.h"
#include "moiety/tasks/scoring.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
using Windows = std::vector<std::vector<int64_t>>;

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kMedianSample = int64_t{1} << 22;

// max |t|; NaN when one is in it. Without a copy of t.
double largest_size(const Tensor& t) {
  const auto [low, high] = at::aminmax(t);
  return std::max(-low.item<double>(), high.item<double>());
}

// Rows' max |t| of [n, h], f32.
Tensor largest_sizes(const Tensor& t) {
  const auto [low, high] = at::aminmax(t, 1);
  return torch::maximum(-low, high).to(torch::kFloat32);
}

}  // namespace

ExpertMaxima::ExpertMaxima(int64_t experts, std::string site)
    : output_max(torch::zeros({experts})),
      input_max(torch::zeros({experts})),
      output_channel(torch::full({experts}, -1, torch::kInt64)),
      tokens(torch::zeros({experts}, torch::kInt64)),
      latest(static_cast<size_t>(experts), -1),
      site_(std::move(site)) {}

void ExpertMaxima::add(int64_t expert, const Tensor& z, const Tensor& o) {
  const torch::NoGradGuard frozen;
  if (o.size(0) == 0) return;
  const auto [values, rows] = top_k(largest_sizes(o.detach()).unsqueeze(0), 1);  // the first row wins ties
  const double most = values.item<double>(), read = largest_size(z.detach());
  check(std::isfinite(most) && std::isfinite(read), "{}, expert {}: a value that is not finite", site_, expert);
  const int64_t row = rows.item<int64_t>();
  const bool fresh = tokens[expert].item<int64_t>() == 0;
  if (fresh || most > output_max[expert].item<double>()) {
    output_max[expert] = most;
    output_channel[expert] = top_k(o.detach()[row].to(torch::kFloat32).abs(), 1).second[0].item<int64_t>();
  }
  if (read > input_max[expert].item<double>()) input_max[expert] = read;
  tokens[expert] += o.size(0);
  latest[static_cast<size_t>(expert)] = row;
}

Tensor ExpertWatch::apply(const Tensor& x, const std::vector<int64_t>& counts, Tensor y) {
  int64_t begin = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    maxima_->add(static_cast<int64_t>(e), x.narrow(0, begin, counts[e]), y.narrow(0, begin, counts[e]));
    begin += counts[e];
  }
  return y;
}

Tensor ExpertWatch::delta(int64_t) const {
  return torch::zeros({});
}

void SharedExpertWatch::apply(const Tensor& x, std::vector<Tensor>& outputs, Pass&) {
  const auto& y = outputs.at(0);
  maxima_->add(column_, x.reshape({-1, x.size(-1)}), y.reshape({-1, y.size(-1)}));
}

void SuperExpertRule::fields(Fields& f) {
  f("quantile", quantile, "percentile of all maxima that a super expert's is above").min(0).max(100);
  f("times", times, "a super expert's maximum is above the largest one over this").min(0);
  f("include_layers", include_layers, "share of the layers, from the first, that are looked at").min(0).max(1);
  f("scope", scope, "what percentile and largest maximum are taken over: the layers looked at, or all")
      .choices({"included", "model"});
  f("floor", floor, "round the largest maximum over `times` down, as the authors' code does");
}

std::vector<int64_t> included_layers(int64_t layers, double share, const std::vector<int64_t>& mixtures) {
  check(share > 0.0 && share <= 1.0, "a share of {} of the layers: it has to be above 0 and at most 1", share);
  // Half to even, as the authors' language rounds.
  const auto end = static_cast<int64_t>(std::nearbyint(static_cast<double>(layers) * share));
  std::vector<int64_t> out;
  std::copy_if(mixtures.begin(), mixtures.end(), std::back_inserter(out), [&](int64_t l) { return l < end; });
  return out;
}

std::vector<int64_t> growing_layers(const std::vector<double>& hidden_max, const std::vector<int64_t>& mixtures,
                                    double factor) {
  std::vector<int64_t> out;
  for (const int64_t l : mixtures) {
    const auto at = static_cast<size_t>(l);
    check(at + 1 < hidden_max.size(), "layer {} has no residual stream behind it", l);
    if (hidden_max[at + 1] >= factor * hidden_max[at]) out.push_back(l);
  }
  return out;
}

namespace {

// Linearly interpolated between the two nearest; `values` sorted.
double percentile_of(const std::vector<double>& values, double percent) {
  const double place = percent / 100.0 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(std::floor(place));
  const double part = place - std::floor(place);
  return below + 1 < values.size() ? values[below] + part * (values[below + 1] - values[below]) : values[below];
}

}  // namespace

SuperExperts find_super_experts(const Tensor& table, const std::vector<int64_t>& layers, const SuperExpertRule& rule,
                                bool shared_last) {
  check(table.dim() == 2, "maxima of experts are a table [layers, experts]");
  check(rule.quantile > 0.0 && rule.quantile < 100.0, "a quantile of {}: it has to lie between 0 and 100",
        rule.quantile);
  check(rule.times > 0.0, "`times` is {}: it has to be above 0", rule.times);
  check(rule.scope == "included" || rule.scope == "model", "unknown scope `{}`; known are included and model",
        rule.scope);
  const auto a = table.to(torch::kCPU, torch::kFloat64).contiguous();
  const int64_t rows = a.size(0), columns = a.size(1);
  const double* value = a.const_data_ptr<double>();
  for (const int64_t l : layers) check(l >= 0 && l < rows, "layer {} does not exist: there are 0 to {}", l, rows - 1);
  const auto included = [&](int64_t l) { return std::find(layers.begin(), layers.end(), l) != layers.end(); };
  std::vector<double> all;
  for (int64_t l = 0; l < rows; ++l)
    if (rule.scope == "model" || included(l))
      for (int64_t e = 0; e < columns; ++e)
        if (!std::isnan(value[l * columns + e])) all.push_back(value[l * columns + e]);
  check(!all.empty(), "no layer that is looked at has experts: nothing to find");
  std::sort(all.begin(), all.end());
  SuperExperts out;
  out.percentile = percentile_of(all, rule.quantile);
  out.limit = all.back() / rule.times;
  if (rule.floor) out.limit = std::floor(out.limit);
  for (int64_t l = 0; l < rows; ++l) {
    if (!included(l)) continue;
    for (int64_t e = 0; e < columns; ++e) {
      const double v = value[l * columns + e];
      if (v > out.percentile && v > out.limit) out.found.push_back({l, shared_last && e == columns - 1 ? -1 : e, v});
    }
  }
  std::stable_sort(out.found.begin(), out.found.end(), [](const SuperExpert& x, const SuperExpert& y) {
    return x.value != y.value ? x.value > y.value : x.layer != y.layer ? x.layer < y.layer : x.expert < y.expert;
  });
  return out;
}

Tensor sink_score(const Tensor& attention, const std::vector<int64_t>& sinks) {
  check(attention.dim() == 3 && attention.size(1) == attention.size(2), "attention is [heads, tokens, tokens]");
  check(!sinks.empty(), "no position is named as a sink");
  const int64_t tokens = attention.size(1);
  const auto [low, high] = std::minmax_element(sinks.begin(), sinks.end());
  check(*low >= 0 && *high < tokens - 1, "sinks at {} to {}: a text of {} tokens has queries behind 0 to {}", *low,
        *high, tokens, tokens - 2);
  const auto index = torch::tensor(sinks, torch::kInt64).to(attention.device());
  return attention.slice(1, *high + 1).index_select(2, index).sum(-1).mean(-1);
}

SinkDecay sink_decay(const Tensor& before, const Tensor& after) {
  check(before.sizes() == after.sizes() && before.dim() == 1, "sink scores before and after are of as many heads");
  const auto b = before.to(torch::kFloat64), a = after.to(torch::kFloat64);
  SinkDecay out;
  out.decay = torch::where(b > 0, 1.0 - a / b, torch::full_like(b, kNone));
  out.mean = out.decay.nanmean().item<double>();
  return out;
}

std::vector<int64_t> ModelMaxima::layers_with_experts() const {
  std::vector<int64_t> out;
  for (const auto& [layer, unused] : mixtures) out.push_back(layer);
  return out;
}

bool ModelMaxima::shared() const {
  return std::any_of(mixtures.begin(), mixtures.end(), [](const auto& m) { return m.second.shared; });
}

Tensor ModelMaxima::table() const {
  int64_t experts = 0;
  for (const auto& [layer, m] : mixtures) experts = std::max(experts, m.experts);
  auto out = torch::full({layers, experts + (shared() ? 1 : 0)}, kNone, torch::kFloat64);
  for (const auto& [layer, m] : mixtures) {
    out[layer].narrow(0, 0, m.experts).copy_(m.maxima->output_max.narrow(0, 0, m.experts));
    if (m.shared) out[layer][experts] = m.maxima->output_max[m.experts];
  }
  return out;
}

namespace {

Decoder& decoder_of(CausalModel& model) {
  auto* decoder = dynamic_cast<Decoder*>(&model);
  check(decoder != nullptr, "this is no decoder: its blocks cannot be looked at one by one");
  return *decoder;
}

// Puts watches beside the down projections of every mixture.
std::map<int64_t, LayerMaxima> watch_experts(Decoder& model) {
  std::map<int64_t, LayerMaxima> out;
  for (int64_t b = 0; b < model.blocks(); ++b) {
    if (model.experts(b) == 0) continue;
    auto* mixture = dynamic_cast<Mixture*>(model.layers[static_cast<size_t>(b)]->ffn.get());
    auto* experts = mixture == nullptr ? nullptr : dynamic_cast<GatedExperts*>(mixture->experts.get());
    check(experts != nullptr, "layer {}: its experts are not those of an ordinary mixture layer", b);
    LayerMaxima m;
    m.experts = experts->count();
    m.shared = mixture->shared != nullptr;
    m.maxima = std::make_shared<ExpertMaxima>(m.experts + (m.shared ? 1 : 0), fmt::format("layer {}", b));
    m.first.assign(static_cast<size_t>(m.experts + (m.shared ? 1 : 0)), 0);
    experts->down->attach(std::make_shared<ExpertWatch>(m.maxima));
    if (m.shared) mixture->shared->down->attach(std::make_shared<SharedExpertWatch>(m.maxima, m.experts));
    out.emplace(b, std::move(m));
  }
  check(!out.empty(), "no MoE layers: nothing to profile");
  return out;
}

// Counts the experts whose largest value of this window came from position 0.
void count_first(LayerMaxima& m, const Routing& routing, const Tensor& map) {
  const Dispatch d = Dispatch::of(routing, m.experts, map);
  const auto tokens = d.tokens.to(torch::kCPU);
  int64_t begin = 0;
  for (size_t e = 0; e < d.counts.size(); begin += d.counts[e++])
    if (d.counts[e] > 0 && tokens[begin + m.maxima->latest[e]].item<int64_t>() == 0) ++m.first[e];
  if (m.shared && m.maxima->latest.back() == 0) ++m.first.back();
}

// max |H| and an even sample of its sizes.
struct HiddenSizes {
  double most = 0;
  std::vector<Tensor> sample;
  void add(const Tensor& x, int64_t stride) {
    most = std::max(most, largest_size(x));
    sample.push_back(x.reshape({-1}).slice(0, 0, std::nullopt, stride).to(torch::kFloat32).abs());
  }
  double median() const { return torch::cat(sample).median().item<double>(); }
};

}  // namespace

ModelMaxima profile_experts(CausalModel& given, const Windows& windows,
                            const std::function<void(int64_t, int64_t)>& progress) {
  const torch::NoGradGuard frozen;
  Decoder& model = decoder_of(given);
  ModelMaxima out;
  out.layers = model.blocks();
  out.mixtures = watch_experts(model);
  out.windows = static_cast<int64_t>(windows.size());
  for (const auto& w : windows) out.tokens += static_cast<int64_t>(w.size());
  LayerWalk walk(model, windows);
  const int64_t stride = std::max<int64_t>(1, out.tokens * model.parsed.hidden / kMedianSample),
                all = walk.windows() * model.blocks();
  const auto look = [&] {
    HiddenSizes sizes;
    for (int64_t w = 0; w < walk.windows(); ++w) sizes.add(walk.hidden(w), stride);
    out.hidden_max.push_back(sizes.most);
    out.hidden_median.push_back(sizes.median());
  };
  for (; !walk.done(); walk.next()) {
    look();
    const auto found = out.mixtures.find(walk.block());
    for (int64_t w = 0; w < walk.windows(); ++w) {
      Trace trace;
      walk.run(w, found == out.mixtures.end() ? nullptr : &trace);
      for (const Trace::Record& r : trace.records)
        if (r.site.site == "ffn")
          count_first(found->second, r.routing, static_cast<Mixture&>(*walk.layer().ffn).expert_map);
      if (progress) progress(walk.block() * walk.windows() + w + 1, all);
    }
  }
  look();
  return out;
}

std::vector<int64_t> massive_layers(const ModelMaxima& m, double absolute, double ratio) {
  std::vector<int64_t> out;
  for (size_t l = 0; l < m.hidden_max.size(); ++l)
    if (m.hidden_max[l] > absolute && m.hidden_max[l] > ratio * m.hidden_median[l])
      out.push_back(static_cast<int64_t>(l));
  return out;
}

namespace {

// Beside the matrix that values come from: while it is on, the values of sinks are ones, all others zeros, so that what
// attention adds up is the probability that sinks get.
class SinkValues : public Beside {
 public:
  SinkValues(std::vector<int64_t> sinks, double value, int64_t stride, int64_t skip)
      : sinks_(std::move(sinks)), value_(value), stride_(stride), skip_(skip) {}
  void apply(const Tensor&, std::vector<Tensor>& outputs, Pass&) override {
    if (!on) return;
    auto& y = outputs.at(0);  // [B, T, heads * stride], of each head the first `skip` are keys
    y = y.clone();
    auto values = y.view({y.size(0), y.size(1), -1, stride_}).slice(-1, skip_);
    values.zero_();
    values.index_fill_(1, torch::tensor(sinks_, torch::kInt64).to(y.device()), value_);
  }
  bool on = false;

 private:
  std::vector<int64_t> sinks_;
  double value_;
  int64_t stride_, skip_;
};

// Beside the output matrix: keeps what attention has added up.
class SinkReader : public Beside {
 public:
  void apply(const Tensor& x, std::vector<Tensor>&, Pass&) override {
    if (on) seen = x;
  }
  bool on = false;
  Tensor seen;
};

// One attention with both.
struct SinkProbe {
  std::shared_ptr<SinkValues> values;
  std::shared_ptr<SinkReader> reader = std::make_shared<SinkReader>();
  double value = 1.0;
  int64_t head = 0;  // size of a head's values

  explicit SinkProbe(AttentionBase& attention, const std::vector<int64_t>& sinks) {
    if (auto* a = dynamic_cast<Attention*>(&attention)) {
      if (a->parts.clip > 0.0) value = std::min(value, a->parts.clip);
      head = a->parts.head_dim;
      values = std::make_shared<SinkValues>(sinks, value, head, 0);
      a->parts.v->attach(values);
      a->parts.o->attach(reader);
    } else if (auto* l = dynamic_cast<LatentAttention*>(&attention)) {
      head = l->parts.v_dim;
      values = std::make_shared<SinkValues>(sinks, value, l->parts.nope_dim + head, l->parts.nope_dim);
      l->parts.kv_b->attach(values);
      l->parts.o->attach(reader);
    }
  }
  // [H]: mean over queries behind the sinks.
  Tensor score(AttentionBase& attention, const Tensor& x, const AttentionContext& context, Pass& pass,
               int64_t first_query) {
    values->on = reader->on = true;
    attention.forward(x, context, pass);
    values->on = reader->on = false;
    const auto p = reader->seen.reshape({reader->seen.size(1), -1, head}).select(-1, 0).to(torch::kFloat64) / value;
    return p.slice(0, first_query).mean(0);
  }
};

}  // namespace

Tensor model_sinks(CausalModel& given, const Windows& windows, const std::vector<int64_t>& sinks,
                   const std::function<void(int64_t, int64_t)>& progress) {
  const torch::NoGradGuard frozen;
  Decoder& model = decoder_of(given);
  check(!sinks.empty(), "no position is named as a sink");
  const auto [low, high] = std::minmax_element(sinks.begin(), sinks.end());
  for (const auto& w : windows)
    check(*low >= 0 && *high + 1 < static_cast<int64_t>(w.size()), "a window of {} tokens has no query behind sink {}",
          w.size(), *high);
  auto out = torch::full({model.blocks(), model.parsed.heads}, kNone, torch::kFloat64);
  LayerWalk walk(model, windows);
  const int64_t all = walk.windows() * model.blocks();
  for (; !walk.done(); walk.next()) {
    Block& block = walk.layer();
    SinkProbe probe(*block.attention, sinks);
    auto sum = torch::zeros({model.parsed.heads}, torch::kFloat64);
    for (int64_t w = 0; w < walk.windows(); ++w) {
      if (probe.values) {
        const auto& x = walk.hidden(w);
        const auto normed = block.before_attention ? block.before_attention->forward(x) : x;
        sum += probe.score(*block.attention, normed, walk.context(w), walk.pass(w), *high + 1).to(torch::kCPU);
      }
      walk.run(w);
      if (progress) progress(walk.block() * walk.windows() + w + 1, all);
    }
    if (probe.values) out[walk.block()] = sum / static_cast<double>(walk.windows());
  }
  return out;
}

double window_perplexity(CausalModel& model, const Windows& windows,
                         const std::function<void(int64_t, int64_t)>& progress) {
  check(!windows.empty(), "there is no window of tokens to score");
  double sum = 0;
  int64_t done = 0;
  for (const auto& w : windows) {
    check(w.size() >= 2, "a window of {} tokens has nothing to predict", w.size());
    const auto scores = score_tokens(model, torch::tensor(w, torch::kInt64).unsqueeze(0));
    sum -= scores.logprob.to(torch::kFloat64).mean().item<double>();
    if (progress) progress(++done, static_cast<int64_t>(windows.size()));
  }
  return std::exp(sum / static_cast<double>(windows.size()));
}

namespace {

// m4 / m2^2 - 3 with population moments; 0 where all values are equal.
double excess_kurtosis(const Tensor& values) {
  const auto v = values.to(torch::kFloat64);
  const auto c = v - v.mean();
  const double m2 = c.square().mean().item<double>();
  return m2 > 0.0 ? c.pow(4).mean().item<double>() / (m2 * m2) - 3.0 : 0.0;
}

}  // namespace

json super_experts_report(const ModelMaxima& m, const SuperExperts& found, const std::vector<int64_t>& included) {
  const auto column = [](const LayerMaxima& l, int64_t expert) { return expert < 0 ? l.experts : expert; };
  const auto entry = [&](int64_t layer, int64_t expert) -> json {
    const LayerMaxima& l = m.mixtures.at(layer);
    const int64_t c = column(l, expert);
    return {{"layer_index", layer},
            {"expert_index", expert},
            {"output_max", l.maxima->output_max[c].item<double>()},
            {"input_max", l.maxima->input_max[c].item<double>()},
            {"output_channel", l.maxima->output_channel[c].item<int64_t>()},
            {"tokens", l.maxima->tokens[c].item<int64_t>()},
            {"first_position_share", static_cast<double>(l.first[static_cast<size_t>(c)]) /
                                         static_cast<double>(std::max<int64_t>(1, m.windows))}};
  };
  json list = json::array();
  for (const SuperExpert& s : found.found) {
    json one = entry(s.layer, s.expert);
    one["rank"] = list.size() + 1;
    list.push_back(std::move(one));
  }
  std::vector<json> layers, experts;
  for (const auto& [layer, l] : m.mixtures) {
    layers.push_back({{"layer_index", layer},
                      {"output_max", l.maxima->output_max.max().item<double>()},
                      {"excess_kurtosis", excess_kurtosis(l.maxima->output_max)},
                      {"included", std::find(included.begin(), included.end(), layer) != included.end()}});
    for (int64_t e = 0; e < l.experts; ++e) experts.push_back(entry(layer, e));
    if (l.shared) experts.push_back(entry(layer, -1));
  }
  const auto by_value = [](const json& x, const json& y) {
    return x["output_max"].get<double>() > y["output_max"].get<double>();
  };
  std::stable_sort(layers.begin(), layers.end(), by_value);
  std::stable_sort(experts.begin(), experts.end(), by_value);
  return {{"super_experts", std::move(list)},
          {"percentile", found.percentile},
          {"limit", found.limit},
          {"included_layers", included},
          {"windows", m.windows},
          {"tokens", m.tokens},
          {"hidden_max", m.hidden_max},
          {"hidden_median", m.hidden_median},
          {"layers", std::move(layers)},
          {"experts", std::move(experts)}};
}

namespace {

const RegisterMethod registered(
    {.slug = "super-experts",
     .kind = "policy",
     .title = "Super Experts (profiling)",
     .summary = "finds the few experts that write enormous values and that a model cannot do without",
     .paper = {"Unveiling Super Experts in Mixture-of-Experts Large Language Models", "Su et al.", 2025, "2507.23279"},
     .sites = {},
     .config = describe<SuperExpertRule>,
     .make = {}});

}  // namespace
}  // namespace moiety
