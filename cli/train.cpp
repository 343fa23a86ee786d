// moiety train: trains a model as a YAML file says; goes on by itself after a stop or a crash.
#include <fmt/format.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "interrupts.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/memory.h"
#include "moiety/train/trainer.h"
#include "train_progress.h"
#include "verb.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct TrainArguments : Common {
  std::string file;
  std::vector<std::string> set;
  bool dry_run = false, resume = false, restart = false, list = false;
};

std::string megabytes(int64_t bytes) {
  return bytes >= int64_t{1} << 30 ? fmt::format("{:.2f} GiB", static_cast<double>(bytes) / (1 << 30))
                                   : fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1 << 20));
}

int dry_run(const TrainArguments& a, const TrainConfig& config) {
  const TrainPlan plan = plan_training(config);
  const int64_t sum =
      plan.weights_bytes + plan.gradient_bytes + plan.optimizer_bytes + plan.ema_bytes + plan.activation_bytes;
  if (a.json) {
    json out = {{"parameters", plan.parameters},
                {"trained", plan.trained},
                {"steps", plan.steps},
                {plan.unit + "s_per_step", plan.tokens_per_step},
                {"documents", plan.documents},
                {"rows_of_an_epoch", plan.rows_of_an_epoch ? json(*plan.rows_of_an_epoch) : json()},
                {"bytes",
                 {{"weights", plan.weights_bytes},
                  {"gradients", plan.gradient_bytes},
                  {"optimizer", plan.optimizer_bytes},
                  {"average", plan.ema_bytes},
                  {"activations", plan.activation_bytes},
                  {"sum", sum}}},
                {"settings", dump(config)}};
    for (const Slot& s : plan.slots)
      out["trained_parameters"].push_back(
          {{"name", s.name}, {"shape", s.parameter.sizes().vec()}, {"lr", s.lr}, {"weight_decay", s.weight_decay}});
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  std::cout << fmt::format(
      "parameters   {} ({} learn)\nsteps        {} of {} {}s: {} {}s\n{:<12} {}{}\n"
      "memory       {}: weights {}, gradients {}, optimizer {}, {}activations about {}\n",
      plan.parameters, plan.trained, plan.steps, plan.tokens_per_step, plan.unit, plan.steps * plan.tokens_per_step,
      plan.unit, plan.unit == "image" ? "images" : "documents", plan.documents,
      plan.rows_of_an_epoch ? fmt::format(" ({} rows an epoch)", *plan.rows_of_an_epoch) : "", megabytes(sum),
      megabytes(plan.weights_bytes), megabytes(plan.gradient_bytes), megabytes(plan.optimizer_bytes),
      plan.ema_bytes > 0 ? fmt::format("average {}, ", megabytes(plan.ema_bytes)) : "",
      megabytes(plan.activation_bytes));
  if (a.list) {
    std::cout << "\n";
    for (const Slot& s : plan.slots)
      std::cout << fmt::format("{:<52} {:<18} lr {:<8} decay {}\n", s.name,
                               fmt::format("{}", c10::Join("x", s.parameter.sizes())), s.lr, s.weight_decay);
  }
  return 0;
}

int run_train(const TrainArguments& a) {
  const TrainConfig config = read_train_config(read_text(a.file), a.file, a.set);
  if (a.dry_run || a.list) return dry_run(a, config);
  note_interrupts();
  keep_freed_memory();
  const auto ranks = Ranks::from_environment();
  const bool leader = !ranks || ranks->rank() == 0;
  if (!leader) {
    set_progress_mode(ProgressMode::None);
    log::set_level(log::Level::Error);
  }
  TrainOptions options;
  options.ranks = ranks.get();
  options.device = torch::Device(a.device);
  options.resume = a.restart ? TrainOptions::restart : a.resume ? TrainOptions::required : TrainOptions::automatic;
  options.stop = interrupted;
  TrainProgress progress;
  progress.watch(options);
  Trainer trainer(config, options);
  if (trainer.step() > 0) log::info("{} goes on behind step {}", config.output.folder, trainer.step());
  progress.begin(trainer);
  const TrainResult r = trainer.run();
  progress.end();
  if (ranks) ranks->barrier();  // none leaves while another still sends
  if (!leader) return 0;
  if (a.json) {
    json out = {{"ended", r.ended},       {"step", r.step},       {"steps", r.steps},         {"loss", r.loss},
                {r.unit + "s", r.tokens}, {"seconds", r.seconds}, {"model", r.model.string()}};
    if (r.evaluation) out["evaluation"] = to_json(*r.evaluation);
    if (r.before) out["evaluation_before"] = to_json(*r.before);
    if (r.best_step > 0) out["best"] = {{"loss", r.best}, {"step", r.best_step}};
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  if (r.ended == "already complete") {
    std::cout << fmt::format("{} is complete at step {}: --restart begins anew, a larger train.steps goes on\n",
                             config.output.folder, r.step);
    return 0;
  }
  if (r.ended == "stopped")
    std::cout << fmt::format("stopped behind step {} of {}; the same command goes on\n", r.step, r.steps);
  if (r.ended == "early stop")
    std::cout << fmt::format("ended at step {} of {}: the held-out loss did not get better\n", r.step, r.steps);
  std::cout << fmt::format("training loss  {:.4f}\n", r.loss);
  if (r.evaluation && r.evaluation->accuracy)
    std::cout << fmt::format("held out       loss {:.4f}, {:.2f} % right ({} images); best loss {:.4f} at step {}\n",
                             r.evaluation->loss, 100.0 * *r.evaluation->accuracy, r.evaluation->tokens, r.best,
                             r.best_step);
  else if (r.evaluation)
    std::cout << fmt::format(
        "held out       loss {:.4f}, perplexity {:.3f}, {:.4f} bits a byte ({} tokens); best {:.4f} at step {}\n",
        r.evaluation->loss, std::exp(r.evaluation->loss), r.evaluation->bits_per_byte, r.evaluation->tokens, r.best,
        r.best_step);
  if (r.evaluation && r.before)
    std::cout << fmt::format("before         loss {:.4f}; changed by {:+.4f}\n", r.before->loss,
                             r.evaluation->loss - r.before->loss);
  if (r.evaluation)
    for (const auto& [source, loss] : r.evaluation->by_source) {
      const auto first = r.before ? r.before->by_source.find(source) : r.evaluation->by_source.end();
      const bool known = r.before && first != r.before->by_source.end();
      std::cout << fmt::format("  {:<12} loss {:.4f}{}\n", source, loss,
                               known ? fmt::format(", changed by {:+.4f}", loss - first->second) : "");
    }
  std::cout << fmt::format("time           {:.1f} s, {:.0f} {}s/s\nmodel          {}\nreport         {}\n", r.seconds,
                           static_cast<double>(r.tokens) / std::max(r.seconds, 1e-9), r.unit, r.model.string(),
                           (std::filesystem::path(config.output.folder) / "report.html").string());
  return 0;
}

const Register train({
    "train",
    "Train a model, from scratch or from a checkpoint, as a YAML file says",
    "moiety train run.yaml\n"
    "moiety train run.yaml --dry-run\n"
    "moiety train run.yaml --set optimizer.lr=1e-3 --set train.steps=2000 --set output=runs/other\n"
    "moiety train run.yaml --restart",
    [](CLI::App& app) {
      auto a = std::make_shared<TrainArguments>();
      app.add_option("RUN", a->file, "The YAML file of the run; docs/train.md explains its keys")->required();
      add_common(app, *a, /*model=*/false);
      app.remove_option(app.get_option("--dtype"));  // the run's file says it
      app.add_option("--set", a->set, "KEY=VALUE, in place of what the file says; may be given several times")
          ->take_all()
          ->expected(1);
      app.add_flag("--dry-run", a->dry_run, "Only say what would be trained: parameters, memory, steps");
      app.add_flag("--parameters", a->list, "As --dry-run, and list every parameter that learns");
      auto* resume = app.add_flag("--resume", a->resume, "Go on from the last checkpoint; an error when there is none");
      app.add_flag("--restart", a->restart, "Remove the checkpoints that are there and begin anew")->excludes(resume);
      return [a] { return run_train(*a); };
    },
});

}  // namespace
}  // namespace moiety::cli
