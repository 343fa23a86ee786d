#include "moiety/train/run_log.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "moiety/base/error.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

using nlohmann::json;

TEST(Crc32c, KnownValues) {
  // RFC 3720, B.4.
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(crc32c(std::string(32, '\xFF')), 0x62A8AB43u);
}

json record(int64_t step, double loss) {
  return {
      {"step", step}, {"time", 1000.0 + static_cast<double>(step)}, {"loss", loss}, {"auxiliary", {{"balance", 0.5}}}};
}

std::string text_of(const std::filesystem::path& file) {
  return read_text(file);
}

TEST(RunLog, DropsWhatIsBehindTheStepAndTornLines) {
  const TemporaryFolder folder;
  {
    RunLog log(folder.path(), 0);
    for (int64_t s = 1; s <= 5; ++s) log.add(record(s, 1.0 / static_cast<double>(s)));
  }
  const std::string whole = text_of(folder / "log.jsonl");
  std::ofstream(folder / "log.jsonl", std::ios::app) << "{\"step\": 6, \"lo";
  EXPECT_EQ(read_log(folder / "log.jsonl", 100).size(), 5u);
  {
    RunLog log(folder.path(), 3);
    EXPECT_EQ(log.records().size(), 3u);
    log.add(record(4, 0.25));
    log.add(record(5, 0.2));
  }
  EXPECT_EQ(text_of(folder / "log.jsonl"), whole);
  std::ofstream(folder / "log.jsonl", std::ios::app) << "junk\n{\"step\": 7}\n";
  EXPECT_THROW(read_log(folder / "log.jsonl", 100), Error);
}

// Reads the file by the definition of its format.
std::vector<std::string> messages(const std::string& bytes) {
  std::vector<std::string> out;
  const auto masked = [](const std::string& s) {
    const uint32_t c = crc32c(s);
    return (c >> 15 | c << 17) + 0xA282EAD8u;
  };
  for (size_t at = 0; at < bytes.size();) {
    uint64_t length = 0;
    uint32_t crc = 0;
    std::memcpy(&length, &bytes.at(at), 8);
    std::memcpy(&crc, &bytes.at(at + 8), 4);
    EXPECT_EQ(crc, masked(bytes.substr(at, 8)));
    out.push_back(bytes.substr(at + 12, length));
    std::memcpy(&crc, &bytes.at(at + 12 + length), 4);
    EXPECT_EQ(crc, masked(out.back()));
    at += 16 + length;
  }
  return out;
}

TEST(RunLog, WritesTensorBoardEvents) {
  const TemporaryFolder folder;
  const auto file = folder / "tensorboard" / "events.out.tfevents.0000000001.moiety";
  std::string first;
  {
    RunLog log(folder.path(), 0);
    log.add(record(1, 2.5));
    log.add(record(2, 1.5));
    first = text_of(file);
  }
  const auto all = messages(first);
  ASSERT_EQ(all.size(), 3u);
  EXPECT_NE(all[0].find("brain.Event:2"), std::string::npos);
  // Event{wall_time, step 1, Summary{Value{"auxiliary/balance", 0.5}, Value{"loss", 2.5}}}
  std::string expected("\x09", 1);
  const double wall = 1001.0;
  expected.append(reinterpret_cast<const char*>(&wall), 8);
  expected += std::string("\x10\x01\x2A", 3);
  std::string values;
  const auto value = [&](const std::string& tag, float x) {
    std::string one = std::string("\x0A") + static_cast<char>(tag.size()) + tag + "\x15";
    one.append(reinterpret_cast<const char*>(&x), 4);
    values += std::string("\x0A") + static_cast<char>(one.size()) + one;
  };
  value("auxiliary/balance", 0.5f);
  value("loss", 2.5f);
  expected += static_cast<char>(values.size()) + values;
  EXPECT_EQ(all[1], expected);
  // A resumed run's file is that of a run that never stopped.
  {
    RunLog log(folder.path(), 1);
    log.add(record(2, 1.5));
  }
  EXPECT_EQ(text_of(file), first);
}

TEST(RunLog, ReportHoldsCurvesAndLoads) {
  std::vector<json> records;
  for (int64_t s = 1; s <= 5000; ++s) records.push_back(record(s, 3.0));
  records.back()["routing"]["0"] = {{"evenness", 0.9}, {"share", {0.25, 0.75}}};
  const json run = {{"title", "a </script> b"}, {"what", ""}, {"tiles", json::array()}, {"settings", json::object()}};
  const std::string page = report_page(run, records);
  EXPECT_NE(page.find("\"loss\":{\"steps\""), std::string::npos);
  EXPECT_NE(page.find("[0.25,0.75]"), std::string::npos);
  EXPECT_EQ(page.find("a </script> b"), std::string::npos);
  EXPECT_LT(page.size(), 100000u);  // thinned
  EXPECT_EQ(page.find("http://"), std::string::npos);
  EXPECT_EQ(page.find("https://"), std::string::npos);
}

}  // namespace
}  // namespace moiety
