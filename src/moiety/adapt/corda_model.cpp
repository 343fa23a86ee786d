#include "moiety/adapt/corda_model.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <span>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/io/finite.h"
#include "moiety/io/overlay.h"
#include "moiety/io/safetensors.h"
#include "moiety/io/sha256.h"
#include "moiety/models/model.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
using Progress = std::function<void(const char*, int64_t, int64_t)>;

const RegisterMethod watch({.slug = "corda-watch",
                            .kind = "part",
                            .title = "Second moments of inputs",
                            .summary = "watches what matrices read and changes nothing; what CorDA decomposes by",
                            .paper = {"CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
                                      "Yang et al.", 2024, "2406.05223"},
                            .sites = {"linear"},
                            .config = {},
                            .make = MakeBeside{.per_input = true,
                                               .make = [](LinearSite& site, const json&) -> std::shared_ptr<Beside> {
                                                 std::vector<std::string> paths;
                                                 for (const auto& t : site.targets) paths.push_back(t.path);
                                                 return std::make_shared<CordaWatch>(paths.at(0), paths);
                                               }}});

json without_parts(const Checkpoint& checkpoint) {
  check(checkpoint.gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
        checkpoint.path().string());
  json config = checkpoint.config();
  const auto own = config.find("moiety");
  check(own == config.end() || !own->contains("parts") || (*own)["parts"].empty(),
        "{} has parts already: merge or leave them out first", checkpoint.path().string());
  return config;
}

using Change = std::function<Tensor(const Tensor&)>;

// `base` with changed matrices, and new ones.
std::shared_ptr<const Checkpoint> changed(std::shared_ptr<const Checkpoint> base, json config,
                                          const std::map<std::string, Change>& changes,
                                          const std::map<std::string, Tensor>& added) {
  std::vector<OverlayTensor> tensors;
  for (const auto& [name, change] : changes) {
    OverlayTensor t;
    t.info = base->get(name);
    t.get = [base, name = name, change = change] {
      const torch::NoGradGuard frozen;
      const TensorView v = base->get(name);
      return view_of(change(as_tensor(v).to(torch::kFloat32)), v.format);
    };
    tensors.push_back(std::move(t));
  }
  for (const auto& [name, value] : added) {
    OverlayTensor t;
    t.info.name = name;
    t.info.format = Format::F32;
    t.info.shape = value.sizes().vec();
    t.get = [value = value] { return view_of(value, Format::F32); };
    tensors.push_back(std::move(t));
  }
  return overlay(std::move(base), std::move(config), std::move(tensors));
}

// The tensor of a matrix, which has to be a float matrix of its own.
std::string tensor_of(const Checkpoint& base, const std::string& path) {
  const std::string name = path + ".weight";
  check(base.has(name), "{}: there is no tensor '{}': this family stores several matrices in one", base.path().string(),
        name);
  check(!is_block(base.get(name).format),
        "{}: '{}' is stored in blocks; decompose before quantizing (`moiety convert`)", base.path().string(), name);
  return name;
}

// The model with a watch at every input of the targets.
struct Watched {
  std::shared_ptr<CausalModel> model;
  std::vector<const CordaWatch*> watches;
};
Watched watched(const Checkpoint& checkpoint, const CordaOptions& options) {
  json config = without_parts(checkpoint);
  config["moiety"]["parts"] = json::array({{{"slug", "corda-watch"}, {"target", options.targets}}});
  Watched out{load_causal(checkpoint, config, {.dtype = options.dtype}), {}};
  out.model->eval();
  for (const auto& module : out.model->modules())
    if (const auto* w = dynamic_cast<const CordaWatch*>(module.get())) {
      for (const auto& path : w->paths) tensor_of(checkpoint, path);
      out.watches.push_back(w);
    }
  return out;
}

constexpr const char* kMoments = "moiety.corda-moments";

// What tells a matrix from that of another model, whatever float type it is stored in: its shape and the corners that
// are read at once.
std::string fingerprint(const Checkpoint& checkpoint, const std::string& path) {
  const TensorView weight = checkpoint.get(tensor_of(checkpoint, path));
  std::string bytes;
  for (const int64_t n : weight.shape) bytes += fmt::format("{} ", n);
  for (const int64_t row : {int64_t{0}, weight.shape.at(0) - 1}) {
    const auto values = as_tensor(slice_rows(weight, row, row + 1)).to(torch::kFloat32).contiguous();
    bytes.append(static_cast<const char*>(values.const_data_ptr()), static_cast<size_t>(values.nbytes()));
  }
  Sha256 hash;
  hash.update(std::as_bytes(std::span(bytes)));
  return hash.hex();
}

}  // namespace

CordaMoments corda_calibrate(const Checkpoint& checkpoint, const CordaOptions& options,
                             const std::vector<std::vector<int64_t>>& samples,
                             const std::function<void(int64_t)>& progress) {
  check(!samples.empty(), "there is no calibration data");
  const auto [model, watches] = watched(checkpoint, options);
  const torch::NoGradGuard frozen;
  int64_t done = 0;
  for (const auto& ids : samples) {
    Pass pass;
    model->hidden(torch::tensor(ids, torch::kInt64).unsqueeze(0), pass);
    if (progress) progress(++done);
  }
  CordaMoments out;
  for (const auto* w : watches) {
    const auto held = std::make_shared<const CordaCovariance>(w->covariance);
    for (const auto& path : w->paths) out[path] = held;
  }
  return out;
}

void write_moments(const std::filesystem::path& file, const CordaMoments& moments, const Checkpoint& checkpoint,
                   const CordaSource& source) {
  check(!moments.empty(), "there are no second moments to write");
  // Every moment once, under the first of its matrices.
  std::map<const CordaCovariance*, std::string> names;
  json matrices = json::object();
  std::vector<TensorInfo> infos;
  std::vector<Tensor> values;
  for (const auto& [path, moment] : moments) {
    const auto [name, fresh] = names.emplace(moment.get(), path);
    matrices[path] = {{"input", name->second}, {"weight", fingerprint(checkpoint, path)}};
    if (!fresh) continue;
    for (const auto& [what, value] :
         {std::pair<const char*, Tensor>{"covariance", moment->sum()}, {"sizes", moment->mean_sizes()}}) {
      check(value.defined(), "{} has seen no calibration data", path);
      values.push_back(value.to(torch::kFloat32).contiguous());
      infos.push_back({fmt::format("{}.{}", path, what), Format::F32, value.sizes().vec()});
    }
  }
  SafetensorsWriter writer(file, infos,
                           {{"format", kMoments},
                            {"model", source.model},
                            {"text", source.text},
                            {"samples", std::to_string(moments.begin()->second->samples())},
                            {"tokens", std::to_string(source.tokens)},
                            {"matrices", matrices.dump()}});
  for (size_t i = 0; i < infos.size(); ++i)
    writer.write(infos[i].name,
                 {static_cast<const std::byte*>(values[i].const_data_ptr()), static_cast<size_t>(values[i].nbytes())});
  writer.finish();
}

CordaMoments read_moments(const std::filesystem::path& file, const Checkpoint& checkpoint,
                          const CordaOptions& options) {
  const auto stored = SafetensorsFile::open(file);
  const std::string where = file.string();
  const auto said = [&](const char* key) {
    const auto it = stored->metadata().find(key);
    return it == stored->metadata().end() ? std::string() : it->second;
  };
  check(said("format") == kMoments, "{}: no second moments of `moiety convert --save-covariance` are in it", where);
  int64_t samples = 0;
  const std::string count = said("samples");
  const auto [rest, error] = std::from_chars(count.data(), count.data() + count.size(), samples);
  check(error == std::errc() && rest == count.data() + count.size() && samples >= 1, "{}: `samples` is `{}`", where,
        shown(count));
  const json matrices = parse_json(said("matrices"), where);
  std::map<std::string, std::shared_ptr<const CordaCovariance>> by_input;
  const auto read = [&](const std::string& input, const std::string& path) {
    auto& held = by_input[input];
    if (held) return held;
    const int64_t in = checkpoint.get(tensor_of(checkpoint, path)).shape.at(1);
    const auto tensor = [&](const char* what, const std::vector<int64_t>& shape) {
      const TensorView view = stored->get(fmt::format("{}.{}", input, what));
      check(view.format == Format::F32 && view.shape == shape,
            "{}: '{}' is {} {}, and {} of this model asks for F32 {}", where, shown(view.name), info(view.format).name,
            view.shape, path, shape);
      const auto problem = not_finite(view.to_float(), shape);
      check(problem.empty(), "{}: '{}' {}", where, shown(view.name), problem);
      return as_tensor(view).clone();
    };
    const auto moment = std::make_shared<CordaCovariance>(path);
    moment->restore(tensor("covariance", {in, in}), samples, tensor("sizes", {in}));
    held = moment;
    return held;
  };
  CordaMoments out;
  reading_json(where, [&] {
    const Watched all = watched(checkpoint, options);
    for (const auto* w : all.watches)
      for (const auto& path : w->paths) {
        check(matrices.contains(path), "{}: it has nothing of {}; it is of {}", where, path,
              shown(fmt::format("{} matrices of {}", matrices.size(), said("model"))));
        check(matrices.at(path).at("weight").get<std::string>() == fingerprint(checkpoint, path),
              "{}: it is of another model ({}), whose {} is not that of {}", where, shown(said("model")), path,
              checkpoint.path().string());
        out[path] = read(matrices.at(path).at("input").get<std::string>(), path);
      }
    return 0;
  });
  return out;
}

std::shared_ptr<const Checkpoint> corda_checkpoint(std::shared_ptr<const Checkpoint> base, const CordaOptions& options,
                                                   const CordaMoments& moments, const Progress& progress) {
  check(options.mode == "kpm" || options.mode == "ipm", "unknown mode `{}`; known are kpm and ipm", options.mode);
  json config = without_parts(*base);
  for (const auto& [path, moment] : moments) tensor_of(*base, path);
  const double alpha = options.alpha > 0.0 ? options.alpha : static_cast<double>(options.rank),
               scale = alpha / static_cast<double>(options.rank);
  std::map<std::string, Change> changes;
  std::map<std::string, Tensor> added;
  std::set<std::string> names;
  const CordaCovariance* last = nullptr;
  Damped damping;
  int64_t done = 0, skipped = 0;
  // By input: the inverse is taken once for matrices that share it.
  std::vector<std::pair<const CordaCovariance*, std::string>> order;
  for (const auto& [path, moment] : moments) order.emplace_back(moment.get(), path);
  std::sort(order.begin(), order.end());
  for (const auto& [moment, path] : order) {
    if (moment != last) damping = damped(moment->value(), path);
    last = moment;
    const auto weight = as_tensor(base->get(tensor_of(*base, path))).to(torch::kFloat32);
    const auto d = corda_decompose(weight, damping, options.mode, options.rank, alpha, path);
    skipped += d.skipped > 0 ? 1 : 0;
    const size_t half = path.rfind('.'), layer = path.rfind('.', half - 1);
    const std::string name = path.substr(half + 1), front = path.substr(0, layer) + ".adapters." + name + ".";
    names.insert(name);
    added[front + "lora_A"] = d.a;
    added[front + "lora_B"] = d.b;
    changes[path + ".weight"] = [a = d.a, b = d.b, scale](const Tensor& w) { return w - scale * torch::matmul(b, a); };
    progress("decompose", ++done, static_cast<int64_t>(order.size()));
  }
  if (skipped > 0)
    log::warn("{} matrices have components that are as good as zero; the smallest others were taken", skipped);
  config["moiety"]["parts"] = json::array({{{"slug", "lora"},
                                            {"target", std::vector<std::string>(names.begin(), names.end())},
                                            {"rank", options.rank},
                                            {"alpha", alpha}}});
  return changed(std::move(base), std::move(config), changes, added);
}

std::shared_ptr<const Checkpoint> corda_compressed(std::shared_ptr<const Checkpoint> base, const std::string& kind,
                                                   double drop, double asvd_alpha, const CordaMoments& moments,
                                                   const Progress& progress) {
  check(drop >= 0.0 && drop < 1.0, "a share of {} cannot go: 0 to below 1", drop);
  const json config = without_parts(*base);
  std::map<std::string, Change> changes;
  int64_t done = 0;
  for (const auto& [path, moment] : moments) {
    const auto weight = as_tensor(base->get(tensor_of(*base, path))).to(torch::kFloat32);
    const auto gone =
        static_cast<int64_t>(std::llround(drop * static_cast<double>(std::min(weight.size(0), weight.size(1)))));
    Tensor by;
    if (kind == "corda") by = moment->value();
    if (kind == "asvd") by = moment->mean_sizes();
    const auto small = corda_compress(weight, kind, by, gone, asvd_alpha);
    changes[path + ".weight"] = [small](const Tensor&) { return small; };
    progress("decompose", ++done, static_cast<int64_t>(moments.size()));
  }
  return changed(std::move(base), config, changes, {});
}

}  // namespace moiety
