#include "moiety/study/adapters.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>
#include <numbers>
#include <regex>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/io/dataset.h"
#include "moiety/io/sha256.h"
#include "moiety/models/model.h"
#include "moiety/train/byte_tokenizer.h"
#include "moiety/train/open_run.h"

namespace moiety {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t kBaseSteps = 500, kShortBaseSteps = 150, kTuningSeed = 1000;
// Of every kind, and of one document: none is to rule what is measured.
constexpr int64_t kHeldOutTokens = 8192, kDocumentTokens = 2560;
constexpr double kRates[] = {1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1};
constexpr int64_t kFirst = 3, kLast = 5;  // of those that are tried in any case

// Of experts: whole models learn with a rate that leaves them near their base.
constexpr double kExpertRate = 1e-3, kLoraRate = 1e-2;
constexpr int64_t kExpertSteps = 200, kShortExpertSteps = 60, kExpertRank = 8;

StudySource source_of(const std::string& name) {
  for (const auto& s : study_text().sources)
    if (s.name == name) return s;
  fail("there is no text called {}", name);
}

}  // namespace

LanguageRecipe adapter_recipe() {
  LanguageRecipe r;
  r.hidden = 96;
  r.width = 192;
  r.sources = {"prose", "manual-en"};
  r.held_out_tokens = 16384;
  return r;
}

std::vector<std::string> adapter_kinds() {
  return {"python", "perl", "manual-de", "manual-fr", "manual-ja"};
}

json adapter_settings() {
  json out = adapter_recipe().settings();
  out["base_steps"] = {kBaseSteps, kShortBaseSteps};
  out["rates"] = kRates;
  out["held_out"] = {kHeldOutTokens, kDocumentTokens};
  return out;
}

std::string adapter_setup() {
  const auto r = adapter_recipe();
  return fmt::format(
      "A byte-level decoder of {} blocks, hidden size {}, which has learned English prose and a manual for {} steps "
      "({} "
      "in a short run), frozen, learns other kinds of text. AdamW with a cosine and without decay, 8 rows of {} bytes "
      "a "
      "step; every arm has a peak rate of its own, the best of 0.003, 0.01 and 0.03 (and of rates beyond, from 0.0001 "
      "to "
      "0.1, while the best one lies at the edge) on the base of seed 0, other held-out documents than those that are "
      "measured, and half of the steps",
      r.layers, r.hidden, kBaseSteps, kShortBaseSteps, r.length);
}

namespace {

// Kept for all studies under the settings that it depends on.
fs::path kept_for_all(const StudyCell& cell, const char* what, const json& settings, const std::string& name,
                      const std::function<void(const fs::path&)>& make) {
  const std::string print = settings.dump();
  Sha256 hash;
  hash.update(std::as_bytes(std::span(print)));
  StudyCell common = cell;
  common.shared = cell.common / what;
  return common.once(fmt::format("{}-{}", hash.hex().substr(0, 12), name), make);
}

}  // namespace

fs::path adapter_base(const StudyCell& cell, int64_t seed, const json& parts) {
  const auto recipe = adapter_recipe();
  const int64_t steps = cell.budget.full() ? kBaseSteps : kShortBaseSteps;
  json settings = recipe.settings();
  if (!parts.is_null()) settings["parts"] = parts;
  const auto folder =
      kept_for_all(cell, "adapter-base", settings, fmt::format("{}-{}", steps, seed), [&](const fs::path& to) {
        StudyCell own = cell;
        own.folder = to;
        own.seed = seed;
        train_language(own, {.recipe = recipe, .parts = parts, .steps = steps});
      });
  return folder / "run" / "last";
}

json adapter_expert_settings() {
  json out = adapter_settings();
  out["experts"] = {kExpertRate, kLoraRate, kExpertSteps, kShortExpertSteps, kExpertRank};
  return out;
}

std::string adapter_expert_setup() {
  const auto r = adapter_recipe();
  return fmt::format(
      "A byte-level decoder of {} blocks, hidden size {}, has learned English prose and a manual for {} steps ({} in a "
      "short run). Experts: it goes on to one other kind of text for {} steps ({}), 8 rows of {} bytes each, AdamW "
      "without decay, with all its parameters (rate {}) or as a LoRA of rank {} beside all matrices (rate {})",
      r.layers, r.hidden, kBaseSteps, kShortBaseSteps, kExpertSteps, kShortExpertSteps, r.length, kExpertRate,
      kExpertRank, kLoraRate);
}

fs::path adapter_expert(const StudyCell& cell, const std::string& kind, bool lora) {
  const int64_t steps = cell.budget.full() ? kExpertSteps : kShortExpertSteps;
  const auto folder = kept_for_all(
      cell, "adapter-expert", adapter_expert_settings(),
      fmt::format("{}-{}-{}-{}", kind, lora ? "lora" : "whole", steps, cell.seed), [&](const fs::path& to) {
        StudyCell own = cell;
        own.folder = to;
        Adaptation run;
        run.model = adapter_base(cell, cell.seed);
        if (lora)
          run.parts =
              json::array({{{"slug", "lora"}, {"target", "all"}, {"rank", kExpertRank}, {"alpha", kExpertRank}}});
        run.kinds = {kind};
        run.rate = lora ? kLoraRate : kExpertRate;
        run.steps = steps;
        run.seed = cell.seed;
        adapt(own, run);
      });
  return folder / "run" / "last";
}

std::unique_ptr<Trainer> adapt(const StudyCell& cell, const Adaptation& run, const std::string& name) {
  const auto r = adapter_recipe();
  const int64_t steps = run.steps > 0 ? run.steps : cell.budget.steps;
  TrainConfig config;
  config.model.checkpoint = run.model.string();
  config.parts = run.parts;
  for (size_t i = 0; i < run.kinds.size(); ++i) {
    SourceConfig source;
    source.path = source_of(run.kinds[i]).train.string();
    source.weight = run.shares.empty() ? 1.0 : run.shares.at(i);
    if (!run.labels.empty()) source.label = run.labels.at(i);
    config.data.sources.push_back(source);
  }
  config.data.sources.insert(config.data.sources.end(), run.extra.begin(), run.extra.end());
  config.data.length = r.length;
  config.train.steps = steps;
  config.train.batch = r.batch;
  config.train.seed = run.seed;
  config.train.log_every = std::max<int64_t>(1, steps / 20);
  config.optimizer.lr = run.rate;
  config.optimizer.weight_decay = 0.0;
  config.optimizer.clip = 1.0;
  config.schedule.name = "cosine";
  config.schedule.warmup = static_cast<double>(std::max<int64_t>(1, steps / 20));
  config.schedule.floor = 0.05;
  config.output.folder = (cell.folder / name).string();
  TrainOptions options;
  options.resume = TrainOptions::restart;
  CausalModel* model = nullptr;
  if (run.watch) {
    options.on_step = [&](int64_t step, int64_t of, double, int64_t) { run.watch(*model, step, of); };
  }
  auto trainer = std::make_unique<Trainer>(config, options);
  model = &trainer->model();
  if (run.watch) run.watch(*model, 0, steps);
  trainer->run();
  return trainer;
}

std::map<std::string, HeldOut> adapter_text(const std::vector<std::string>& kinds, Half half) {
  const auto r = adapter_recipe();
  Encoder encoder;
  encoder.tokenizer = Tokenizer::from_json(json(byte_tokenizer()), json(byte_tokenizer_config()), "the byte tokenizer");
  encoder.options.max_length = kDocumentTokens;
  DataConfig config;
  config.length = r.length;
  std::map<std::string, HeldOut> out;
  for (const auto& kind : kinds) {
    const auto data = Dataset::open(source_of(kind).held_out.string());
    std::vector<int64_t> own;
    for (int64_t i = half == Half::test ? 0 : 1; i < data->size(); i += 2) own.push_back(i);
    check(!own.empty(), "there is too little of {} to choose rates by", kind);
    out[kind] = held_out_rows(subset(data, own), encoder, config, 4096 / r.length, kHeldOutTokens, 1);
  }
  return out;
}

json measure_bits(CausalModel& model, const std::map<std::string, HeldOut>& text, const Edits& edits) {
  json by_kind = json::object();
  double bits = 0;
  for (const auto& [name, rows] : text) {
    by_kind[name] = evaluate(model, rows, torch::kCPU, nullptr, edits).loss / std::numbers::ln2;
    bits += by_kind[name].get<double>() / static_cast<double>(text.size());
  }
  return {{"bits", bits}, {"by_kind", by_kind}};
}

double exact_share(CausalModel& model, const std::vector<std::pair<std::string, std::string>>& questions) {
  check(!questions.empty(), "there are no questions");
  const torch::NoGradGuard frozen;
  size_t longest = 0;
  for (const auto& [prompt, answer] : questions) longest = std::max(longest, prompt.size() + answer.size());
  // What stands behind an answer is never seen before it.
  const auto n = static_cast<int64_t>(questions.size());
  auto ids = torch::zeros({n, static_cast<int64_t>(longest)}, torch::kInt64);
  for (int64_t i = 0; i < n; ++i) {
    const std::string text = questions[static_cast<size_t>(i)].first + questions[static_cast<size_t>(i)].second;
    for (size_t j = 0; j < text.size(); ++j) ids[i][static_cast<int64_t>(j)] = static_cast<unsigned char>(text[j]);
  }
  const bool training = model.is_training();
  model.eval();
  Pass pass;
  const auto best = model.forward(ids, pass).argmax(-1);
  model.train(training);
  int64_t right = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto& [prompt, answer] = questions[static_cast<size_t>(i)];
    const auto from = static_cast<int64_t>(prompt.size()), count = static_cast<int64_t>(answer.size());
    right += torch::equal(best[i].narrow(0, from - 1, count), ids[i].narrow(0, from, count)) ? 1 : 0;
  }
  return 100.0 * static_cast<double>(right) / static_cast<double>(n);
}

double thousand_trained(CausalModel& model) {
  int64_t n = 0;
  for (const auto& p : model.parameters())
    if (p.requires_grad()) n += p.numel();
  return static_cast<double>(n) / 1e3;
}

json tuned_rate(const StudyCell& cell, const std::string& name,
                const std::function<double(const StudyCell&, double)>& score) {
  const auto folder = cell.once("rate-" + name, [&](const fs::path& to) {
    StudyCell half = cell;
    half.seed = 0;
    half.budget.steps = std::max<int64_t>(1, cell.budget.steps / 2);
    half.folder = to / "runs";
    std::map<double, double> tried;
    std::string why;
    const auto attempt = [&](double rate) {
      double got = std::numeric_limits<double>::infinity();
      try {
        got = score(half, rate);
      } catch (const Error& e) {
        why = e.what();  // a rate at which gradients are no numbers any more is no candidate
      }
      tried[rate] = std::isfinite(got) ? got : 1e9;
      fs::remove_all(half.folder);
    };
    for (int64_t i = kFirst; i <= kLast; ++i) attempt(kRates[i]);
    const auto best = [&] {
      return std::min_element(tried.begin(), tried.end(),
                              [](const auto& a, const auto& b) { return a.second < b.second; })
          ->first;
    };
    constexpr int64_t count = std::size(kRates);
    for (int64_t i = kFirst - 1; i >= 0 && best() == kRates[i + 1]; --i) attempt(kRates[i]);
    for (int64_t i = kLast + 1; i < count && best() == kRates[i - 1]; ++i) attempt(kRates[i]);
    check(tried.at(best()) < 1e9, "{} does not learn at any rate. {}", name, why);
    json list = json::object();
    for (const auto& [rate, value] : tried) list[fmt::format("{}", rate)] = value;
    write_file(to / "rate.json", json{{"rate", best()}, {"tried", list}}.dump(1) + "\n");
  });
  return parse_json(read_text(folder / "rate.json"), "rate.json");
}

json tuned_rate(const StudyCell& cell, const std::string& name, const Adaptation& run) {
  return tuned_rate(cell, name, [&](const StudyCell& half, double rate) {
    Adaptation own = run;
    own.model = adapter_base(cell, 0);
    own.rate = rate;
    own.seed = kTuningSeed;
    own.watch = nullptr;
    const int64_t asked = run.steps > 0 ? run.steps : cell.budget.steps;
    own.steps = std::max<int64_t>(1, asked / 2);
    const auto trainer = adapt(half, own);
    return measure_bits(trainer->model(), adapter_text(run.kinds, Half::tuning))["bits"].get<double>();
  });
}

AdaptedArm adapted_arm(const StudyCell& cell, Adaptation run, const std::string& rated) {
  const json tuned = tuned_rate(cell, rated.empty() ? cell.arm : rated, run);
  run.model = adapter_base(cell, cell.seed);
  run.seed = cell.seed;
  run.rate = tuned.at("rate");
  AdaptedArm out;
  const std::clock_t start = std::clock();
  out.trainer = adapt(cell, run);
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  out.text = adapter_text(run.kinds, Half::test);
  out.values = measure_bits(out.trainer->model(), out.text);
  out.values["trained"] = thousand_trained(out.trainer->model());
  out.values["rate"] = run.rate;
  out.values["tried"] = tuned.at("tried");
  out.values["ms"] = 1e3 * seconds / static_cast<double>(run.steps > 0 ? run.steps : cell.budget.steps);
  return out;
}

std::map<std::string, torch::Tensor> expert_use(CausalModel& model, const std::map<std::string, HeldOut>& text) {
  std::map<std::string, torch::Tensor> out;
  trace_language(model, text, [&](const std::string&, const Trace::Record& r) {
    const auto chosen = r.routing.experts.masked_select(r.routing.experts >= 0);
    const auto now = torch::bincount(chosen, {}, r.experts > 0 ? r.experts : r.routing.scores.size(1));
    auto& n = out[fmt::format("{}.{}", r.site.block, r.site.site)];
    n = n.defined() ? n + now : now;
  });
  return out;
}

std::map<std::string, LinearImpl*> matrices_of(CausalModel& model) {
  std::map<std::string, LinearImpl*> out;
  static const std::regex matrix("layers\\.[0-9]+\\.(self_attn|mlp)\\.[a-z]+_proj");
  for (const auto& item : model.named_modules()) {
    const std::string name = parameter_name(item.key());
    auto* linear = dynamic_cast<LinearImpl*>(item.value().get());
    if (linear != nullptr && std::regex_match(name, matrix)) out[name] = linear;
  }
  check(!out.empty(), "the model has no matrices under the names that are expected");
  return out;
}

torch::Tensor adapter_tensor(const LinearImpl& matrix, const std::string& name) {
  for (const auto& a : matrix.attached()) {
    for (const auto& p : a.beside->named_parameters(false))
      if (p.key() == name) return p.value().detach().clone();
    for (const auto& p : a.beside->named_buffers(false))
      if (p.key() == name) return p.value().detach().clone();
  }
  fail("nothing called {} stands beside the matrix", name);
}

void write_changed(CausalModel& model, const fs::path& base, const fs::path& to, const json& parts,
                   const std::function<void(std::map<std::string, torch::Tensor>&)>& change) {
  const torch::NoGradGuard frozen;
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& stored : model.stored()) tensors[stored.name] = stored.value().detach();
  change(tensors);
  std::vector<StoredTensor> list;
  for (const auto& [name, t] : tensors) list.push_back({name, [t = t] { return t; }});
  fs::create_directories(to);
  json config = parse_json(read_text(base / "config.json"), "config.json");
  if (parts.is_null())
    config.erase("moiety");
  else
    config["moiety"]["parts"] = parts;
  write_file(to / "config.json", config.dump(2) + "\n");
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"})
    if (fs::exists(base / name)) fs::copy_file(base / name, to / name, fs::copy_options::overwrite_existing);
  write_stored(to, list, "f32");
}

std::shared_ptr<CausalModel> open_base_model(const fs::path& model) {
  auto out = load_causal(*Checkpoint::open(model.string()));
  out->eval();
  return out;
}

void Added::apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass&) {
  auto& y = outputs.at(0);
  y = y + delta_(x.reshape({-1, x.size(-1)})).view(y.sizes());
}

}  // namespace moiety
