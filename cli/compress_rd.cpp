// moiety compress --prune rd|uniform|uniform+|global|lamp|erk: the smallest weights of a vision model or a decoder,
// shared out among its layers; with --retrain in turn with training.
#include <torch/torch.h>

#include <fmt/format.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "compress.h"
#include "interrupts.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/base/random.h"
#include "moiety/compress/rd_pruning_model.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/tokenizer.h"
#include "moiety/tasks/image_classification.h"
#include "moiety/tasks/scoring.h"
#include "moiety/train/prune_and_retrain.h"
#include "read_texts.h"
#include "train_progress.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct Options {
  RdPruningConfig rd;
  bool synthetic = false, mean = false;
  int64_t samples = 0;     // 0: by the kind of model
  int64_t entries = 1024;  // of the vocabulary
  std::string report, retrain;
};

// Pieces of `batch` samples, of all or of as many as are asked for.
std::vector<torch::Tensor> in_batches(const torch::Tensor& all, int64_t batch) {
  std::vector<torch::Tensor> out;
  for (int64_t at = 0; at < all.size(0); at += batch)
    out.push_back(all.slice(0, at, std::min(all.size(0), at + batch)));
  return out;
}

std::vector<torch::Tensor> images(const CompressArguments& a, const Options& o, const VisionConfig& config) {
  const int64_t wanted = o.samples > 0 ? o.samples : 256, batch = 128;
  if (o.synthetic) {
    torch::manual_seed(0);
    return in_batches(torch::randn({wanted, config.channels, config.image, config.image}), batch);
  }
  std::vector<torch::Tensor> out;
  for (const auto& path : a.calibration) {
    DataOptions options;
    options.channels = static_cast<int>(config.channels);
    const auto data = Dataset::open(path, options);
    auto order = RandomStream(0, "rd-pruning.images").permutation(data->size());
    order.resize(std::min(order.size(), static_cast<size_t>(wanted)));
    for (const auto& m : in_batches(image_batch(*data, order, config).images, batch))
      out.push_back(m.to(torch::kFloat32) / 127.5 - 1.0);
  }
  return out;
}

// Windows of one length, cut from all texts in turn; an encoder's begin and end as its tokenizer has it.
std::vector<torch::Tensor> windows(const CompressArguments& a, const Options& o, const PrunableModel& m) {
  const int64_t wanted = o.samples > 0 ? o.samples : 32,
                context = m.encoder ? m.encoder->max_length() : m.causal->context_length(),
                length = a.context > 0 ? a.context : std::min<int64_t>(64, context);
  if (o.synthetic) {
    torch::manual_seed(0);
    const int64_t vocabulary = m.encoder ? m.encoder->vocabulary() : m.causal->vocab_size();
    return in_batches(torch::randint(vocabulary, {wanted, length}, torch::kInt64), a.batch_size);
  }
  const auto tokenizer = Tokenizer::load(*m.checkpoint);
  const auto ends = m.encoder ? tokenizer->encode("") : std::vector<int64_t>();
  const bool framed = ends.size() == 2 && length > 2;
  const int64_t inner = framed ? length - 2 : length;
  const auto texts = read_texts(*tokenizer, a.calibration, a.limit_tokens);
  for (size_t i = 0; i < texts.size(); ++i)
    check(static_cast<int64_t>(texts[i].size()) >= inner, "{} gives fewer than {} tokens, one window", a.calibration[i],
          inner);
  std::vector<torch::Tensor> rows;
  for (int64_t at = 0; static_cast<int64_t>(rows.size()) < wanted; at += inner) {
    const size_t before = rows.size();
    for (const auto& ids : texts) {
      if (at + inner > static_cast<int64_t>(ids.size()) || static_cast<int64_t>(rows.size()) >= wanted) continue;
      std::vector<int64_t> row(ids.begin() + at, ids.begin() + at + inner);
      if (framed) row.insert(row.begin(), ends.front()), row.push_back(ends.back());
      rows.push_back(torch::tensor(row, torch::kInt64));
    }
    if (rows.size() == before) break;
  }
  return in_batches(torch::stack(rows), a.batch_size);
}

void print(const CompressArguments& a, const PruningReport& r) {
  if (a.json) {
    auto out = r.json();
    out.update({{"output", a.out}, {"written", !a.dry_run}, {"method", a.prune}});
    std::cout << out.dump(2) << "\n";
    return;
  }
  fmt::print("{:<48} {:>12} {:>9}\n", "layer", "weights", "zeros");
  for (const auto& l : r.layers)
    fmt::print("{:<48} {:>12} {:>8.1f}%\n", l.name, l.weights,
               100.0 * static_cast<double>(l.pruned) / static_cast<double>(l.weights));
  fmt::print("\n{} {}: {} of {} weights are zero ({:.1f} %)\n", a.dry_run ? "would write" : "wrote", a.out, r.pruned,
             r.weights, 100.0 * static_cast<double>(r.pruned) / static_cast<double>(r.weights));
  if (a.prune == "rd")
    fmt::print("distortion {:.4g}, {:.4g} as the sum over layers (ratio {:.2f}); allocated in {:.2f} s\n", r.joint,
               r.predicted, r.predicted > 0.0 ? r.joint / r.predicted : 0.0, r.seconds_of_allocation);
  else if (r.joint > 0.0)
    fmt::print("distortion {:.4g}\n", r.joint);
}

std::vector<torch::Tensor> inputs(const CompressArguments& a, const Options& o, const PrunableModel& m) {
  if (!o.synthetic && a.calibration.empty()) return {};
  return m.vision ? images(a, o, m.vision->config()) : windows(a, o, m);
}

WriteOptions write_options(const CompressArguments& a) {
  WriteOptions write;
  write.overwrite = a.overwrite;
  write.dry_run = a.dry_run;
  return write;
}

void print(const CompressArguments& a, const RetrainingResult& r) {
  json rounds = json::array();
  for (const auto& one : r.rounds) {
    const TrainResult& t = one.training;
    json entry = {{"sparsity", one.target}, {"pruning", one.pruning}, {"step", t.step}, {"loss", t.loss}};
    if (t.evaluation) entry["evaluation"] = to_json(*t.evaluation);
    rounds.push_back(std::move(entry));
  }
  if (a.json) {
    const json out = {
        {"output", a.out}, {"written", r.complete}, {"method", a.prune}, {"rounds", rounds}, {"complete", r.complete}};
    std::cout << out.dump(2) << "\n";
    return;
  }
  fmt::print("{:<6} {:>9} {:>12} {:>14} {:>10}\n", "round", "zeros", "distortion", "training loss", "held out");
  for (size_t i = 0; i < r.rounds.size(); ++i) {
    const TrainResult& t = r.rounds[i].training;
    const double joint = r.rounds[i].pruning.value("joint", 0.0);
    fmt::print("{:<6} {:>8.1f}% {:>12} {:>14.4f} {:>10}\n", i + 1, 100.0 * r.rounds[i].target,
               joint > 0.0 ? fmt::format("{:.4g}", joint) : "", t.loss,
               !t.evaluation            ? ""
               : t.evaluation->accuracy ? fmt::format("{:.2f} %", 100.0 * *t.evaluation->accuracy)
                                        : fmt::format("{:.4f}", t.evaluation->loss));
  }
  if (r.complete)
    fmt::print("\nwrote {}\n", a.out);
  else
    fmt::print("\nstopped; the same command goes on\n");
}

int run_rounds(const CompressArguments& a, const Options& o) {
  check(!a.dry_run, "--retrain trains: there is no --dry-run of it");
  check(a.overwrite || !std::filesystem::exists(std::filesystem::path(a.out) / "config.json"),
        "{} is there already; --overwrite replaces it", a.out);
  const TrainConfig run =
      read_train_config(read_text(o.retrain), o.retrain, {"model=" + json(a.model).dump(), "train.keep_zeros=true"});
  note_interrupts();
  RetrainingOptions options;
  TrainProgress training;
  training.watch(options.train);
  options.train.stop = interrupted;
  options.entries = o.entries;
  options.input = {{"calibration", a.calibration}, {"synthetic", o.synthetic}, {"samples", o.samples},
                   {"entries", o.entries},         {"context", a.context},     {"tokens", a.limit_tokens}};
  options.batches = [&](const PrunableModel& m) { return inputs(a, o, m); };
  std::optional<Progress> curves;
  options.on_point = [&](int64_t round, int64_t done, int64_t all) {
    if (!curves) curves.emplace(fmt::format("curves {}", round), all, "point");
    curves->set(done);
  };
  options.on_run = [&](int64_t round, const Trainer& trainer) {
    curves.reset();
    training.begin(trainer, fmt::format("train {}", round));
  };
  options.after_run = [&](int64_t, const Trainer&) { training.end(); };
  const auto r = prune_and_retrain(a.model, a.prune, o.rd, run, options);
  if (r.complete) write_hf(*Checkpoint::open(r.model.string()), a.out, write_options(a));
  if (!o.report.empty() && r.complete) write_file(o.report, r.rounds.back().pruning.dump(2) + "\n");
  print(a, r);
  return r.complete ? 0 : 130;
}

int run(const CompressArguments& a, Options o) {
  check(a.device == "cpu", "--prune computes on the CPU: use --device cpu");
  check(o.synthetic || !a.calibration.empty() || a.prune != "rd",
        "--prune rd measures how far outputs move: give --calibration FILE, or --synthetic for random inputs");
  check(!o.synthetic || a.calibration.empty(), "--synthetic stands in place of --calibration: one of them");
  o.rd.worst_case = !o.mean;
  if (!o.retrain.empty()) return run_rounds(a, o);
  PrunableModel model = open_prunable(a.model, o.entries);
  const auto batches = inputs(a, o, model);
  std::optional<Progress> progress;
  const auto report = prune_layers(model.staged, batches, a.prune, o.rd, [&](int64_t done, int64_t all) {
    if (!progress) progress.emplace("curves", all, "point");
    progress->set(done);
  });
  progress.reset();
  write_hf(*model.now(), a.out, write_options(a));
  if (!o.report.empty()) write_file(o.report, report.json().dump(2) + "\n");
  print(a, report);
  return 0;
}

std::function<int()> setup(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<Options>();
  app.add_option("--sparsity", o->rd.sparsity,
                 "Share of all weights of matrices that is zero in the end (--prune rd ...)")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--grid", o->rd.grid, "Points of every layer's curve (--prune rd)")
      ->check(CLI::Range(1, 65535))
      ->capture_default_str();
  app.add_flag("--mean-distortion", o->mean, "Of the mean sample, not of the worst one (--prune rd)");
  app.add_option("--floor", o->rd.floor, "Share of every layer that stays in any case (--prune rd)")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--iterations", o->rd.iterations, "Measure and prune so many times, the same share each (--prune rd)")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option(
         "--retrain", o->retrain,
         "Train behind every one of the --iterations as this run's YAML file says (docs/train.md), what is zero "
         "staying zero; rounds are kept in its output.folder, and a stopped command goes on (--prune rd ...)")
      ->check(CLI::ExistingFile);
  app.add_flag("--synthetic", o->synthetic, "Measure on random images or tokens in place of data (--prune rd ...)");
  app.add_option("--calibration-samples", o->samples,
                 "Images, or windows of --context tokens, to measure on (default: 256 images, 32 windows) (--prune rd)")
      ->check(CLI::Range(1, 1 << 20));
  app.add_option("--entries", o->entries, "Tokens of the vocabulary whose logits are compared; 0: all (--prune rd)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--report", o->report, "Write what every layer lost to this JSON file (--prune rd ...)");
  return [a, o] { return run(*a, *o); };
}

const RegisterPrune rd({"rd", "uniform", "uniform+", "global", "lamp", "erk"}, setup);

}  // namespace
}  // namespace moiety::cli
