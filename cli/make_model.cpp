// moiety make-model: a checkpoint with random weights, for benchmarks.
#include <algorithm>
#include <cctype>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/base/text.h"
#include "moiety/models/random_checkpoint.h"
#include "moiety/train/byte_tokenizer.h"
#include "verb.h"
#include "write_checkpoint.h"

using nlohmann::json;

namespace moiety::cli {
namespace {

struct Options {
  std::string family, params, format, out, config;
  std::vector<std::string> set;
  int64_t experts = 0, top_k = 0, expert_width = 0, layers = 0, hidden = 0;
  uint64_t seed = 0;
  bool overwrite = false, dry_run = false, json = false, quiet = false;
};

double parse_count(const std::string& text) {
  static const std::map<char, double> units = {{'K', 1e3}, {'M', 1e6}, {'B', 1e9}, {'T', 1e12}};
  size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used > 0 && used == text.size()) return value;
  const auto unit = used + 1 == text.size()
                        ? units.find(static_cast<char>(std::toupper(static_cast<unsigned char>(text[used]))))
                        : units.end();
  check(used > 0 && unit != units.end(), "--params '{}' is not a number of parameters; 300M, 2B and 1.5B are",
        shown(text));
  return value * unit->second;
}

// The tokenizer of bytes, filled up to the model's vocabulary with tokens that no text gives.
void write_tokenizer(const std::filesystem::path& folder, int64_t vocabulary) {
  check(vocabulary >= byte_tokenizer_size, "a vocabulary of {} is too small: the tokenizer of bytes has {} tokens",
        vocabulary, byte_tokenizer_size);
  auto tokenizer = byte_tokenizer();
  for (int64_t id = byte_tokenizer_size; id < vocabulary; ++id)
    tokenizer["model"]["vocab"][fmt::format("<unused{}>", id)] = id;
  write_file(folder / "tokenizer.json", tokenizer.dump());
  write_file(folder / "tokenizer_config.json", byte_tokenizer_config().dump());
}

int run(const Options& o) {
  json fixed = json::object();
  if (!o.config.empty()) {
    fixed = json::parse(read_text(o.config), nullptr, false);
    check(fixed.is_object(), "{} is not a JSON object", o.config);
  }
  const auto put = [&](const char* key, int64_t value) {
    if (value > 0) fixed[key] = value;
  };
  put("experts", o.experts);
  put("top_k", o.top_k);
  put("expert_width", o.expert_width);
  put("num_hidden_layers", o.layers);
  if (o.hidden > 0) {
    check(o.hidden % 128 == 0, "--hidden {} is not a multiple of 128, two heads of 64", o.hidden);
    put("hidden_size", o.hidden);
    put("num_attention_heads", o.hidden / 64);
    put("num_key_value_heads", o.hidden / 128);
  }
  for (const auto& s : o.set) {
    const size_t sign = s.find('=');
    check(sign != std::string::npos && sign > 0, "--set '{}' is not KEY=VALUE", shown(s));
    const auto value = json::parse(s.substr(sign + 1), nullptr, false);
    fixed[s.substr(0, sign)] = value.is_discarded() ? json(s.substr(sign + 1)) : value;
  }
  json config = fixed;
  if (!o.params.empty()) {
    check(!o.family.empty() || fixed.contains("model_type"), "say which --family the model is of");
    config = config_of_size(o.family.empty() ? fixed["model_type"].get<std::string>() : o.family, parse_count(o.params),
                            fixed);
  } else {
    check(!o.config.empty(), "say how large the model is with --params, or give its --config");
    check(o.experts == 0 && o.top_k == 0 && o.expert_width == 0,
          "--experts, --top-k and --expert-width go with --params; a --config has keys of its family, which --set "
          "changes");
    if (!o.family.empty()) config["model_type"] = o.family;
  }
  // The tokenizer is one of bytes, whatever the config's own was.
  config["bos_token_id"] = 256;
  config["eos_token_id"] = 257;
  config["pad_token_id"] = 258;
  const TemporaryFolder scratch;
  const auto vocabulary = config.value("vocab_size", int64_t{0});
  write_tokenizer(scratch.path(), vocabulary);
  write_file(scratch / "config.json", config.dump());
  const auto checkpoint = random_checkpoint(config, scratch.path(), o.seed);

  WriteOptions write;
  (is_gguf(o.out) ? write.type : write.dtype) = o.format.empty() && is_gguf(o.out) ? "bf16" : o.format;
  write.overwrite = o.overwrite;
  write.dry_run = o.dry_run;
  const WriteReport report = write_checkpoint(*checkpoint, o.out, write, "make-model");
  if (o.json) {
    std::cout << json{{"output", o.out},
                      {"written", !o.dry_run},
                      {"config", config},
                      {"parameters", report.elements},
                      {"bytes", report.bytes}}
                     .dump(2, ' ', false, json::error_handler_t::replace)
              << "\n";
    return 0;
  }
  fmt::print("{} {}: {}, {:.1f}M parameters, {:.1f} MiB\n", o.dry_run ? "would write" : "wrote", o.out,
             config.value("model_type", ""), static_cast<double>(report.elements) * 1e-6,
             static_cast<double>(report.bytes) / 1048576);
  return 0;
}

const Register verb({
    "make-model",
    "A checkpoint with random weights, of any family and size, for benchmarks",
    "moiety make-model --family mixtral --params 2B --format q4_0 -o m.gguf\n"
    "moiety make-model --family qwen3_moe --params 700M --experts 32 --top-k 4 -o m --format bf16\n"
    "moiety make-model --family llama --params 100M --layers 12 --hidden 768 -o dense.gguf --format q8_0 --dry-run",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      app.add_option("--family", o->family, "model_type of the config: llama, mixtral, qwen3_moe, ...");
      app.add_option("--params", o->params, "About how many parameters: 300M, 2B");
      app.add_option("--config", o->config, "A config.json: its keys are kept");
      app.add_option("--set", o->set, "KEY=VALUE of the config (repeatable)")->allow_extra_args(false);
      const auto number = CLI::Range(int64_t{1}, int64_t{1} << 24);
      app.add_option("--experts", o->experts, "Experts of a mixture (32)")->check(number);
      app.add_option("--top-k", o->top_k, "Experts that a token takes (4)")->check(number);
      app.add_option("--expert-width", o->expert_width, "Hidden units of one expert (half the hidden size)")
          ->check(number);
      app.add_option("--layers", o->layers, "Blocks")->check(number);
      app.add_option("--hidden", o->hidden, "Hidden size")->check(number);
      app.add_option("--format", o->format,
                     fmt::format("GGUF: {}; directory: f32, f16, bf16", list_of(gguf_type_names())));
      app.add_option("-o,--output", o->out,
                     "What to write: a name ending in .gguf is a GGUF file, any other a directory")
          ->required();
      app.add_option("--seed", o->seed, "Of the weights")->capture_default_str();
      app.add_flag("--dry-run", o->dry_run, "Say what would be written, write nothing");
      app.add_flag("--overwrite", o->overwrite, "Replace a model that is there already");
      app.add_flag("--json", o->json, "Print the result as JSON");
      app.add_flag("-q,--quiet", o->quiet, "No progress");
      app.parse_complete_callback([o] {
        if (o->json) set_progress_mode(ProgressMode::Json);
        if (o->quiet) set_progress_mode(ProgressMode::None);
      });
      return [o] { return run(*o); };
    },
});

}  // namespace
}  // namespace moiety::cli
