// LLaVA-MoLE: does one LoRA expert a token undo what a mixture of unlike data costs plain LoRA? On images and text, as
// in the paper, and on kinds of text.
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <map>
#include <numbers>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/dataset.h"
#include "moiety/models/image_tokens.h"
#include "moiety/moe/routing_counts.h"
#include "moiety/study/adapters.h"
#include "moiety/study/images.h"
#include "moiety/train/byte_tokenizer.h"
#include "moiety/train/language_task.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kExperts = 3, kRank = 8;
constexpr double kScale = 2.0, kShareOfQuestions = 0.25;
constexpr size_t kLead = 64;
constexpr int64_t kSide = 28, kPatch = 7;                    // 16 tokens an image
constexpr int64_t kImageRows = 16, kTextRows = 4;            // of a step
constexpr int64_t kImageSteps = 2;                           // times those of text
constexpr int64_t kShown = 500, kAsked = 50, kTunedOn = 50;  // images of a class: learned, measured, for rates
constexpr int64_t kTuningSeed = 1000;
const std::string kImage = "image-";
const char* const kQuestion = "\nWhat is on the picture? ";
const char* const kClothes[10] = {"T-shirt", "trousers", "pullover", "dress", "coat",
                                  "sandal",  "shirt",    "sneaker",  "bag",   "boot"};

const char* const kMonths[2][12] = {{"January", "February", "March", "April", "May", "June", "July", "August",
                                     "September", "October", "November", "December"},
                                    {"Januar", "Februar", "Marz", "April", "Mai", "Juni", "Juli", "August", "September",
                                     "Oktober", "November", "Dezember"}};

std::vector<std::string> mixed() {
  return {"python", "manual-de", "manual-ja"};
}

// A question whose answer depends on the text in front of it: English behind Python, German behind the German manual.
struct Question {
  std::string prompt, answer;
};
std::vector<Question> questions(size_t convention, bool held_out, int64_t count, uint64_t seed) {
  const std::string name = mixed()[convention];
  const auto sources = study_text().sources;
  const auto source = std::find_if(sources.begin(), sources.end(), [&](const auto& s) { return s.name == name; });
  const auto data = Dataset::open((held_out ? source->held_out : source->train).string());
  RandomStream draw(seed, "llava-mole." + name);
  std::vector<Question> out;
  while (static_cast<int64_t>(out.size()) < count) {
    const std::string text = data->get(static_cast<int64_t>(draw.below(static_cast<uint64_t>(data->size())))).text;
    const auto begins = [&](size_t i) { return (static_cast<unsigned char>(text[i]) & 0xc0) != 0x80; };
    if (text.size() < 4 * kLead) continue;
    size_t from = draw.below(text.size() - 2 * kLead), to = from + kLead;
    while (!begins(from)) ++from;
    while (!begins(to)) --to;
    const auto month = draw.below(12);
    out.push_back(
        {text.substr(from, to - from) + fmt::format("\nmonth {} is ", month + 1), kMonths[convention][month]});
  }
  return out;
}

SourceConfig question_source(const fs::path& folder, size_t convention, uint64_t seed) {
  std::string lines;
  for (const auto& q : questions(convention, false, 1500, seed))
    lines += json{{"text", q.prompt + q.answer + ".\n"}}.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  fs::create_directories(folder);
  const fs::path file = folder / fmt::format("questions-{}.jsonl", convention);
  write_file(file, lines);
  SourceConfig source;
  source.path = file.string();
  source.weight = kShareOfQuestions;
  return source;
}

json lora(const json& target, int64_t rank) {
  return {{"slug", "lora"},
          {"target", target},
          {"rank", rank},
          {"alpha", kScale * static_cast<double>(rank)},
          {"dropout", 0.05}};
}

json parts_of(const std::string& arm) {
  const json attention = {"q_proj", "k_proj", "v_proj", "o_proj"}, layer = {"gate_proj", "up_proj", "down_proj"};
  if (arm == "lora-wide") return json::array({lora(attention, kRank), lora(layer, kExperts * kRank + 1)});
  if (arm.rfind("mole", 0) != 0) return json::array({lora(attention, kRank), lora(layer, kRank)});
  json mole = {{"slug", "llava-mole"},
               {"target", layer},
               {"experts", kExperts},
               {"rank", kRank},
               {"alpha", kScale * static_cast<double>(kRank)},
               {"coef", 0.01}};
  if (arm == "mole-prob") mole["gate_weighting"] = "prob";
  if (arm == "mole-straight") mole["gate_weighting"] = "straight_through";
  return json::array({lora(attention, kRank), mole});
}

json measure_text(const StudyCell& cell) {
  const bool alone = cell.arm == "lora-alone";
  Adaptation run;
  run.parts = parts_of(cell.arm);
  run.kinds = alone ? std::vector<std::string>{"python"} : mixed();
  run.extra = {question_source(cell.folder / "text", 0, static_cast<uint64_t>(cell.seed))};
  if (!alone) run.extra.push_back(question_source(cell.folder / "text", 1, static_cast<uint64_t>(cell.seed)));
  if (cell.arm == "lora-twice") run.steps = 2 * cell.budget.steps;
  const auto arm = adapted_arm(cell, run);
  CausalModel& model = arm.trainer->model();
  json out = arm.values;
  out["a"] = out["by_kind"]["python"];
  if (!alone) {
    out["b"] = out["by_kind"]["manual-de"];
    out["c"] = out["by_kind"]["manual-ja"];
  } else {
    out.erase("bits");
  }
  for (const size_t convention : {0, 1}) {
    if (alone && convention == 1) continue;
    std::vector<std::pair<std::string, std::string>> asked;
    for (const auto& q : questions(convention, true, 96, 7)) asked.emplace_back(q.prompt, q.answer + ".");
    out[convention == 0 ? "english" : "german"] = exact_share(model, asked);
  }
  if (cell.arm.rfind("mole", 0) == 0) {
    double uneven = 0;
    json loads = json::object();
    for (const auto& [site, n] : expert_use(model, arm.text)) {
      const auto share = (n.to(torch::kFloat64) / n.to(torch::kFloat64).mean()).contiguous();
      loads[site] = std::vector<double>(share.data_ptr<double>(), share.data_ptr<double>() + share.numel());
      uneven = std::max(uneven, (share - 1.0).abs().max().item<double>());
    }
    out["uneven"] = 100.0 * uneven;
    out["loads"] = loads;
  }
  return out;
}

// Images with a question behind them and the name of what they show.
struct Asked {
  torch::Tensor images, ids, targets, mask, where;
  int64_t learned = 0;  // bytes of answers
};
Asked asked(const LabelledImages& data, const torch::Tensor& rows, int64_t tokens) {
  const std::string question = kQuestion;
  const auto labels = data.labels.index_select(0, rows);
  const auto n = rows.size(0), begin = tokens + static_cast<int64_t>(question.size());
  int64_t longest = 0;
  for (const char* name : kClothes) longest = std::max(longest, static_cast<int64_t>(std::string(name).size()) + 1);
  Asked out;
  out.images = data.images.index_select(0, rows);
  out.ids = torch::zeros({n, begin + longest}, torch::kInt64);
  out.targets = torch::full_like(out.ids, -100);
  out.mask = torch::zeros(out.ids.sizes(), torch::kBool);
  out.where = torch::zeros(out.ids.sizes(), torch::kBool);
  out.where.narrow(1, 0, tokens).fill_(true);
  for (int64_t i = 0; i < n; ++i) {
    const std::string text = question + kClothes[labels[i].item<int64_t>()] + ".";
    const auto end = tokens + static_cast<int64_t>(text.size());
    for (int64_t j = tokens; j < end; ++j)
      out.ids[i][j] = static_cast<int64_t>(static_cast<unsigned char>(text[static_cast<size_t>(j - tokens)]));
    out.targets[i].narrow(0, begin - 1, end - begin).copy_(out.ids[i].narrow(0, begin, end - begin));
    out.mask[i].narrow(0, 0, end).fill_(true);
    out.learned += end - begin;
  }
  return out;
}

torch::Tensor answer(CausalModel& model, ImageTokens& adaptor, const Asked& a, Pass& pass) {
  pass.mask = a.mask;
  place_vectors(pass, a.where, adaptor.forward(a.images).flatten(0, 1));
  return model.forward(a.ids, pass);
}

// Bits a byte of answers and the percent of them that are right from the first byte to the last.
struct Answers {
  double bits = 0, right = 0;
};
Answers score_answers(CausalModel& model, ImageTokens& adaptor, const LabelledImages& data, Trace* trace = nullptr) {
  const torch::NoGradGuard frozen;
  Answers out;
  const int64_t n = data.labels.size(0), at_once = 100;
  double learned = 0;
  for (int64_t at = 0; at < n; at += at_once) {
    const auto a = asked(data, torch::arange(at, std::min(n, at + at_once)), adaptor.tokens());
    Pass pass;
    pass.trace = trace;
    const auto logits = answer(model, adaptor, a, pass);
    out.bits += token_loss(logits, a.targets).item<double>() / std::numbers::ln2;
    learned += static_cast<double>(a.learned);
    out.right += ((logits.argmax(-1) == a.targets) | (a.targets == -100)).all(1).sum().item<double>();
  }
  out.bits /= learned;
  out.right *= 100.0 / static_cast<double>(n);
  return out;
}

std::unique_ptr<TrainingRows> python_rows(uint64_t seed) {
  Encoder encoder;
  encoder.tokenizer = Tokenizer::from_json(json(byte_tokenizer()), json(byte_tokenizer_config()), "the byte tokenizer");
  DataConfig config;
  config.length = adapter_recipe().length;
  SourceConfig source;
  source.path = study_sources({"python"}).at(0).train.string();
  config.sources.push_back(source);
  return open_data(config, encoder, seed).rows;
}

struct Answering {
  std::shared_ptr<CausalModel> model;
  std::shared_ptr<ImageTokens> adaptor;
};
// The adaptor and the parts of an arm learn; every arm sees the same images, all but one the same text besides.
Answering learn_answers(const std::string& arm, const fs::path& base, double rate, int64_t steps, int64_t seed) {
  static const auto shown = fashion_images("train", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 0, kShown);
  torch::manual_seed(static_cast<uint64_t>(seed));
  Answering out;
  const auto checkpoint = Checkpoint::open(base.string());
  json config = checkpoint->config();
  config["moiety"]["parts"] = parts_of(arm);
  LoadOptions options;
  options.dtype = "f32";
  options.trainable = options.frozen_base = true;
  out.model = load_causal(*checkpoint, config, options);
  out.adaptor = std::make_shared<ImageTokens>(kSide, 1, kPatch, adapter_recipe().hidden);
  auto slots = slots_at(*out.model, rate);
  for (const auto& p : out.adaptor->named_parameters()) {
    Slot slot;
    slot.name = "image_tokens." + p.key();
    slot.parameter = p.value();
    slot.lr = rate;
    slots.push_back(slot);
  }
  DrawnRows rows(shown.labels.size(0), static_cast<uint64_t>(seed), "llava-mole.images");
  const auto text = arm == "lora-alone" ? nullptr : python_rows(static_cast<uint64_t>(seed));
  learn_by(*out.model, std::move(slots), steps, [&](Pass& pass) {
    const auto a = asked(shown, rows.next(kImageRows), out.adaptor->tokens());
    auto sum = token_loss(answer(*out.model, *out.adaptor, a, pass), a.targets);
    if (!text) return sum / static_cast<double>(a.learned);
    const MicroBatch m = text->next(kTextRows);
    Pass other;
    other.training = true;
    set_rows(other, m);
    sum = sum + token_loss(out.model->forward(m.ids, other), m.targets);
    // The balance loss is a mean over samples, of both passes.
    const double all = kImageRows + kTextRows;
    for (auto& [name, value] : pass.losses) value = value * (kImageRows / all);
    for (auto& [name, value] : other.losses) pass.add_loss(name, value * (kTextRows / all));
    return sum / static_cast<double>(a.learned + m.learned);
  });
  return out;
}

json measure_images(const StudyCell& cell) {
  const std::string arm = cell.arm.substr(kImage.size());
  const bool alone = arm == "lora-alone";
  const std::vector<int64_t> classes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  const json tuned = tuned_rate(cell, cell.arm, [&](const StudyCell& half, double rate) {
    const auto a = learn_answers(arm, adapter_base(cell, 0), rate, kImageSteps * half.budget.steps, kTuningSeed);
    const double bits = score_answers(*a.model, *a.adaptor, fashion_images("train", classes, kShown, kTunedOn)).bits;
    if (alone) return bits;
    return (bits + measure_bits(*a.model, adapter_text({"python"}, Half::tuning))["bits"].get<double>()) / 2.0;
  });
  const double rate = tuned.at("rate");
  const int64_t steps = kImageSteps * cell.budget.steps;
  const std::clock_t start = std::clock();
  const auto a = learn_answers(arm, adapter_base(cell, cell.seed), rate, steps, cell.seed);
  json out{{"rate", rate}, {"tried", tuned.at("tried")}};
  out["ms"] = 1e3 * static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC / static_cast<double>(steps);
  out["trained"] = thousand_trained(*a.model) + static_cast<double>(parameter_count(*a.adaptor)) / 1e3;
  std::map<std::string, std::map<std::string, RoutingCounts>> loads;  // of images and text, by router
  std::map<std::string, RoutingCounts> both;
  std::string domain = "images";
  Trace trace;
  trace.on_record = [&](const Trace::Record& r) {
    const std::string site = fmt::format("{}.{}", r.site.block, r.site.site);
    loads[domain][site].add(r, r.real);
    both[site].add(r, r.real);
  };
  const auto scored = score_answers(*a.model, *a.adaptor, fashion_images("t10k", classes, 0, kAsked), &trace);
  out["answers"] = scored.right;
  out["answer_bits"] = scored.bits;
  const auto text = adapter_text({"python"}, Half::test);
  if (!alone) out["a"] = measure_bits(*a.model, text)["bits"];
  domain = "text";
  trace_language(*a.model, text, [&](const std::string&, const Trace::Record& r) { trace.on_record(r); });
  const auto list = [](const torch::Tensor& t) {
    const auto c = t.to(torch::kFloat64).contiguous();
    return std::vector<double>(c.data_ptr<double>(), c.data_ptr<double>() + c.numel());
  };
  double uneven = 0;
  for (const auto& [site, n] : both) {
    const auto share = n.share().to(torch::kFloat64) * static_cast<double>(kExperts);
    uneven = std::max(uneven, (share - 1.0).abs().max().item<double>());
  }
  for (const auto& [name, sites] : loads)
    for (const auto& [site, n] : sites) out["loads"][name][site] = list(n.share());
  if (!both.empty()) out["uneven"] = 100.0 * uneven;
  return out;
}

json measure(const StudyCell& cell) {
  return cell.arm.rfind(kImage, 0) == 0 ? measure_images(cell) : measure_text(cell);
}

// A half by the rule: what a mixture costs LoRA in `metric`, and what experts recover of it.
struct HalfVerdict {
  StudyOutcome::Verdict verdict = StudyOutcome::inconclusive;
  double recovered = 0;
};
HalfVerdict judge_half(const StudyTable& t, const std::string& front, const std::string& experts,
                       const std::string& metric, const std::vector<std::string>& others) {
  const auto alone = t.values(front + "lora-alone", metric), mix = t.values(front + "lora", metric),
             mole = t.values(front + experts, metric);
  bool gap = !mix.empty(), no_gap = !mix.empty(), no_gain = !mix.empty(), kept = true;
  HalfVerdict out;
  for (size_t i = 0; i < mix.size(); ++i) {
    gap = gap && mix[i] > alone.at(i);
    no_gap = no_gap && mix[i] <= alone.at(i);
    no_gain = no_gain && mole.at(i) >= mix[i];
    out.recovered += 100.0 * (mix[i] - mole.at(i)) / (mix[i] - alone.at(i)) / static_cast<double>(mix.size());
  }
  for (const auto& other : others) kept = kept && !t.difference(front + experts, front + "lora", other).higher();
  if (mix.size() < 2) return out;
  out.verdict = gap && out.recovered >= 50.0 && kept ? StudyOutcome::reproduced
                : no_gap || no_gain                  ? StudyOutcome::not_reproduced
                                                     : StudyOutcome::inconclusive;
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const HalfVerdict images = judge_half(t, kImage, "mole-straight", "answer_bits", {"a"}),
                    text = judge_half(t, "", "mole", "a", {"b", "c"});
  const auto on_b = t.difference("mole", "lora", "b"), on_c = t.difference("mole", "lora", "c"),
             all = t.difference("mole", "lora", "bits"), wide = t.difference("mole", "lora-wide", "bits"),
             twice = t.difference("mole", "lora-twice", "bits"), prob = t.difference("mole-prob", "lora", "bits");
  const auto row = [&](const std::string& arm) {
    return t.has(kImage + arm) ? fmt::format("{:.1f} % ({:.4f} bits a byte)", t.mean(kImage + arm, "answers"),
                                             t.mean(kImage + arm, "answer_bits"))
                               : std::string("not measured");
  };
  StudyOutcome o;
  o.verdict = images.verdict == StudyOutcome::not_reproduced ? StudyOutcome::not_reproduced
              : images.verdict == StudyOutcome::reproduced && text.verdict == StudyOutcome::reproduced
                  ? StudyOutcome::reproduced
                  : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Images: of the answers LoRA has {} right when it learns images alone and {} with text besides; one expert a "
      "token with the gradient of probabilities {}, as released {}. Of the gap in bits it recovers {:.0f} %; on the "
      "text "
      "against LoRA: {}. The share of an expert in a layer is off even by up to {:.0f} % (as released {:.0f} %), image "
      "and prompt tokens included; a step takes {:.2f} times LoRA's. By itself this half is {}. ",
      row("lora-alone"), row("lora"), row("mole-straight"), row("mole"), images.recovered,
      t.difference(kImage + "mole-straight", kImage + "lora", "a").text(), t.mean(kImage + "mole-straight", "uneven"),
      t.mean(kImage + "mole", "uneven"), t.mean(kImage + "mole-straight", "ms") / t.mean(kImage + "lora", "ms"),
      to_string(images.verdict));
  o.reason += fmt::format(
      "Text: on Python LoRA reaches {:.3f} bits a byte when it learns Python alone and {:.3f} on the mixture; one "
      "expert a token {:.3f}: {:.0f} % of the gap. Against LoRA of the active rank, on the German manual: {}; on the "
      "Japanese: {}; all three: {}; times the probability: {}. Against LoRA of all ranks: {}; against LoRA on twice "
      "the steps: {}. Months by their convention: {:.0f} % and {:.0f} % right, LoRA {:.0f} % and {:.0f} %. The share "
      "of an expert in a layer is off even by up to {:.0f} %; a step takes {:.2f} times LoRA's. By itself this half "
      "is {}.{}",
      t.mean("lora-alone", "a"), t.mean("lora", "a"), t.mean("mole", "a"), text.recovered, on_b.text(), on_c.text(),
      all.text(), prob.text(), wide.text(), twice.text(), t.mean("mole", "english"), t.mean("mole", "german"),
      t.mean("lora", "english"), t.mean("lora", "german"), t.mean("mole", "uneven"),
      t.mean("mole", "ms") / t.mean("lora", "ms"), to_string(text.verdict),
      t.values("lora", "a").size() < 2 ? " One seed decides nothing." : "");
  o.headline = fmt::format(
      "images: {:.1f} % of answers right (LoRA {:.1f} %, on images alone {:.1f} %); text: {:.0f} % of what the mixture "
      "costs LoRA on Python recovered",
      t.mean(kImage + "mole-straight", "answers"), t.mean(kImage + "lora", "answers"),
      t.mean(kImage + "lora-alone", "answers"), text.recovered);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "On Tiny LVLM-eHub LoRA falls from 306.3 to 295.8 when documents and biomedical data are mixed in; with one "
      "expert "
      "a token the score stays, and is above LoRA on twice the samples.";
  s.setup =
      adapter_setup() +
      fmt::format(
          ". All arms have LoRA of rank 8 beside the matrices of attention; beside the feed-forward layer stands LoRA "
          "or three experts of rank 8 with one router a layer. Images: {} of each of Fashion-MNIST's ten classes are "
          "{} patches each through one matrix that learns, in front of a question, and the answer is the name of the "
          "class; {} of them a step, and in a mixture {} rows of Python besides, so that all arms see the same images; "
          "{} steps ({} in a short run), rates by the mean of bits a byte of answers and of Python; measured on {} "
          "images of the test set. Text: the mixture is Python, the German and the Japanese manual, and months by "
          "number behind lines of the first two, to be named in English behind Python and in German behind German",
          kShown, (kSide / kPatch) * (kSide / kPatch), kImageRows, kTextRows, kImageSteps * 150, kImageSteps * 24,
          10 * kAsked) +
      ".";
  s.arms = {
      {"image-lora-alone", "images: LoRA of rank 8, on images alone"},
      {"image-lora", "images: LoRA of rank 8, on images and text"},
      {"image-mole-straight", "images: three experts of rank 8, one a token, weight 1, the router learns of the loss"},
      {"image-mole", "images: the same without that gradient: LLaVA-MoLE as released", false},
      {"lora-alone", "LoRA of rank 8, on Python and its questions alone"},
      {"lora", "LoRA of rank 8, on the mixture: the active rank"},
      {"mole", "three experts of rank 8, one a token, weight 1: LLaVA-MoLE as released"},
      {"mole-prob", "the same, times the probability", false},
      {"lora-wide", "LoRA of rank 25 beside the feed-forward layer: the trained parameters of the experts", false},
      {"lora-twice", "LoRA of rank 8, twice the steps", false}};
  s.metrics = {{"answer_bits", "answers, bits a byte", 4},
               {"answers", "right, %", 1},
               {"a", "Python, bits a byte", 4},
               {"b", "German", 4},
               {"c", "Japanese", 4},
               {"english", "months, %", 1},
               {"german", "Monate, %", 1},
               {"uneven", "unevenness, %", 1},
               {"trained", "thousand trained", 1},
               {"rate", "learning rate", 4},
               {"ms", "ms a step", 1}};
  s.rule =
      "A half is reproduced: on every seed LoRA on the mixture is worse than LoRA on its first kind alone (images: "
      "bits a byte of answers; text: of Python), experts recover half of that gap or more on average, and are not "
      "clearly worse on the other kinds; not reproduced: the mixture costs LoRA nothing on any seed, or experts gain "
      "nothing on the first kind on any; else, and with one seed, inconclusive. On images these are the experts whose "
      "router learns of the loss. Together: not reproduced when the half on images is not, which is the paper's "
      "claim; reproduced when both halves are; else inconclusive.";
  s.full = {.seeds = 3, .steps = 150};
  s.brief = {.seeds = 1, .steps = 24};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    json out = adapter_settings();
    out["images"] = {kPatch, kImageRows, kTextRows, kImageSteps, kShown, kAsked, kTunedOn};
    return out;
  };
  return s;
}

const RegisterStudy registered("llava-mole", "LLaVA-MoLE: one LoRA expert a token against conflicts of data",
                               "what a mixture of data costs LoRA, and how much of it experts recover", study);

}  // namespace
}  // namespace moiety
