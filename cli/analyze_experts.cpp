// moiety analyze experts: what every expert is worth on a text, which are alike, and a budget by layer.
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "analyze.h"
#include "calibrate.h"
#include "moiety/analyze/expert_report.h"
#include "moiety/base/files.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

struct Options {
  Common common;
  CalibrationArguments calibration;
  std::string out, html;
  bool weights = false;
};

void print(const json& report) {
  fmt::print("{:>5} {:>8} {:>7} {:>9} {:>9}  {:<22} {}\n", "layer", "experts", "unused", "least", "most",
             "routers most alike", report["layers"][0].contains("closest_weights") ? "weights most alike" : "");
  const auto pair = [](const json& c) {
    return c.is_null() ? std::string()
                       : fmt::format("{} and {}: {:.3f}", c["a"].get<int64_t>(), c["b"].get<int64_t>(),
                                     c["similarity"].get<double>());
  };
  for (const auto& l : report["layers"]) {
    const auto s = l["saliency"].get<std::vector<double>>();
    const auto load = l["load"].get<std::vector<double>>();
    const auto [least, most] = std::minmax_element(s.begin(), s.end());
    fmt::print("{:>5} {:>8} {:>7} {:>9.3g} {:>9.3g}  {:<22} {}\n", l["layer"].get<int64_t>(),
               l["experts"].get<int64_t>(), std::count(load.begin(), load.end(), 0.0), *least, *most,
               pair(l["closest_routers"]), l.contains("closest_weights") ? pair(l["closest_weights"]) : "");
  }
  fmt::print("\n{} tokens; least and most: mean of gate times size of the output, over the experts of a layer\n",
             report["tokens"].get<int64_t>());
  for (const auto& s : report["suggestions"]) {
    std::string keep;
    for (const auto& k : s["keep"]) keep += fmt::format(" {}", k.get<int64_t>());
    fmt::print("{:>5.1f} % of the experts write {:.1f} % of it: keep{}\n", 100 * s["share"].get<double>(),
               100 * s["saliency_kept"].get<double>(), keep);
  }
}

int run(const Options& o) {
  const ExpertLayers layers(Checkpoint::open(o.common.model));
  json report = expert_report(layers, calibration_of(o.common, o.calibration, layers), o.weights);
  report["model"] = o.common.model;
  const std::string text = report.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  if (!o.out.empty()) write_file(o.out, text);
  if (!o.html.empty()) write_file(o.html, expert_page(report));
  if (o.common.json)
    std::cout << text;
  else
    print(report);
  return 0;
}

const RegisterAnalyze experts([](CLI::App& analyze) -> AnalyzeWay {
  auto o = std::make_shared<Options>();
  CLI::App& app = *analyze.add_subcommand(
      "experts",
      "What every expert of a mixture is worth on a text, which are alike, and how many layers could do without");
  add_common(app, o->common);
  add_calibration(app, o->calibration, "--text");
  app.add_flag("--weights", o->weights, "Also compare the experts' weights: reads all of them");
  app.add_option("-o,--output", o->out, "Write the JSON to this file");
  app.add_option("--html", o->html, "Write a page with heatmaps to this file; it needs nothing else");
  return {&app, [o] { return run(*o); }};
});

}  // namespace
}  // namespace moiety::cli
