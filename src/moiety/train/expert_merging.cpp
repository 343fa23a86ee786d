#include "moiety/train/expert_merging.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"
#include "moiety/io/name_patterns.h"
#include "moiety/io/overlay.h"
#include "moiety/models/decoder.h"
#include "moiety/nn/weights.h"
#include "moiety/train/optimizer.h"

namespace moiety {
namespace {

using torch::Tensor;

constexpr int64_t kFirstRestart = 50, kRestartFactor = 2, kPatience = 3;
constexpr double kLeastRate = 0.1;

// A norm that remembers what it read and gave.
class Recorder : public Norm {
 public:
  explicit Recorder(std::shared_ptr<Norm> norm) : norm_(std::move(norm)) {}
  Tensor forward(const Tensor& x) override {
    input = x;
    return output = norm_->forward(x);
  }
  Tensor input, output;

 private:
  std::shared_ptr<Norm> norm_;
};

// A decoder whose hidden states can be read.
class Observed {
 public:
  Observed(const Checkpoint& checkpoint, const LoadOptions& options, const std::vector<int64_t>& layers)
      : model_(load_causal(checkpoint, options)) {
    model_->eval();
    decoder_ = dynamic_cast<Decoder*>(model_.get());
    check(decoder_ != nullptr, "{}: experts of plain decoders are merged", checkpoint.path().string());
    const int64_t last = decoder_->blocks();
    for (const int64_t l : layers) {
      check(l >= 0 && l <= last, "there is no hidden state {}: the model has 0 to {}", l, last);
      auto& norm = l == last ? decoder_->norm : decoder_->layers[static_cast<size_t>(l)]->before_attention;
      check(norm != nullptr, "{}: its blocks have no norm in front, where hidden states are read",
            checkpoint.path().string());
      if (recorders_.count(l) != 0) continue;
      recorders_[l] = std::make_shared<Recorder>(norm);
      norm = recorders_[l];
    }
  }
  CausalModel& model() { return *model_; }

  Tensor forward(const std::vector<int64_t>& ids) {
    Pass pass;
    return model_->forward(torch::tensor(ids, torch::kInt64).unsqueeze(0), pass);
  }
  // Those asked for at their places in a list of all; the others undefined.
  std::vector<Tensor> hidden() const {
    std::vector<Tensor> out(static_cast<size_t>(decoder_->blocks()) + 1);
    for (const auto& [l, r] : recorders_) out[static_cast<size_t>(l)] = l == decoder_->blocks() ? r->output : r->input;
    return out;
  }

 private:
  std::shared_ptr<CausalModel> model_;
  Decoder* decoder_ = nullptr;
  std::map<int64_t, std::shared_ptr<Recorder>> recorders_;
};

// One merged tensor: where it stands in the student, and what it is made of.
struct Merged {
  std::string name;
  Tensor parameter, value;  // the student's parameter, and the stored tensor as a view of it
  Tensor base;
  std::vector<Tensor> experts;
  Tensor raw;    // [K, m], or undefined: fixed
  Tensor fixed;  // [K]

  std::vector<Tensor> tasks() const {
    std::vector<Tensor> out;
    for (const Tensor& e : experts) out.push_back(e.to(torch::kFloat32) - base.to(torch::kFloat32));
    return out;
  }
  Tensor merged() const {
    const torch::NoGradGuard frozen;
    return raw.defined() ? merge_experts(base, tasks(), raw) : merge_experts_fixed(base, tasks(), fixed);
  }
  // The part of the parameter's gradient that belongs to the stored tensor.
  Tensor gradient() const {
    if (!parameter.grad().defined()) return torch::zeros_like(value);
    const auto g = parameter.grad().contiguous();
    return g.as_strided(value.sizes(), value.strides(), value.storage_offset() - parameter.storage_offset());
  }
  int64_t chunks() const { return raw.defined() ? raw.size(1) : 0; }
  Tensor alpha() const { return raw.defined() ? raw.detach().sigmoid() : fixed.unsqueeze(1); }
};

void check_same(const Checkpoint& base, const Checkpoint& expert) {
  for (const Checkpoint* c : {&base, &expert}) {
    check(c->gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
          c->path().string());
    for (const TensorInfo& t : c->tensors())
      check(!is_block(t.format), "{}: '{}' is stored in blocks; merge before quantizing", c->path().string(),
            shown(t.name));
  }
  for (const TensorInfo& t : base.tensors())
    check(expert.has(t.name) && expert.get(t.name).shape == t.shape, "'{}' of {} is not in {}, or of another shape",
          shown(t.name), base.path().string(), expert.path().string());
}

class Learner {
 public:
  Learner(std::shared_ptr<const Checkpoint> base, std::vector<std::shared_ptr<const Checkpoint>> experts,
          const std::vector<MergeTask>& tasks, const ExpertMergingConfig& config,
          std::function<void(int64_t, int64_t)> progress)
      : base_(std::move(base)),
        experts_(std::move(experts)),
        tasks_(tasks),
        config_(config),
        progress_(std::move(progress)),
        student_(*base_, {.dtype = "f32", .trainable = true}, config.hidden_layers),
        init_(torch::full({static_cast<int64_t>(experts_.size())}, config.init)) {
    for (const auto& e : experts_)
      teachers_.push_back(std::make_unique<Observed>(*e, LoadOptions{}, config.hidden_layers));
    find_tensors();
  }

  std::vector<Merged>& merged_tensors() { return tensors_; }

  // chunks of each one, 0: fixed; from the beginning.
  void start(const std::vector<int64_t>& chunks) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      tensors_[i].raw = Tensor();
      if (chunks[i] > 0) tensors_[i].raw = initial_coefficients(init_, chunks[i]).requires_grad_(true);
      tensors_[i].fixed = init_;
    }
  }

  void learn(std::vector<double>& losses) {
    std::vector<Slot> slots;
    for (const Merged& s : tensors_)
      if (s.raw.defined()) slots.push_back({s.name, s.raw, config_.lr, config_.weight_decay});
    if (slots.empty()) return;
    OptimizerConfig o;
    o.lr = config_.lr;
    o.weight_decay = config_.weight_decay;
    o.beta2 = 0.999;
    optimizer_ = make_optimizer(o, std::move(slots));
    steps_ = 0;
    double best = std::numeric_limits<double>::infinity();
    std::vector<Tensor> kept;
    for (int64_t epoch = 0, since = 0; epoch < config_.epochs && since < kPatience; ++epoch) {
      const double loss = run_epoch(epoch);
      check(std::isfinite(loss), "the loss of epoch {} is {}: take a lower --lr", epoch + 1, loss);
      losses.push_back(loss);
      ++since;
      if (loss >= best) continue;
      best = loss;
      since = 0;
      kept.clear();
      for (const Merged& s : tensors_) kept.push_back(s.raw.defined() ? s.raw.detach().clone() : Tensor());
    }
    const torch::NoGradGuard frozen;
    for (size_t i = 0; i < tensors_.size(); ++i)
      if (tensors_[i].raw.defined()) tensors_[i].raw.copy_(kept[i]);
  }

 private:
  void find_tensors() {
    const NamePatterns exclude(config_.exclude, "exclude");
    std::map<const void*, Tensor> parameters;
    for (const auto& p : student_.model().parameters()) {
      p.set_requires_grad(false);
      parameters.emplace(p.storage().data(), p);
    }
    for (const auto& s : student_.model().stored()) {
      if (exclude.match(s.name) || !base_->has(s.name)) continue;
      Merged one;
      one.name = s.name;
      one.value = s.value().detach();
      const auto it = parameters.find(one.value.storage().data());
      check(it != parameters.end(),
            "'{}' is made of several matrices of the model: this family cannot be merged by learning", shown(s.name));
      one.parameter = it->second;
      one.parameter.set_requires_grad(true);
      one.base = as_tensor(base_->get(s.name));
      for (const auto& e : experts_) one.experts.push_back(as_tensor(e->get(s.name)));
      tensors_.push_back(std::move(one));
    }
    check(!tensors_.empty(), "every tensor is excluded: there is nothing to merge");
  }

  double beta(size_t task) const { return config_.beta.empty() ? 1.0 : config_.beta.at(task); }

  void place() {
    const torch::NoGradGuard frozen;
    for (Merged& s : tensors_) s.value.copy_(s.merged());
  }

  double run_epoch(int64_t epoch) {
    const auto order = merge_order(tasks_, config_.seed, epoch);
    double sum = 0.0;
    for (size_t at = 0; at < order.size(); at += static_cast<size_t>(config_.accumulation))
      sum += step({order.begin() + static_cast<std::ptrdiff_t>(at),
                   order.begin() + static_cast<std::ptrdiff_t>(
                                       std::min(order.size(), at + static_cast<size_t>(config_.accumulation)))},
                  epoch, order.size());
    return sum / static_cast<double>(order.size());
  }

  // One update from a few samples; the sum of their losses.
  double step(const std::vector<std::pair<size_t, size_t>>& samples, int64_t epoch, size_t all) {
    place();
    for (const Merged& s : tensors_) s.parameter.mutable_grad() = Tensor();
    optimizer_->zero_grad();
    const double share = 1.0 / static_cast<double>(config_.accumulation);
    double sum = 0.0;
    for (const auto& [task, i] : samples) {
      const auto loss = loss_of(task, tasks_[task][i], {});
      (loss.total * share).backward();
      sum += loss.total.item<double>();
      ++seen_;
      if (progress_) progress_(seen_, total(all));
    }
    std::vector<Tensor> raw;
    for (Merged& s : tensors_) {
      if (!s.raw.defined()) continue;
      s.raw.mutable_grad() = coefficient_gradient(s.gradient(), s.tasks(), s.raw);
      raw.push_back(s.raw);
    }
    // Of every sample, and the same for all.
    const auto reg = coefficients_loss(raw);
    (reg * (share * static_cast<double>(samples.size()))).backward();
    const double scale = gradient_norm(optimizer_->slots(), config_.clip).scale;
    optimizer_->step(warm_restart_factor(steps_++), scale);
    return sum + reg.item<double>() * static_cast<double>(samples.size());
  }

  int64_t total(size_t epoch) const {
    return static_cast<int64_t>(epoch) * config_.epochs * (config_.plus_plus ? 2 : 1);
  }

  MergeLoss loss_of(size_t task, const std::vector<int64_t>& ids, const std::vector<Tensor>& raw) {
    MergeSample sample;
    {
      const torch::NoGradGuard frozen;
      sample.teacher_logits = teachers_[task]->forward(ids);
      sample.teacher_hidden = teachers_[task]->hidden();
    }
    sample.student_logits = student_.forward(ids);
    sample.student_hidden = student_.hidden();
    return expert_merging_loss(sample, raw, init_, config_, beta(task));
  }

  // What holds coefficients where they began; the same for every sample.
  Tensor coefficients_loss(const std::vector<Tensor>& raw) const {
    return merge_regulariser(raw, init_) * config_.reg_weight;
  }

  std::shared_ptr<const Checkpoint> base_;
  std::vector<std::shared_ptr<const Checkpoint>> experts_;
  const std::vector<MergeTask>& tasks_;
  const ExpertMergingConfig& config_;
  std::function<void(int64_t, int64_t)> progress_;
  Observed student_;
  std::vector<std::unique_ptr<Observed>> teachers_;
  Tensor init_;
  std::vector<Merged> tensors_;
  std::unique_ptr<Optimizer> optimizer_;
  int64_t steps_ = 0, seen_ = 0;
};

// Importance and chunks from coefficients that were learned.
void find_chunks(const std::vector<Merged>& tensors, const ExpertMergingConfig& config, ExpertMergingResult& out) {
  std::vector<Tensor> alpha, sizes;
  std::vector<int64_t> elements;
  for (const Merged& s : tensors) {
    alpha.push_back(s.alpha().mean(1));
    std::vector<Tensor> of;
    for (const Tensor& t : s.tasks()) of.push_back(t.abs().sum(torch::kFloat64));
    sizes.push_back(torch::stack(of));
    elements.push_back(s.base.numel());
  }
  out.importance = layer_importance(torch::stack(alpha, 1), torch::stack(sizes, 1));
  out.chunks = allocate_chunks(out.importance, elements, config.budget, config.kappa);
}

std::shared_ptr<const Checkpoint> with_merged(std::shared_ptr<const Checkpoint> base,
                                              const std::vector<Merged>& merged) {
  std::vector<OverlayTensor> tensors;
  for (const Merged& s : merged) {
    Merged own = s;
    own.parameter = own.value = Tensor();  // the student goes
    if (own.raw.defined()) own.raw = own.raw.detach().clone();
    OverlayTensor t;
    t.info = base->get(s.name);
    t.info.name = s.name;
    t.get = [own, format = t.info.format] { return view_of(own.merged(), format); };
    tensors.push_back(std::move(t));
  }
  nlohmann::json config = base->config();
  return overlay(std::move(base), std::move(config), std::move(tensors));
}

}  // namespace

double warm_restart_factor(int64_t step) {
  check(step >= 0, "there is no step {}", step);
  int64_t length = kFirstRestart;
  while (step >= length) {
    step -= length;
    length *= kRestartFactor;
  }
  const double along = static_cast<double>(step) / static_cast<double>(length);
  return kLeastRate + (1.0 - kLeastRate) * 0.5 * (1.0 + std::cos(std::numbers::pi * along));
}

std::vector<std::pair<size_t, size_t>> merge_order(const std::vector<MergeTask>& tasks, int64_t seed, int64_t epoch) {
  size_t longest = 0;
  for (const auto& t : tasks) longest = std::max(longest, t.size());
  std::vector<std::pair<size_t, size_t>> out;
  for (size_t i = 0; i < longest; ++i)
    for (size_t k = 0; k < tasks.size(); ++k) out.emplace_back(k, i % tasks[k].size());
  RandomStream(static_cast<uint64_t>(seed), fmt::format("expert-merging.order.{}", epoch)).shuffle(out);
  return out;
}

ExpertMergingResult learn_expert_merging(std::shared_ptr<const Checkpoint> base,
                                         const std::vector<std::shared_ptr<const Checkpoint>>& experts,
                                         const std::vector<MergeTask>& tasks, const ExpertMergingConfig& config,
                                         const std::function<void(int64_t, int64_t)>& progress) {
  const std::string problem = config.problem();
  check(problem.empty(), "{}", problem);
  check(!experts.empty(), "there is no expert to merge");
  check(tasks.size() == experts.size(), "{} experts need data of as many tasks: there are {}", experts.size(),
        tasks.size());
  check(config.beta.empty() || config.beta.size() == tasks.size(), "{} experts have {} betas", experts.size(),
        config.beta.size());
  std::vector<MergeTask> used = tasks;
  for (size_t k = 0; k < used.size(); ++k) {
    check(!used[k].empty(), "there is no data for {}", experts[k]->path().string());
    if (config.samples > 0 && static_cast<int64_t>(used[k].size()) > config.samples)
      used[k].resize(static_cast<size_t>(config.samples));
    for (const auto& ids : used[k]) check(ids.size() >= 2, "a sample of task {} has fewer than two tokens", k + 1);
  }
  for (const auto& e : experts) check_same(*base, *e);
  Learner learner(base, experts, used, config, progress);
  ExpertMergingResult out;
  learner.start(std::vector<int64_t>(learner.merged_tensors().size(), 1));
  learner.learn(out.losses);
  if (config.plus_plus) {
    find_chunks(learner.merged_tensors(), config, out);
    learner.start(out.chunks);
    learner.learn(out.losses);
  }
  for (const Merged& s : learner.merged_tensors()) {
    out.names.push_back(s.name);
    out.alpha[s.name] = s.alpha().clone();
  }
  out.model = with_merged(std::move(base), learner.merged_tensors());
  return out;
}

nlohmann::json ExpertMergingResult::json() const {
  nlohmann::json coefficients = nlohmann::json::object();
  for (const auto& [name, a] : alpha) {
    nlohmann::json rows = nlohmann::json::array();
    for (int64_t k = 0; k < a.size(0); ++k) {
      const auto row = a[k].to(torch::kFloat64).contiguous();
      rows.push_back(std::vector<double>(row.const_data_ptr<double>(), row.const_data_ptr<double>() + row.numel()));
    }
    coefficients[name] = rows;
  }
  nlohmann::json out = {{"alpha", coefficients}, {"losses", losses}};
  if (!importance.empty()) {
    out["tensors"] = names;
    out["importance"] = importance;
    out["chunks"] = chunks;
  }
  return out;
}

}  // namespace moiety
