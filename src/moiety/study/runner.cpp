#include "moiety/study/runner.h"

#include <fmt/format.h>
#include <sys/utsname.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <set>
#include <span>
#include <thread>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/html.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/base/version.h"
#include "moiety/io/sha256.h"

namespace moiety {
namespace pages {
extern const char study_report[];
}

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

fs::path root_folder(const StudyOptions& options) {
  return options.work.empty() ? cache_folder() / "studies" : options.work;
}

fs::path study_folder(const Study& study, const StudyOptions& options, const StudyBudget& budget) {
  return root_folder(options) / study.slug / budget.name;
}

json settings_of(const Study& study) {
  return study.settings ? study.settings() : json();
}

// What a cell's values depend on besides the program.
json fingerprint(const Study& study, const StudyBudget& budget) {
  return {
      {"version", MOIETY_VERSION}, {"budget", budget.name}, {"steps", budget.steps}, {"settings", settings_of(study)}};
}

std::vector<StudyArm> arms_of(const Study& study, const StudyBudget& budget) {
  std::vector<StudyArm> out;
  for (const auto& arm : study.arms)
    if (budget.full() || arm.in_short) out.push_back(arm);
  return out;
}

fs::path cell_file(const fs::path& folder, const std::string& arm, int64_t seed) {
  return folder / "cells" / fmt::format("{}-{}.json", arm, seed);
}

// The kept values of a cell; null when there are none that still hold.
json kept(const Study& study, const StudyBudget& budget, const fs::path& file) {
  if (!fs::exists(file)) return nullptr;
  const json cell = parse_json(read_text(file), file.string());
  return reading_json(file.string(),
                      [&]() -> json { return cell.at("fingerprint") == fingerprint(study, budget) ? cell : json(); });
}

json machine_record() {
  utsname system{};
  ::uname(&system);
  std::string cpu = "unknown";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos) {
      cpu = line.substr(line.find(": ") + 2);
      break;
    }
  return {{"cpu", cpu},
          {"cores", static_cast<int64_t>(std::thread::hardware_concurrency())},
          {"system", fmt::format("{} {}", system.sysname, system.machine)}};
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[16];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::localtime(&now));
  return text;
}

}  // namespace

std::vector<std::string> study_slugs() {
  std::vector<std::string> out;
  for (const auto& m : methods())
    if (m.kind == "study") out.push_back(m.slug);
  return out;
}

Study get_study(const std::string& slug) {
  const Method& method = get_method("study", slug);
  Study study = factory<MakeStudy>(method)();
  study.slug = method.slug;
  study.title = method.title;
  return study;
}

StudyBudget study_budget(const Study& study, const StudyOptions& options) {
  check(options.budget == "short" || options.budget == "full", "a budget is short or full, not {}",
        shown(options.budget));
  check(options.seeds >= 0, "the number of seeds cannot be {}", options.seeds);
  StudyBudget budget = options.budget == "full" ? study.full : study.brief;
  budget.name = options.budget;
  if (options.seeds > 0) budget.seeds = options.seeds;
  return budget;
}

void measure_cell(const Study& study, const StudyOptions& options, const std::string& arm, int64_t seed) {
  const StudyBudget budget = study_budget(study, options);
  const auto arms = arms_of(study, budget);
  std::vector<std::string> names;
  for (const auto& a : arms) names.push_back(a.name);
  check(std::find(names.begin(), names.end(), arm) != names.end(), "{} has no arm {} at budget {} (it has {})",
        study.slug, shown(arm), budget.name, list_of(names, "and"));
  const fs::path folder = study_folder(study, options, budget), file = cell_file(folder, arm, seed);
  if (!kept(study, budget, file).is_null()) return;
  StudyCell cell{arm,
                 seed,
                 budget,
                 folder / "running" / fmt::format("{}-{}", arm, seed),
                 folder / "shared",
                 root_folder(options) / "common"};
  // What cells share depends on the settings too.
  const std::string print = fingerprint(study, budget).dump();
  Sha256 hash;
  hash.update(std::as_bytes(std::span(print)));
  cell.shared /= hash.hex().substr(0, 12);
  fs::remove_all(cell.folder);
  fs::create_directories(cell.folder);
  fs::create_directories(file.parent_path());
  const auto start = std::chrono::steady_clock::now();
  json values = study.measure(cell);
  values["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  write_file(
      file,
      json{{"arm", arm}, {"seed", seed}, {"fingerprint", fingerprint(study, budget)}, {"values", values}}.dump(1) +
          "\n");
  fs::remove_all(cell.folder);
}

json run_study(const Study& study, const StudyOptions& options) {
  const StudyBudget budget = study_budget(study, options);
  const fs::path folder = study_folder(study, options, budget);
  if (options.restart) fs::remove_all(folder);
  const auto arms = arms_of(study, budget);
  std::vector<std::pair<std::string, int64_t>> open;
  // Seed by seed: a study that is stopped has whole seeds.
  for (int64_t seed = 0; seed < budget.seeds; ++seed)
    for (const auto& arm : arms)
      if (kept(study, budget, cell_file(folder, arm.name, seed)).is_null()) open.emplace_back(arm.name, seed);
  if (!open.empty() && options.run_cells) options.run_cells(open);
  if (!options.run_cells)
    for (const auto& [arm, seed] : open) measure_cell(study, options, arm, seed);

  StudyTable table;
  double seconds = 0;
  json rows = json::array();
  for (const auto& arm : arms) {
    json cells = json::array();
    for (int64_t seed = 0; seed < budget.seeds; ++seed) {
      const json cell = kept(study, budget, cell_file(folder, arm.name, seed));
      check(!cell.is_null(), "arm {}, seed {} of {} was not measured", arm.name, seed, study.slug);
      const json values = cell.at("values");
      table.add(arm.name, seed, values);
      seconds += values.at("seconds").get<double>();
      json entry = values;
      entry["seed"] = seed;
      cells.push_back(entry);
    }
    json summary = json::object();
    for (const auto& m : study.metrics) {
      const auto n = table.values(arm.name, m.name).size();
      if (n > 0)
        summary[m.name] = {
            {"mean", table.mean(arm.name, m.name)}, {"spread", table.spread(arm.name, m.name)}, {"seeds", n}};
    }
    rows.push_back({{"name", arm.name}, {"text", arm.text}, {"values", summary}, {"cells", cells}});
  }
  json metrics = json::array();
  for (const auto& m : study.metrics) metrics.push_back({{"name", m.name}, {"text", m.text}, {"digits", m.digits}});
  const StudyOutcome outcome = study.judge(table);
  return {{"slug", study.slug},
          {"title", study.title},
          {"claim", study.claim},
          {"setup", study.setup},
          {"rule", study.rule},
          {"budget", {{"name", budget.name}, {"seeds", budget.seeds}, {"steps", budget.steps}}},
          {"settings", settings_of(study)},
          {"arms", rows},
          {"metrics", metrics},
          {"verdict", to_string(outcome.verdict)},
          {"reason", outcome.reason},
          {"headline", outcome.headline},
          {"cell_seconds", seconds},
          {"machine", machine_record()},
          {"date", today()},
          {"versions", {{"moiety", MOIETY_VERSION}, {"torch", TORCH_VERSION}}}};
}

std::string study_html(const json& result) {
  return html_with_data(pages::study_report, result);
}

}  // namespace moiety
