#include "moiety/tasks/multiple_choice.h"

#include <torch/torch.h>
#include <utf8proc.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/tasks/scoring.h"

namespace moiety {
namespace {

/// What Python's str.rstrip() takes away.
bool is_space(int32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/// Bytes of `text` without the spaces at its end.
size_t stripped(const std::string& text) {
  size_t end = text.size();
  while (end > 0) {
    size_t start = end - 1;
    while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xc0) == 0x80) --start;
    utf8proc_int32_t c = 0;
    const auto used = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + start,
                                       static_cast<utf8proc_ssize_t>(end - start), &c);
    if (used != static_cast<utf8proc_ssize_t>(end - start) || !is_space(c)) break;
    end = start;
  }
  return end;
}

int64_t code_points(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

}  // namespace

ChoiceTokens encode_choice(const Tokenizer& tokenizer, std::string context, std::string continuation, int64_t bos) {
  ChoiceTokens out;
  if (context.empty()) {
    const auto start = tokenizer.bos() ? tokenizer.bos() : tokenizer.eos();
    check(start.has_value(), "a choice with an empty context needs a BOS or EOS token, and the tokenizer has neither");
    out.context = {*start};
    out.continuation = tokenizer.encode(continuation, false);
  } else {
    const size_t kept = stripped(context);
    continuation.insert(0, context, kept, std::string::npos);
    context.resize(kept);
    out.context = tokenizer.encode(context, false);
    auto whole = tokenizer.encode(context + continuation, false);
    const size_t skip = std::min(out.context.size(), whole.size());
    out.continuation.assign(whole.begin() + static_cast<ptrdiff_t>(skip), whole.end());
    if (bos >= 0) out.context.insert(out.context.begin(), bos);
    if (out.context.empty()) {  // the context was spaces only
      const auto start = tokenizer.bos() ? tokenizer.bos() : tokenizer.eos();
      check(start.has_value(),
            "a choice with an empty context needs a BOS or EOS token, and the tokenizer has neither");
      out.context = {*start};
    }
  }
  check(!out.continuation.empty(), "the choice '{}' has no tokens of its own behind its context", continuation);
  return out;
}

const std::vector<std::string>& choice_rules() {
  static const std::vector<std::string> rules = {"acc", "acc_norm", "acc_bytes", "acc_tokens", "acc_mutual_info"};
  return rules;
}

int64_t pick_choice(const std::vector<ChoiceScore>& scores, const std::string& rule) {
  const auto value = [&](const ChoiceScore& s) {
    if (rule == "acc") return s.logprob;
    if (rule == "acc_norm") return s.logprob / static_cast<double>(s.characters);
    if (rule == "acc_bytes") return s.logprob / static_cast<double>(s.bytes);
    if (rule == "acc_tokens") return s.logprob / static_cast<double>(s.tokens);
    check(rule == "acc_mutual_info", "unknown rule '{}'; known are {}", rule, fmt::join(choice_rules(), ", "));
    return s.logprob - s.unconditional;
  };
  int64_t best = 0;
  for (size_t i = 1; i < scores.size(); ++i)
    if (value(scores[i]) > value(scores[best])) best = static_cast<int64_t>(i);
  return best;
}

Accuracy accuracy(const std::string& rule, const std::vector<std::vector<ChoiceScore>>& scores,
                  const std::vector<ChoiceQuestion>& questions) {
  check(!questions.empty() && scores.size() == questions.size(),
        "accuracy needs one set of scores for each of at least one question");
  int64_t right = 0;
  for (size_t i = 0; i < questions.size(); ++i) right += pick_choice(scores[i], rule) == questions[i].answer;
  const double n = static_cast<double>(questions.size()), p = static_cast<double>(right) / n;
  return {rule, p, questions.size() < 2 ? 0.0 : std::sqrt(p * (1.0 - p) / (n - 1.0))};
}

std::vector<std::vector<ChoiceScore>> score_choices(CausalModel& model, const Tokenizer& tokenizer,
                                                    const std::vector<ChoiceQuestion>& questions,
                                                    const MultipleChoiceOptions& options,
                                                    const std::function<void(int64_t, int64_t)>& progress) {
  const bool wants_bos = options.bos == MultipleChoiceOptions::always ||
                         (options.bos == MultipleChoiceOptions::automatic && adds_bos(tokenizer));
  check(!wants_bos || tokenizer.bos().has_value(), "BOS was asked for, but the tokenizer has no BOS token");
  const int64_t bos = wants_bos ? *tokenizer.bos() : -1;

  struct Request {
    std::vector<int64_t> ids;
    int64_t continuation = 0;
    size_t question = 0, choice = 0;
    bool conditional = true;
  };
  const int64_t most = model.context_length();
  std::vector<Request> requests;
  std::vector<std::vector<ChoiceScore>> scores(questions.size());
  const auto add = [&](size_t q, size_t c, const std::string& context, bool conditional) {
    const std::string& choice = questions[q].choices[c];
    ChoiceTokens t;
    try {
      t = encode_choice(tokenizer, context, options.delimiter + choice, bos);
    } catch (const Error& e) {
      fail("question {}: {}", q + 1, e.what());
    }
    Request r;
    r.ids = std::move(t.context);
    r.continuation = static_cast<int64_t>(t.continuation.size());
    r.ids.insert(r.ids.end(), t.continuation.begin(), t.continuation.end());
    check(r.continuation <= most, "question {}: the choice '{}' has {} tokens, more than the model's context of {}",
          q + 1, choice, r.continuation, most);
    if (static_cast<int64_t>(r.ids.size()) > most + 1) r.ids.erase(r.ids.begin(), r.ids.end() - (most + 1));
    r.question = q;
    r.choice = c;
    r.conditional = conditional;
    requests.push_back(std::move(r));
  };
  for (size_t q = 0; q < questions.size(); ++q) {
    const auto& question = questions[q];
    check(!question.choices.empty(), "question {} has no choices", q + 1);
    check(question.answer >= 0 && question.answer < static_cast<int64_t>(question.choices.size()),
          "question {}: answer {} is not the number of one of its {} choices (from 0)", q + 1, question.answer,
          question.choices.size());
    scores[q].resize(question.choices.size());
    for (size_t c = 0; c < question.choices.size(); ++c) {
      check(!question.choices[c].empty(), "question {}: choice {} is empty", q + 1, c);
      add(q, c, question.context, true);
      if (options.mutual_info) add(q, c, "", false);
      scores[q][c].bytes = static_cast<int64_t>(question.choices[c].size());
      scores[q][c].characters = code_points(question.choices[c]);
    }
  }

  std::vector<size_t> order(requests.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return requests[a].ids.size() > requests[b].ids.size(); });
  const auto device = model.parameters().empty() ? torch::Device(torch::kCPU) : model.parameters().front().device();
  const auto total = static_cast<int64_t>(requests.size());
  if (progress) progress(0, total);
  for (int64_t from = 0; from < total;) {
    const auto width = static_cast<int64_t>(requests[order[from]].ids.size());
    const int64_t n = std::min(rows_that_fit(model, width, options.batch_size), total - from);
    auto batch = torch::zeros({n, width}, torch::kInt64), mask = torch::zeros({n, width}, torch::kBool);
    int64_t first = width;
    for (int64_t i = 0; i < n; ++i) {
      const auto& r = requests[order[from + i]];
      const auto size = static_cast<int64_t>(r.ids.size());
      std::copy(r.ids.begin(), r.ids.end(), batch.data_ptr<int64_t>() + i * width);
      std::fill_n(mask.data_ptr<bool>() + i * width, size, true);
      first = std::min(first, size - r.continuation - 1);
    }
    const auto result = score_tokens(model, batch.to(device), mask.to(device), first, true);
    for (int64_t i = 0; i < n; ++i) {
      const auto& r = requests[order[from + i]];
      const auto size = static_cast<int64_t>(r.ids.size());
      const float* logprob = result.logprob.data_ptr<float>() + i * (width - 1);
      const bool* greedy = result.greedy.data_ptr<bool>() + i * (width - 1);
      double sum = 0.0;
      bool all = true;
      for (int64_t t = size - r.continuation - 1; t < size - 1; ++t) {
        sum += logprob[t];
        all = all && greedy[t];
      }
      auto& score = scores[r.question][r.choice];
      if (r.conditional) {
        score.logprob = sum;
        score.greedy = all;
        score.tokens = r.continuation;
      } else {
        score.unconditional = sum;
      }
    }
    from += n;
    if (progress) progress(from, total);
  }
  return scores;
}

}  // namespace moiety
