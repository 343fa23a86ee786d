// moiety merge: folds an adapter into the model that it adapts or takes it out again, or makes one model of several
// experts.
#include <fmt/ranges.h>

#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "merge.h"
#include "moiety/adapt/corda.h"
#include "moiety/adapt/flylora.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/text.h"
#include "moiety/models/merged.h"
#include "moiety/nn/weights.h"
#include "open_model.h"
#include "verb.h"
#include "write_checkpoint.h"

using nlohmann::json;

namespace moiety::cli {
namespace {

struct Options : MergeArguments {
  std::string lora_of;
  std::vector<std::string> average;
  bool unmerge = false;
};

struct Registered {
  std::vector<std::string> methods;
  MergeSetup setup;
};
std::vector<Registered>& registered() {
  static std::vector<Registered> all;
  return all;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& way : registered()) names.insert(names.end(), way.methods.begin(), way.methods.end());
  std::sort(names.begin(), names.end());
  return names;
}

// What CorDA's LoRA has learned, as a LoRA of twice the rank over the model before.
int run_lora_of(const Options& o) {
  const auto path = resolve_model(o.common.model);
  check(is_adapter(path),
        "--lora-of takes an adapter that was trained over a model of `moiety convert --method corda`");
  const auto after = Checkpoint::open(path.string());  // the adapter's tensors stand before those of its base
  const std::string name = adapter_base(path);
  const auto start = Checkpoint::open(name);
  const auto original = Checkpoint::open(o.lora_of);
  json parts = start->config().value("moiety", json::object()).value("parts", json::array());
  check(parts.size() == 1 && parts[0].value("slug", std::string()) == "lora",
        "{} is no model of `moiety convert --method corda`: no LoRA stands in it", name);
  std::vector<AdapterTensor> tensors;
  for (const TensorInfo& t : start->tensors()) {
    const size_t end = t.name.rfind(".lora_A");
    if (t.name.find(".adapters.") == std::string::npos || end == std::string::npos) continue;
    const std::string front = t.name.substr(0, end);
    const auto pair = [&](const Checkpoint& c) {
      return LoraPair{as_tensor(c.get(front + ".lora_A")).to(torch::kFloat32),
                      as_tensor(c.get(front + ".lora_B")).to(torch::kFloat32)};
    };
    const LoraPair both = corda_to_lora(pair(*start), pair(*after));
    for (const auto& [last, m] : {std::pair<const char*, torch::Tensor>{".lora_A", both.a}, {".lora_B", both.b}}) {
      const auto f = m.contiguous();
      tensors.push_back({front + last, f.sizes().vec(),
                         std::vector<float>(f.const_data_ptr<float>(), f.const_data_ptr<float>() + f.numel())});
    }
  }
  parts[0]["rank"] = 2 * parts[0].value("rank", int64_t{8});
  parts[0]["alpha"] = 2.0 * parts[0].value("alpha", 8.0);
  check(o.overwrite || !std::filesystem::exists(o.out), "{} exists already: --overwrite replaces it", o.out);
  if (!o.dry_run) write_adapter(o.out, parts, std::move(tensors), *original, o.lora_of);
  fmt::print("{} {}: a LoRA of rank {} over {}\n", o.dry_run ? "would write" : "wrote", o.out,
             parts[0]["rank"].get<int64_t>(), o.lora_of);
  return 0;
}

// FlyLoRA adapters of one seed as one.
int run_average(const Options& o) {
  std::vector<std::string> folders = {o.common.model};
  folders.insert(folders.end(), o.average.begin(), o.average.end());
  std::vector<std::shared_ptr<const Checkpoint>> models;
  json parts, base;
  for (const auto& folder : folders) {
    const auto path = resolve_model(folder);
    check(is_adapter(path), "--average takes adapters, and {} is none", folder);
    const json config = parse_json(read_text(path / "adapter_config.json"), (path / "adapter_config.json").string());
    const json own = config.value("moiety", json::object()).value("parts", json());
    check(own.is_array() && own.size() == 1 && own[0].value("slug", std::string()) == "flylora",
          "{} is no FlyLoRA adapter: only those share the matrix A, which an average needs", folder);
    check(parts.is_null() || parts == own, "{} has other settings than {}", folder, folders[0]);
    check(base.is_null() || base == config.at("base_model_name_or_path"), "{} adapts another model than {}", folder,
          folders[0]);
    parts = own;
    base = config.at("base_model_name_or_path");
    models.push_back(Checkpoint::open(path.string()));
  }
  std::vector<AdapterTensor> tensors;
  for (const TensorInfo& t : models[0]->tensors()) {
    const size_t end = t.name.rfind(".lora_A");
    if (t.name.find(".adapters.") == std::string::npos || end == std::string::npos) continue;
    const std::string front = t.name.substr(0, end);
    std::vector<FlyAdapter> all;
    for (const auto& m : models) {
      const auto get = [&](const char* last) { return as_tensor(m->get(front + last)).to(torch::kFloat32); };
      all.push_back({get(".lora_A"), get(".lora_B"), get(".bias")});
    }
    FlyAdapter one;
    try {
      one = fly_average(all);
    } catch (const Error& e) {
      fail("{}: {}", front, e.what());
    }
    for (const auto& [last, value] : std::vector<std::pair<std::string, torch::Tensor>>{
             {".lora_A", one.a}, {".lora_B", one.b}, {".bias", one.bias}}) {
      const auto f = value.contiguous();
      tensors.push_back({front + last, f.sizes().vec(),
                         std::vector<float>(f.const_data_ptr<float>(), f.const_data_ptr<float>() + f.numel())});
    }
  }
  check(o.overwrite || !std::filesystem::exists(o.out), "{} exists already: --overwrite replaces it", o.out);
  if (!o.dry_run) write_adapter(o.out, parts, std::move(tensors), *models[0], base.get<std::string>());
  fmt::print("{} {}: the average of {} adapters\n", o.dry_run ? "would write" : "wrote", o.out, folders.size());
  return 0;
}

int run(const Options& o) {
  if (!o.average.empty()) return run_average(o);
  if (!o.lora_of.empty()) return run_lora_of(o);
  const auto path = resolve_model(o.common.model);
  const bool adapter = is_adapter(path);
  check(!o.unmerge || (!adapter && !o.common.adapters.empty()) || (!adapter && !o.common.scaled_adapters.empty()),
        "--unmerge takes the merged model, and what was merged into it with --adapter or --adapter-scaled");
  auto base = Checkpoint::open(adapter ? adapter_base(path) : o.common.model);
  // Rows of a GGUF file lie in another order, and its blocks cannot take a sum: as a directory first.
  std::unique_ptr<TemporaryFolder> folder;
  if (base->gguf()) {
    folder = std::make_unique<TemporaryFolder>("moiety-merge");
    WriteOptions plain;
    plain.dtype = "f32";
    write_checkpoint(*base, (folder->path() / "base").string(), plain, "convert");
    base = Checkpoint::open((folder->path() / "base").string());
  }
  if (adapter) base = open_adapter(path, base);
  const auto adapted = with_adapters(base, adapters_of(o.common));
  return write_merged(*(o.unmerge ? unmerged_checkpoint(adapted) : merged_checkpoint(adapted)), o);
}

using Runs = std::map<std::string, std::function<int()>>;

int run_method(const Options& o, const Runs& runs) {
  if (o.method.empty()) {
    check(o.experts.empty(), "{} models are given: say with --method how they become one ({})", o.experts.size() + 1,
          fmt::join(method_names(), ", "));
    return run(o);
  }
  check(!o.experts.empty(), "--method {} merges experts into a base: give them behind it", o.method);
  check(o.average.empty() && o.lora_of.empty() && o.common.adapters.empty() && o.common.scaled_adapters.empty(),
        "--method {} takes a base and experts; adapters are folded in without it", o.method);
  return runs.at(o.method)();
}

const Register verb({
    "merge",
    "Fold an adapter into the model that it adapts, or make one model of several experts",
    "moiety merge run/last -o merged\n"
    "moiety merge ./my-model --adapter ./my-lora -o merged.gguf --type q8_0\n"
    "moiety merge ./my-model --adapter-scaled ./my-lora:0.5 -o merged --dtype bf16\n"
    "moiety merge merged --unmerge --adapter ./my-lora -o before\n"
    "moiety merge ./my-model python.tv prose.tv --method ties -o both",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      app.add_option(
             "MODEL", o->common.model,
             "The model: a directory, a .safetensors or .gguf file, or pip:PACKAGE; or an adapter that names it")
          ->required();
      app.add_option(
          "EXPERTS", o->experts,
          "With --method: what is merged into MODEL, files of `moiety compress --method compeft`, or models");
      app.add_option("--method", o->method, fmt::format("How experts become one: {}", fmt::join(method_names(), ", ")))
          ->check(CLI::IsMember(method_names()));
      add_adapters(app, o->common);
      app.add_option("-o,--output", o->out,
                     "What to write: a name ending in .gguf is a GGUF file, any other a directory")
          ->required();
      app.add_option("--type", o->type, "GGUF: the format of the large matrices");
      app.add_option("--dtype", o->dtype, "Directory: the type of the weights; without it as the model stores them")
          ->check(CLI::IsMember({"f32", "f16", "bf16"}));
      auto* unmerge = app.add_flag("--unmerge", o->unmerge,
                                   "The other way: take what --adapter names out of MODEL, into which it was merged");
      auto* lora_of = app.add_option(
          "--lora-of", o->lora_of,
          "Write a LoRA over this model instead: what was trained over its CorDA decomposition, at twice the "
          "rank");
      auto* average = app.add_option(
          "--average", o->average,
          "Write, instead of a model, the average of the FlyLoRA adapter MODEL and these ones, which have its "
          "seed");
      unmerge->excludes(lora_of)->excludes(average);
      app.add_flag("--dry-run", o->dry_run, "Say what would be written, write nothing");
      app.add_flag("--overwrite", o->overwrite, "Replace a model that is there already");
      app.add_flag("--json", o->common.json, "Print the result as JSON");
      app.add_flag("-q,--quiet", o->common.quiet, "No progress, no remarks");
      app.parse_complete_callback([o] {
        if (o->common.json) set_progress_mode(ProgressMode::Json);
        if (o->common.quiet) {
          set_progress_mode(ProgressMode::None);
          log::set_level(log::Level::Error);
        }
      });
      auto runs = std::make_shared<Runs>();
      for (const auto& way : registered()) {
        const auto body = way.setup(app, o);
        for (const auto& method : way.methods) (*runs)[method] = body;
      }
      return [o, runs] { return run_method(*o, *runs); };
    },
});

}  // namespace

int write_merged(const Checkpoint& merged, const MergeArguments& o) {
  const bool to_gguf = is_gguf(o.out);
  check(to_gguf || o.type.empty(), "--type is for GGUF files, and '{}' does not end in .gguf", o.out);
  check(!to_gguf || o.dtype.empty(), "--dtype is for directories; a GGUF file takes --type");
  WriteOptions write;
  write.type = o.type;
  write.dtype = o.dtype;
  write.overwrite = o.overwrite;
  write.dry_run = o.dry_run;
  const WriteReport report = write_checkpoint(merged, o.out, write, "merge");
  for (const auto& w : report.warnings) log::warn("{}", w);
  if (o.common.json)
    std::cout << json{{"output", o.out},
                      {"written", !o.dry_run},
                      {"tensors", report.tensors.size()},
                      {"bytes", report.bytes}}
                     .dump(2)
              << "\n";
  else
    fmt::print("{} {}: {} tensors, {:.1f} MiB\n", o.dry_run ? "would write" : "wrote", o.out, report.tensors.size(),
               static_cast<double>(report.bytes) / 1048576);
  return 0;
}

RegisterMerge::RegisterMerge(std::vector<std::string> methods, MergeSetup setup) {
  registered().push_back({std::move(methods), std::move(setup)});
}

}  // namespace moiety::cli
