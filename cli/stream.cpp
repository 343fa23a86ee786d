// moiety stream: adapts a model to one task after another, and shows what stays.
#include <fmt/format.h>

#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "interrupts.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/progress.h"
#include "moiety/stream/task_stream.h"
#include "verb.h"

namespace moiety::cli {
namespace {

struct Options : Common {
  std::string file;
};

int run(const Options& o) {
  const StreamConfig config = read_stream_config(read_text(o.file), o.file);
  note_interrupts();
  std::optional<Progress> progress;
  std::string task;
  StreamOptions options;
  options.stop = interrupted;
  options.on_phase = [&](const std::string& what) {
    progress.reset();
    task.clear();
    log::debug("{}", what);
  };
  options.on_step = [&](const std::string& name, int64_t step, int64_t steps, double loss) {
    if (task != name) progress.emplace("stream " + name, steps, "step");
    task = name;
    progress->note(fmt::format("loss {:.4f}", loss));
    progress->set(step);
  };
  const StreamResult r = run_stream(config, options);
  progress.reset();
  if (o.json) {
    std::cout << r.to_json().dump(2) << "\n";
    return r.complete ? 0 : 130;
  }
  if (!r.complete) {
    std::cout << "stopped; the same command goes on\n";
    return 130;
  }
  const auto count = static_cast<int64_t>(r.tasks.size());
  std::cout << fmt::format("{:<16}", "after");
  for (const auto& t : r.tasks) std::cout << fmt::format("{:>12}", t.substr(0, 11));
  std::cout << "\n" << fmt::format("{:<16}", "(nothing)");
  for (int64_t j = 0; j < count; ++j) std::cout << fmt::format("{:>11.2f}%", 100.0 * r.before[j].item<double>());
  for (int64_t t = 0; t < count; ++t) {
    std::cout << "\n" << fmt::format("{:<16}", r.tasks[static_cast<size_t>(t)].substr(0, 15));
    for (int64_t j = 0; j < count; ++j) std::cout << fmt::format("{:>11.2f}%", 100.0 * r.accuracy[t][j].item<double>());
  }
  std::cout << fmt::format(
      "\n\ntransfer       {:.2f} %   tasks before they are learned\naverage        {:.2f} %\nlast           {:.2f} %   "
      "after the last task\nforgotten      {:.2f}     points since a task was learned (BWT {:+.2f})\nadapter        "
      "{}\n",
      100.0 * r.metrics.transfer, 100.0 * r.metrics.average, 100.0 * r.metrics.last, -100.0 * r.metrics.bwt,
      100.0 * r.metrics.bwt, r.adapter.string());
  return 0;
}

const Register verb({
    "stream",
    "Adapt a model to one task after another: what is learned, what is kept",
    "moiety stream stream.yaml\n"
    "moiety stream stream.yaml --json",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      app.add_option("STREAM", o->file, "A YAML file: model, part, tasks and how to train (docs/stream.md)")
          ->required();
      add_common(app, *o, false);
      return [o] { return run(*o); };
    },
});

}  // namespace
}  // namespace moiety::cli
