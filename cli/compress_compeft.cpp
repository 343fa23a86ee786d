// moiety compress --method compeft: what an expert adds to its base, as signs and one scale.
#include <fmt/format.h>

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "compress.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/compress/compeft_model.h"
#include "moiety/io/peft.h"
#include "moiety/io/tokenizer.h"
#include "moiety/models/model.h"
#include "moiety/tasks/perplexity.h"

namespace moiety::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CompeftOptions compeft;
  std::string base;
  std::string tune;  // a text
};

CompeftReport compressed(const CompressArguments& a, const Options& o, const CompeftOptions& options,
                         const fs::path& out) {
  const auto path = resolve_model(a.model);
  if (is_adapter(path)) {
    check(o.base.empty(), "{} is an adapter, which is compressed as it is: --base is for whole models", a.model);
    return compress_adapter(path, options, out);
  }
  check(!o.base.empty(), "{} is a whole model: name the one that it was made from with --base", a.model);
  return compress_expert(*Checkpoint::open(a.model), *Checkpoint::open(o.base), o.base, options, out);
}

// Mean loss of a token of the text, by density and alpha; the best one first. What is compressed with alpha 1 is merged
// with alpha as its weight.
std::vector<CompeftTrial> tuned(const CompressArguments& a, const Options& o) {
  const auto path = resolve_model(a.model);
  const bool adapter = is_adapter(path);
  const auto base = Checkpoint::open(adapter ? adapter_base(path) : o.base);
  const auto tokenizer = Tokenizer::load(*base);
  const std::string text = read_text(o.tune);
  PerplexityOptions scoring;
  scoring.context = a.context;
  scoring.batch_size = a.batch_size;
  scoring.limit_tokens = a.limit_tokens;
  const TemporaryFolder folder("moiety-compeft");
  const bool scaled = o.compeft.config.quantizer == "sign";  // the others have no alpha
  const auto alphas = scaled ? kCompeftAlphas : std::vector<double>{o.compeft.config.alpha};
  Progress progress("tune", static_cast<int64_t>(kCompeftDensities.size() * alphas.size()), "model");
  int64_t done = 0;
  return tune_compeft(kCompeftDensities, alphas, [&](double density) -> std::function<double(double)> {
    CompeftOptions options = o.compeft;
    options.config.density = density;
    options.config.alpha = 1.0;
    const fs::path vector = folder / "vector.tv";
    fs::remove(vector);
    compressed(a, o, options, vector);
    const auto file = TaskVectorFile::open(vector);
    return [&, file, scaled](double alpha) {
      std::shared_ptr<const Checkpoint> model;
      if (adapter) {
        const fs::path merged = folder / "adapter";
        fs::remove_all(merged);
        merge_adapters({file}, {}, scaled ? alpha : 1.0, base->path().string(), merged);
        model = open_adapter(merged, base);
      } else {
        model = merged_experts(base, {compressed_delta(file, *base)}, {}, scaled ? alpha : 1.0);
      }
      const auto loaded = load_causal(*model);
      const auto r = perplexity(*loaded, tokenizer, text, scoring);
      progress.set(++done);
      return r.nll / static_cast<double>(r.tokens);
    };
  });
}

int run(const CompressArguments& a, const Options& given) {
  Options o = given;
  const std::string problem = o.compeft.config.problem();
  check(problem.empty(), "{}", problem);
  check(a.overwrite || a.dry_run || !fs::exists(a.out), "{} exists already: --overwrite replaces it", a.out);
  nlohmann::json trials;
  if (!o.tune.empty()) {
    const auto all = tuned(a, o);
    o.compeft.config.density = all[0].density;
    o.compeft.config.alpha = all[0].alpha;
    trials = nlohmann::json::array();
    for (const CompeftTrial& t : all) trials.push_back({{"density", t.density}, {"alpha", t.alpha}, {"loss", t.loss}});
    if (!a.json)
      fmt::print("of {} settings density {} with alpha {} is best: a loss of {:.4f} a token\n", all.size(),
                 all[0].density, all[0].alpha, all[0].loss);
  }
  o.compeft.dry_run = a.dry_run;
  const CompeftReport r = compressed(a, o, o.compeft, a.out);
  const double times = r.bytes > 0 ? static_cast<double>(r.bytes_before) / static_cast<double>(r.bytes) : 0.0;
  if (a.json) {
    nlohmann::json out{{"output", a.out},
                       {"written", !a.dry_run},
                       {"kind", r.kind},
                       {"form", r.form},
                       {"entries", r.d},
                       {"kept", r.kept},
                       {"scale", r.scale},
                       {"entropy_bytes", r.entropy_bits / 8.0},
                       {"bytes_before", r.bytes_before},
                       {"bytes", r.bytes}};
    if (!trials.is_null()) {
      out["trials"] = trials;
      out["density"] = o.compeft.config.density;
      out["alpha"] = o.compeft.config.alpha;
    }
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  fmt::print("{} {}: {} of {} entries ({}, {}), scale {:.4g}", a.dry_run ? "would write" : "wrote", a.out, r.kept, r.d,
             r.kind, r.form, r.scale);
  if (r.bytes > 0)
    fmt::print(", {:.1f} KiB instead of {:.1f} KiB ({:.1f} times smaller)", static_cast<double>(r.bytes) / 1024,
               static_cast<double>(r.bytes_before) / 1024, times);
  fmt::print("\n");
  return 0;
}

CompressWay setup(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<Options>();
  CompeftConfig& c = o->compeft.config;
  app.add_option("--base", o->base, "The model that the expert was made from; an adapter needs none (compeft)");
  app.add_option("--density", c.density, "Share of the entries that is kept, above 0 and at most 1 (compeft)")
      ->capture_default_str();
  app.add_option("--alpha", c.alpha, "The scale is so many standard deviations of all entries (compeft)")
      ->capture_default_str();
  app.add_option("--quantizer", c.quantizer,
                 "sign: one scale; stc: the mean size of what is kept as scale; prune: kept values in half precision "
                 "(compeft)")
      ->check(CLI::IsMember({"sign", "stc", "prune"}))
      ->capture_default_str();
  app.add_flag("--masks", o->compeft.masks, "Store two bit masks in place of the shorter position code (compeft)");
  app.add_option("--exclude", o->compeft.exclude,
                 "Regular expressions from the start of a name: tensors that are stored as they are (compeft)")
      ->capture_default_str();
  app.add_option("--tune", o->tune,
                 "A text file: density and alpha are those of the paper's grids that give the smallest loss on it "
                 "(compeft; --context, --limit-tokens)");
  return {"--method compeft", [a] { return a->method == "compeft"; }, [a, o] { return run(*a, *o); }};
}

const RegisterCompress compeft("compeft", setup);

}  // namespace
}  // namespace moiety::cli
