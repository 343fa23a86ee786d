#include "moiety/study/study.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

#include "moiety/base/error.h"

namespace moiety {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

double mean_of(const std::vector<double>& v) {
  if (v.empty()) return std::numeric_limits<double>::quiet_NaN();
  double sum = 0;
  for (const double x : v) sum += x;
  return sum / static_cast<double>(v.size());
}

double spread_of(const std::vector<double>& v) {
  if (v.size() < 2) return 0.0;
  const double mean = mean_of(v);
  double sum = 0;
  for (const double x : v) sum += (x - mean) * (x - mean);
  return std::sqrt(sum / static_cast<double>(v.size() - 1));
}

// Held while one process fills a shared folder.
class FileLock {
 public:
  explicit FileLock(const fs::path& path) : fd_(::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644)) {
    check(fd_ >= 0, "{} cannot be written", path.string());
    while (::flock(fd_, LOCK_EX) != 0) check(errno == EINTR, "{} cannot be locked", path.string());
  }
  ~FileLock() { ::close(fd_); }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int fd_;
};

}  // namespace

RegisterStudy::RegisterStudy(std::string slug, std::string title, std::string summary, MakeStudy make)
    : RegisterMethod({.slug = std::move(slug),
                      .kind = "study",
                      .title = std::move(title),
                      .summary = std::move(summary),
                      .make = std::move(make)}) {}

fs::path StudyCell::once(const std::string& name, const std::function<void(const fs::path&)>& make) const {
  fs::create_directories(shared);
  const fs::path done = shared / name, half = shared / (name + ".part");
  const FileLock lock(shared / (name + ".lock"));
  if (fs::exists(done)) return done;
  fs::remove_all(half);
  fs::create_directories(half);
  make(half);
  fs::rename(half, done);
  return done;
}

bool StudyDifference::clear(double sign, double margin) const {
  if (percent.size() < 2) return false;
  for (const double p : percent)
    if (!(sign * p > 0)) return false;
  return sign * mean > std::max(margin, 2.0 * spread / std::sqrt(static_cast<double>(percent.size())));
}

std::string StudyDifference::text() const {
  if (percent.empty()) return "not measured";
  return percent.size() < 2 ? fmt::format("{:+.2f} % (one seed)", mean)
                            : fmt::format("{:+.2f} % (spread {:.2f}, {} seeds)", mean, spread, percent.size());
}

void StudyTable::add(const std::string& arm, int64_t seed, json values) {
  cells_[arm][seed] = std::move(values);
}

const std::map<int64_t, json>& StudyTable::cells(const std::string& arm) const {
  const auto it = cells_.find(arm);
  check(it != cells_.end(), "arm {} was not measured", arm);
  return it->second;
}

std::vector<double> StudyTable::values(const std::string& arm, const std::string& metric) const {
  std::vector<double> out;
  const auto it = cells_.find(arm);
  if (it == cells_.end()) return out;
  for (const auto& [seed, v] : it->second)
    if (v.contains(metric) && v[metric].is_number()) out.push_back(v[metric].get<double>());
  return out;
}

double StudyTable::mean(const std::string& arm, const std::string& metric) const {
  return mean_of(values(arm, metric));
}
double StudyTable::spread(const std::string& arm, const std::string& metric) const {
  return spread_of(values(arm, metric));
}

StudyDifference StudyTable::difference(const std::string& arm, const std::string& base,
                                       const std::string& metric) const {
  StudyDifference d;
  if (!has(arm) || !has(base)) return d;
  for (const auto& [seed, v] : cells(arm)) {
    const auto other = cells(base).find(seed);
    if (other == cells(base).end() || !v.contains(metric) || !other->second.contains(metric)) continue;
    if (!v[metric].is_number() || !other->second[metric].is_number()) continue;
    const double b = other->second[metric].get<double>();
    d.percent.push_back(100.0 * (v[metric].get<double>() - b) / std::abs(b));
  }
  d.mean = mean_of(d.percent);
  d.spread = spread_of(d.percent);
  return d;
}

std::string to_string(StudyOutcome::Verdict verdict) {
  switch (verdict) {
    case StudyOutcome::reproduced:
      return "reproduced";
    case StudyOutcome::not_reproduced:
      return "not reproduced";
    default:
      return "inconclusive";
  }
}

}  // namespace moiety
