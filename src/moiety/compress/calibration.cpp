#include "moiety/compress/calibration.h"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/compress/expert_statistics.h"
#include "moiety/io/safetensors.h"
#include "moiety/io/sha256.h"
#include "moiety/moe/watch.h"
#include "moiety/nn/weights.h"

namespace moiety {

using nlohmann::json;

namespace {

constexpr const char* kVersion = "moiety-calibration-1";

// Name and tensor of everything that is counted.
template <class Layer, class F>
void each_tensor(Layer& l, const F& f) {
  f("load", l.load);
  f("gates", l.gates);
  f("gram", l.gram);
  f("pairs", l.pairs);
  f("output", l.output);
}

std::string fingerprint(const std::vector<std::vector<int64_t>>& texts, const WindowOptions& windows) {
  Sha256 sum;
  const int64_t how[] = {windows.context, windows.batch_size, windows.bos, static_cast<int64_t>(texts.size())};
  sum.update(std::as_bytes(std::span(how)));
  for (const auto& ids : texts) {
    const int64_t size[] = {static_cast<int64_t>(ids.size())};
    sum.update(std::as_bytes(std::span(size)));
    sum.update(std::as_bytes(std::span(ids)));
  }
  return sum.hex();
}

// One record of a router, padding left out.
void count(LayerCalibration& l, const Trace::Record& record, const torch::Tensor& mask) {
  const auto& r = record.routing;
  const int64_t rows = l.load.numel();
  check(r.logits.defined() && r.logits.size(1) == rows,
        "block {}: its router gives {} logits, the checkpoint has {} experts there", l.block,
        r.logits.defined() ? r.logits.size(1) : 0, rows);
  const auto real = mask.reshape({-1});
  l.tokens += real_tokens(real.numel(), real);
  l.load += selection_counts(r, rows, real);
  l.gates += gate_mass(r, rows, real);
  l.gram += logit_gram(r.logits, real);
}

// One call of a layer's experts.
void count(LayerCalibration& l, const ExpertCall& call) {
  const auto experts = l.pairs.numel();
  check(static_cast<int64_t>(call.dispatch.counts.size()) == experts,
        "block {}: the model has {} experts, the checkpoint {}", l.block, call.dispatch.counts.size(), experts);
  auto weight = call.dispatch.gates.to(torch::kCPU, torch::kFloat64) *
                call.out.to(torch::kFloat32).norm(2, {1}).to(torch::kCPU, torch::kFloat64);
  auto one = torch::ones_like(weight, torch::kInt64);
  if (call.real.defined()) {
    const auto real = call.real.to(torch::kCPU);
    weight = weight.masked_fill(~real, 0.0);
    one = real.to(torch::kInt64);
  }
  // Sums in the order of pairs, whatever the number of threads.
  const auto* w = weight.const_data_ptr<double>();
  const auto* n = one.const_data_ptr<int64_t>();
  auto* output = l.output.data_ptr<double>();
  auto* pairs = l.pairs.data_ptr<int64_t>();
  int64_t p = 0;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t i = 0; i < call.dispatch.counts[static_cast<size_t>(e)]; ++i, ++p) output[e] += w[p], pairs[e] += n[p];
}

Calibration empty_for(const ExpertLayers& layers) {
  Calibration c;
  for (const auto& layer : layers.layers()) {
    LayerCalibration l;
    l.block = layer.block;
    l.load = torch::zeros({layer.rows}, torch::kInt64);
    l.gates = torch::zeros({layer.rows}, torch::kFloat64);
    l.gram = torch::zeros({layer.rows, layer.rows}, torch::kFloat64);
    l.pairs = torch::zeros({layer.experts}, torch::kInt64);
    l.output = torch::zeros({layer.experts}, torch::kFloat64);
    c.layers.push_back(std::move(l));
  }
  return c;
}

int64_t number(const std::map<std::string, std::string>& meta, const std::string& key, const std::string& where) {
  const auto it = meta.find(key);
  check(it != meta.end() && !it->second.empty() && it->second.size() < 18 &&
            it->second.find_first_not_of("0123456789") == std::string::npos,
        "{}: '{}' is not there or no number", where, key);
  return std::stoll(it->second);
}

}  // namespace

torch::Tensor LayerCalibration::usage() const {
  return usage_of(load);
}

torch::Tensor LayerCalibration::importance() const {
  return gates / static_cast<double>(std::max<int64_t>(1, tokens));
}

torch::Tensor LayerCalibration::saliency() const {
  return output / pairs.to(torch::kFloat64).clamp_min(1.0);
}

const LayerCalibration& Calibration::of_block(int64_t block) const {
  for (const auto& l : layers)
    if (l.block == block) return l;
  fail("the calibration has no layer {}", block);
}

void Calibration::save(const std::filesystem::path& file) const {
  std::vector<TensorInfo> infos;
  std::vector<TensorView> views;
  json blocks = json::array();
  for (const auto& l : layers) {
    blocks.push_back({{"block", l.block}, {"tokens", l.tokens}});
    each_tensor(l, [&](const char* name, const torch::Tensor& t) {
      views.push_back(view_of(t.contiguous(), format_of(t.scalar_type())));
      views.back().name = fmt::format("layers.{}.{}", l.block, name);
      infos.push_back(views.back());
    });
  }
  SafetensorsWriter writer(file, infos,
                           {{"format", kVersion},
                            {"model", model},
                            {"texts", texts},
                            {"layers", blocks.dump()},
                            {"batches", fmt::format("{}", batches)},
                            {"windows", fmt::format("{}", windows)},
                            {"done", fmt::format("{}", done)}});
  for (const auto& v : views) writer.write(v.name, v.data);
  writer.finish();
}

Calibration Calibration::load(const std::filesystem::path& path) {
  const auto file = SafetensorsFile::open(path);
  const std::string where = path.string();
  const auto& meta = file->metadata();
  const auto text = [&](const char* key) {
    const auto it = meta.find(key);
    check(it != meta.end(), "{} is no calibration file: it has no '{}'", where, key);
    return it->second;
  };
  check(text("format") == kVersion, "{} is no calibration file of this version", where);
  Calibration c;
  c.model = text("model");
  c.texts = text("texts");
  c.batches = number(meta, "batches", where);
  c.windows = number(meta, "windows", where);
  c.done = number(meta, "done", where);
  const json blocks = parse_json(text("layers"), where);
  check(blocks.is_array(), "{}: 'layers' is no list", where);
  for (const json& b : blocks) {
    check(b.is_object() && b.contains("block") && b["block"].is_number_unsigned() && b.contains("tokens") &&
              b["tokens"].is_number_unsigned(),
          "{}: 'layers' holds {}", where, b.dump());
    LayerCalibration l;
    l.block = b["block"].get<int64_t>();
    l.tokens = b["tokens"].get<int64_t>();
    each_tensor(l, [&](const char* name, torch::Tensor& t) {
      t = as_tensor(file->get(fmt::format("layers.{}.{}", l.block, name))).clone();
      const bool whole = std::string_view(name) == "load" || std::string_view(name) == "pairs";
      check(t.scalar_type() == (whole ? torch::kInt64 : torch::kFloat64), "{}: 'layers.{}.{}' is of another type",
            where, l.block, name);
    });
    const int64_t rows = l.load.numel(), experts = l.pairs.numel();
    check(l.load.dim() == 1 && l.gates.sizes() == l.load.sizes() && l.gram.dim() == 2 && l.gram.size(0) == rows &&
              l.gram.size(1) == rows && l.pairs.dim() == 1 && l.output.dim() == 1 && l.output.numel() == experts,
          "{}: the tensors of layer {} do not fit each other", where, l.block);
    c.layers.push_back(std::move(l));
  }
  return c;
}

std::string model_fingerprint(const ExpertLayers& layers) {
  Sha256 sum;
  const std::string config = layers.checkpoint()->config().dump(-1, ' ', false, json::error_handler_t::replace);
  sum.update(std::as_bytes(std::span(config)));
  for (size_t i = 0; i < layers.layers().size(); ++i) {
    const auto router = layers.router(i).contiguous();
    sum.update(std::as_bytes(std::span(router.const_data_ptr<float>(), static_cast<size_t>(router.numel()))));
  }
  return sum.hex();
}

Calibration calibrate(CausalModel& model, const ExpertLayers& layers, const std::vector<std::vector<int64_t>>& texts,
                      const CalibrationOptions& options) {
  Calibration c = empty_for(layers);
  c.model = model_fingerprint(layers);
  c.texts = fingerprint(texts, options.windows);
  if (!options.file.empty() && std::filesystem::exists(options.file)) {
    Calibration old = Calibration::load(options.file);
    check(old.model == c.model, "{} was made with another model: take another file, or delete it",
          options.file.string());
    check(old.texts == c.texts, "{} was made with other texts or windows: take another file, or delete it",
          options.file.string());
    check(old.layers.size() == c.layers.size(), "{} has {} layers, the model {}", options.file.string(),
          old.layers.size(), c.layers.size());
    if (old.complete()) return old;
    c = std::move(old);
  }
  std::map<int64_t, LayerCalibration*> by_block;
  for (auto& l : c.layers) by_block[l.block] = &l;
  const auto at = [&](int64_t block) -> LayerCalibration& {
    const auto it = by_block.find(block);
    check(it != by_block.end(), "block {} routes, but the checkpoint has no experts there", block);
    return *it->second;
  };
  const WatchExperts watch(model, [&](const ExpertCall& call) { count(at(call.site.block), call); });
  check(watch.mixtures() == static_cast<int64_t>(c.layers.size()),
        "the model has {} plain mixtures, the checkpoint {} layers with experts", watch.mixtures(), c.layers.size());
  auto saved = std::chrono::steady_clock::now();
  each_window(
      texts, options.windows, model.context_length(),
      [&](const WindowBatch& batch) {
        Trace trace;
        trace.on_record = [&](const Trace::Record& record) { count(at(record.site.block), record, batch.mask); };
        Pass pass;
        pass.trace = &trace;
        read_window(model, batch, pass);
        ++c.batches;
        c.done = batch.done;
        c.windows = batch.windows;
        if (options.progress) options.progress(c.done, c.windows);
        const auto now = std::chrono::steady_clock::now();
        if (options.file.empty() || c.complete() ||
            std::chrono::duration<double>(now - saved).count() < options.save_every)
          return;
        c.save(options.file);
        saved = now;
      },
      c.batches);
  if (!options.file.empty()) c.save(options.file);
  return c;
}

}  // namespace moiety
