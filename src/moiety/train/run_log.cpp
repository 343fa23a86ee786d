#include "moiety/train/run_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/html.h"

namespace moiety {
namespace pages {
extern const char train_report[];
}

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr size_t kCurvePoints = 1000;

// Numbers of a record as (tag, value): nested keys are joined by '/', so that TensorBoard groups them.
void flatten(const json& value, const std::string& tag, std::vector<std::pair<std::string, double>>& out) {
  if (value.is_number()) out.emplace_back(tag, value.get<double>());
  if (!value.is_object()) return;
  for (const auto& [key, inner] : value.items()) {
    if (tag.empty() && (key == "step" || key == "time")) continue;
    flatten(inner, tag.empty() ? key : tag + "/" + key, out);
  }
}

// Means of equal runs of points: a long run stays readable and its page small.
json thinned(const std::vector<std::pair<int64_t, double>>& points) {
  const size_t bin = (points.size() + kCurvePoints - 1) / kCurvePoints;
  json steps = json::array(), values = json::array();
  for (size_t i = 0; i < points.size(); i += bin) {
    const size_t end = std::min(i + bin, points.size());
    double sum = 0;
    for (size_t j = i; j < end; ++j) sum += points[j].second;
    steps.push_back(points[end - 1].first);
    values.push_back(sum / static_cast<double>(end - i));
  }
  return {{"steps", steps}, {"values", values}};
}

}  // namespace

std::vector<json> read_log(const fs::path& file, int64_t step) {
  std::vector<json> out;
  if (!fs::exists(file)) return out;
  std::istringstream lines(read_text(file, int64_t{4} << 30));
  std::string torn;
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    check(torn.empty(), "{}:{}: this line is no record", file.string(), number - 1);
    json record = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object() || !record.contains("step") || !record["step"].is_number_integer()) {
      torn = line.empty() ? " " : line;
      continue;
    }
    if (record["step"].get<int64_t>() <= step) out.push_back(std::move(record));
  }
  return out;
}

RunLog::RunLog(fs::path folder, int64_t step) : folder_(std::move(folder)) {
  const fs::path file = folder_ / "log.jsonl";
  records_ = read_log(file, step);
  std::string text;
  for (const json& record : records_) text += record.dump() + "\n";
  write_file(file, text);
  fd_ = ::open(file.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  check(fd_ >= 0, "cannot write {}: {}", file.string(), std::strerror(errno));
  fs::remove_all(folder_ / "tensorboard");
  fs::create_directories(folder_ / "tensorboard");
  for (const json& record : records_) write_events(record);
}

void RunLog::write_events(const json& record) {
  const double time = record.value("time", 0.0);
  if (!events_)
    events_ =
        std::make_unique<EventFile>((folder_ / "tensorboard" / "events.out.tfevents.0000000001.moiety").string(), time);
  std::vector<std::pair<std::string, double>> values;
  flatten(record, "", values);
  if (!values.empty()) events_->scalars(time, record.value("step", int64_t{0}), values);
}

RunLog::~RunLog() {
  if (fd_ >= 0) ::close(fd_);
}

void RunLog::add(const json& record) {
  const std::string line = record.dump() + "\n";
  // One write: a kill leaves the line whole or absent.
  for (size_t done = 0; done < line.size();) {
    const ssize_t written = ::write(fd_, line.data() + done, line.size() - done);
    if (written < 0 && errno == EINTR) continue;
    check(written > 0, "cannot write {}: {}", (folder_ / "log.jsonl").string(), std::strerror(errno));
    done += static_cast<size_t>(written);
  }
  write_events(record);
  records_.push_back(record);
}

void RunLog::sync() {
  check(::fsync(fd_) == 0, "cannot sync {}: {}", (folder_ / "log.jsonl").string(), std::strerror(errno));
}

void RunLog::write_report(const json& run) const {
  write_file(folder_ / "report.html", report_page(run, records_));
}

std::string report_page(const json& run, const std::vector<json>& records) {
  std::map<std::string, std::vector<std::pair<int64_t, double>>> curves;
  json loads = json::object();
  for (const json& record : records) {
    std::vector<std::pair<std::string, double>> values;
    flatten(record, "", values);
    for (const auto& [tag, value] : values) curves[tag].emplace_back(record["step"].get<int64_t>(), value);
    if (!record.contains("routing")) continue;
    for (const auto& [site, entry] : record["routing"].items())
      if (entry.contains("share")) loads[site].push_back({{"step", record["step"]}, {"share", entry["share"]}});
  }
  json data = {{"run", run}, {"curves", json::object()}, {"loads", json::object()}};
  for (const auto& [tag, points] : curves) data["curves"][tag] = thinned(points);
  for (const auto& [site, entries] : loads.items()) {
    // A heatmap of a hundred columns says what can be seen.
    const size_t every = (entries.size() + 99) / 100;
    json kept = json::array();
    for (size_t i = 0; i < entries.size(); i += every) kept.push_back(entries[i]);
    data["loads"][site] = kept;
  }
  return html_with_data(pages::train_report, data);
}

}  // namespace moiety
