#include "moiety/io/examples.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "moiety/base/error.h"

namespace moiety {
using Json = nlohmann::ordered_json;

namespace {

size_t common(std::span<const int64_t> a, std::span<const int64_t> b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

void learn(Example& e, size_t begin, size_t end) {
  for (size_t i = begin; i < std::min(end, e.ids.size()); ++i) e.loss[i] = 1;
}

void add_eos(Example& e, const Tokenizer& tokenizer, const EncodeOptions& options) {
  if (!options.add_eos || !tokenizer.eos()) return;
  if (!e.ids.empty() && e.ids.back() == *tokenizer.eos()) {
    e.loss.back() = 1;
    return;
  }
  e.ids.push_back(*tokenizer.eos());
  e.loss.push_back(1);
}

Example encode_completion(const std::string& prompt, const std::string& completion, const Tokenizer& tokenizer,
                          const EncodeOptions& options) {
  Example e;
  e.ids = tokenizer.encode(prompt + completion, options.add_special);
  e.loss.assign(e.ids.size(), 0);
  const auto head = tokenizer.encode(prompt, options.add_special);
  // A post-processor may close the text with tokens of its own; the common beginning leaves them out.
  learn(e,
        prompt.empty() && tokenizer.bos() && !e.ids.empty() && e.ids[0] == *tokenizer.bos() ? 1 : common(head, e.ids),
        e.ids.size());
  add_eos(e, tokenizer, options);
  return e;
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n"), end = text.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

Example encode_chat(const Sample& sample, const Tokenizer& tokenizer, const ChatTemplate* chat_template,
                    const EncodeOptions& options) {
  check(chat_template != nullptr, "{}: a chat needs a chat template, and this model has none", sample.where);
  const Json special = special_tokens(tokenizer);
  const auto context = [&](size_t count, bool prompt) {
    Json messages = Json::array();
    for (size_t i = 0; i < count; ++i) messages.push_back(sample.messages[i]);
    return chat_context(messages, prompt, special, sample.tools, options.template_variables);
  };
  const auto encode = [&](std::string_view text) { return tokenizer.encode(text, false); };
  const size_t count = sample.messages.size();
  size_t last = count;
  for (size_t i = 0; i < count; ++i)
    if (sample.messages[i]["role"] == "assistant") last = i;
  Example e;
  if (chat_template->marks_generation()) {
    const auto marked = chat_template->render_marked(context(count, false));
    e.ids = encode(marked.text);
    e.loss.assign(e.ids.size(), 0);
    const std::string_view text = marked.text;
    for (size_t i = 0; i < marked.generation.size(); ++i) {
      if (options.last_answer_only && i + 1 < marked.generation.size()) continue;
      const auto [begin, end] = marked.generation[i];
      learn(e, common(encode(text.substr(0, begin)), e.ids),
            end == text.size() ? e.ids.size() : common(encode(text.substr(0, end)), e.ids));
    }
    return e;
  }
  const std::string text = chat_template->render(context(count, false));
  e.ids = encode(text);
  e.loss.assign(e.ids.size(), 0);
  size_t searched = 0;
  for (size_t i = 0; i < count; ++i) {
    if (sample.messages[i]["role"] != "assistant" || (options.last_answer_only && i != last)) continue;
    const std::string before = chat_template->render(context(i, true));
    size_t begin = common(encode(before), e.ids);
    size_t end = i + 1 == count ? e.ids.size() : common(encode(chat_template->render(context(i + 1, false))), e.ids);
    const Json& content = sample.messages[i].value("content", Json());
    std::string answer = content.is_string() ? content.get<std::string>() : "";
    if (const size_t think = answer.rfind("</think>"); think != std::string::npos) answer = answer.substr(think + 8);
    answer = trimmed(answer);
    const auto between = std::span<const int64_t>(e.ids).subspan(begin, end > begin ? end - begin : 0);
    if (end <= begin || tokenizer.decode(between).find(answer) == std::string::npos) {
      // Some templates drop the reasoning of earlier answers: find the answer's own text instead, behind all before it.
      const auto same = std::mismatch(before.begin(), before.end(), text.begin(), text.end()).first - before.begin();
      searched = std::max(searched, static_cast<size_t>(same));
      const size_t found = answer.empty() ? std::string::npos : text.find(answer, searched);
      check(
          found != std::string::npos,
          "{}: the chat template writes message {} differently when others follow, so what is to be learned cannot be "
          "found: learn the last answer only, or use a template with generation blocks",
          sample.where, i + 1);
      begin = std::max(begin, common(encode(std::string_view(text).substr(0, found)), e.ids));
      end = common(encode(std::string_view(text).substr(0, found + answer.size())), e.ids);
      if (end < e.ids.size() && tokenizer.is_special(e.ids[end])) ++end;
      searched = found + answer.size();
    }
    learn(e, begin, end);
  }
  return e;
}

}  // namespace

Json special_tokens(const Tokenizer& tokenizer) {
  Json out = Json::object();
  const auto add = [&](const char* name, const std::optional<int64_t>& id) {
    if (id) out[name] = tokenizer.piece(*id);
  };
  add("bos_token", tokenizer.bos());
  add("eos_token", tokenizer.eos());
  add("pad_token", tokenizer.pad());
  add("unk_token", tokenizer.unk());
  return out;
}

Example encode_example(const Sample& sample, const Tokenizer& tokenizer, const ChatTemplate* chat_template,
                       const EncodeOptions& options) {
  Example e;
  switch (sample.kind) {
    case SampleKind::text:
      e.ids = tokenizer.encode(sample.text, options.add_special);
      e.loss.assign(e.ids.size(), 1);
      if (!e.ids.empty() && tokenizer.bos() && e.ids[0] == *tokenizer.bos()) e.loss[0] = 0;
      add_eos(e, tokenizer, options);
      break;
    case SampleKind::completion:
      e = encode_completion(sample.prompt, sample.completion, tokenizer, options);
      break;
    case SampleKind::choice:
      check(sample.answer >= 0 && sample.answer < static_cast<int64_t>(sample.choices.size()),
            "{}: this question has no answer to learn", sample.where);
      e = encode_completion(sample.prompt, " " + sample.choices[static_cast<size_t>(sample.answer)], tokenizer,
                            options);
      break;
    case SampleKind::chat:
      e = encode_chat(sample, tokenizer, chat_template, options);
      break;
    case SampleKind::image:
      fail("{}: an image has no tokens", sample.where);
  }
  if (options.loss_on_prompt) {
    std::fill(e.loss.begin(), e.loss.end(), uint8_t{1});
    if (!e.ids.empty() && tokenizer.bos() && e.ids[0] == *tokenizer.bos()) e.loss[0] = 0;
  }
  check(options.max_length >= 0, "the largest length {} is negative", options.max_length);
  if (options.max_length > 0 && static_cast<int64_t>(e.ids.size()) > options.max_length) {
    e.ids.resize(static_cast<size_t>(options.max_length));
    e.loss.resize(static_cast<size_t>(options.max_length));
  }
  return e;
}

namespace {

struct Piece {
  size_t example, begin, end;
};

void check_examples(std::span<const Example> examples) {
  for (const auto& e : examples)
    check(e.ids.size() == e.loss.size(), "an example has {} tokens but {} loss marks", e.ids.size(), e.loss.size());
}

// Rows given as lists of pieces, to arrays.
Batch lay_out(std::span<const Example> examples, const std::vector<std::vector<Piece>>& rows, int64_t length,
              int64_t pad_id, bool left) {
  Batch b;
  b.rows = static_cast<int64_t>(rows.size());
  b.length = length;
  const size_t total = rows.size() * static_cast<size_t>(length);
  b.ids.assign(total, pad_id);
  b.loss.assign(total, 0);
  b.segments.assign(total, 0);
  b.positions.assign(total, 0);
  for (size_t r = 0; r < rows.size(); ++r) {
    size_t used = 0;
    for (const auto& p : rows[r]) used += p.end - p.begin;
    size_t at = r * static_cast<size_t>(length) + (left ? static_cast<size_t>(length) - used : 0);
    int64_t segment = 0;
    for (const auto& p : rows[r]) {
      ++segment;
      for (size_t i = p.begin; i < p.end; ++i, ++at) {
        b.ids[at] = examples[p.example].ids[i];
        b.loss[at] = i > p.begin ? examples[p.example].loss[i] : 0;
        b.segments[at] = segment;
        b.positions[at] = static_cast<int64_t>(i - p.begin);
      }
    }
  }
  return b;
}

}  // namespace

Batch pack(std::span<const Example> examples, int64_t length, Packing packing, int64_t pad_id) {
  check(length > 0, "rows of {} tokens cannot be packed", length);
  check_examples(examples);
  const auto width = static_cast<size_t>(length);
  std::vector<std::vector<Piece>> rows;
  if (packing == Packing::sequential) {
    size_t room = 0;
    for (size_t e = 0; e < examples.size(); ++e) {
      for (size_t at = 0; at < examples[e].ids.size();) {
        if (room == 0) {
          rows.emplace_back();
          room = width;
        }
        const size_t take = std::min(room, examples[e].ids.size() - at);
        rows.back().push_back({e, at, at + take});
        at += take;
        room -= take;
      }
    }
    return lay_out(examples, rows, length, pad_id, false);
  }
  std::vector<Piece> pieces;
  for (size_t e = 0; e < examples.size(); ++e)
    for (size_t at = 0; at < examples[e].ids.size(); at += width)
      pieces.push_back({e, at, std::min(at + width, examples[e].ids.size())});
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.end - a.begin > b.end - b.begin; });
  std::multimap<size_t, size_t> room;  // free tokens -> row; of equals, the row that got them first
  for (const auto& p : pieces) {
    const size_t size = p.end - p.begin;
    const auto fit = room.lower_bound(size);
    size_t row = rows.size(), free = width;
    if (fit == room.end()) {
      rows.emplace_back();
    } else {
      free = fit->first;
      row = fit->second;
      room.erase(fit);
    }
    rows[row].push_back(p);
    if (free > size) room.emplace(free - size, row);
  }
  return lay_out(examples, rows, length, pad_id, false);
}

Batch pad(std::span<const Example> examples, int64_t pad_id, int64_t length, bool left) {
  check_examples(examples);
  size_t longest = 0;
  std::vector<std::vector<Piece>> rows;
  for (size_t e = 0; e < examples.size(); ++e) {
    longest = std::max(longest, examples[e].ids.size());
    rows.push_back({});
    if (!examples[e].ids.empty()) rows.back().push_back({e, 0, examples[e].ids.size()});
  }
  if (length == 0) length = static_cast<int64_t>(longest);
  check(static_cast<int64_t>(longest) <= length, "an example has {} tokens, which rows of {} cannot hold", longest,
        length);
  return lay_out(examples, rows, length, pad_id, left);
}

}  // namespace moiety
