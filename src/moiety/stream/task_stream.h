#pragma once
// Continual adaptation: one task after another beside a frozen model, and after each how well every task goes. MoRA
// (adapt/mora.h) gets a new block of ranks for every task; other parts go on learning what they are.
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/adapt/mora.h"
#include "moiety/base/config.h"

namespace moiety {

struct StreamTaskConfig {
  std::string name;
  nlohmann::json sources, held_out_sources;
  int64_t steps = 0;

  void fields(Fields& f) {
    f("name", name, "what the task is called").required();
    f("sources", sources, "what it learns from, as `data.sources` of a run").required();
    f("held_out_sources", held_out_sources, "what it is measured on; else a share of its sources, see `data`");
    f("steps", steps, "optimizer steps of this task; 0: those under `train`").min(0);
  }
};

struct StreamConfig {
  nlohmann::json model, part = {{"slug", "mora"}}, data, train, optimizer, schedule;
  std::vector<StreamTaskConfig> tasks;
  int64_t evaluation_tokens = 8192;
  std::string consolidate = "fold", output;

  void fields(Fields& f) {
    f("model", model, "the model that is adapted, as `model` of a run").required();
    f("part", part,
      "what stands beside its matrices: mora with its settings and `target`, or another part of that site");
    f("tasks", tasks, "one after another").required().length(1, 1000);
    f("data", data, "what sources share, as `data` of a run: length, held_out, ...");
    f("train", train, "as `train` of a run: steps of a task, batch, dtype, seed, ...").required();
    f("optimizer", optimizer, "as `optimizer` of a run; its state begins anew with every task");
    f("schedule", schedule, "as `schedule` of a run, over each task");
    f("evaluation_tokens", evaluation_tokens, "held-out tokens of every task").min(2);
    f("consolidate", consolidate,
      "mora, at the end of a task: fold keeps its function, raw leaves out `scaling` as the authors' language code "
      "does")
        .choices({"fold", "raw"});
    f("output", output, "where everything goes").required();
  }
  std::string problem() const;
};

/// Reads a stream. Throws Error naming file, line, key and what is allowed.
StreamConfig read_stream_config(const std::string& yaml, const std::string& where);

struct StreamResult {
  std::vector<std::string> tasks;
  torch::Tensor accuracy;  ///< [T, T] f64: after task t (row), the share of task j's held-out tokens foreseen first
  torch::Tensor loss;      ///< [T, T] f64, nats a token
  torch::Tensor before;    ///< [T] f64: accuracy of the model before the first task
  StreamMetrics metrics;   ///< of the accuracy
  std::filesystem::path adapter;
  bool complete = false;  ///< false: stopped
  nlohmann::json to_json() const;
};

struct StreamOptions {
  /// Called with the task that trains, its step, of all, and the loss of the step.
  std::function<void(const std::string& task, int64_t step, int64_t steps, double loss)> on_step;
  std::function<void(const std::string& what)> on_phase;
  std::function<bool()> stop;
};

/// Runs the stream, or goes on with it: tasks that are through are not learned or measured again. Writes
/// OUTPUT/TASK/ (a run of `moiety train`), OUTPUT/stream.json, and at the end OUTPUT/last with the adapter. Throws
/// Error, also when what is in OUTPUT was begun with other settings.
StreamResult run_stream(const StreamConfig& config, const StreamOptions& options = {});

}  // namespace moiety
