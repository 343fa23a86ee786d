// moiety compress --prune rd|uniform|uniform+|global|lamp|erk: the smallest weights of a vision model or a decoder,
// shared out among its layers.
#include <torch/torch.h>

#include <fmt/format.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "compress.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/base/random.h"
#include "moiety/compress/rd_pruning_model.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/tokenizer.h"
#include "moiety/tasks/image_classification.h"
#include "moiety/tasks/scoring.h"
#include "read_texts.h"

namespace moiety::cli {
namespace {

struct Options {
  RdPruningConfig rd;
  bool synthetic = false, mean = false;
  int64_t samples = 0;     // 0: by the kind of model
  int64_t entries = 1024;  // of the vocabulary
  std::string report;
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

// Windows of one length, cut from all texts in turn.
std::vector<torch::Tensor> windows(const CompressArguments& a, const Options& o, const CausalModel& model,
                                   const Checkpoint& checkpoint) {
  const int64_t wanted = o.samples > 0 ? o.samples : 32,
                length = a.context > 0 ? a.context : std::min<int64_t>(64, model.context_length());
  if (o.synthetic) {
    torch::manual_seed(0);
    return in_batches(torch::randint(model.vocab_size(), {wanted, length}, torch::kInt64), a.batch_size);
  }
  const auto texts = read_texts(*Tokenizer::load(checkpoint), a.calibration, a.limit_tokens);
  for (size_t i = 0; i < texts.size(); ++i)
    check(static_cast<int64_t>(texts[i].size()) >= length, "{} gives fewer than {} tokens, one window",
          a.calibration[i], length);
  std::vector<torch::Tensor> rows;
  for (int64_t at = 0; static_cast<int64_t>(rows.size()) < wanted; at += length) {
    const size_t before = rows.size();
    for (const auto& ids : texts)
      if (at + length <= static_cast<int64_t>(ids.size()) && static_cast<int64_t>(rows.size()) < wanted)
        rows.push_back(torch::tensor(std::vector<int64_t>(ids.begin() + at, ids.begin() + at + length), torch::kInt64));
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

int run(const CompressArguments& a, Options o) {
  check(a.device == "cpu", "--prune computes on the CPU: use --device cpu");
  const bool measured = o.synthetic || !a.calibration.empty();
  check(measured || a.prune != "rd",
        "--prune rd measures how far outputs move: give --calibration FILE, or --synthetic for random inputs");
  check(!o.synthetic || a.calibration.empty(), "--synthetic stands in place of --calibration: one of them");
  o.rd.worst_case = !o.mean;
  const auto checkpoint = Checkpoint::open(a.model);
  check_prunable(*checkpoint);
  LoadOptions load;
  load.dtype = "f32";
  load.trainable = true;
  std::shared_ptr<VisionModel> vision;
  std::shared_ptr<CausalModel> causal;
  StagedModel staged;
  std::vector<torch::Tensor> batches;
  if (is_vision(checkpoint->config())) {
    vision = load_vision(*checkpoint, load);
    vision->eval();
    staged = stages_of(*vision);
    if (measured) batches = images(a, o, vision->config());
  } else {
    causal = load_causal(*checkpoint, load);
    causal->eval();
    staged = stages_of(*causal, o.entries);
    if (measured) batches = windows(a, o, *causal, *checkpoint);
  }
  std::optional<Progress> progress;
  const auto report = prune_layers(staged, batches, a.prune, o.rd, [&](int64_t done, int64_t all) {
    if (!progress) progress.emplace("curves", all, "point");
    progress->set(done);
  });
  progress.reset();
  WriteOptions write;
  write.overwrite = a.overwrite;
  write.dry_run = a.dry_run;
  write_hf(*with_values(checkpoint, vision ? vision->stored() : causal->stored()), a.out, write);
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
