#include "moiety/compress/edgemoe.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/registry.h"

namespace moiety {
namespace {

using nlohmann::json;

void check_width(int64_t width) {
  check(width == 2 || width == 4 || width == 8 || width == 16 || width == 32,
        "an expert cannot have {} bits; widths are 2, 4, 8, 16 and 32", width);
}

std::vector<int64_t> sorted_widths(std::vector<int64_t> widths) {
  for (const int64_t w : widths) check_width(w);
  std::sort(widths.begin(), widths.end());
  return widths;
}

}  // namespace

void EdgeMoeConfig::fields(Fields& f) {
  f("tolerance", tolerance, "largest relative loss of accuracy").min(0);
  f("widths", widths, "bit widths that experts may get, of 2, 4, 8, 16, 32").length(1);
  f("k0", k0, "experts with the narrower width that the walk starts from; -1: half of them").min(-1);
  f("step", step, "of the walk; 0: a 32nd of the experts").min(0);
  f("int2_scale", int2_scale, "scale of 2-bit rows: from the largest weight, or fitted to all").choices({"max", "fit"});
}

std::string EdgeMoeConfig::problem() const {
  if (!(tolerance < 1.0)) return fmt::format("tolerance is {}; it must be below 1", tolerance);
  for (size_t i = 0; i < widths.size(); ++i) {
    const int64_t w = widths[i];
    if (w != 2 && w != 4 && w != 8 && w != 16 && w != 32)
      return fmt::format("widths has {}; an expert can have 2, 4, 8, 16 or 32 bits", w);
    if (std::find(widths.begin(), widths.begin() + static_cast<int64_t>(i), w) !=
        widths.begin() + static_cast<int64_t>(i))
      return fmt::format("widths has {} twice", w);
  }
  return "";
}

BitBounds bit_bounds(const std::vector<int64_t>& widths, const std::vector<double>& losses, double tolerance) {
  check(widths.size() == losses.size() && !widths.empty(), "{} widths need as many uniform losses, not {}",
        widths.size(), losses.size());
  check(tolerance >= 0.0 && tolerance < 1.0, "tolerance is {}; it must be at least 0 and below 1", tolerance);
  const auto sorted = sorted_widths(widths);
  BitBounds b{0, 32};
  for (const int64_t w : sorted) {
    const auto at = std::find(widths.begin(), widths.end(), w) - widths.begin();
    if (losses[static_cast<size_t>(at)] <= tolerance) {
      b.high = w;
      break;
    }
  }
  b.low = b.high;
  for (const int64_t w : sorted)
    if (w < b.high) b.low = w;
  return b;
}

std::vector<int64_t> sensitivity_order(std::span<const double> sensitivity) {
  std::vector<int64_t> order(sensitivity.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return sensitivity[static_cast<size_t>(a)] < sensitivity[static_cast<size_t>(b)];
  });
  return order;
}

int64_t walk_bits(int64_t n, int64_t k0, int64_t step, double tolerance, const std::function<double(int64_t)>& loss) {
  check(step >= 1, "the walk's step is {}; it must be at least 1", step);
  int64_t k = std::clamp<int64_t>(k0, 0, n);
  if (loss(k) <= tolerance) {
    while (k + step <= n && loss(k + step) <= tolerance) k += step;
  } else {
    while (k > 0 && loss(k) > tolerance) k = std::max<int64_t>(0, k - step);
  }
  return k;
}

BitAssignment assign_bits(const EdgeMoeConfig& config, const std::vector<double>& uniform_loss,
                          std::span<const double> sensitivity,
                          const std::function<double(int64_t k, const std::vector<int64_t>& bits)>& loss,
                          bool second_pass) {
  const auto n = static_cast<int64_t>(sensitivity.size());
  check(n > 0, "there are no experts");
  BitAssignment out;
  out.bounds = bit_bounds(config.widths, uniform_loss, config.tolerance);
  out.order = sensitivity_order(sensitivity);
  const auto bits_at = [&](int64_t k) {
    std::vector<int64_t> bits(static_cast<size_t>(n), out.bounds.high);
    for (int64_t i = 0; i < k; ++i) bits[static_cast<size_t>(out.order[static_cast<size_t>(i)])] = out.bounds.low;
    return bits;
  };
  out.k = n;
  if (out.bounds.low != out.bounds.high) {
    std::map<int64_t, double> known;
    const auto measured = [&](int64_t k) {
      const auto it = known.find(k);
      return it != known.end() ? it->second : known[k] = loss(k, bits_at(k));
    };
    const int64_t k0 = config.k0 < 0 ? n / 2 : config.k0,
                  step = config.step > 0 ? config.step : std::max<int64_t>(1, n / 32);
    out.k = walk_bits(n, k0, step, config.tolerance, measured);
    if (second_pass) out.k = walk_bits(n, out.k, 1, config.tolerance, measured);
  }
  out.bits = bits_at(out.k);
  return out;
}

EdgeMoeMeasurements EdgeMoeMeasurements::load(const std::string& file, const std::string& fingerprint) {
  EdgeMoeMeasurements out{fingerprint, {}};
  if (!std::filesystem::exists(file)) return out;
  const json j = parse_json(read_text(file), file);
  return reading_json(file, [&] {
    if (j.value("fingerprint", std::string()) == fingerprint)
      out.accuracy = j.at("accuracy").get<std::map<std::string, double>>();
    return out;
  });
}

void EdgeMoeMeasurements::save(const std::string& file) const {
  write_file(file, json{{"fingerprint", fingerprint}, {"accuracy", accuracy}}.dump(1) + "\n");
}

EdgeMoeSearch search_bits(EdgeMoeModel& model, const EdgeMoeConfig& config, EdgeMoeMeasurements& measured,
                          const std::function<void()>& changed,
                          const std::function<void(int64_t, int64_t, const std::string&)>& progress) {
  const int64_t n = model.experts();
  EdgeMoeSearch out;
  const auto widths = sorted_widths(config.widths);
  const int64_t least = 2 + static_cast<int64_t>(widths.size()) + n;  // the walk comes on top
  int64_t done = 0;
  // Measured once under its name, or known from a run before.
  const auto accuracy = [&](const std::string& name, const std::vector<int64_t>& bits) {
    if (progress) progress(std::min(done, least - 1), least, name);
    ++done;
    const auto it = measured.accuracy.find(name);
    if (it != measured.accuracy.end()) return it->second;
    model.set_bits(bits);
    const double a = model.accuracy();
    measured.accuracy[name] = a;
    ++out.evaluations;
    if (changed) changed();
    return a;
  };
  const auto uniform = [&](int64_t width) { return std::vector<int64_t>(static_cast<size_t>(n), width); };
  const auto uniform_name = [](int64_t width) { return fmt::format("all at {} bits", width); };
  out.full = accuracy(uniform_name(32), uniform(32));
  check(std::isfinite(out.full) && out.full > 0.0,
        "the whole model's accuracy on the evaluation text is {}; there is nothing that could be lost", out.full);
  const auto loss_of = [&](double a) { return std::isfinite(a) ? (out.full - a) / out.full : 1.0; };
  for (const int64_t width : config.widths)
    out.uniform_loss.push_back(loss_of(accuracy(uniform_name(width), uniform(width))));

  const double all4 = accuracy(uniform_name(4), uniform(4));
  std::vector<bool> unused;
  bool asked = false;
  for (int64_t i = 0; i < n; ++i) {
    const std::string name = fmt::format("{} at 2 bits, others at 4", i);
    if (!measured.accuracy.count(name)) {
      if (!asked) {
        model.set_bits(uniform(4));
        unused = model.unused();
        asked = true;
      }
      if (!unused.empty() && unused[static_cast<size_t>(i)]) measured.accuracy[name] = all4;
    }
    auto bits = uniform(4);
    bits[static_cast<size_t>(i)] = 2;
    out.sensitivity.push_back(loss_of(accuracy(name, bits)));
  }
  const auto bounds = bit_bounds(config.widths, out.uniform_loss, config.tolerance);
  const auto order = sensitivity_order(out.sensitivity);
  const auto walk_loss = [&](int64_t k, const std::vector<int64_t>& bits) {
    if (k == 0) return loss_of(accuracy(uniform_name(bounds.high), bits));
    if (k == n) return loss_of(accuracy(uniform_name(bounds.low), bits));
    return loss_of(
        accuracy(fmt::format("{} least sensitive at {} bits, others at {}", k, bounds.low, bounds.high), bits));
  };
  out.assignment = assign_bits(config, out.uniform_loss, out.sensitivity, walk_loss);
  const auto& a = out.assignment;
  out.loss =
      a.bounds.low == a.bounds.high ? loss_of(accuracy(uniform_name(a.bounds.high), a.bits)) : walk_loss(a.k, a.bits);
  model.set_bits(a.bits);
  if (progress) progress(least, least, "");
  return out;
}

namespace {

const RegisterMethod registered({
    .slug = "edgemoe",
    .kind = "transform",
    .title = "EdgeMoE",
    .summary = "every expert its own bit width, within a tolerance of the whole model's accuracy",
    .paper = {"EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models", "Yi et al.", 2023, "2308.14352"},
    .sites = {"ffn"},
    .config = describe<EdgeMoeConfig>,
    .make = {},
});

}  // namespace
}  // namespace moiety
