#include "calibrate.h"

#include <algorithm>
#include <optional>

#include "moiety/base/error.h"
#include "moiety/base/progress.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"
#include "read_texts.h"

namespace moiety::cli {

void add_calibration(CLI::App& app, CalibrationArguments& a, const std::string& flag) {
  app.add_option(flag, a.texts, "Text files of what the model has to do");
  app.add_option("--calibration-file", a.file,
                 "Keep what was found out about the experts in this file: methods share it, a stopped run goes on");
  app.add_option("--context", a.context, "Tokens that the model sees at a time (default: 512, or its limit)")
      ->check(CLI::Range(1, 1 << 30));
  app.add_option("--limit-tokens", a.limit_tokens, "Use only the first tokens of each text; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--batch-size", a.batch_size, "Windows at a time")->check(CLI::Range(1, 65536))->capture_default_str();
}

Calibration calibration_of(const Common& common, const CalibrationArguments& a, const ExpertLayers& layers) {
  if (a.texts.empty()) {
    check(!a.file.empty(),
          "how a text uses the experts is what this looks at: give a text file, or the "
          "--calibration-file of an earlier run");
    Calibration c = Calibration::load(a.file);
    check(c.model == model_fingerprint(layers), "{} was made with another model", a.file);
    check(c.complete(), "{} has read {} of {} windows: give the text files again to go on", a.file, c.done, c.windows);
    return c;
  }
  const OpenModel open = open_causal(common);
  CalibrationOptions options;
  options.windows.context = a.context > 0 ? a.context : std::min<int64_t>(512, open.model->context_length());
  options.windows.batch_size = a.batch_size;
  if (adds_bos(*open.tokenizer)) options.windows.bos = *open.tokenizer->bos();
  options.file = a.file;
  std::optional<Progress> progress;
  options.progress = [&](int64_t done, int64_t windows) {
    if (!progress) progress.emplace("calibration", windows, "window");
    progress->set(done);
  };
  return calibrate(*open.model, layers, read_texts(*open.tokenizer, a.texts, a.limit_tokens), options);
}

}  // namespace moiety::cli
