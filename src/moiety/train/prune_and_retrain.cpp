#include "moiety/train/prune_and_retrain.h"

#include <fmt/format.h>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/io/checkpoint_writer.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

json read_json(const fs::path& file) {
  return parse_json(read_text(file), file.string());
}

// Prunes into `folder`, or finds that it has been done; what it says of it.
json prune_once(const std::string& from, const fs::path& folder, const std::string& method,
                const RdPruningConfig& config, const RetrainingOptions& options,
                const std::function<void(int64_t, int64_t)>& progress) {
  const fs::path report = folder.parent_path() / "pruning.json";
  if (fs::exists(report)) return read_json(report);
  PrunableModel model = open_prunable(from, options.entries);
  const auto batches = options.batches ? options.batches(model) : std::vector<torch::Tensor>();
  const json out = prune_layers(model.staged, batches, method, config, progress).json();
  WriteOptions write;
  write.overwrite = true;  // a killed call's
  write_hf(*model.now(), folder, write);
  write_file(report, out.dump(2) + "\n");
  return out;
}

}  // namespace

RetrainingResult prune_and_retrain(const std::string& model, const std::string& method, const RdPruningConfig& config,
                                   const TrainConfig& run, const RetrainingOptions& options) {
  const std::string problem = config.problem();
  check(problem.empty(), "{}", problem);
  const auto run_on = [&](const std::string& checkpoint) {
    TrainConfig out = run;
    out.model = {};
    out.model.checkpoint = checkpoint;
    out.train.keep_zeros = true;
    return out;
  };
  const fs::path folder = run.output.folder, begun = folder / "pruning.json";
  json settings = {{"model", model}, {"method", method}, {"pruning", dump(config)}, {"input", options.input}};
  if (fs::exists(begun)) {
    const json before = read_json(begun);
    check(before.is_object() && before.contains("before") && before.value("settings", json()) == settings,
          "{} holds rounds of another pruning: give the run another output.folder, or remove it", folder.string());
    settings = before;
  } else {
    check(!fs::exists(folder / "run.json"), "{} holds a run of its own: give this one another output.folder",
          folder.string());
    const PrunableModel opened = open_prunable(model, options.entries);
    check(!opened.encoder, "{} is an encoder, which cannot be trained here: prune it without training", model);
    const double before = opened.zeros();
    check(config.sparsity + 1e-9 >= before, "the model is already {:.1f} % sparse, more than {:.1f} %", 100.0 * before,
          100.0 * config.sparsity);
    // What is wrong with the run shows before anything is measured.
    plan_training(run_on(model));
    fs::create_directories(folder);
    settings = {{"settings", settings}, {"before", before}};
    write_file(begun, settings.dump(2) + "\n");
  }
  RetrainingResult result;
  std::string from = model;
  for (int64_t round = 1; round <= config.iterations; ++round) {
    const fs::path here = folder / fmt::format("round-{}", round);
    fs::create_directories(here);
    RdPruningConfig once = config;
    once.iterations = 1;
    once.sparsity = rd_round_target(settings.at("before").get<double>(), config.sparsity, round, config.iterations);
    RetrainedRound out;
    out.target = once.sparsity;
    out.pruning = prune_once(from, here / "pruned", method, once, options, [&](int64_t done, int64_t all) {
      if (options.on_point) options.on_point(round, done, all);
    });
    TrainConfig training = run_on((here / "pruned").string());
    training.train.seed += round - 1;
    training.output.folder = (here / "run").string();
    TrainOptions with = options.train;
    with.resume = TrainOptions::automatic;
    Trainer trainer(training, with);
    if (options.on_run) options.on_run(round, trainer);
    out.training = trainer.run();
    if (options.after_run) options.after_run(round, trainer);
    result.model = out.training.model;
    const bool stopped = out.training.ended == "stopped";
    result.rounds.push_back(std::move(out));
    if (stopped) return result;
    from = result.model.string();
  }
  result.complete = true;
  return result;
}

}  // namespace moiety
