#pragma once
// A run as its YAML file describes it; docs/train.md explains every key.
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/train/data.h"
#include "moiety/train/optimizer.h"
#include "moiety/train/schedule.h"

namespace moiety {

struct ModelConfig {
  std::string checkpoint;
  nlohmann::json config;
  std::string tokenizer;
  std::string chat_template;

  void fields(Fields& f) {
    f("checkpoint", checkpoint, "a model to go on from: a folder, a file or pip:PACKAGE");
    f("config", config, "from scratch: a Hugging Face config, written here or as the path of a config.json");
    f("tokenizer", tokenizer,
      "bytes (one token a byte), or a folder, tokenizer.json or pip:PACKAGE; default: the checkpoint's own");
    f("chat_template", chat_template, "a file with a Jinja template, instead of the tokenizer's own");
  }
  std::string problem() const;
};

struct GroupConfig {
  std::string match;
  std::optional<double> lr, lr_scale, weight_decay;

  void fields(Fields& f) {
    f("match", match, "regular expression, searched in the names of parameters").required();
    f("lr", lr, "peak learning rate").min(0);
    f("lr_scale", lr_scale, "times the optimizer's rate").min(0);
    f("weight_decay", weight_decay, "decay of the group").min(0);
  }
  std::string problem() const { return lr && lr_scale ? "lr and lr_scale exclude each other" : ""; }
};

struct EmaConfig {
  double decay = 0.0;
  void fields(Fields& f) {
    f("decay", decay,
      "keep a moving average of the trained weights: average = decay * average + (1 - decay) * weights after every "
      "step; "
      "it is what is evaluated and saved as the model. 0: off")
        .min(0)
        .max(0.9999999);
  }
};

struct LoopConfig {
  int64_t steps = 0;
  double epochs = 0;
  int64_t batch = 8;
  int64_t accumulate = 1;
  std::string dtype = "f32";
  bool checkpoint_activations = false;
  std::vector<std::string> train, freeze;
  bool keep_zeros = false;
  int64_t seed = 0;
  int64_t log_every = 1;
  EmaConfig ema;

  void fields(Fields& f) {
    f("steps", steps, "optimizer steps").min(0);
    f("epochs", epochs, "instead of steps: passes over the data").min(0);
    f("batch", batch, "rows of one forward pass (a micro-batch)").min(1);
    f("accumulate", accumulate, "micro-batches of one optimizer step").min(1);
    f("dtype", dtype, "what is computed in; weights, gradients and the optimizer stay f32").choices({"f32", "bf16"});
    f("checkpoint_activations", checkpoint_activations,
      "keep only the input of every block and compute it again in the backward pass: less memory, a third more work");
    f("train", train, "regular expressions: only parameters whose names they match learn");
    f("freeze", freeze, "regular expressions: parameters whose names they match do not learn");
    f("keep_zeros", keep_zeros,
      "weights of matrices that are exactly zero in the checkpoint stay zero: what was pruned stays pruned");
    f("seed", seed, "of initial weights, order of data, and everything drawn in between").min(0);
    f("log_every", log_every, "steps between records of the log; a record holds means since the last one").min(1);
    f("ema", ema, "moving average of weights");
  }
  std::string problem() const;
};

struct RoutingConfig {
  std::string balance = "auto";
  std::optional<double> coef;
  int64_t devices = 0;
  std::optional<double> z_coef, jitter;
  double capacity_factor = 0.0;
  double bias_rate = 0.0;

  void fields(Fields& f) {
    f("balance", balance,
      "the loss that keeps experts evenly used: auto (what the model's config asks for, if it does), none, switch "
      "(every mixture over the batch), sequence (every mixture within each sequence), pooled (all mixtures in one "
      "table), device (groups of experts)")
        .choices({"auto", "none", "switch", "pooled", "sequence", "device"});
    f("coef", coef, "weight of that loss; default: the weight in the model's config").min(0);
    f("devices", devices, "balance: device: groups of neighbouring experts").min(0);
    f("z_coef", z_coef, "weight of the squared log-sum-exp of the router's logits; default: the config's, or none")
        .min(0);
    f("jitter", jitter, "noise on what a mixture sees: times U(1 - jitter, 1 + jitter); default: the config's")
        .min(0)
        .max(0.99);
    f("capacity_factor", capacity_factor,
      "an expert takes at most tokens * choices / experts times this from a micro-batch, the others' gates stay; 0: no "
      "limit")
        .min(0);
    f("bias_rate", bias_rate,
      "balance without a loss: a bias on the choice moves by this towards experts with less load after every step; 0: "
      "no such bias, or as it is")
        .min(0)
        .max(1);
  }
  std::string problem() const;
};

struct ParallelConfig {
  int64_t experts = 1;
  void fields(Fields& f) {
    f("experts", experts,
      "spread the experts of every mixture over so many processes, a divisor of those of the run: each group of so "
      "many "
      "holds all experts together; 1: every process has all experts")
        .min(1);
  }
};

struct EvaluationConfig {
  int64_t every = 0;
  bool start = false;
  int64_t tokens = 65536;
  int64_t batch = 0;
  int64_t patience = 0;
  double min_delta = 0.0;

  void fields(Fields& f) {
    f("every", every, "steps between evaluations on held-out data; 0: at the end only").min(0);
    f("start", start,
      "evaluate before the first step, too: what a run then reports of each source is how it changed, and with it what "
      "was forgotten");
    f("tokens", tokens, "evaluate on about so many held-out tokens; of an image task: images").min(2);
    f("batch", batch, "rows of one forward pass; 0: as in training").min(0);
    f("patience", patience, "stop after so many evaluations in a row without a better loss; 0: never").min(0);
    f("min_delta", min_delta, "how much lower a loss has to be to count as better").min(0);
  }
};

struct SaveConfig {
  std::string folder;
  int64_t every = 0;
  int64_t keep = 2;
  bool best = true;
  std::string dtype = "f32";

  void fields(Fields& f) {
    f("folder", folder, "where everything goes").required();
    f("every", every, "steps between checkpoints; 0: at the end only (and when the run is stopped)").min(0);
    f("keep", keep, "checkpoints that stay: the newest ones, and the best one besides").min(1);
    f("best", best, "also save a checkpoint after every evaluation that is the best so far");
    f("dtype", dtype, "of the weights in the saved model; the training state keeps f32")
        .choices({"f32", "bf16", "f16"});
  }
};

struct TrainConfig {
  nlohmann::json task = {{"slug", "language"}};
  ModelConfig model;
  nlohmann::json parts;
  RoutingConfig routing;
  ParallelConfig parallel;
  DataConfig data;
  LoopConfig train;
  OptimizerConfig optimizer;
  std::vector<GroupConfig> groups;
  ScheduleConfig schedule;
  EvaluationConfig evaluation;
  SaveConfig output;

  void fields(Fields& f) {
    f("task", task,
      "what is learned: language, or another method of kind task (see `moiety methods`) with its settings; a text is "
      "short for {slug: TEXT}");
    f("model", model, "what learns; a text is short for {checkpoint: TEXT}").required();
    f("parts", parts, "modules that take sites of the model (see `moiety methods`)");
    f("routing", routing, "how mixtures of experts are kept in balance");
    f("parallel", parallel, "what several processes share besides the data");
    f("data", data, "what it learns from; a text is short for {sources: [{path: TEXT}]}").required();
    f("train", train, "how long and in what portions").required();
    f("optimizer", optimizer, "how gradients become steps");
    f("groups", groups, "other settings for some parameters; the first that matches counts");
    f("schedule", schedule, "how the learning rate changes");
    f("evaluation", evaluation, "held-out loss during training");
    f("output", output, "what is written where; a text is short for {folder: TEXT}").required();
  }
  std::string problem() const;
  std::string task_slug() const { return task.at("slug").get<std::string>(); }
};

/// Reads a run. `overrides`: KEY=VALUE with dotted keys ("optimizer.lr=1e-3", "data.sources.0.path=a.txt"), the value
/// read as YAML. Throws Error naming file, line, key and what is allowed.
TrainConfig read_train_config(const std::string& yaml, const std::string& where,
                              const std::vector<std::string>& overrides = {});

/// The keys of `now` that a run begun with `before` cannot change and go on, with both values; empty: it can go on.
std::vector<std::string> changed_keys(const nlohmann::json& before, const nlohmann::json& now);

}  // namespace moiety
