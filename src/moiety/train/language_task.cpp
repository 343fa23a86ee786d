#include "moiety/train/language_task.h"

#include <torch/torch.h>

#include <algorithm>
#include <numbers>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/models/decoder.h"
#include "moiety/train/head_loss.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

struct TeacherSettings {
  std::string model;
  RecoveryConfig loss;
  void fields(Fields& f) {
    f("model", model,
      "a model of the same tokens, whose probabilities are learned besides: a folder, a file, pip:PACKAGE");
    loss.fields(f);
  }
};

struct LanguageSettings {
  std::string slug;
  TeacherSettings teacher;
  void fields(Fields& f) {
    f("slug", slug, "the task's name");
    f("teacher", teacher,
      "learn after a model that is not changed: the loss is task * cross-entropy + distillation * KL(teacher || "
      "model), "
      "summed over positions and divided by rows");
  }
};

Encoder encoder_of(const TrainConfig& config, const OpenRun& run) {
  Encoder e;
  e.tokenizer = run.tokenizer;
  e.chat_template = run.chat_template;
  e.options = encode_options(config);
  return e;
}

// The loss of a decoder without all of its logits at once.
Tensor language_loss(CausalModel& model, const MicroBatch& m, Pass& pass) {
  if (auto* decoder = dynamic_cast<Decoder*>(&model); decoder != nullptr && decoder->head->attached().empty())
    return head_loss(decoder->hidden(m.ids, pass), decoder->head, m.targets, decoder->parsed.logits_scale,
                     decoder->parsed.logits_softcap);
  return token_loss(model.forward(m.ids, pass), m.targets);
}

}  // namespace

void set_rows(Pass& pass, const MicroBatch& m) {
  pass.mask = m.mask;
  pass.segments = m.segments;
  pass.positions = m.positions;
  pass.labels = m.labels;
}

EncodeOptions encode_options(const TrainConfig& config) {
  EncodeOptions o;
  o.max_length = config.data.cut ? config.data.length : 0;
  o.add_eos = config.data.add_end;
  o.loss_on_prompt = config.data.learn_prompts;
  o.last_answer_only = config.data.last_answer_only;
  return o;
}

Tensor token_loss(const Tensor& logits, const Tensor& targets) {
  return at::cross_entropy_loss(logits.reshape({-1, logits.size(-1)}), targets.reshape({-1}), {}, at::Reduction::Sum,
                                /*ignore_index=*/-100);
}

EvaluationResult evaluate(CausalModel& model, const HeldOut& data, torch::Device device, Ranks* ranks,
                          const Edits& edits, Trace* trace) {
  const auto sums =
      score_batches(model, data, device, ranks, [&](const MicroBatch& m, bool counts) -> std::vector<double> {
        Pass pass;
        set_rows(pass, m);
        pass.edits = edits;
        if (counts) pass.trace = trace;
        return {language_loss(model, m, pass).item<double>()};
      });
  EvaluationResult result;
  result.tokens = data.learned;
  result.loss = sums[0] / static_cast<double>(data.learned);
  result.bits_per_byte = data.bytes > 0 ? sums[0] / std::numbers::ln2 / static_cast<double>(data.bytes) : 0.0;
  return result;
}

LanguageTask::LanguageTask(const TrainConfig& config, const TaskContext& context)
    : config_(config), run_(open_run(config, context.device, context.scratch, context.weights)) {
  const auto settings = parse<LanguageSettings>(config.task, "task");
  if (settings.teacher.model.empty() || !context.weights) return;
  recovery_ = settings.teacher.loss;
  LoadOptions options;
  options.dtype = config.train.dtype;
  options.device = context.device;
  const auto checkpoint = Checkpoint::open(settings.teacher.model);
  teacher_ = load_causal(*checkpoint, options);
  check(teacher_->vocab_size() == run_.model->vocab_size(),
        "task.teacher: {} has a vocabulary of {}, the model that learns one of {}", settings.teacher.model,
        teacher_->vocab_size(), run_.model->vocab_size());
  teacher_->eval();
}

void LanguageTask::open_data() {
  check(config_.data.length <= run_.model->context_length(), "data.length is {}, but the model's context is {} tokens",
        config_.data.length, run_.model->context_length());
  const Encoder encoder = encoder_of(config_, run_);
  const auto seed = static_cast<uint64_t>(config_.train.seed);
  data_ = moiety::open_data(config_.data, encoder, seed);
  for (const HeldOutSource& source : data_.held_out) {
    auto rows = held_out_rows(
        source.data, encoder, config_.data,
        config_.evaluation.batch > 0 ? config_.evaluation.batch : config_.train.batch,
        std::max<int64_t>(2, config_.evaluation.tokens / static_cast<int64_t>(data_.held_out.size())), seed);
    if (source.label)
      for (MicroBatch& m : rows.batches) m.labels = torch::full({m.ids.size(0)}, *source.label, torch::kInt64);
    held_out_.emplace_back(source.name, std::move(rows));
  }
}

Tensor LanguageTask::loss(const MicroBatch& m, Pass& pass) {
  set_rows(pass, m);
  if (!teacher_) return language_loss(*run_.model, m, pass);
  Tensor target;
  {
    const torch::NoGradGuard frozen;
    Pass own;
    set_rows(own, m);
    target = teacher_->forward(m.ids, own);
  }
  const auto logits = run_.model->forward(m.ids, pass);
  if (m.learned > 0 && recovery_.distillation > 0.0)
    pass.add_loss("distillation",
                  recovery_.distillation * teacher_divergence(logits, target, m.targets, recovery_.temperature));
  return recovery_.task * token_loss(logits, m.targets);
}

EvaluationResult LanguageTask::evaluate(torch::Device device, Ranks* ranks) {
  EvaluationResult all;
  double bits = 0.0, bytes = 0.0;
  for (const auto& [name, rows] : held_out_) {
    const auto one = moiety::evaluate(*run_.model, rows, device, ranks);
    all.loss += one.loss * static_cast<double>(one.tokens);
    all.tokens += one.tokens;
    bits += one.bits_per_byte * static_cast<double>(rows.bytes);
    bytes += static_cast<double>(rows.bytes);
    if (!name.empty()) all.by_source[name] = one.loss;
  }
  all.loss /= static_cast<double>(all.tokens);
  all.bits_per_byte = bytes > 0.0 ? bits / bytes : 0.0;
  return all;
}

void LanguageTask::write(const std::filesystem::path& folder, const std::string& dtype) const {
  write_model(folder, run_, dtype);
}

int64_t LanguageTask::activation_bytes() const {
  // What the backward pass keeps, counted for a block with a gated feed-forward layer: about 14 values of the hidden
  // size and 4 of the inner size a token; logits and their gradient besides.
  const json& c = run_.config;
  const auto number = [&](const char* key, int64_t otherwise) {
    return c.contains(key) && c[key].is_number_integer() ? c[key].get<int64_t>() : otherwise;
  };
  const int64_t hidden = number("hidden_size", 0), inner = number("intermediate_size", 4 * hidden);
  const int64_t active = std::max<int64_t>(1, number("num_experts_per_tok", 1)), blocks = run_.model->blocks();
  const int64_t width = config_.train.dtype == "bf16" ? 2 : 4, tokens = config_.train.batch * config_.data.length;
  const int64_t block = 14 * hidden + 4 * inner * active;
  return tokens * (width * (config_.train.checkpoint_activations ? hidden * blocks + block : block * blocks) +
                   12 * run_.model->vocab_size());
}

namespace {

const RegisterMethod registered({.slug = "language",
                                 .kind = "task",
                                 .title = "Language modelling",
                                 .summary = "texts, completions and chats, token by token",
                                 .paper = {},
                                 .sites = {},
                                 .config = describe<LanguageSettings>,
                                 .make = MakeTrainTask([](const TrainConfig& config,
                                                          const TaskContext& context) -> std::unique_ptr<TrainTask> {
                                   return std::make_unique<LanguageTask>(config, context);
                                 })});

}  // namespace
}  // namespace moiety
