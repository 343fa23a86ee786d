// moiety compress --method compeft: what an expert adds to its base, as signs and one scale.
#include <fmt/format.h>

#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "compress.h"
#include "moiety/base/error.h"
#include "moiety/compress/compeft_model.h"
#include "moiety/io/peft.h"

namespace moiety::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  CompeftOptions compeft;
  std::string base;
};

CompeftReport compressed(const CompressArguments& a, const Options& o, CompeftOptions options) {
  options.dry_run = a.dry_run;
  const auto path = resolve_model(a.model);
  if (is_adapter(path)) {
    check(o.base.empty(), "{} is an adapter, which is compressed as it is: --base is for whole models", a.model);
    return compress_adapter(path, options, a.out);
  }
  check(!o.base.empty(), "{} is a whole model: name the one that it was made from with --base", a.model);
  return compress_expert(*Checkpoint::open(a.model), *Checkpoint::open(o.base), o.base, options, a.out);
}

int run(const CompressArguments& a, const Options& o) {
  const std::string problem = o.compeft.config.problem();
  check(problem.empty(), "{}", problem);
  check(a.overwrite || a.dry_run || !fs::exists(a.out), "{} exists already: --overwrite replaces it", a.out);
  const CompeftReport r = compressed(a, o, o.compeft);
  const double times = r.bytes > 0 ? static_cast<double>(r.bytes_before) / static_cast<double>(r.bytes) : 0.0;
  if (a.json) {
    std::cout << nlohmann::json{{"output", a.out},
                                {"written", !a.dry_run},
                                {"kind", r.kind},
                                {"form", r.form},
                                {"entries", r.d},
                                {"kept", r.kept},
                                {"scale", r.scale},
                                {"entropy_bytes", r.entropy_bits / 8.0},
                                {"bytes_before", r.bytes_before},
                                {"bytes", r.bytes}}
                     .dump(2)
              << "\n";
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
  return {"--method compeft", [a] { return a->method == "compeft"; }, [a, o] { return run(*a, *o); }};
}

const RegisterCompress compeft("compeft", setup);

}  // namespace
}  // namespace moiety::cli
