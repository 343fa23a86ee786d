// moiety compress --method corda-svd: matrices without their smallest components, under what they read.
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>

#include "compress.h"
#include "corda_options.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/tokenizer.h"

namespace moiety::cli {

std::vector<std::vector<int64_t>> CordaArguments::read(const Checkpoint& checkpoint) const {
  check(!calibration.empty(),
        "give --calibration-text FILE, the text that says what the matrices read, or --covariance FILE");
  const auto tokenizer = Tokenizer::load(checkpoint);
  std::vector<std::vector<int64_t>> texts, out;
  for (const auto& path : calibration) {
    texts.push_back(tokenizer->encode(read_text(path, int64_t{4} << 30), false));
    check(texts.back().size() >= 2, "{} gives no tokens", path);
  }
  for (size_t at = 0;; at += static_cast<size_t>(length)) {
    bool any = false;
    for (const auto& ids : texts) {
      if (at >= ids.size() || static_cast<int64_t>(out.size()) == samples) continue;
      any = true;
      const size_t end = std::min(ids.size(), at + static_cast<size_t>(length));
      out.emplace_back(ids.begin() + static_cast<std::ptrdiff_t>(at), ids.begin() + static_cast<std::ptrdiff_t>(end));
    }
    if (!any) return out;
  }
}

CordaMoments CordaArguments::moments(const Checkpoint& checkpoint, const std::string& model, bool dry_run) const {
  if (!covariance.empty()) return read_moments(covariance, checkpoint, options);
  check(save_covariance.empty() || !std::filesystem::exists(save_covariance),
        "{} exists already: --covariance reads it, another name keeps it", save_covariance);
  const auto pieces = read(checkpoint);
  const auto progress = corda_progress();
  auto out = corda_calibrate(checkpoint, options, pieces,
                             [&](int64_t n) { progress("calibration", n, static_cast<int64_t>(pieces.size())); });
  if (save_covariance.empty() || dry_run) return out;
  CordaSource source{model, fmt::format("{}", fmt::join(calibration, ", ")), 0};
  for (const auto& piece : pieces) source.tokens += static_cast<int64_t>(piece.size());
  write_moments(save_covariance, out, checkpoint, source);
  return out;
}

void add_corda(CLI::App& app, CordaArguments& a, const std::string& marked) {
  app.add_option("--target", a.options.targets,
                 "Matrices by name, all, or regular expressions over whole paths " + marked)
      ->delimiter(',')
      ->capture_default_str();
  auto* text =
      app.add_option("--calibration-text", a.calibration, "Text files that say what the matrices read " + marked);
  auto* save = app.add_option("--save-covariance", a.save_covariance,
                              "Keep the second moments of what they read in this file " + marked);
  app.add_option("--covariance", a.covariance,
                 "Take them from such a file of the same model, instead of a text " + marked)
      ->excludes(text)
      ->excludes(save);
  app.add_option("--samples", a.samples, "Pieces of these texts " + marked)
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--length", a.length, "Tokens of a piece " + marked)
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
}

std::function<void(const char*, int64_t, int64_t)> corda_progress() {
  struct Bar {
    std::string what;
    std::unique_ptr<Progress> bar;
  };
  return [held = std::make_shared<Bar>()](const char* what, int64_t done, int64_t all) {
    if (held->what != what) {
      held->bar = nullptr;
      held->bar = std::make_unique<Progress>(what, all, std::string(what) == "decompose" ? "matrix" : "sample");
      held->what = what;
    }
    held->bar->set(done);
  };
}

namespace {

CompressWay setup_corda(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  struct Options {
    CordaArguments corda;
    std::string kind = "corda";
    double drop = 0.1, asvd_alpha = 0.5;
  };
  auto o = std::make_shared<Options>();
  add_corda(app, o->corda, "(corda-svd)");
  app.add_option("--drop", o->drop, "Share of every matrix's components that goes (corda-svd)")
      ->check(CLI::Range(0.0, 0.999))
      ->capture_default_str();
  app.add_option("--kind", o->kind,
                 "What weighs inputs: corda (second moments), asvd (mean sizes), svd (nothing) (corda-svd)")
      ->check(CLI::IsMember({"corda", "asvd", "svd"}))
      ->capture_default_str();
  app.add_option("--asvd-alpha", o->asvd_alpha, "Power of the mean sizes (corda-svd)")->capture_default_str();
  return {"--method corda-svd", [a] { return a->method == "corda-svd"; },
          [a, o] {
            const auto base = Checkpoint::open(a->model);
            const auto small = corda_compressed(base, o->kind, o->drop, o->asvd_alpha,
                                                o->corda.moments(*base, a->model, a->dry_run), corda_progress());
            WriteOptions write;
            write.overwrite = a->overwrite;
            write.dry_run = a->dry_run;
            const WriteReport report = write_hf(*small, a->out, write);
            if (a->json)
              std::cout << nlohmann::json{{"output", a->out},
                                          {"written", !a->dry_run},
                                          {"kind", o->kind},
                                          {"drop", o->drop},
                                          {"bytes", report.bytes}}
                               .dump(2)
                        << "\n";
            else
              fmt::print("{} {}: every target without {:.3g} % of its components ({})\n",
                         a->dry_run ? "would write" : "wrote", a->out, 100.0 * o->drop, o->kind);
            return 0;
          }};
}

const RegisterCompress corda("corda-svd", setup_corda);

}  // namespace
}  // namespace moiety::cli
