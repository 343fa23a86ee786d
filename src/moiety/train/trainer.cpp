#include "moiety/train/trainer.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/text.h"
#include "moiety/base/version.h"
#include "moiety/kernels/cpu.h"
#include "moiety/nn/parameters.h"
#include "moiety/nn/random_state.h"
#include "moiety/train/expert_parallel.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int64_t kNotFinite = 10;      // steps in a row without finite gradients that end a run
constexpr int64_t kShareRecords = 100;  // records of a run that list the load of every expert

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double unix_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

int64_t total_steps(const TrainConfig& config, RowSource& rows, std::optional<int64_t>* epoch_rows = nullptr) {
  if (config.train.steps > 0) return config.train.steps;
  const int64_t of_an_epoch = rows.rows_of_an_epoch();
  if (epoch_rows) *epoch_rows = of_an_epoch;
  const double all = config.train.epochs * static_cast<double>(of_an_epoch);
  return std::max<int64_t>(
      1, static_cast<int64_t>(std::ceil(all / static_cast<double>(config.train.batch * config.train.accumulate))));
}

}  // namespace

TrainPlan plan_training(const TrainConfig& config) {
  const TemporaryFolder scratch("moiety-plan");
  const auto task = open_task(config, {torch::kCPU, scratch.path(), /*weights=*/false});
  TrainPlan plan;
  plan.unit = task->unit();
  plan.parameters = parameter_count(task->model());
  plan.slots = trained_slots(task->model(), config);
  for (const Slot& s : plan.slots) plan.trained += s.parameter.numel();
  task->open_data();
  plan.documents = task->rows().documents();
  plan.steps = total_steps(config, task->rows(), &plan.rows_of_an_epoch);
  plan.tokens_per_step = config.train.batch * config.train.accumulate * task->row_units();
  plan.weights_bytes = 4 * plan.parameters;
  plan.gradient_bytes = 4 * plan.trained;
  const int64_t moments = config.optimizer.name == "adamw"                                   ? 2
                          : config.optimizer.name == "lion" || config.optimizer.momentum > 0 ? 1
                                                                                             : 0;
  plan.optimizer_bytes = 4 * moments * plan.trained;
  plan.ema_bytes = config.train.ema.decay > 0 ? 4 * plan.trained : 0;
  plan.activation_bytes = task->activation_bytes();
  return plan;
}

namespace {

// Other values stand in for those of parameters while it lives.
class Substitute {
 public:
  Substitute(std::vector<Tensor> parameters, const std::vector<Tensor>& values) : parameters_(std::move(parameters)) {
    const torch::NoGradGuard frozen;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      kept_.push_back(parameters_[i].variable_data());
      parameters_[i].set_data(values[i]);
    }
  }
  Substitute(const Substitute&) = delete;
  Substitute& operator=(const Substitute&) = delete;
  ~Substitute() {
    const torch::NoGradGuard frozen;
    for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i].set_data(kept_[i]);
  }

 private:
  std::vector<Tensor> parameters_, kept_;
};

}  // namespace

struct Trainer::Window {
  double nll = 0;
  int64_t learned = 0, steps = 0, tokens = 0;
  std::map<std::string, double> auxiliary;
  double seconds = 0;

  json save() const {
    return {{"nll", nll},       {"learned", learned},     {"steps", steps},
            {"tokens", tokens}, {"auxiliary", auxiliary}, {"seconds", seconds}};
  }
  void restore(const json& j) {
    nll = j.at("nll");
    learned = j.at("learned");
    steps = j.at("steps");
    tokens = j.at("tokens");
    auxiliary = j.at("auxiliary").get<std::map<std::string, double>>();
    seconds = j.at("seconds");
  }
};

Trainer::Trainer(TrainConfig config, TrainOptions options)
    : config_(std::move(config)), options_(std::move(options)), window_(std::make_unique<Window>()) {
  check(config_.train.accumulate % processes() == 0,
        "train.accumulate is {}, which {} processes cannot share evenly: it has to be a multiple of their number",
        config_.train.accumulate, processes());
  const auto in_turn = [&](const std::function<void()>& body) {
    // The first process writes what the others read.
    if (leader()) body();
    if (options_.ranks) options_.ranks->barrier();
    if (!leader()) body();
  };
  in_turn([&] { folder_ = std::make_unique<RunFolder>(config_.output.folder, leader()); });
  const auto saved = options_.resume == TrainOptions::restart ? std::vector<int64_t>() : folder_->steps();
  check(options_.resume != TrainOptions::required || !saved.empty(), "{} has no checkpoint to go on from",
        folder_->path().string());
  TrainConfig computed = config_;
  if (config_.train.dtype == "bf16" && options_.device.is_cpu() && !has_fast_bf16_products()) {
    // The run stays one of bf16: elsewhere it goes on as it says.
    computed.train.dtype = "f32";
    if (leader()) log::warn("train.dtype is bf16, whose products are slow on this processor: f32 is computed in");
  }
  in_turn([&] { task_ = open_task(computed, {options_.device, folder_->path()}); });
  if (options_.prepare) options_.prepare(task_->model());
  if (config_.parallel.experts > 1) spread_experts();
  task_->open_data();
  auto slots = trained_slots(task_->model(), config_);
  for (Slot& s : slots)
    s.share = std::any_of(shares_.begin(), shares_.end(), [&](const Tensor& t) { return t.is_same(s.parameter); });
  optimizer_ = make_optimizer(config_.optimizer, std::move(slots));
  for (const auto& module : task_->model().modules(/*include_self=*/true)) {
    auto* scheduled = dynamic_cast<Scheduled*>(module.get());
    if (scheduled && std::find(scheduled_.begin(), scheduled_.end(), scheduled) == scheduled_.end())
      scheduled_.push_back(scheduled);
  }
  if (config_.train.ema.decay > 0)
    for (const Slot& s : optimizer_->slots()) average_.push_back(s.parameter.detach().clone());
  // Before a checkpoint of the run is read: zeros that came with training are free.
  if (config_.train.keep_zeros) hold_zeros();
  // Only now that everything could be opened.
  if (options_.resume == TrainOptions::restart && leader()) folder_->clear();
  if (!saved.empty()) restore(saved.back());
  if (steps_ == 0) steps_ = total_steps(config_, task_->rows());
  if (leader()) write_file(folder_->path() / "run.json", dump(config_).dump(2) + "\n");
}

Trainer::~Trainer() = default;

void Trainer::spread_experts() {
  const int64_t wanted = config_.parallel.experts;
  check(processes() % wanted == 0,
        "parallel.experts is {}, but the run has {}: start it with torchrun --no-python --nproc-per-node {} moiety "
        "train ..., or with a multiple of it",
        wanted, processes() == 1 ? std::string("one process") : fmt::format("{} processes", processes()), wanted);
  group_ = options_.ranks;
  if (processes() > wanted) {
    // Neighbours hold all experts together; every group has its own copy of them.
    const int64_t rank = options_.ranks->rank(), first = rank / wanted * wanted;
    std::vector<int64_t> neighbours, same;
    for (int64_t i = 0; i < wanted; ++i) neighbours.push_back(first + i);
    for (int64_t i = rank % wanted; i < processes(); i += wanted) same.push_back(i);
    own_group_ = options_.ranks->part(neighbours);
    peers_ = options_.ranks->part(same);
    group_ = own_group_.get();
  }
  shares_ = split_experts(task_->model(), *group_);
}

void Trainer::hold_zeros() {
  int64_t held = 0;
  for (const Slot& s : optimizer_->slots()) {
    const Tensor zero = s.parameter.dim() >= 2 ? s.parameter.detach() == 0 : Tensor();
    const int64_t count = zero.defined() ? zero.count_nonzero().item<int64_t>() : 0;
    zeros_.push_back(count > 0 ? zero : Tensor());
    held += count;
  }
  if (held == 0 && leader()) log::warn("train.keep_zeros: no matrix that learns has a weight of zero");
}

CausalModel& Trainer::model() {
  auto* model = dynamic_cast<CausalModel*>(&task_->model());
  check(model != nullptr, "the run's task is {}, which trains no language model", config_.task_slug());
  return *model;
}

void Trainer::restore(int64_t step) {
  const fs::path folder = folder_->checkpoint(step) / "training", file = folder / "state.json";
  const json state = parse_json(read_text(file), file.string());
  reading_json(file.string(), [&] {
    const auto changed = changed_keys(state.at("config"), dump(config_));
    check(changed.empty(),
          "{} was begun with other settings: {}; give the run another output.folder, or begin it anew with --restart",
          folder_->path().string(), list_of(changed, "and"));
    const auto tensors = read_tensors(folder / "state.safetensors");
    const auto get = [&](const std::string& name, const Tensor& like, bool share = false) {
      const auto it = tensors.find(name);
      auto shape = like.sizes().vec();
      if (share) shape[0] *= group_->size();
      check(it != tensors.end() && it->second.sizes() == at::IntArrayRef(shape),
            "{}: no tensor '{}' of the right shape", (folder / "state.safetensors").string(), name);
      return (share ? share_of(it->second, *group_) : it->second).to(like.device());
    };
    const torch::NoGradGuard frozen;
    const auto& counts = state.at("updates");
    auto& slots = optimizer_->slots();
    for (size_t i = 0; i < slots.size(); ++i) {
      Slot& s = slots[i];
      s.parameter.copy_(get("parameter." + s.name, s.parameter, s.share));
      s.step = counts.at(s.name).get<int64_t>();
      if (s.step > 0)
        for (const auto& name : optimizer_->state_names())
          s.state[name] = get("optimizer." + name + "." + s.name, s.parameter, s.share).clone();
      if (!average_.empty()) average_[i].copy_(get("average." + s.name, s.parameter, s.share));
    }
    for (auto& buffer : task_->model().named_buffers()) {
      auto& value = buffer.value();
      if (value.defined()) value.copy_(get("buffer." + parameter_name(buffer.key()), value));
    }
    task_->rows().restore(state.at("data"));
    window_->restore(state.at("window"));
    step_ = state.at("step").get<int64_t>();
    tokens_ = state.at("tokens").get<int64_t>();
    skipped_ = state.at("skipped").get<int64_t>();
    seconds_ = state.at("seconds").get<double>();
    last_loss_ = state.at("loss").get<double>();
    best_ = state.at("best").get<double>();
    best_step_ = state.at("best_step").get<int64_t>();
    bad_evaluations_ = state.at("bad_evaluations").get<int64_t>();
    ended_ = state.at("ended").get<std::string>();
    // A schedule over epochs was counted once; another number of steps is another schedule from here on.
    const json before = state.at("config").at("train");
    if (config_.train.steps == 0 && before.at("epochs") == config_.train.epochs)
      steps_ = state.at("steps").get<int64_t>();
    if (const auto& e = state.at("evaluation"); !e.is_null()) last_evaluation_ = evaluation_from_json(e);
    if (const auto e = state.value("first_evaluation", json()); !e.is_null())
      first_evaluation_ = evaluation_from_json(e);
    if (const int64_t threads = state.at("threads"); threads != at::get_num_threads())
      log::warn("the run used {} threads so far and uses {} now: sums are rounded differently", threads,
                at::get_num_threads());
    if (const int64_t before_now = state.at("processes"); before_now != processes())
      log::warn("the run had {} processes so far and has {} now: sums are rounded differently", before_now,
                processes());
    // A process that was not there before takes the first one's stream.
    const auto own = tensors.find(fmt::format("random.{}", options_.ranks ? options_.ranks->rank() : 0));
    const auto random = own != tensors.end() ? own : tensors.find("random.0");
    check(random != tensors.end(), "{}: no tensor 'random.0'", (folder / "state.safetensors").string());
    set_random_state(options_.device, random->second);
  });
  // A kill between the two leaves the checkpoint without its mark.
  if (best_step_ == step_ && leader()) folder_->mark_best(step_);
}

void Trainer::train_step(bool record) {
  for (Scheduled* s : scheduled_) s->before_step(step_, steps_);
  std::vector<MicroBatch> batches;
  int64_t learned = 0;
  step_tokens_ = 0;
  for (int64_t i = 0; i < config_.train.accumulate; ++i) {
    // Every process walks over all rows, so that all are at one position; each keeps its share.
    const MicroBatch m = task_->rows().next(config_.train.batch);
    learned += m.learned;
    step_tokens_ += m.tokens;
    if (!options_.ranks || i % processes() == options_.ranks->rank()) batches.push_back(m.to(options_.device));
  }
  routing_ = record ? std::make_unique<RouterLoad>() : nullptr;
  Trace trace;
  if (record) trace.on_record = [this](const Trace::Record& r) { routing_->add(r); };
  optimizer_->zero_grad();
  double nll = 0;
  const auto portion = static_cast<double>(config_.train.accumulate);
  std::map<std::string, double> auxiliary;
  for (const MicroBatch& m : batches) {
    Pass pass;
    pass.training = true;
    pass.recompute_blocks = config_.train.checkpoint_activations;
    if (record) pass.trace = &trace;
    const Tensor loss = task_->loss(m, pass);
    nll += loss.item<double>();
    // Every learned token of the step weighs the same, whatever micro-batch it is in.
    Tensor total = loss / static_cast<double>(std::max<int64_t>(1, learned));
    for (const auto& [name, value] : pass.losses) {
      auxiliary[name] += value.item<double>() / portion;
      total = total + value.to(total.scalar_type()) / portion;
    }
    if (total.requires_grad()) total.backward();
  }
  if (options_.ranks) {
    std::vector<Tensor> gradients, shared, sums;
    for (Slot& s : optimizer_->slots()) {
      if (!s.parameter.grad().defined()) s.parameter.mutable_grad() = torch::zeros_like(s.parameter.detach());
      // A share has got the gradients of its group with the rows of all.
      (s.share ? shared : gradients).push_back(s.parameter.grad());
    }
    options_.ranks->sum(gradients);
    if (peers_) peers_->sum(shared);
    sums.push_back(torch::tensor(nll, torch::kFloat64));
    for (const auto& [name, value] : auxiliary) sums.push_back(torch::tensor(value, torch::kFloat64));
    options_.ranks->sum(sums);
    nll = sums[0].item<double>();
    size_t at = 1;
    for (auto& [name, value] : auxiliary) value = sums[at++].item<double>();
    for (Scheduled* s : scheduled_) options_.ranks->sum(s->counts());
  }
  const auto at_zeros = [&](const auto& use) {
    const torch::NoGradGuard frozen;
    for (size_t i = 0; i < zeros_.size(); ++i)
      if (zeros_[i].defined()) use(optimizer_->slots()[i].parameter, zeros_[i]);
  };
  // Without a gradient they neither move nor count in its norm.
  at_zeros([](Tensor p, const Tensor& zero) {
    if (p.grad().defined()) p.mutable_grad().masked_fill_(zero, 0.0);
  });
  std::function<double(double)> sum;
  if (!shares_.empty())
    sum = [&](double value) {
      auto all = torch::tensor(value, torch::kFloat64);
      group_->sum({all});
      return all.item<double>();
    };
  const GradientNorm gradients = gradient_norm(optimizer_->slots(), config_.optimizer.clip, sum);
  grad_norm_ = gradients.norm;
  if (std::isfinite(grad_norm_) && std::isfinite(nll)) {
    skipped_ = 0;
    optimizer_->step(schedule_factor(config_.schedule, step_, steps_), gradients.scale);
    at_zeros([](Tensor p, const Tensor& zero) { p.masked_fill_(zero, 0.0); });
    if (!average_.empty()) {
      const torch::NoGradGuard frozen;
      for (size_t i = 0; i < average_.size(); ++i)
        average_[i].lerp_(optimizer_->slots()[i].parameter.detach(), 1.0 - config_.train.ema.decay);
    }
  } else {
    ++skipped_;
    log::warn("step {}: the gradients are not finite; the weights stay as they are", step_ + 1);
    check(skipped_ < kNotFinite, "the gradients of {} steps in a row are not finite: the learning rate {} is too high",
          skipped_, config_.optimizer.lr);
  }
  for (Scheduled* s : scheduled_) s->after_step();
  optimizer_->zero_grad();
  ++step_;
  tokens_ += step_tokens_;
  step_loss_ = nll / static_cast<double>(std::max<int64_t>(1, learned));
  window_->nll += nll;
  window_->learned += learned;
  window_->steps += 1;
  window_->tokens += step_tokens_;
  for (const auto& [name, value] : auxiliary) window_->auxiliary[name] += value;
}

json Trainer::log_record() {
  const Window& w = *window_;
  const std::string unit = task_->unit();
  last_loss_ = w.nll / static_cast<double>(std::max<int64_t>(1, w.learned));
  json record = {{"step", step_},
                 {"time", unix_time()},
                 {"loss", last_loss_},
                 {"lr", config_.optimizer.lr * schedule_factor(config_.schedule, step_ - 1, steps_)},
                 {"grad_norm", grad_norm_},
                 {unit + "s", tokens_},
                 {"epoch", task_->rows().epoch()},
                 {unit + "s_per_second", w.seconds > 0 ? std::round(static_cast<double>(w.tokens) / w.seconds) : 0.0}};
  for (const auto& [name, value] : w.auxiliary) record["auxiliary"][name] = value / static_cast<double>(w.steps);
  if (routing_ && !routing_->empty()) {
    const int64_t every = std::max<int64_t>(1, steps_ / kShareRecords);
    const int64_t log_every = config_.train.log_every;
    // The first record behind each hundredth of the run.
    const bool shares = step_ / every != (step_ - log_every) / every || step_ <= log_every;
    record["routing"] = routing_->report(shares);
  }
  *window_ = Window();
  return record;
}

// The moving average stands in for the weights while `body` runs.
template <class Body>
void Trainer::with_average(Body body) {
  std::vector<Tensor> parameters;
  if (!average_.empty())
    for (const Slot& s : optimizer_->slots()) parameters.push_back(s.parameter);
  const Substitute substitute(std::move(parameters), average_);
  body();
}

bool Trainer::evaluate_now() {
  for (Scheduled* scheduled : scheduled_) scheduled->before_evaluation();
  with_average([&] { last_evaluation_ = task_->evaluate(options_.device, options_.ranks); });
  for (Scheduled* scheduled : scheduled_) scheduled->after_evaluation();
  if (log_) log_->add({{"step", step_}, {"time", unix_time()}, {"evaluation", to_json(*last_evaluation_)}});
  if (step_ == 0) {
    // Before the first step: what changes are measured against, and no candidate for the best.
    first_evaluation_ = std::exchange(last_evaluation_, std::nullopt);
    return false;
  }
  const bool better = best_step_ == 0 || last_evaluation_->loss < best_ - config_.evaluation.min_delta;
  if (better) {
    best_ = last_evaluation_->loss;
    best_step_ = step_;
    bad_evaluations_ = 0;
  } else {
    ++bad_evaluations_;
  }
  return better;
}

bool Trainer::stop_asked() {
  const bool asked = options_.stop && options_.stop();
  if (!options_.ranks) return asked;
  auto count = torch::tensor(asked ? 1.0 : 0.0, torch::kFloat64);
  options_.ranks->sum({count});
  return count.item<double>() > 0;
}

void Trainer::save() {
  // The streams of all processes, a row each.
  const Tensor own = random_state(options_.device);
  auto random = torch::zeros({processes(), own.numel()}, torch::kInt32);
  random[options_.ranks ? options_.ranks->rank() : 0] = own.to(torch::kCPU, torch::kInt32);
  if (options_.ranks) options_.ranks->sum({random});
  NamedTensors tensors;
  json updates = json::object();
  auto& slots = optimizer_->slots();
  for (size_t i = 0; i < slots.size(); ++i) {
    const Slot& s = slots[i];
    // The processes of a group hand in their shares; what the first one writes is whole.
    const auto put = [&](const std::string& name, const Tensor& t) {
      tensors[name] = s.share ? gather_share(t, *group_) : t;
    };
    put("parameter." + s.name, s.parameter);
    updates[s.name] = s.step;
    for (const auto& [name, value] : s.state) put("optimizer." + name + "." + s.name, value);
    if (!average_.empty()) put("average." + s.name, average_[i]);
  }
  std::vector<Tensor> whole;
  with_average([&] {
    for (const Tensor& share : shares_) whole.push_back(gather_share(share, *group_));
  });
  if (!leader()) return;
  log_->sync();
  folder_->save(step_, [&](const fs::path& folder) {
    with_average([&] {
      const Substitute substitute(shares_, whole);
      task_->write(folder, config_.output.dtype);
    });
    fs::create_directory(folder / "training");
    for (const auto& buffer : task_->model().named_buffers())
      if (buffer.value().defined()) tensors["buffer." + parameter_name(buffer.key())] = buffer.value();
    for (int64_t r = 0; r < processes(); ++r) tensors[fmt::format("random.{}", r)] = random[r].to(torch::kUInt8);
    write_tensors(folder / "training" / "state.safetensors", tensors);
    const json state = {{"version", MOIETY_VERSION},
                        {"config", dump(config_)},
                        {"step", step_},
                        {"steps", steps_},
                        {"tokens", tokens_},
                        {"skipped", skipped_},
                        {"seconds", seconds_},
                        {"loss", last_loss_},
                        {"best", best_},
                        {"best_step", best_step_},
                        {"bad_evaluations", bad_evaluations_},
                        {"evaluation", last_evaluation_ ? to_json(*last_evaluation_) : json()},
                        {"first_evaluation", first_evaluation_ ? to_json(*first_evaluation_) : json()},
                        {"ended", ended_},
                        {"threads", at::get_num_threads()},
                        {"processes", processes()},
                        {"updates", updates},
                        {"window", window_->save()},
                        {"data", task_->rows().state()}};
    write_file(folder / "training" / "state.json", state.dump(1) + "\n");
  });
}

void Trainer::report(const std::string& ended) {
  if (!log_) return;
  int64_t parameters = 0;
  for (const Slot& s : optimizer_->slots()) parameters += s.parameter.numel() * (s.share ? group_->size() : 1);
  json tiles = json::array();
  tiles.push_back({"step", fmt::format("{} of {}", step_, steps_)});
  tiles.push_back({"training loss", last_loss_});
  if (best_step_ > 0) tiles.push_back({fmt::format("best held-out loss (step {})", best_step_), best_});
  if (last_evaluation_ && last_evaluation_->accuracy) {
    tiles.push_back({"held-out accuracy", *last_evaluation_->accuracy});
  } else if (last_evaluation_) {
    tiles.push_back({"held-out perplexity", std::exp(last_evaluation_->loss)});
    tiles.push_back({"held-out bits a byte", last_evaluation_->bits_per_byte});
  }
  tiles.push_back({"trained parameters", parameters});
  tiles.push_back({task_->unit() + "s", tokens_});
  tiles.push_back({task_->unit() + "s a second", seconds_ > 0 ? static_cast<double>(tokens_) / seconds_ : 0.0});
  log_->write_report({{"title", fs::path(config_.output.folder).filename().string()},
                      {"what", ended},
                      {"tiles", tiles},
                      {"settings", dump(config_)}});
}

TrainResult Trainer::run() {
  if (leader()) log_ = std::make_unique<RunLog>(folder_->path(), step_);
  TrainResult result;
  result.ended = "complete";
  if (step_ >= steps_ || ended_ == "early stop") {
    result.ended = "already complete";
  } else {
    task_->model().train();
    ended_.clear();
    if (step_ == 0 && config_.evaluation.start && task_->has_held_out()) evaluate_now();
    while (step_ < steps_) {
      const auto start = Clock::now();
      const bool last = step_ + 1 == steps_;
      const bool record = (step_ + 1) % config_.train.log_every == 0 || last;
      train_step(record);
      const double took = seconds_since(start);
      window_->seconds += took;
      seconds_ += took;
      if (options_.on_step) options_.on_step(step_, steps_, step_loss_, step_tokens_);
      if (record) {
        const json entry = log_record();
        if (log_) log_->add(entry);
      }
      bool better = false;
      if (task_->has_held_out() && (last || (config_.evaluation.every > 0 && step_ % config_.evaluation.every == 0))) {
        better = evaluate_now();
        report("Running.");
        if (config_.evaluation.patience > 0 && bad_evaluations_ >= config_.evaluation.patience) ended_ = "early stop";
      }
      const bool stopped = stop_asked() && !last;
      const bool due = config_.output.every > 0 && step_ % config_.output.every == 0;
      const bool best = better && config_.output.best;
      if (due || best || last || stopped || !ended_.empty()) {
        save();
        if (leader()) {
          if (better) folder_->mark_best(step_);
          folder_->prune(config_.output.keep);
        }
      }
      if (stopped && ended_.empty()) result.ended = "stopped";
      if (!ended_.empty()) result.ended = ended_;
      if (stopped || !ended_.empty()) break;
    }
    report(result.ended == "complete"  ? "Complete."
           : result.ended == "stopped" ? "Stopped; the same command goes on."
                                       : "Ended early: the held-out loss did not get better.");
  }
  result.step = step_;
  result.steps = steps_;
  result.loss = last_loss_;
  result.evaluation = last_evaluation_;
  result.before = first_evaluation_;
  result.best = best_;
  result.best_step = best_step_;
  result.tokens = tokens_;
  result.unit = task_->unit();
  result.seconds = seconds_;
  result.model = folder_->path() / "last";
  return result;
}

}  // namespace moiety
