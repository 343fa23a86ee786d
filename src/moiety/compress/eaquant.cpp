#include "moiety/compress/eaquant.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/registry.h"
#include "moiety/moe/topk.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr double kLeast = 1e-5;
constexpr double kLeastScale = 1e-5, kLargestScale = 1e4;
constexpr int kRatios = 101;

double ratio_of(int j) {
  return 0.35 + 0.65 * j / 100.0;
}

void check_finite(const Tensor& t, const char* what) {
  check(torch::isfinite(t).all().item<bool>(), "{} hold a number that is not finite", what);
}

// max |W| of every column over the rows of all matrices [.., h].
Tensor column_max(const std::vector<Tensor>& matrices) {
  Tensor out;
  for (const Tensor& m : matrices) {
    const auto most = m.reshape({-1, m.size(-1)}).abs().amax(0);
    out = out.defined() ? torch::maximum(out, most) : most;
  }
  return out;
}

}  // namespace

void EaquantConfig::fields(Fields& f) {
  f("weight_bits", weight_bits, "bits of weights").min(2).max(16);
  f("activation_bits", activation_bits, "bits of activations").min(2).max(16);
  f("router_bits", router_bits, "bits of the router's weights").min(2).max(16);
  f("alpha", alpha, "smoothing: how much of the difficulty goes from activations to weights").min(0).max(1);
  f("aggregate", aggregate, "how the smoothing vectors of experts become one; none: the router's own")
      .choices({"max", "frequency", "router", "weight", "none"});
  f("with_router", with_router, "the router's own vector joins by maximum");
  f("otsu_ratio", otsu_ratio, "quantile that bounds of outlier channels start from").min(0.5).max(1);
  f("otsu_smooth_rate", otsu_smooth_rate, "power of an outlier channel's excess that is moved").min(0).max(1);
  f("block_size", block_size, "channels that are rotated together").min(1);
  f("rotation_steps", rotation_steps, "steps of the greedy search of a rotation").min(0);
  f("lac", lac, "activations: extremes are multiplied by this").min(0.01).max(1);
  f("swc", swc, "weights by minmax: extremes are multiplied by this").min(0.01).max(1);
  f("weight_method", weight_method, "how weights are clipped").choices({"mse", "minmax"});
  f("router_loss", router_loss, "what the router's clipping minimises").choices({"kl", "mse", "mse+kl"});
  f("kl_ratio", kl_ratio, "share of the experts that are not chosen which the KL counts, too").min(0).max(1);
  f("balance_ratio", balance_ratio, "calibration tokens of an expert, in even shares of a sequence; 0: no balance")
      .min(0);
  f("seed", seed, "of the rotations").min(0);
}

std::string EaquantConfig::problem() const {
  return alpha > 0.0 && alpha < 1.0 ? "" : fmt::format("`alpha` is {}; it has to lie between 0 and 1", alpha);
}

Tensor smoothing_vector(const Tensor& act_max, const std::vector<Tensor>& matrices, double alpha) {
  check(alpha > 0.0 && alpha < 1.0, "alpha is {}; it has to lie between 0 and 1", alpha);
  check_finite(act_max, "statistics of activations");
  const auto weights = column_max(matrices);
  check_finite(weights, "weights");
  return (act_max.clamp_min(kLeast).pow(alpha) / weights.clamp_min(kLeast).pow(1.0 - alpha)).clamp_min(kLeast);
}

namespace {

// max over gate, up and columns of max |W[:, c]| / mean |W[:, c]|: [E].
Tensor column_ratio(const Tensor& gate, const Tensor& up) {
  const auto of = [](const Tensor& w) {
    const auto size = w.abs();
    return (size.amax(1) / size.mean(1).clamp_min(std::numeric_limits<float>::min())).amax(1);
  };
  return torch::maximum(of(gate), of(up));
}

Tensor weighted(const Tensor& vectors, const Tensor& weights) {
  const auto w = weights.to(vectors.scalar_type());
  return (vectors * w.unsqueeze(1)).sum(0);
}

Tensor aggregated(const SmoothingLayer& layer, const Tensor& vectors, const std::string& aggregate) {
  if (aggregate == "max") return vectors.amax(0);
  if (aggregate == "frequency") {
    const double all = layer.tokens.sum().item<double>();
    check(all > 0.0, "no expert has seen a token: the frequencies are unknown");
    return weighted(vectors, layer.tokens.to(torch::kFloat64) / all);
  }
  if (aggregate == "router") {
    check_finite(layer.router_prob, "probabilities of the router");
    return weighted(vectors, layer.router_prob);
  }
  check(aggregate == "weight", "unknown aggregate `{}`; known are max, frequency, router, weight and none", aggregate);
  const auto ratio = column_ratio(layer.gate, layer.up);
  return weighted(vectors, ratio / ratio.sum());
}

}  // namespace

Tensor smoothing_scale(const SmoothingLayer& layer, double alpha, const std::string& aggregate, bool with_router) {
  const torch::NoGradGuard frozen;
  const auto all = layer.router_max.defined() ? layer.router_max : layer.act_max.amax(0);
  const auto of_router = [&] { return smoothing_vector(all, {layer.router}, alpha); };
  if (aggregate == "none") return of_router();
  std::vector<Tensor> vectors;
  for (int64_t e = 0; e < layer.act_max.size(0); ++e)
    vectors.push_back(smoothing_vector(layer.act_max[e], {layer.gate[e], layer.up[e]}, alpha));
  auto s = aggregated(layer, torch::stack(vectors), aggregate);
  if (with_router) s = torch::maximum(s, of_router());
  if (layer.shared_gate.defined())
    s = torch::maximum(s, smoothing_vector(all, {layer.shared_gate, layer.shared_up}, alpha));
  return s;
}

void fold_smoothing(const Tensor& s, const std::vector<Tensor>& writers, const std::vector<Tensor>& readers) {
  const torch::NoGradGuard frozen;
  for (Tensor t : writers) t.div_(s.to(t.scalar_type()));
  for (Tensor t : readers) t.mul_(s.to(t.scalar_type()));
}

void ChannelExtremes::add(const Tensor& x) {
  const torch::NoGradGuard frozen;
  if (x.size(0) == 0) return;
  const auto [least, most] = at::aminmax(x, 0);
  check_finite(least, "inputs of a down projection");
  check_finite(most, "inputs of a down projection");
  high = high.defined() ? 0.9 * high + 0.1 * most : most;
  low = low.defined() ? 0.9 * low + 0.1 * least : least;
}

namespace {

using Values = std::vector<double>;

Values doubles(const Tensor& t) {
  const auto flat = t.to(torch::kCPU, torch::kFloat64).contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

double quantile_of(Values v, double share) {
  std::sort(v.begin(), v.end());
  const double place = share * static_cast<double>(v.size() - 1), part = place - std::floor(place);
  const auto below = static_cast<size_t>(place);
  return below + 1 < v.size() ? v[below] + part * (v[below + 1] - v[below]) : v[below];
}

// Unbiased; 0 for one value.
double variance(Values::const_iterator begin, Values::const_iterator end) {
  const auto n = static_cast<double>(end - begin);
  if (n < 2.0) return 0.0;
  const double mean = std::accumulate(begin, end, 0.0) / n;
  double sum = 0.0;
  for (auto it = begin; it != end; ++it) sum += (*it - mean) * (*it - mean);
  return sum / (n - 1.0);
}

// The values beyond a bound in two: the bound moves to the edge of the half that looks less like outliers. `upper`:
// they lie above it.
double resplit(Values v, bool upper) {
  std::sort(v.begin(), v.end(), std::greater<>());
  double best = -std::numeric_limits<double>::infinity();
  size_t cut = 1;
  for (size_t n = 1; n < v.size(); ++n) {
    const auto middle = v.cbegin() + static_cast<std::ptrdiff_t>(n);
    const double score =
        std::abs(v[n - 1] - v[n]) - (upper ? variance(middle, v.cend()) : variance(v.cbegin(), middle));
    if (score > best) {
      best = score;
      cut = n;
    }
  }
  return upper ? v[cut] : v[cut - 1];
}

struct Bounds {
  double up, down;
};

Bounds outlier_bounds(const Values& high, const Values& low, double ratio) {
  const auto spread = [&](const Values& v) { return quantile_of(v, ratio) - quantile_of(v, 1.0 - ratio); };
  Bounds b{quantile_of(high, ratio) + 1.5 * spread(high), quantile_of(low, 1.0 - ratio) - 1.5 * spread(low)};
  Values above, below;
  std::copy_if(high.begin(), high.end(), std::back_inserter(above), [&](double v) { return v > b.up; });
  std::copy_if(low.begin(), low.end(), std::back_inserter(below), [&](double v) { return v < b.down; });
  if (above.size() > 1) b.up = resplit(std::move(above), true);
  if (below.size() > 1) b.down = resplit(std::move(below), false);
  return b;
}

}  // namespace

Tensor outlier_scale(const Tensor& channel_high, const Tensor& channel_low, double ratio, double rate) {
  const torch::NoGradGuard frozen;
  check(channel_high.dim() == 1 && channel_high.sizes() == channel_low.sizes() && channel_high.numel() > 0,
        "extremes of channels have to be of as many channels");
  check_finite(channel_high, "extremes of channels");
  check_finite(channel_low, "extremes of channels");
  const Values high = doubles(channel_high), low = doubles(channel_low);
  const Bounds b = outlier_bounds(high, low, ratio);
  double most = -std::numeric_limits<double>::infinity(), least = std::numeric_limits<double>::infinity();
  for (const double v : high)
    if (v <= b.up) most = std::max(most, v);
  for (const double v : low)
    if (v >= b.down) least = std::min(least, v);
  Values scale(high.size(), 1.0);
  for (size_t c = 0; c < scale.size(); ++c) {
    // A side whose normal extreme has another sign than its outliers says nothing.
    const bool above = high[c] > b.up && most > 0.0, below = low[c] < b.down && least < 0.0;
    const double up = above ? std::pow(high[c] / most, rate) : 0.0, down = below ? std::pow(low[c] / least, rate) : 0.0;
    if (above || below) scale[c] = std::max(up, down);
  }
  return torch::tensor(scale, torch::kFloat64).to(channel_high.device(), channel_high.scalar_type());
}

Tensor rotate_blocks(const Tensor& x, const Tensor& rotation) {
  const int64_t b = rotation.size(0), h = x.size(-1);
  check(rotation.dim() == 2 && rotation.size(1) == b, "a rotation of blocks is square");
  check(h % b == 0, "{} channels are no multiple of blocks of {}", h, b);
  return torch::matmul(x.reshape({-1, b}), rotation.to(x.device(), x.scalar_type())).view(x.sizes());
}

Tensor flat_rotation(int64_t block, uint64_t seed) {
  RandomStream random(seed, "eaquant.rotation");
  auto m = torch::empty({block, block}, torch::kFloat64);
  double* value = m.data_ptr<double>();
  for (int64_t i = 0; i < m.numel(); ++i) value[i] = random.normal();
  m.select(1, 0).fill_(1.0);
  const auto [q, r] = torch::linalg_qr(m);
  const auto sign =
      torch::where(r.diagonal() < 0, -torch::ones({block}, torch::kFloat64), torch::ones({block}, torch::kFloat64));
  return (q * sign).t().contiguous();
}

namespace {

// P Q P with P swapping 0 and `at`.
Tensor swapped(const Tensor& q, int64_t at) {
  auto order = torch::arange(q.size(0), torch::kInt64);
  order[0] = at;
  order[at] = 0;
  return q.index_select(0, order).index_select(1, order);
}

double range_of(const Tensor& x) {
  const auto [low, high] = at::aminmax(x);
  return high.item<double>() - low.item<double>();
}

// Of the first largest |x|, the coordinate in its block.
int64_t largest_coordinate(const Tensor& x, int64_t block) {
  const auto value = x.abs().amax(1);
  const int64_t row = top_k(value.unsqueeze(0), 1).second.item<int64_t>();
  return top_k(x[row].abs().unsqueeze(0), 1).second.item<int64_t>() % block;
}

}  // namespace

Tensor greedy_rotation(const Tensor& given, int64_t block, int64_t steps, uint64_t seed) {
  const torch::NoGradGuard frozen;
  check(given.dim() == 2 && given.size(0) > 0, "a rotation needs calibration tokens");
  check_finite(given, "calibration tokens");
  const auto q = flat_rotation(block, seed);
  auto x = given.to(torch::kCPU);
  auto product = torch::eye(block, torch::kFloat64), best = product;
  double smallest = range_of(x);
  for (int64_t step = 0; step < steps; ++step) {
    const auto turn = swapped(q, largest_coordinate(x, block));
    x = rotate_blocks(x, turn);
    product = torch::matmul(product, turn);
    if (const double range = range_of(x); range < smallest) {
      smallest = range;
      best = product;
    }
  }
  return best;
}

Tensor zigzag_permutation(const Tensor& x, int64_t block) {
  const int64_t h = x.size(-1), blocks = h / block;
  check(h % block == 0, "{} channels are no multiple of blocks of {}", h, block);
  const auto size = x.reshape({-1, h}).abs().amax(0).to(torch::kCPU);
  const auto order = std::get<1>(at::sort(size, /*stable=*/true, 0, /*descending=*/true));
  auto perm = torch::empty({h}, torch::kInt64);
  const int64_t* from = order.const_data_ptr<int64_t>();
  int64_t* to = perm.data_ptr<int64_t>();
  for (int64_t i = 0; i < h; ++i) {
    const int64_t round = i / blocks, place = i % blocks;
    to[(round % 2 == 0 ? place : blocks - 1 - place) * block + round] = from[i];
  }
  return perm;
}

Tensor Rotation::apply(const Tensor& x) const {
  auto y = first.defined() ? rotate_blocks(x, first) : x;
  if (perm.defined()) y = y.index_select(-1, perm.to(y.device()));
  return second.defined() ? rotate_blocks(y, second) : y;
}

Tensor Rotation::undo(const Tensor& x) const {
  auto y = second.defined() ? rotate_blocks(x, second.t()) : x;
  if (perm.defined()) y = y.index_select(-1, at::argsort(perm).to(y.device()));
  return first.defined() ? rotate_blocks(y, first.t()) : y;
}

Rotation find_rotation(const Tensor& x, int64_t block, int64_t steps, uint64_t seed) {
  const int64_t h = x.size(-1);
  check(block >= 1 && h % block == 0, "{} channels are no multiple of blocks of {}; {} would do", h, block,
        std::gcd(h, block));
  Rotation r;
  r.first = greedy_rotation(x, block, steps, seed);
  auto turned = rotate_blocks(x, r.first);
  r.perm = zigzag_permutation(turned, block);
  turned = turned.index_select(-1, r.perm.to(turned.device()));
  r.second = greedy_rotation(turned, block, steps, seed + 1);
  return r;
}

Rotation rotation_by(const Tensor& x, const Tensor& first, const Tensor& second) {
  Rotation r;
  r.first = first;
  r.perm = zigzag_permutation(rotate_blocks(x, first), first.size(0));
  r.second = second;
  return r;
}

namespace {

void check_bits(int64_t bits) {
  check(bits >= 2 && bits <= 16, "{} bits: 2 to 16 are possible", bits);
}

struct Extremes {
  Tensor low, high;  // [rows, 1]
  explicit Extremes(const Tensor& w) {
    check(w.dim() == 2, "rows are quantized of a matrix");
    check_finite(w, "numbers to quantize");
    std::tie(low, high) = at::aminmax(w, 1, /*keepdim=*/true);
  }
};

struct Codes {
  Tensor codes, scale, zero;
  Tensor values() const { return (codes - zero).mul_(scale); }
  Tensor values_in_place() { return codes.sub_(zero).mul_(scale); }
};

// `ratio` a number or [rows, 1].
template <class Ratio>
Codes codes_of(const Tensor& w, const Extremes& e, int64_t bits, const Ratio& ratio, bool clamp_zero) {
  const auto levels = static_cast<double>((int64_t{1} << bits) - 1);
  Codes c;
  c.scale = ((e.high * ratio - e.low * ratio) / levels).clamp(kLeastScale, kLargestScale);
  c.zero = (-(e.low * ratio) / c.scale).round();
  if (clamp_zero) c.zero = c.zero.clamp(0.0, levels);
  c.codes = (w / c.scale).round_().add_(c.zero).clamp_(0.0, levels);
  return c;
}

}  // namespace

QuantizedRows quantize_rows(const Tensor& w, int64_t bits, double ratio, bool clamp_zero) {
  const torch::NoGradGuard frozen;
  check_bits(bits);
  const auto c = codes_of(w, Extremes(w), bits, ratio, clamp_zero);
  return {c.values(), c.scale, c.zero, torch::full_like(c.scale, ratio), c.codes};
}

namespace {

// Tries all ratios and keeps for every row that with the smallest score(values) [rows, 1].
template <class Score>
QuantizedRows best_rows(const Tensor& w, int64_t bits, const Score& score) {
  const torch::NoGradGuard frozen;
  check_bits(bits);
  const Extremes extremes(w);
  auto best = torch::full_like(extremes.low, std::numeric_limits<double>::infinity());
  auto ratio = torch::full_like(extremes.low, ratio_of(0));
  for (int j = 0; j < kRatios; ++j) {
    const Tensor s = score(codes_of(w, extremes, bits, ratio_of(j), true).values_in_place());
    const auto better = s < best;
    best = torch::where(better, s, best);
    ratio = ratio.masked_fill(better, ratio_of(j));
  }
  const auto c = codes_of(w, extremes, bits, ratio, true);
  return {c.values(), c.scale, c.zero, ratio, c.codes};
}

}  // namespace

QuantizedRows search_rows(const Tensor& w, int64_t bits) {
  return best_rows(w, bits, [&](const Tensor& values) { return (w - values).square().sum(1, true); });
}

QuantizedRows quantize_weight(const Tensor& w, int64_t bits, const std::string& method, double swc) {
  if (method == "mse") return search_rows(w, bits);
  check(method == "minmax", "unknown method `{}` for weights; known are mse and minmax", method);
  return quantize_rows(w, bits, swc);
}

Tensor quantize_activations(const Tensor& x, int64_t bits, double lac) {
  const torch::NoGradGuard frozen;
  check_bits(bits);
  const auto rows = x.reshape({-1, x.size(-1)});
  return codes_of(rows, Extremes(rows), bits, lac, false).values_in_place().view(x.sizes());
}

RouterQuantization calibrate_router(const Tensor& router, const Tensor& x, int64_t bits, int64_t top_k_count,
                                    const std::string& loss, double kl_ratio) {
  const torch::NoGradGuard frozen;
  const int64_t experts = router.size(0);
  check(loss == "kl" || loss == "mse+kl" || loss == "mse",
        "unknown loss `{}` of a router; known are kl, mse and mse+kl", loss);
  check(x.dim() == 2 && x.size(0) > 0 && x.size(1) == router.size(1),
        "a router of {} features needs tokens of as many to calibrate on", router.size(1));
  check(top_k_count >= 1 && top_k_count <= experts, "a router of {} experts cannot choose {}", experts, top_k_count);
  check(kl_ratio >= 0.0 && kl_ratio <= 1.0, "a share of {} of the experts that are not chosen", kl_ratio);
  check_finite(x, "inputs of the router");
  const auto logits = torch::matmul(x, router.t());
  const auto logp = torch::log_softmax(logits, -1);
  const int64_t counted = top_k_count + static_cast<int64_t>(kl_ratio * static_cast<double>(experts - top_k_count));
  const auto which = top_k(logits, counted).second;
  const auto p = logp.exp().gather(1, which), logp_counted = logp.gather(1, which);
  // Probabilities of all experts, so that the sum over some may be negative.
  const auto kl_of = [&](const Tensor& values) {
    const auto logq = torch::log_softmax(torch::matmul(x, values.t()), -1).gather(1, which);
    return (p * (logp_counted - logq)).sum() / static_cast<double>(x.size(0));
  };
  QuantizedRows rows;
  if (loss == "mse") {
    rows = search_rows(router, bits);
  } else {
    rows = best_rows(router, bits, [&](const Tensor& values) {
      const auto kl = kl_of(values).reshape({1, 1}).expand({experts, 1});
      if (loss == "kl") return kl.contiguous();
      return ((logits - torch::matmul(x, values.t())).square().sum(0).unsqueeze(1) + kl).contiguous();
    });
  }
  RouterQuantization out;
  static_cast<QuantizedRows&>(out) = rows;
  out.kl = kl_of(rows.values).item<double>();
  const auto chosen = top_k(logits, top_k_count).second,
             now = top_k(torch::matmul(x, rows.values.t()), top_k_count).second;
  const auto kept = (chosen.unsqueeze(2) == now.unsqueeze(1)).any(2).to(torch::kFloat64);
  out.overlap = kept.mean().item<double>();
  return out;
}

int64_t balance_cap(int64_t experts, int64_t top_k_count, int64_t seq_length, double ratio) {
  check(experts >= 1 && top_k_count >= 1 && seq_length >= 1 && ratio > 0.0,
        "{} of {} experts on sequences of {} at a ratio of {} leave nothing to balance", top_k_count, experts,
        seq_length, ratio);
  return static_cast<int64_t>(static_cast<double>(top_k_count) / static_cast<double>(experts) *
                              static_cast<double>(seq_length) * ratio);
}

BalancedTokens balance_tokens(const Tensor& selected, int64_t experts, int64_t cap) {
  check(selected.dim() == 3 && selected.scalar_type() == torch::kInt64,
        "choices to balance are int64 [samples, tokens, k]");
  const auto choice = selected.to(torch::kCPU).contiguous();
  const int64_t samples = choice.size(0), tokens = choice.size(1), k = choice.size(2);
  const int64_t* chosen = choice.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> of(static_cast<size_t>(experts));
  std::vector<bool> open(static_cast<size_t>(experts));
  for (int64_t s = 0; s < samples; ++s) {
    // Whole samples: what an expert has is looked at before each.
    for (size_t e = 0; e < of.size(); ++e) open[e] = static_cast<int64_t>(of[e].size()) < cap;
    for (int64_t i = 0; i < tokens * k; ++i) {
      const int64_t e = chosen[s * tokens * k + i], token = s * tokens + i / k;
      check(e < experts, "a choice names expert {}, there are {}", e, experts);
      if (e < 0 || !open[static_cast<size_t>(e)]) continue;
      auto& list = of[static_cast<size_t>(e)];
      if (list.empty() || list.back() != token) list.push_back(token);
    }
  }
  BalancedTokens out;
  out.cap = cap;
  out.index = torch::full({experts, cap}, -1, torch::kInt64);
  out.count = torch::zeros({experts}, torch::kInt64);
  out.fallback = torch::zeros({experts}, torch::kUInt8);
  for (int64_t e = 0; e < experts; ++e) {
    const auto& list = of[static_cast<size_t>(e)];
    const int64_t n = std::min<int64_t>(cap, static_cast<int64_t>(list.size()));
    std::copy_n(list.begin(), n, out.index.data_ptr<int64_t>() + e * cap);
    out.count[e] = n;
    out.fallback[e] = n == 0 ? 1 : 0;
  }
  return out;
}

}  // namespace moiety
