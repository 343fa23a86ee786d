// moiety compress --method edgemoe: every expert its own bit width, so that the model loses no more than a tolerance.
#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "compress.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/progress.h"
#include "moiety/compress/edgemoe_experts.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/sha256.h"
#include "moiety/offload/offload.h"
#include "moiety/tasks/perplexity.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"

namespace moiety::cli {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

struct EdgeOptions {
  EdgeMoeConfig config;
  std::vector<std::string> eval;
  std::string non_experts = "auto", measurements;
};

struct EvaluationText {
  std::vector<std::vector<int64_t>> ids;
  int64_t bos = -1;
  PerplexityOptions options;
  std::string digest;
};

EvaluationText read_evaluation(const CompressArguments& a, const EdgeOptions& o, const OpenModel& open) {
  EvaluationText text;
  text.options.context = a.context > 0 ? a.context : std::min<int64_t>(512, open.model->context_length());
  text.options.stride = text.options.context;
  text.options.batch_size = a.batch_size;
  if (adds_bos(*open.tokenizer)) text.bos = *open.tokenizer->bos();
  Sha256 hash;
  for (const auto& path : o.eval) {
    auto ids = open.tokenizer->encode(read_text(path, int64_t{4} << 30), false);
    if (a.limit_tokens > 0 && static_cast<int64_t>(ids.size()) > a.limit_tokens)
      ids.resize(static_cast<size_t>(a.limit_tokens));
    check(ids.size() > 1, "{} gives {} tokens: nothing to be predicted", path, ids.size());
    hash.update(std::as_bytes(std::span(ids)));
    text.ids.push_back(std::move(ids));
  }
  text.digest = hash.hex();
  return text;
}

/// exp(-mean nll): 1 / perplexity.
double accuracy_of(CausalModel& model, const EvaluationText& text) {
  torch::NoGradGuard frozen;
  PerplexityResult all;
  for (const auto& ids : text.ids) all += perplexity_of_ids(model, ids, text.bos, {}, text.options);
  return 1.0 / all.perplexity();
}

/// What the measurements depend on: all weights, the text, and how it is read.
std::string fingerprint(const Checkpoint& checkpoint, const CompressArguments& a, const EdgeOptions& o,
                        const EvaluationText& text) {
  Sha256 hash;
  const auto add = [&](const std::string& s) { hash.update(std::as_bytes(std::span(s.data(), s.size()))); };
  for (const auto& t : checkpoint.tensors()) {
    add(fmt::format("{} {} ", t.name, info(t.format).name));
    hash.update(checkpoint.get(t.name).data);
  }
  add(json{{"text", text.digest},
           {"context", text.options.context},
           {"bos", text.bos},
           {"dtype", a.dtype},
           {"int2_scale", o.config.int2_scale}}
          .dump());
  return hash.hex();
}

class ScratchBeside {
 public:
  explicit ScratchBeside(const fs::path& out)
      : folder_((out.has_parent_path() ? out.parent_path() : fs::path(".")) /
                fmt::format(".{}.{}", out.filename().string(), static_cast<int64_t>(::getpid()))) {
    std::error_code ec;
    fs::create_directory(folder_, ec);
    check(!ec, "{}: cannot be created: {}", folder_.string(), ec.message());
  }
  ~ScratchBeside() {
    std::error_code ec;
    fs::remove_all(folder_, ec);
  }
  ScratchBeside(const ScratchBeside&) = delete;
  ScratchBeside& operator=(const ScratchBeside&) = delete;
  fs::path operator/(const std::string& name) const { return folder_ / name; }

 private:
  fs::path folder_;
};

struct Candidate {
  std::string type;  // "" as in the source
  fs::path file;
  int64_t bytes = 0;
  double loss = 0.0;
};

int run_edgemoe(const CompressArguments& a, const EdgeOptions& given) {
  EdgeOptions o = given;
  o.config = parse<EdgeMoeConfig>(dump(given.config), "edgemoe");  // limits and what does not fit together
  check(!o.eval.empty(), "the bit search measures accuracy: give --eval");
  check(a.out.ends_with(".gguf"), "--output is {}; edgemoe writes a GGUF file and its experts beside it: NAME.gguf",
        a.out);
  const fs::path out = a.out, experts_file = edge_experts_path(out);
  if (!a.overwrite && !a.dry_run)
    for (const auto& file : {out, experts_file})
      check(!fs::exists(file), "{}: exists already; remove it or ask to overwrite", file.string());
  OpenModel open = open_causal(a);
  check(edge_experts_of(*open.checkpoint) == nullptr,
        "{} has edgemoe's experts already; compress the model it came from", a.model);
  check(!open.checkpoint->config().contains("moiety") || !open.checkpoint->config()["moiety"].contains("parts"),
        "{} has parts that a GGUF file cannot hold", a.model);
  const std::string routers = router_hash(*open.model);
  check(!routers.empty(), "{} has no expert layers: there is nothing to give widths to", a.model);
  const EvaluationText text = read_evaluation(a, o, open);

  const std::string print = fingerprint(*open.checkpoint, a, o, text);
  if (o.measurements.empty()) {
    const fs::path folder = cache_folder() / "edgemoe";
    fs::create_directories(folder);
    o.measurements = (folder / (print.substr(0, 24) + ".json")).string();
  }
  auto measured = EdgeMoeMeasurements::load(o.measurements, print);
  const auto save = [&] { measured.save(o.measurements); };

  auto model = std::make_unique<EdgeMoeExperts>(open.model, o.config.int2(),
                                                [&](CausalModel& m) { return accuracy_of(m, text); });
  std::optional<Progress> bar;
  const auto search =
      search_bits(*model, o.config, measured, save, [&](int64_t done, int64_t total, const std::string& what) {
        if (!bar) bar.emplace("edgemoe", total, "evaluation");
        bar->set(std::min(done, total));
        bar->note(what);
      });
  bar.reset();
  EdgeLayout layout = model->layout();
  layout.router_hash = routers;

  // The experts once; then the rest in every type that might do, each measured from its file.
  std::vector<Candidate> candidates;
  Candidate chosen;
  int64_t expert_bytes = 0;
  for (size_t i = 0; i < layout.bits.size(); ++i) expert_bytes += layout.stored_bytes(layout.bits[i]);
  const auto write_rest = [&](const std::string& type, const fs::path& file, bool dry) {
    WriteOptions w;
    w.type = type;
    w.overwrite = true;
    w.dry_run = dry;
    w.threads = a.threads;
    return write_edge_model(*open.checkpoint, file, layout, w);
  };
  const int64_t as_is = write_rest("", out, true).bytes;
  std::vector<std::string> types = {o.non_experts == "keep" ? "" : o.non_experts};
  if (o.non_experts == "auto") {
    types = {};
    for (const char* type : {"q4_0", "q8_0", "f16", "f32"})
      if (write_rest(type, out, true).bytes < as_is) types.emplace_back(type);
    types.emplace_back("");
  }
  const auto loss_of = [&](double accuracy) { return (search.full - accuracy) / search.full; };
  if (a.dry_run) {
    chosen = {o.non_experts == "auto" ? "" : types.front(), out, write_rest(types.back(), out, true).bytes,
              search.loss};
  } else {
    const ScratchBeside scratch(out);
    {
      std::optional<Progress> writing;
      write_edge_experts(
          scratch / "model.experts.safetensors", layout, o.config.int2(),
          [&](int64_t l, int64_t e) { return model->original(l, e); },
          [&](int64_t done, int64_t total) {
            if (!writing) writing.emplace("experts", total, "byte");
            writing->set(done);
          });
    }
    model.reset();
    open.model.reset();
    for (const auto& type : types) {
      Candidate c{type, scratch / fmt::format("model-{}.gguf", type.empty() ? "keep" : type), 0, 0.0};
      c.bytes = write_rest(type, c.file, false).bytes;
      std::error_code ec;
      fs::create_symlink("model.experts.safetensors", edge_experts_path(c.file), ec);
      check(!ec, "{}: cannot be linked: {}", edge_experts_path(c.file).string(), ec.message());
      const std::string name = fmt::format("written with {} beside the experts, {}",
                                           type.empty() ? "its own types" : type, fmt::join(layout.bits, ","));
      if (const auto known = measured.accuracy.find(name); known != measured.accuracy.end()) {
        c.loss = loss_of(known->second);
      } else {
        const auto written = load_causal(*Checkpoint::open(c.file.string()), {a.dtype, torch::Device(a.device)});
        measured.accuracy[name] = accuracy_of(*written, text);
        c.loss = loss_of(measured.accuracy[name]);
        save();
      }
      candidates.push_back(c);
      if (c.loss <= o.config.tolerance) break;  // they come by size
    }
    chosen = candidates.back();
    fs::rename(scratch / "model.experts.safetensors", experts_file);
    fs::rename(chosen.file, out);
  }
  if (chosen.loss > o.config.tolerance)
    log::warn("the model loses {:.3f} %, {:.3f} points more than the tolerance of {:.3f} %", 100.0 * chosen.loss,
              100.0 * (chosen.loss - o.config.tolerance), 100.0 * o.config.tolerance);

  const auto& found = search.assignment;
  std::map<int64_t, int64_t> count;
  for (const int64_t b : layout.bits) ++count[b];
  const auto type_name = [](const std::string& t) { return t.empty() ? std::string("as they were") : t; };
  if (a.json) {
    json uniform = json::object(), tried = json::array(), widths = json::object();
    for (size_t i = 0; i < o.config.widths.size(); ++i)
      uniform[std::to_string(o.config.widths[i])] = search.uniform_loss[i];
    for (const auto& c : candidates)
      tried.push_back({{"type", type_name(c.type)}, {"bytes", c.bytes}, {"loss", c.loss}});
    for (const auto& [width, n] : count) widths[std::to_string(width)] = n;
    std::cout << json{{"output", a.out},
                      {"experts_file", experts_file.string()},
                      {"written", !a.dry_run},
                      {"settings", dump(o.config)},
                      {"perplexity", 1.0 / search.full},
                      {"uniform_loss", uniform},
                      {"sensitivity", search.sensitivity},
                      {"bounds", {found.bounds.low, found.bounds.high}},
                      {"k", found.k},
                      {"bits", layout.bits},
                      {"experts_by_width", widths},
                      {"loss_of_experts", search.loss},
                      {"loss", chosen.loss},
                      {"non_experts", type_name(chosen.type)},
                      {"non_experts_tried", tried},
                      {"bytes", chosen.bytes},
                      {"expert_bytes", expert_bytes},
                      {"evaluations", search.evaluations},
                      {"measurements", o.measurements}}
                     .dump(2, ' ', false, json::error_handler_t::replace)
              << "\n";
    return 0;
  }
  fmt::print("{:<28} {:>9}\n", "experts", "loss, %");
  for (size_t i = 0; i < o.config.widths.size(); ++i)
    fmt::print("{:<28} {:>9.3f}\n", fmt::format("all at {} bits", o.config.widths[i]), 100.0 * search.uniform_loss[i]);
  std::vector<std::string> mixed;
  for (const auto& [width, n] : count) mixed.push_back(fmt::format("{} at {}", n, width));
  fmt::print("{:<28} {:>9.3f}\n", fmt::format("{}", fmt::join(mixed, ", ")), 100.0 * search.loss);
  for (const auto& c : candidates)
    fmt::print("{:<28} {:>9.3f}\n", "  and the rest " + type_name(c.type), 100.0 * c.loss);
  fmt::print("\n{} {} ({:.1f} MiB) and {} ({:.1f} MiB): perplexity {:.4f} before, loses {:.3f} % of {:.3f} allowed\n",
             a.dry_run ? "would write" : "wrote", a.out, static_cast<double>(chosen.bytes) / 1048576.0,
             experts_file.string(), static_cast<double>(expert_bytes) / 1048576.0, 1.0 / search.full,
             100.0 * chosen.loss, 100.0 * o.config.tolerance);
  return 0;
}

CompressWay setup_edgemoe(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<EdgeOptions>();
  app.add_option("--eval", o->eval, "Text files that the accuracy is measured on (edgemoe)");
  app.add_option("--tolerance", o->config.tolerance, "Largest relative loss of accuracy, 1 / perplexity (edgemoe)")
      ->capture_default_str();
  app.add_option("--widths", o->config.widths, "Bit widths that experts may get: 2, 4, 8, 16, 32 (edgemoe)")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--k0", o->config.k0, "Experts with the narrower width that the walk starts from; -1: half (edgemoe)")
      ->capture_default_str();
  app.add_option("--step", o->config.step, "Of the walk; 0: a 32nd of the experts (edgemoe)")->capture_default_str();
  app.add_option("--int2-scale", o->config.int2_scale,
                 "Scale of 2-bit rows: max, from the largest weight, or fit, to all (edgemoe)")
      ->capture_default_str();
  std::vector<std::string> types = {"auto", "keep", "q4_0", "q8_0", "f16", "f32"};
  app.add_option("--non-experts", o->non_experts,
                 "What stands beside the experts: auto (the smallest that keeps the tolerance), keep, q4_0, q8_0, f16, "
                 "f32 (edgemoe)")
      ->check(CLI::IsMember(types))
      ->capture_default_str();
  app.add_option("--measurements", o->measurements,
                 "File of what has been measured; a search goes on from it (default: in the cache folder; edgemoe)");
  return {"--method edgemoe", [a] { return a->method == "edgemoe"; }, [a, o] { return run_edgemoe(*a, *o); }};
}

const RegisterCompress edgemoe("edgemoe", setup_edgemoe);

}  // namespace
}  // namespace moiety::cli
