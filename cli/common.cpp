#include <ATen/Parallel.h>
#include <torch/cuda.h>

#include "moiety/base/error.h"
#include "moiety/base/log.h"
#include "moiety/base/progress.h"
#include "verb.h"

namespace moiety::cli {

std::vector<Verb>& verbs() {
  static std::vector<Verb> all;
  return all;
}

void add_common(CLI::App& app, Common& common, bool model) {
  if (model) {
    app.add_option("MODEL", common.model, "A directory with config.json, a .safetensors or .gguf file, or pip:PACKAGE")
        ->required();
  }
  app.add_option("--device", common.device, "Where to compute")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--dtype", common.dtype, "Type to compute in; auto is what the model stores")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--threads", common.threads, "Threads to compute with; 0 is one for every core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_flag("--json", common.json, "Print the result as JSON");
  CLI::Option* quiet = app.add_flag("-q,--quiet", common.quiet, "Print the result only: no progress, no remarks");
  app.add_flag("-v,--verbose", common.verbose, "Say what is being done")->excludes(quiet);
  app.parse_complete_callback([&common] {
    if (common.json) set_progress_mode(ProgressMode::Json);
    if (common.quiet) set_progress_mode(ProgressMode::None);
    if (common.quiet) log::set_level(log::Level::Error);
    if (common.verbose) log::set_level(log::Level::Debug);
    if (common.threads > 0) at::set_num_threads(common.threads);
    if (common.device == "cuda") {
      check(torch::cuda::is_available(),
            "there is no CUDA device, or this build of torch has no CUDA support; use --device cpu");
    }
  });
}

void add_adapters(CLI::App& app, Common& common) {
  app.add_option(
      "--adapter", common.adapters,
      "A folder with an adapter (adapter_config.json, as PEFT and `moiety train` write it); several times for "
      "several");
  app.add_option("--adapter-scaled", common.scaled_adapters,
                 "FOLDER:STRENGTH, a LoRA adapter that counts so many times");
}

CLI::Option* add_active_experts(CLI::App& app, Common& common) {
  return app
      .add_option("--active-experts", common.active_experts,
                  "Experts that each token takes in every mixture, in place of the model's own number")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
}

}  // namespace moiety::cli
