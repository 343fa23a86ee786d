#pragma once
// What studies of adapters share: one small byte-level decoder a seed that has learned English prose and a manual, kept
// for all of them, and runs of the trainer that adapt it, frozen, to kinds of text that it does not know.
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/nn/beside.h"
#include "moiety/study/language.h"

namespace moiety {

/// Of the base: 4 blocks, hidden size 96, learned from prose and the English manual.
LanguageRecipe adapter_recipe();
/// What the base has not learned: Python, Perl's manual, and the manual in German, French and Japanese.
std::vector<std::string> adapter_kinds();
/// For Study::settings.
nlohmann::json adapter_settings();
/// Base, data and rates in a sentence's beginning, for Study::setup.
std::string adapter_setup();

/// The folder of the base model of a seed; trained by the first cell of any study that asks, then kept for all.
/// `parts`: what it has in place of what the family has.
std::filesystem::path adapter_base(const StudyCell& cell, int64_t seed, const nlohmann::json& parts = nullptr);

/// The folder of what that base becomes on one kind of text: a whole model, or the folder of a LoRA adapter (rank 8,
/// beside all matrices). Trained by the first cell of any study that asks, then kept for all.
std::filesystem::path adapter_expert(const StudyCell& cell, const std::string& kind, bool lora);
/// How these are trained, for Study::settings, and in a sentence.
nlohmann::json adapter_expert_settings();
std::string adapter_expert_setup();

struct Adaptation {
  std::filesystem::path model;      ///< a base, or what another run has left in it
  nlohmann::json parts;             ///< beside the base's own; null: every parameter of the model learns
  std::vector<std::string> kinds;   ///< of text, in even shares unless `shares` says otherwise
  std::vector<double> shares;       ///< of each kind
  std::vector<int64_t> labels;      ///< of each kind; empty: none
  double rate = 0;                  ///< peak of a cosine, 5 % warm-up; AdamW 0.9/0.95 without decay, clip 1
  int64_t steps = 0;                ///< of 8 rows of 128 bytes; 0: the budget's
  int64_t seed = 0;                 ///< of new parameters and of the order of rows
  std::vector<SourceConfig> extra;  ///< text besides `kinds`
  /// Called before the first step with 0 and then after every step.
  std::function<void(CausalModel& model, int64_t step, int64_t steps)> watch = nullptr;
};
/// Trains; the run stands in a folder of the cell called `name`. Throws Error.
std::unique_ptr<Trainer> adapt(const StudyCell& cell, const Adaptation& run, const std::string& name = "run");

/// Held-out rows of kinds of text, the beginnings of documents: one half of these to choose rates by, the other to
/// measure on.
enum class Half { tuning, test };
std::map<std::string, HeldOut> adapter_text(const std::vector<std::string>& kinds, Half half);

/// {"bits": mean bits a byte over the kinds, "by_kind": {...}}.
nlohmann::json measure_bits(CausalModel& model, const std::map<std::string, HeldOut>& text, const Edits& edits = {});
/// Percent of completions that greedy decoding of their prompts gives whole; all are bytes.
double exact_share(CausalModel& model, const std::vector<std::pair<std::string, std::string>>& questions);
/// Thousands of parameters that learn.
double thousand_trained(CausalModel& model);

/// The rate of 0.003, 0.01 and 0.03 with the lowest score, and of those beyond (0.0001 to 0.1) while the best one lies
/// at the edge: tried once for `name`, by the first cell that asks. `score` gets a cell whose budget has half of the
/// steps (at least 1). {rate, tried: {rate: score}}.
nlohmann::json tuned_rate(const StudyCell& cell, const std::string& name,
                          const std::function<double(const StudyCell& half, double rate)>& score);
/// For most arms: parts on the base of seed 0, from a seed of their own, on `kinds`.
nlohmann::json tuned_rate(const StudyCell& cell, const std::string& name, const Adaptation& run);

/// An arm as most studies have it: a rate tuned under `rated` (the arm's name when empty), then `run` on the base of
/// the cell's seed. Values: bits, by_kind, trained, rate, tried, and ms: processor time of a step.
struct AdaptedArm {
  std::unique_ptr<Trainer> trainer;
  std::map<std::string, HeldOut> text;  ///< that was measured on
  nlohmann::json values;
};
AdaptedArm adapted_arm(const StudyCell& cell, Adaptation run, const std::string& rated = "");

/// How often every expert of every matrix or layer is chosen on that text, by the site's place: [E].
std::map<std::string, torch::Tensor> expert_use(CausalModel& model, const std::map<std::string, HeldOut>& text);

/// A matrix of a model by its path, "layers.0.self_attn.q_proj".
std::map<std::string, LinearImpl*> matrices_of(CausalModel& model);
/// A tensor of what stands beside a matrix: "lora_A". Error when there is none.
torch::Tensor adapter_tensor(const LinearImpl& matrix, const std::string& name);
/// Writes the model in folder `to` as `model` is, with other tensors: `change` gets them all by their names, to add,
/// replace and remove; `parts` are the parts of the written model (null: none). Its tokenizer is that of folder `base`.
void write_changed(CausalModel& model, const std::filesystem::path& base, const std::filesystem::path& to,
                   const nlohmann::json& parts,
                   const std::function<void(std::map<std::string, torch::Tensor>&)>& change);
/// The model of a base as it is for inference.
std::shared_ptr<CausalModel> open_base_model(const std::filesystem::path& model);

/// Stands beside one matrix and adds what a function gives for its input [N, in] -> [N, out].
class Added : public Beside {
 public:
  using Delta = std::function<torch::Tensor(const torch::Tensor& x)>;
  explicit Added(Delta delta) : delta_(std::move(delta)) {}
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;

 private:
  Delta delta_;
};

}  // namespace moiety
