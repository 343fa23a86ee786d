#include "moiety/tasks/perplexity.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "moiety/base/error.h"
#include "moiety/tasks/scoring.h"

namespace moiety {

double PerplexityResult::perplexity() const {
  return std::exp(nll / static_cast<double>(tokens));
}

double PerplexityResult::perplexity_stderr() const {
  if (tokens < 2) return 0.0;
  const double n = static_cast<double>(tokens), mean = nll / n;
  return perplexity() * std::sqrt(std::max(0.0, nll_squared / n - mean * mean) / (n - 1.0));
}

double PerplexityResult::bits_per_byte() const {
  return bytes == 0 ? 0.0 : nll / std::numbers::ln2 / static_cast<double>(bytes);
}

double PerplexityResult::bits_per_token() const {
  return nll / std::numbers::ln2 / static_cast<double>(tokens);
}

PerplexityResult& PerplexityResult::operator+=(const PerplexityResult& other) {
  text_tokens += other.text_tokens;
  tokens += other.tokens;
  bytes += other.bytes;
  windows += other.windows;
  nll += other.nll;
  nll_squared += other.nll_squared;
  return *this;
}

std::vector<PerplexityWindow> perplexity_windows(PerplexityOptions::Method method, int64_t tokens, int64_t context,
                                                 int64_t stride, bool bos) {
  std::vector<PerplexityWindow> out;
  if (method == PerplexityOptions::llama_cpp) {
    check(context >= 4, "context {} is too short for llama.cpp's method; at least 4", context);
    for (int64_t begin = 0; begin + context <= tokens; begin += context)
      out.push_back({begin, begin + context, begin + context / 2 + 1});
    return out;
  }
  check(context >= 1, "context {} must be at least 1", context);
  check(stride >= 1 && stride <= context, "stride {} must be from 1 to the context {}", stride, context);
  const int64_t before = bos ? 0 : 1;  // tokens of the text that a window needs before the first one it predicts
  int64_t scored = before;
  for (int64_t target = before; scored < tokens; target += stride) {
    const int64_t end = std::min(target + context, tokens);
    out.push_back({target - before, end, scored});
    scored = end;
  }
  return out;
}

PerplexityResult perplexity_of_ids(CausalModel& model, std::vector<int64_t> ids, int64_t bos,
                                   const std::vector<int64_t>& bytes_before, const PerplexityOptions& options,
                                   const std::function<void(int64_t, int64_t)>& progress) {
  const bool llama = options.method == PerplexityOptions::llama_cpp;
  const int64_t most = model.context_length();
  const int64_t context = options.context > 0 ? options.context : std::min<int64_t>(512, most);
  check(context <= most, "context {} is longer than the {} tokens of the model", context, most);
  const int64_t stride = options.stride > 0 ? options.stride : std::max<int64_t>(1, context / 2);
  const auto count = static_cast<int64_t>(ids.size());
  const auto windows = perplexity_windows(options.method, count, context, stride, bos >= 0);
  check(!windows.empty(), "the text has {} tokens: too few for {}", count,
        llama ? fmt::format("one window of {}", context) : std::string("anything to be predicted"));
  const int64_t lead = !llama && bos >= 0 ? 1 : 0;  // BOS stands before the window's tokens
  int64_t widest = 0;
  for (const auto& w : windows) widest = std::max(widest, w.end - w.begin + lead);
  // Decoding has one sequence.
  const int64_t rows = options.stepwise ? 1 : rows_that_fit(model, widest, options.batch_size);
  const auto device = model.parameters().empty() ? torch::Device(torch::kCPU) : model.parameters().front().device();

  PerplexityResult result;
  result.text_tokens = count;
  result.windows = static_cast<int64_t>(windows.size());
  if (progress) progress(0, result.windows);
  for (int64_t from = 0; from < result.windows; from += rows) {
    const int64_t n = std::min(rows, result.windows - from);
    auto batch = torch::zeros({n, widest}, torch::kInt64), mask = torch::zeros({n, widest}, torch::kBool);
    int64_t first = widest;
    for (int64_t r = 0; r < n; ++r) {
      const auto& w = windows[from + r];
      int64_t* row = batch.data_ptr<int64_t>() + r * widest;
      if (lead) row[0] = bos;
      std::copy(ids.begin() + w.begin, ids.begin() + w.end, row + lead);
      if (llama && bos >= 0) row[0] = bos;
      std::fill_n(mask.data_ptr<bool>() + r * widest, w.end - w.begin + lead, true);
      first = std::min(first, w.first - w.begin + lead - 1);
    }
    const auto scores = score_tokens(model, batch.to(device), mask.to(device), first, false, options.stepwise);
    for (int64_t r = 0; r < n; ++r) {
      const auto& w = windows[from + r];
      const float* logprob = scores.logprob.data_ptr<float>() + r * (widest - 1);
      for (int64_t t = w.first; t < w.end; ++t) {
        const double nll = -static_cast<double>(logprob[t - w.begin + lead - 1]);
        result.nll += nll;
        result.nll_squared += nll * nll;
      }
      result.tokens += w.end - w.first;
      if (!bytes_before.empty()) result.bytes += bytes_before[w.end] - bytes_before[w.first];
    }
    if (progress) progress(from + n, result.windows);
  }
  return result;
}

PerplexityResult perplexity(CausalModel& model, const std::shared_ptr<const Tokenizer>& tokenizer,
                            const std::string& text, const PerplexityOptions& options,
                            const std::function<void(int64_t, int64_t)>& progress) {
  const bool llama = options.method == PerplexityOptions::llama_cpp;
  const bool wants_bos =
      options.bos == PerplexityOptions::always || (options.bos == PerplexityOptions::automatic && adds_bos(*tokenizer));
  check(!wants_bos || tokenizer->bos().has_value(), "BOS was asked for, but the tokenizer has no BOS token");
  const int64_t bos = wants_bos ? *tokenizer->bos() : -1;
  std::string_view input = text;
  if (llama && input.ends_with('\n')) input.remove_suffix(1);
  auto ids = tokenizer->encode(input, false);
  const auto text_tokens = static_cast<int64_t>(ids.size());
  if (options.limit_tokens > 0 && text_tokens > options.limit_tokens)
    ids.resize(static_cast<size_t>(options.limit_tokens));

  // Bytes by a streaming decode: a character that several tokens make up counts for the last of them.
  std::vector<int64_t> bytes_before = {0};
  bytes_before.reserve(ids.size() + 2);
  DecodeStream stream(tokenizer, false);
  for (const int64_t id : ids)
    bytes_before.push_back(bytes_before.back() + static_cast<int64_t>(stream.push(id).size()));
  // Some decoders take a leading space away; the whole text is known exactly.
  if (static_cast<int64_t>(ids.size()) == text_tokens) bytes_before.back() = static_cast<int64_t>(input.size());

  if (llama && bos >= 0) {
    ids.insert(ids.begin(), bos);
    bytes_before.insert(bytes_before.begin(), 0);
  }
  auto result = perplexity_of_ids(model, std::move(ids), bos, bytes_before, options, progress);
  if (llama && bos >= 0) --result.text_tokens;
  return result;
}

}  // namespace moiety
