#include "moiety/compress/compeft.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kPiece = 1 << 16;      // entries that one thread adds up at a time; a multiple of 64
constexpr int64_t kWhole = 100'000'000;  // density in steps of 1e-8: percent in steps of 1e-6
constexpr uint32_t kSize = 0x7fffffffu;  // bits of a float without its sign

std::span<const float> entries_of(const Tensor& tau) {
  check(tau.dim() == 1 && tau.scalar_type() == torch::kFloat32 && tau.is_contiguous() && tau.device().is_cpu(),
        "a task vector is one flat f32 tensor on the CPU");
  return {tau.const_data_ptr<float>(), static_cast<size_t>(tau.numel())};
}

int64_t pieces(int64_t d) {
  return (d + kPiece - 1) / kPiece;
}

// body(piece, begin, end) for all pieces; what it returns, added up in their order.
template <class Body>
double sum_pieces(int64_t d, const Body& body) {
  std::vector<double> sums(static_cast<size_t>(pieces(d)));
  parallel_for(0, pieces(d), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      sums[static_cast<size_t>(p)] = body(p * kPiece, std::min(d, (p + 1) * kPiece));
  });
  double sum = 0.0;
  for (const double s : sums) sum += s;
  return sum;
}

// Sum of f(x) in eight strands, so that it runs in vectors and still has one order.
template <class F>
double strands(std::span<const float> x, const F& f) {
  std::array<double, 8> sums{};
  size_t i = 0;
  for (; i + 8 <= x.size(); i += 8)
    for (size_t k = 0; k < 8; ++k) sums[k] += f(x[i + k]);
  for (; i < x.size(); ++i) sums[i % 8] += f(x[i]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

int64_t steps_of(double density) {
  check(density > 0.0 && density <= 1.0, "the density is {}; it lies above 0 and is at most 1", density);
  return std::llround(density * static_cast<double>(kWhole));
}

void check_finite(std::span<const float> x) {
  std::vector<int64_t> first(static_cast<size_t>(pieces(static_cast<int64_t>(x.size()))), -1);
  const auto d = static_cast<int64_t>(x.size());
  parallel_for(0, pieces(d), 1, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p)
      for (int64_t i = p * kPiece; i < std::min(d, (p + 1) * kPiece) && first[static_cast<size_t>(p)] < 0; ++i)
        if (!std::isfinite(x[static_cast<size_t>(i)])) first[static_cast<size_t>(p)] = i;
  });
  for (const int64_t i : first)
    check(i < 0, "the task vector holds {} at index {}", i < 0 ? 0.0f : x[static_cast<size_t>(std::max<int64_t>(0, i))],
          i);
}

// What is at least as large as the threshold, with its signs; a zero has none.
TernaryMasks signs_from(std::span<const float> x, float threshold) {
  TernaryMasks out(static_cast<int64_t>(x.size()));
  parallel_for(0, static_cast<int64_t>(out.positive.size()), kPiece / 64, [&](int64_t first, int64_t last) {
    for (auto w = static_cast<size_t>(first); w < static_cast<size_t>(last); ++w) {
      uint64_t positive = 0, negative = 0;
      const size_t begin = w * 64, count = std::min<size_t>(64, x.size() - begin);
      for (size_t i = 0; i < count; ++i) {
        const float v = x[begin + i];
        const bool kept = std::fabs(v) >= threshold;
        positive |= static_cast<uint64_t>(kept && v > 0.0f) << i;
        negative |= static_cast<uint64_t>(kept && v < 0.0f) << i;
      }
      out.positive[w] = positive;
      out.negative[w] = negative;
    }
  });
  return out;
}

template <class Body>
void each_kept(const TernaryMasks& m, int64_t begin, int64_t end, const Body& body) {
  for (int64_t w = begin / 64; w * 64 < end; ++w) {
    const auto at = static_cast<size_t>(w);
    for (uint64_t any = m.positive[at] | m.negative[at]; any != 0; any &= any - 1) {
      const int bit = std::countr_zero(any);
      const int64_t i = w * 64 + bit;
      if (i >= begin && i < end) body(i, (m.negative[at] >> bit & 1) != 0);
    }
  }
}

Tensor kept_values(std::span<const float> x, const TernaryMasks& signs) {
  auto out = torch::empty({signs.kept()}, torch::kFloat32);
  float* next = out.data_ptr<float>();
  each_kept(signs, 0, signs.d, [&](int64_t i, bool) { *next++ = x[static_cast<size_t>(i)]; });
  return out;
}

double mean_size(const Tensor& values) {
  const auto x = entries_of(values);
  if (x.empty()) return 0.0;
  const double sum = sum_pieces(values.numel(), [&](int64_t begin, int64_t end) {
    return strands(x.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
                   [](float v) { return std::fabs(static_cast<double>(v)); });
  });
  return sum / static_cast<double>(values.numel());
}

const RegisterMethod registered(
    {.slug = "compeft",
     .kind = "transform",
     .title = "ComPEFT",
     .summary =
         "what an expert adds to its base as the signs of its largest entries and one scale; merges such experts",
     .paper = {"ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
               "Yadav et al.", 2023, "2311.13171"},
     .sites = {},
     .config = describe<CompeftConfig>,
     .make = {}});

}  // namespace

void CompeftConfig::fields(Fields& f) {
  f("density", density, "share of the entries that is kept, above 0 and at most 1").min(0).max(1);
  f("alpha", alpha, "the scale is so many standard deviations of the whole vector").min(0);
  f("quantizer", quantizer, "sign: one scale for all; prune: kept values as they are; stc: their mean size as scale")
      .choices({"sign", "prune", "stc"});
}

std::string CompeftConfig::problem() const {
  if (!(density > 0.0 && density <= 1.0))
    return fmt::format("the density is {}; it lies above 0 and is at most 1", density);
  if (!(alpha > 0.0)) return fmt::format("alpha is {}; it has to be above 0", alpha);
  return "";
}

void TaskMergeConfig::fields(Fields& f) {
  f("method", method, "how task vectors become one").choices({"task-arithmetic", "ties"});
  f("merge_func", merge_func, "ties: what becomes of the entries that agree")
      .choices({"dis-mean", "dis-sum", "dis-max"});
}

std::vector<CompeftTrial> tune_compeft(
    const std::vector<double>& densities, const std::vector<double>& alphas,
    const std::function<std::function<double(double alpha)>(double density)>& compress) {
  check(!densities.empty() && !alphas.empty(), "there is nothing to try: densities and alphas are needed");
  std::vector<CompeftTrial> trials;
  for (const double density : densities) {
    const auto loss = compress(density);
    for (const double alpha : alphas) trials.push_back({density, alpha, loss(alpha)});
  }
  const auto key = [](const CompeftTrial& t) {
    return std::tuple(std::isnan(t.loss) ? std::numeric_limits<double>::infinity() : t.loss, t.density, t.alpha);
  };
  const auto best =
      std::min_element(trials.begin(), trials.end(), [&](const auto& a, const auto& b) { return key(a) < key(b); });
  check(std::isfinite(best->loss), "no density and alpha gives a loss that is a number");
  std::rotate(trials.begin(), best, best + 1);
  return trials;
}

int64_t compeft_kept(int64_t d, double density) {
  const int64_t steps = steps_of(density);
  if (steps == kWhole) return d;
  // d steps / kWhole without leaving 64 bits.
  return d / kWhole * steps + d % kWhole * steps / kWhole + 1;
}

double compeft_deviation(const Tensor& tau) {
  const auto x = entries_of(tau);
  const int64_t d = tau.numel();
  check(d >= 2, "a task vector of {} entries has no standard deviation", d);
  const auto part = [&](int64_t begin, int64_t end) {
    return x.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  };
  const double mean = sum_pieces(d,
                                 [&](int64_t begin, int64_t end) {
                                   return strands(part(begin, end), [](float v) { return static_cast<double>(v); });
                                 }) /
                      static_cast<double>(d);
  const double squares = sum_pieces(d, [&](int64_t begin, int64_t end) {
    return strands(part(begin, end), [mean](float v) {
      const double off = static_cast<double>(v) - mean;
      return off * off;
    });
  });
  return std::sqrt(squares / static_cast<double>(d - 1));
}

float compeft_threshold(const Tensor& tau, int64_t rank) {
  const auto x = entries_of(tau);
  check(rank >= 1 && rank <= tau.numel(), "there is no {}-largest of {} entries", rank, tau.numel());
  // Sizes order as their bit patterns do: the digits of the one that is wanted, from the highest, 11 + 10 + 10 bits.
  struct Digit {
    int shift, bits;
  };
  uint32_t found = 0, known = 0;
  int64_t left = rank;
  for (const Digit digit : {Digit{20, 11}, Digit{10, 10}, Digit{0, 10}}) {
    const uint32_t mask = (1u << digit.bits) - 1;
    std::vector<int64_t> count(size_t{1} << digit.bits);
    for (const float v : x) {
      const uint32_t pattern = std::bit_cast<uint32_t>(v) & kSize;
      if ((pattern & known) == found) ++count[pattern >> digit.shift & mask];
    }
    uint32_t value = mask;
    while (left > count[value]) left -= count[value--];
    found |= value << digit.shift;
    known |= mask << digit.shift;
  }
  return std::bit_cast<float>(found);
}

Tensor CompressedVector::expand(int64_t begin, int64_t end) const {
  check(begin >= 0 && begin <= end && end <= d, "entries {} to {} of {} do not exist", begin, end, d);
  if (form == "dense") return values.slice(0, begin, end);
  auto out = torch::zeros({end - begin}, torch::kFloat32);
  float* to = out.data_ptr<float>();
  const float* value = form == "prune" ? values.const_data_ptr<float>() + signs.kept(begin) : nullptr;
  each_kept(signs, begin, end, [&](int64_t i, bool negative) {
    to[i - begin] = value ? *value++ : negative ? -scale : scale;
  });
  return out;
}

CompressedVector compeft_compress(const Tensor& tau, const CompeftConfig& config) {
  const torch::NoGradGuard frozen;
  const std::string problem = config.problem();
  check(problem.empty(), "{}", problem);
  const auto x = entries_of(tau);
  check_finite(x);
  CompressedVector out;
  out.d = tau.numel();
  out.scale = static_cast<float>(config.alpha * compeft_deviation(tau));
  if (steps_of(config.density) == kWhole) {
    out.form = "dense";
    out.values = tau;
    return out;
  }
  const float threshold = compeft_threshold(tau, compeft_kept(out.d, config.density));
  out.signs = signs_from(x, threshold);
  if (config.quantizer == "sign") return out;
  const auto values = kept_values(x, out.signs);
  if (config.quantizer == "stc") {
    out.scale = static_cast<float>(mean_size(values));
    return out;
  }
  check(config.quantizer == "prune", "unknown quantizer `{}`; known are sign, prune and stc", config.quantizer);
  out.form = "prune";
  out.values = values;
  return out;
}

namespace {

std::string shape_text(const Tensor& t) {
  return fmt::format("[{}]", fmt::join(t.sizes().begin(), t.sizes().end(), ", "));
}

// Names and shapes of expert and base that differ, the first five.
void check_same(const ExpertTensors& expert, const ExpertTensors& base) {
  std::vector<std::string> off;
  for (const auto& [name, t] : expert) {
    const auto it = base.find(name);
    if (it == base.end())
      off.push_back(fmt::format("'{}' is not in the base", shown(name)));
    else if (it->second.sizes() != t.sizes())
      off.push_back(fmt::format("'{}' is {} in the expert and {} in the base", shown(name), shape_text(t),
                                shape_text(it->second)));
  }
  for (const auto& [name, t] : base)
    if (expert.count(name) == 0) off.push_back(fmt::format("'{}' is not in the expert", shown(name)));
  if (off.empty()) return;
  const size_t all = off.size();
  off.resize(std::min<size_t>(5, all));
  fail("expert and base do not have the same tensors: {}{}", fmt::join(off, ", "),
       all > 5 ? fmt::format(", and {} more", all - 5) : "");
}

Tensor init_of(const std::string& kind, const ExpertTensors& base, const std::string& name) {
  check(kind == "full" || kind == "lora" || kind == "ia3", "unknown kind `{}`; known are full, lora and ia3", kind);
  if (kind == "full") return base.at(name).to(torch::kCPU, torch::kFloat32);
  return torch::full({}, kind == "ia3" ? 1.0f : 0.0f);
}

}  // namespace

std::vector<TaskVectorEntry> task_vector_entries(const ExpertTensors& tensors) {
  std::vector<TaskVectorEntry> out;
  for (const auto& [name, t] : tensors) out.push_back({name, t.sizes().vec(), 0, 0});
  lay_out(out, "a task vector");
  return out;
}

Tensor task_vector(const ExpertTensors& expert, const std::string& kind, const ExpertTensors& base) {
  const torch::NoGradGuard frozen;
  if (kind == "full") check_same(expert, base);
  const auto entries = task_vector_entries(expert);
  auto out = torch::empty({entries.empty() ? 0 : entries.back().end}, torch::kFloat32);
  for (const auto& e : entries) {
    const auto to = out.slice(0, e.begin, e.end);
    to.copy_((expert.at(e.name).to(torch::kCPU, torch::kFloat32) - init_of(kind, base, e.name)).flatten());
    const auto wrong = torch::isfinite(to).logical_not().nonzero();
    if (wrong.numel() == 0) continue;
    const auto at = wrong[0][0].item<int64_t>();
    fail("tensor '{}' holds {} at index {}", shown(e.name), std::isnan(to[at].item<float>()) ? "NaN" : "Inf", at);
  }
  return out;
}

ExpertTensors apply_task_vector(const Tensor& tau, const std::vector<TaskVectorEntry>& entries, const std::string& kind,
                                const ExpertTensors& base) {
  const torch::NoGradGuard frozen;
  const int64_t d = entries.empty() ? 0 : entries.back().end;
  check(tau.numel() == d, "a task vector of {} entries for tensors of {}", tau.numel(), d);
  ExpertTensors out;
  for (const auto& e : entries) {
    if (kind == "full") check(base.count(e.name) != 0, "the base has no tensor '{}'", shown(e.name));
    const auto added = tau.slice(0, e.begin, e.end).view(e.shape) + init_of(kind, base, e.name);
    out[e.name] = kind == "full" ? added.to(base.at(e.name).scalar_type()) : added;
  }
  return out;
}

int64_t ties_balance(const Tensor& taus) {
  return taus.sum(0).sign().to(torch::kInt64).sum().item<int64_t>();
}

Tensor merge_task_vectors(const Tensor& taus, const TaskMergeConfig& config, int64_t balance) {
  const torch::NoGradGuard frozen;
  check(taus.dim() == 2 && taus.size(0) >= 1, "there is nothing to merge");
  const auto sum = taus.sum(0);
  if (config.method == "task-arithmetic") return sum;
  check(config.method == "ties", "unknown method `{}`; known are task-arithmetic and ties", config.method);
  const double majority = balance > 0 ? 1.0 : balance < 0 ? -1.0 : 0.0;
  const auto own = sum.sign();
  const auto elected = torch::where(own == 0, torch::full_like(own, majority), own);
  const auto agrees = taus.sign() * elected > 0;
  const auto kept = torch::where(agrees, taus, torch::zeros_like(taus));
  if (config.merge_func == "dis-sum") return kept.sum(0);
  if (config.merge_func == "dis-max") return std::get<0>(kept.abs().max(0)) * elected;
  check(config.merge_func == "dis-mean", "unknown merge_func `{}`; known are dis-mean, dis-sum and dis-max",
        config.merge_func);
  return kept.sum(0) / agrees.sum(0).clamp_min(1).to(taus.scalar_type());
}

Tensor merge_task_vectors(const Tensor& taus, const TaskMergeConfig& config) {
  return merge_task_vectors(taus, config, config.method == "ties" ? ties_balance(taus) : 0);
}

int64_t save_task_vector(const std::filesystem::path& path, const CompressedVector& v, TaskVectorHeader header,
                         const std::vector<TensorView>& others) {
  header.form = header.form == "masks" && v.form == "golomb" ? "masks" : v.form;
  header.scale = v.scale;
  std::span<const float> values;
  Tensor held;
  if (v.form != "golomb") {
    held = v.values.contiguous();
    values = {held.const_data_ptr<float>(), static_cast<size_t>(held.numel())};
  }
  return write_task_vector(path, std::move(header), v.signs, values, others);
}

CompressedVector load_task_vector(const TaskVectorFile& file) {
  const TaskVectorHeader& h = file.header();
  CompressedVector out;
  out.form = h.form == "masks" ? "golomb" : h.form;
  out.d = h.d;
  out.scale = h.scale;
  if (h.form != "dense") out.signs = file.masks();
  if (out.form != "golomb") out.values = torch::tensor(file.values(), torch::kFloat32);
  if (out.form != "prune") return out;
  // The file holds places; their signs are those of the values.
  const float* value = out.values.const_data_ptr<float>();
  const TernaryMasks places = out.signs;
  each_kept(places, 0, out.d, [&](int64_t i, bool) {
    if (!std::signbit(*value++)) return;
    const auto word = static_cast<size_t>(i / 64);
    out.signs.positive[word] ^= uint64_t{1} << i % 64;
    out.signs.negative[word] |= uint64_t{1} << i % 64;
  });
  return out;
}

}  // namespace moiety
