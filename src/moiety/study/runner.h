#pragma once
// Runs a study: every cell (arm and seed) in a process of its own, several at once, each result kept, so that a stopped
// study goes on where it was.
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/study/study.h"

namespace moiety {

struct StudyOptions {
  std::string budget = "short";
  int64_t seeds = 0;           ///< 0: as the budget says
  std::filesystem::path work;  ///< where cells are kept; "": studies/ in the cache folder
  int64_t jobs = 1;            ///< cells at once
  bool restart = false;        ///< measure again what is there
  /// Measures one cell; the command line starts itself again for it. Empty: in this process.
  std::function<void(const std::vector<std::pair<std::string, int64_t>>& cells)> run_cells;
};

/// Names of all studies, sorted.
std::vector<std::string> study_slugs();
/// Throws Error naming the nearest slug.
Study get_study(const std::string& slug);

/// The budget by its name, with `seeds` in place of its own when given. Throws Error.
StudyBudget study_budget(const Study& study, const StudyOptions& options);

/// Measures one cell and keeps its values; does nothing when they are there.
void measure_cell(const Study& study, const StudyOptions& options, const std::string& arm, int64_t seed);

/// Everything: {slug, title, claim, setup, rule, budget, arms: [{name, text, values: {metric: {mean, spread, seeds}},
/// cells: [{seed, ...}]}], metrics, verdict, reason, headline, cell_seconds, machine, date, versions}.
nlohmann::json run_study(const Study& study, const StudyOptions& options);

/// The result as a page.
std::string study_html(const nlohmann::json& result);

}  // namespace moiety
