#include "moiety/adapt/corda_model.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/io/overlay.h"
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

}  // namespace

std::map<std::string, std::shared_ptr<const CordaCovariance>> corda_calibrate(
    const Checkpoint& checkpoint, const CordaOptions& options, const std::vector<std::vector<int64_t>>& samples,
    const std::function<void(int64_t)>& progress) {
  check(!samples.empty(), "there is no calibration data");
  json config = without_parts(checkpoint);
  config["moiety"]["parts"] = json::array({{{"slug", "corda-watch"}, {"target", options.targets}}});
  const auto model = load_causal(checkpoint, config, {.dtype = options.dtype});
  model->eval();
  const torch::NoGradGuard frozen;
  int64_t done = 0;
  for (const auto& ids : samples) {
    Pass pass;
    model->hidden(torch::tensor(ids, torch::kInt64).unsqueeze(0), pass);
    if (progress) progress(++done);
  }
  std::map<std::string, std::shared_ptr<const CordaCovariance>> out;
  for (const auto& module : model->modules())
    if (const auto* w = dynamic_cast<CordaWatch*>(module.get())) {
      const auto held = std::make_shared<const CordaCovariance>(w->covariance);
      for (const auto& path : w->paths) out[path] = held;
    }
  return out;
}

std::shared_ptr<const Checkpoint> corda_checkpoint(std::shared_ptr<const Checkpoint> base, const CordaOptions& options,
                                                   const std::vector<std::vector<int64_t>>& samples,
                                                   const Progress& progress) {
  check(base->gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
        base->path().string());
  check(options.mode == "kpm" || options.mode == "ipm", "unknown mode `{}`; known are kpm and ipm", options.mode);
  json config = without_parts(*base);
  const auto moments = corda_calibrate(
      *base, options, samples, [&](int64_t n) { progress("calibration", n, static_cast<int64_t>(samples.size())); });
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
                                                   double drop, double asvd_alpha, const CordaOptions& options,
                                                   const std::vector<std::vector<int64_t>>& samples,
                                                   const Progress& progress) {
  check(base->gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
        base->path().string());
  check(drop >= 0.0 && drop < 1.0, "a share of {} cannot go: 0 to below 1", drop);
  const json config = without_parts(*base);
  auto moments = corda_calibrate(*base, options, samples,
                                 [&](int64_t n) { progress("calibration", n, static_cast<int64_t>(samples.size())); });
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
