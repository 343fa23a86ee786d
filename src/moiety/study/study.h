#pragma once
// What a study is: arms that are trained or run alike, on several seeds, what is measured of each, and a rule, written
// down before the run, that reads a verdict off the numbers. `moiety reproduce` runs studies; results are data.
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/base/registry.h"

namespace moiety {

struct StudyArm {
  std::string name;  ///< lower case, digits, hyphens
  std::string text;  ///< what it is, one line
  bool in_short = true;
};

struct StudyMetric {
  std::string name;  ///< key in what measure() returns
  std::string text;  ///< heading of its column
  int digits = 3;
};

/// How much is spent. `steps` and `size` mean what the study makes of them.
struct StudyBudget {
  std::string name = "full";  ///< short or full
  int64_t seeds = 3;
  int64_t steps = 0;
  bool full() const { return name == "full"; }
};

/// One arm on one seed: what a study's measure() works in.
struct StudyCell {
  std::string arm;
  int64_t seed = 0;
  StudyBudget budget;
  std::filesystem::path folder;  ///< of its own, empty at the start, removed afterwards
  std::filesystem::path shared;  ///< of the study at this budget; stays
  std::filesystem::path common;  ///< of all studies; stays
  /// A folder that several cells use, say a base model: filled by `make` by the cell that needs it first, while others
  /// wait; it is there whole or not at all. `name` has to tell apart what differs (seed included).
  std::filesystem::path once(const std::string& name,
                             const std::function<void(const std::filesystem::path&)>& make) const;
};

/// Numbers of one arm against those of another, seed by seed, in percent of the other's.
struct StudyDifference {
  std::vector<double> percent;
  double mean = 0;
  double spread = 0;  ///< standard deviation over seeds (n - 1); 0 for one seed
  /// Every seed agrees, there are two or more, and the mean is beyond twice its standard error (and beyond `margin`).
  bool lower(double margin = 0.0) const { return clear(-1.0, margin); }
  bool higher(double margin = 0.0) const { return clear(1.0, margin); }
  std::string text() const;  ///< "-1.2 % (spread 0.3)"

 private:
  bool clear(double sign, double margin) const;
};

/// Measured values by arm and seed.
class StudyTable {
 public:
  void add(const std::string& arm, int64_t seed, nlohmann::json values);
  bool has(const std::string& arm) const { return cells_.count(arm) > 0; }
  const std::map<int64_t, nlohmann::json>& cells(const std::string& arm) const;  ///< by seed; Error when there are none
  /// By seed; not measured: left out.
  std::vector<double> values(const std::string& arm, const std::string& metric) const;
  double mean(const std::string& arm, const std::string& metric) const;    ///< NaN when not measured
  double spread(const std::string& arm, const std::string& metric) const;  ///< standard deviation over seeds (n - 1)
  StudyDifference difference(const std::string& arm, const std::string& base, const std::string& metric) const;

 private:
  std::map<std::string, std::map<int64_t, nlohmann::json>> cells_;
};

struct StudyOutcome {
  enum Verdict { reproduced, not_reproduced, inconclusive } verdict = inconclusive;
  std::string reason;    ///< the numbers that decided, in sentences
  std::string headline;  ///< one line for a table: the measured result
};
std::string to_string(StudyOutcome::Verdict verdict);

struct Study {
  std::string slug;
  std::string title;
  std::string claim;           ///< what the paper says, with its numbers
  std::string setup;           ///< what is done here: model, data, budget, what all arms share
  std::vector<StudyArm> arms;  ///< those that have to be there for judge() are in_short
  std::vector<StudyMetric> metrics;
  std::string rule;  ///< how judge() decides
  StudyBudget full, brief;
  /// Values by metric's name; other keys are kept as they are ("curve", ...). Called in a process of its own, with one
  /// thread.
  std::function<nlohmann::json(const StudyCell&)> measure;
  std::function<StudyOutcome(const StudyTable&)> judge;
  /// What the numbers depend on besides: a change of it measures anew. Asked for only when cells are looked up.
  std::function<nlohmann::json()> settings;
};

/// What a registered method of kind "study" makes: all but slug and title, which it is registered with.
using MakeStudy = std::function<Study()>;

/// The paper is named by the other kinds under the slug.
struct RegisterStudy : RegisterMethod {
  RegisterStudy(std::string slug, std::string title, std::string summary, MakeStudy make);
};

}  // namespace moiety
