#include "moiety/decode/generator.h"

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <set>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One id or a list of ids; nothing when the key is absent or null.
std::vector<int64_t> ids_of(const nlohmann::json& config, const char* key, const char* file) {
  std::vector<int64_t> ids;
  if (!config.is_object() || !config.contains(key) || config[key].is_null()) return ids;
  const auto& value = config[key];
  const auto add = [&](const nlohmann::json& id) {
    check(id.is_number_integer(), "{} of {} is {} but must be a token id or a list of them", key, file, value.dump());
    ids.push_back(id.get<int64_t>());
  };
  if (value.is_array())
    for (const auto& id : value) add(id);
  else
    add(value);
  return ids;
}

template <class T>
void read(const nlohmann::json& config, const char* key, T& out) {
  if (!config.is_object() || !config.contains(key) || config[key].is_null()) return;
  const auto& value = config[key];
  if constexpr (std::is_same_v<T, bool>)
    check(value.is_boolean(), "{} of generation_config.json is {} but must be true or false", key, value.dump());
  else
    check(value.is_number(), "{} of generation_config.json is {} but must be a number", key, value.dump());
  out = value.get<T>();
}

// Control tokens that end a turn or a text in the families whose GGUF files name only one end id.
constexpr std::array kEnds = {"<|im_end|>",
                              "<|eot_id|>",
                              "<|end_of_text|>",
                              "<|eom_id|>",
                              "<end_of_turn>",
                              "<|end|>",
                              "<|endoftext|>",
                              "<|end_of_turn|>",
                              "<|return|>",
                              "<|call|>",
                              "<|end_of_role|>",
                              "<eos>",
                              "</s>",
                              "<｜end▁of▁sentence｜>",
                              "<|eos|>"};

}  // namespace

GenerationDefaults GenerationDefaults::of(const Checkpoint& checkpoint, const Tokenizer& tokenizer) {
  GenerationDefaults defaults;
  const auto& config = checkpoint.generation_config();
  bool sample = false;
  read(config, "do_sample", sample);
  auto& s = defaults.sampler;
  s.greedy = !sample;
  s.top_k = 50;
  read(config, "temperature", s.temperature);
  read(config, "top_k", s.top_k);
  read(config, "top_p", s.top_p);
  read(config, "min_p", s.min_p);
  read(config, "typical_p", s.typical_p);
  read(config, "repetition_penalty", s.repetition_penalty);
  int64_t longest = -1;
  read(config, "max_new_tokens", longest);
  if (longest > 0) defaults.max_new_tokens = longest;

  std::set<int64_t> eos;
  const auto add = [&](const std::vector<int64_t>& ids) { eos.insert(ids.begin(), ids.end()); };
  add(ids_of(config, "eos_token_id", "generation_config.json"));
  if (eos.empty()) {
    add(ids_of(checkpoint.config(), "eos_token_id", "config.json"));
    if (const auto id = tokenizer.eos()) eos.insert(*id);
  }
  if (const auto gguf = checkpoint.gguf()) {
    for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"})
      if (const auto id = gguf->integer(key)) eos.insert(*id);
    for (const char* name : kEnds)
      if (const auto id = tokenizer.id(name); id && tokenizer.is_special(*id)) eos.insert(*id);
  }
  defaults.eos.assign(eos.begin(), eos.end());
  return defaults;
}

std::string to_string(Finish finish) {
  switch (finish) {
    case Finish::eos:
      return "eos";
    case Finish::stop:
      return "stop";
    case Finish::length:
      return "length";
    case Finish::context:
      return "context";
    case Finish::cancelled:
      return "cancelled";
  }
  return "unknown";
}

double GenerationStats::prompt_rate() const {
  return prompt_seconds > 0.0 ? static_cast<double>(prompt_tokens - reused_tokens) / prompt_seconds : 0.0;
}

double GenerationStats::decode_rate() const {
  return decode_seconds > 0.0 ? static_cast<double>(decode_tokens) / decode_seconds : 0.0;
}

nlohmann::ordered_json GenerationStats::json() const {
  return {{"prompt_tokens", prompt_tokens},
          {"reused_tokens", reused_tokens},
          {"generated_tokens", generated_tokens},
          {"prompt_seconds", prompt_seconds},
          {"decode_seconds", decode_seconds},
          {"model_seconds", model_seconds},
          {"first_token_seconds", first_token_seconds},
          {"prompt_tokens_per_second", prompt_rate()},
          {"decode_tokens_per_second", decode_rate()}};
}

std::string GenerationStats::summary() const {
  return fmt::format(
      "prompt {} tokens{} in {:.2f} s ({:.1f}/s), generated {} tokens in {:.2f} s ({:.1f}/s), first token after {:.2f} "
      "s",
      prompt_tokens, reused_tokens > 0 ? fmt::format(" ({} from the cache)", reused_tokens) : "", prompt_seconds,
      prompt_rate(), generated_tokens, decode_seconds, decode_rate(), first_token_seconds);
}

Row::Row(const Request& request, std::shared_ptr<const Tokenizer> tokenizer, const std::vector<int64_t>& eos,
         int64_t context_length)
    : request_(request),
      eos_(eos),
      stream_(tokenizer, request.skip_special),
      stops_(request.stop),
      sampler_(request.sampler, RandomStream(request.seed, "decode")),
      room_(context_length - static_cast<int64_t>(request.prompt.size())) {
  check(!request.prompt.empty(),
        "the prompt has no tokens: give some text, or let the tokenizer add its beginning token");
  check(request.max_tokens >= -1, "max_tokens is {} but must be 0 or more, or -1 for as many as the context holds",
        request.max_tokens);
  check(room_ >= 0, "the prompt has {} tokens but the model's context is {}: shorten it", request.prompt.size(),
        context_length);
  sampler_.see_prompt(request.prompt);
  // Some decoders treat the first token of a text in a special way: the stream begins inside the prompt, and what that
  // yields is dropped.
  constexpr size_t kLead = 8;
  const size_t from = request.prompt.size() > kLead ? request.prompt.size() - kLead : 0;
  DecodeStream ahead(tokenizer, request.skip_special);
  for (size_t i = from; i < request.prompt.size(); ++i) {
    stream_.push(request.prompt[i]);
    ahead.push(request.prompt[i]);
  }
  // What it still holds of the prompt is dropped when it comes, except a character that only the answer completes.
  const std::string held = ahead.flush();
  if (held.find("\xEF\xBF\xBD") == std::string::npos) lead_ = held.size();
  if (request.max_tokens == 0) end(Finish::length);
}

int64_t Row::choose(std::span<float> logits) {
  Chosen chosen;
  if (request_.logprobs >= 0) {
    const double total = log_sum_exp(logits);
    for (const auto& [id, logit] : top(logits, request_.logprobs)) chosen.top.emplace_back(id, logit - total);
    const std::vector<float> raw(logits.begin(), logits.end());
    chosen.id = sampler_.sample(logits);
    chosen.logprob = raw[static_cast<size_t>(chosen.id)] - total;
    out_.logprobs.push_back(chosen);
  } else {
    chosen.id = sampler_.sample(logits);
  }
  sampler_.accept(chosen.id);
  return chosen.id;
}

std::string Row::fresh(std::string text) {
  const size_t drop = std::min(lead_, text.size());
  lead_ -= drop;
  return text.substr(drop);
}

std::string Row::end(Finish reason) {
  over_ = true;
  out_.finish = reason;
  std::string text;
  if (reason != Finish::stop) {
    text = stops_.push(fresh(stream_.flush()));
    if (stops_.stopped()) {
      out_.finish = Finish::stop;
      out_.stop = stops_.found();
    } else {
      text += stops_.flush();
    }
  }
  out_.text += text;
  return text;
}

std::string Row::finish(Finish reason) {
  return over_ ? std::string() : end(reason);
}

std::string Row::accept(int64_t id) {
  check(!over_, "a row that is over takes no more tokens");
  out_.ids.push_back(id);
  --room_;
  if (!request_.ignore_eos && std::find(eos_.begin(), eos_.end(), id) != eos_.end()) return end(Finish::eos);
  std::string text = stops_.push(fresh(stream_.push(id)));
  out_.text += text;
  if (stops_.stopped()) {
    out_.stop = stops_.found();
    end(Finish::stop);
  } else if (request_.max_tokens >= 0 && static_cast<int64_t>(out_.ids.size()) >= request_.max_tokens) {
    text += end(Finish::length);
  } else if (room_ <= 0) {
    text += end(Finish::context);
  }
  return text;
}

std::vector<Completion> Generator::run(Steps& steps, const std::vector<Request>& requests, const OnPiece& on_piece) {
  check(!requests.empty(), "there is nothing to generate: give at least one prompt");
  stats_ = {};
  const auto start = Clock::now();
  std::vector<std::unique_ptr<Row>> rows;
  std::map<std::vector<int64_t>, int64_t> first;  // prompt -> row of the prefill
  std::vector<std::vector<int64_t>> prompts;
  std::vector<int64_t> source;
  for (const Request& request : requests) {
    rows.push_back(std::make_unique<Row>(request, tokenizer_, eos_, steps.context_length()));
    const auto [it, fresh] = first.try_emplace(request.prompt, static_cast<int64_t>(prompts.size()));
    if (fresh) {
      prompts.push_back(request.prompt);
      stats_.prompt_tokens += static_cast<int64_t>(request.prompt.size());
    }
    source.push_back(it->second);
  }

  torch::Tensor logits = steps.restart(prompts, &stats_.reused_tokens).detach().to(torch::kCPU);
  stats_.prompt_seconds = since(start);
  std::vector<size_t> active;  // request of every row of the batch
  std::vector<int64_t> keep;
  for (size_t i = 0; i < rows.size(); ++i)
    if (!rows[i]->over()) {
      active.push_back(i);
      keep.push_back(source[i]);
    }
  const auto narrow = [&] {
    // The identity is common and would copy the cache.
    bool same = keep.size() == static_cast<size_t>(logits.size(0));
    for (size_t i = 0; same && i < keep.size(); ++i) same = keep[i] == static_cast<int64_t>(i);
    if (same || keep.empty()) return;
    steps.select(keep);
    logits = logits.index_select(0, torch::tensor(keep, torch::kInt64));
  };
  narrow();

  auto decode_start = Clock::now();
  bool first_token = true;
  while (!active.empty()) {
    logits = logits.to(torch::kFloat32).contiguous().clone();
    const auto vocabulary = static_cast<size_t>(logits.size(1));
    std::vector<std::vector<int64_t>> next;
    keep.clear();
    std::vector<size_t> still;
    for (size_t b = 0; b < active.size(); ++b) {
      Row& row = *rows[active[b]];
      const int64_t id = row.choose({logits.data_ptr<float>() + b * vocabulary, vocabulary});
      std::string text = row.accept(id);
      ++stats_.generated_tokens;
      if (first_token) {
        stats_.first_token_seconds = since(start);
      } else {
        ++stats_.decode_tokens;
      }
      if (on_piece && !on_piece({active[b], id, text, row.over()}) && !row.over()) {
        // What was held back is part of the answer: show it.
        const std::string rest = row.finish(Finish::cancelled);
        if (!rest.empty()) on_piece({active[b], id, rest, true});
      }
      if (row.over()) continue;
      still.push_back(active[b]);
      keep.push_back(static_cast<int64_t>(b));
      next.push_back({id});
    }
    if (first_token) decode_start = Clock::now();
    first_token = false;
    stats_.decode_seconds = since(decode_start);
    active = std::move(still);
    if (active.empty()) break;
    narrow();
    const auto step = Clock::now();
    logits = steps.feed(next).detach().to(torch::kCPU);
    stats_.model_seconds += since(step);
  }
  std::vector<Completion> completions;
  for (auto& row : rows) completions.push_back(row->take());
  return completions;
}

}  // namespace moiety
