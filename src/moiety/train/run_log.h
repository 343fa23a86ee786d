#pragma once
// What a run says about itself: log.jsonl (one record a line), a TensorBoard event file and report.html, all three from
// the same records.
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/train/event_file.h"

namespace moiety {

class RunLog {
 public:
  /// Keeps the records of log.jsonl up to step `step` and drops the rest, a torn last line too; the event file is
  /// written anew from what is kept. So a resumed run's files are those of a run that was never stopped.
  RunLog(std::filesystem::path folder, int64_t step);
  ~RunLog();
  RunLog(const RunLog&) = delete;
  RunLog& operator=(const RunLog&) = delete;

  /// Appends a record: an object with `step` and `time` (seconds since 1970) and numbers, or sections of numbers.
  void add(const nlohmann::json& record);
  /// Makes what was added survive a power cut.
  void sync();
  /// Writes report.html. `run`: what the page shows above the curves.
  void write_report(const nlohmann::json& run) const;
  const std::vector<nlohmann::json>& records() const { return records_; }

 private:
  void write_events(const nlohmann::json& record);
  std::filesystem::path folder_;
  int fd_ = -1;
  std::vector<nlohmann::json> records_;
  std::unique_ptr<EventFile> events_;  // begun with the first record, whose time it bears
};

/// Records of a log file up to step `step`; lines that are no records are left out when they are the last, and an Error
/// elsewhere.
std::vector<nlohmann::json> read_log(const std::filesystem::path& file, int64_t step);

/// The page over records; curves are thinned to about a thousand points each.
std::string report_page(const nlohmann::json& run, const std::vector<nlohmann::json>& records);

}  // namespace moiety
