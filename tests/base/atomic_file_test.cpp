#include "moiety/base/atomic_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "moiety/base/error.h"
#include "moiety/base/files.h"

using namespace moiety;
namespace fs = std::filesystem;

namespace {

size_t files_in(const fs::path& folder) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

}  // namespace

TEST(AtomicFile, AppearsOnlyWhenCommitted) {
  TemporaryFolder folder;
  {
    AtomicFile file(folder / "a");
    file.write("hello");
    EXPECT_FALSE(fs::exists(folder / "a"));
    file.commit();
    EXPECT_EQ(read_text(folder / "a"), "hello");
  }
  {
    AtomicFile file(folder / "a");
    file.write("never");
  }
  EXPECT_EQ(read_text(folder / "a"), "hello");
  EXPECT_EQ(files_in(folder.path()), 1u);
}

TEST(AtomicFile, PiecesOfEverySizeAndHeaderWrittenLast) {
  TemporaryFolder folder;
  std::string expected = "00000000";
  AtomicFile file(folder / "a");
  file.write(expected);
  for (size_t size : {size_t{1}, size_t{1000}, size_t{1} << 20, (size_t{1} << 20) - 1, size_t{3} << 20}) {
    std::string piece(size, static_cast<char>('a' + size % 26));
    file.write(piece);
    expected += piece;
  }
  EXPECT_EQ(file.size(), static_cast<int64_t>(expected.size()));
  file.write_at(2, std::as_bytes(std::span("xyz", 3)));
  expected.replace(2, 3, "xyz");
  EXPECT_THROW(file.write_at(file.size() - 1, std::as_bytes(std::span("xyz", 3))), Error);
  EXPECT_THROW(file.write_at(-1, std::as_bytes(std::span("xyz", 3))), Error);
  file.commit();
  EXPECT_TRUE(read_text(folder / "a") == expected);
}

TEST(AtomicFile, SetOfFilesUnderNamesKnownLate) {
  TemporaryFolder folder;
  std::vector<AtomicFile> shards;
  for (int i = 0; i < 3; ++i) {
    shards.emplace_back(folder / "shard");
    shards.back().write(std::to_string(i));
    shards.back().close();
  }
  for (int i = 0; i < 3; ++i) shards[i].commit(folder / ("shard-" + std::to_string(i)));
  EXPECT_EQ(read_text(folder / "shard-2"), "2");
  EXPECT_EQ(files_in(folder.path()), 3u);
}

TEST(AtomicFile, KeepsPermissionsAndLinks) {
  TemporaryFolder folder;
  write_file(folder / "target", "old");
  fs::permissions(folder / "target", fs::perms::owner_read | fs::perms::owner_write);
  fs::create_symlink("target", folder / "link");
  write_file(folder / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_EQ(read_text(folder / "target"), "new");
  EXPECT_EQ(fs::status(folder / "target").permissions(), fs::perms::owner_read | fs::perms::owner_write);
}

TEST(AtomicFile, WritesDevicesInPlace) {
  write_file("/dev/null", "gone");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
}

TEST(AtomicFile, SaysWhatIsWrong) {
  TemporaryFolder folder;
  EXPECT_THROW(AtomicFile(folder.path()), Error);
  EXPECT_THROW(AtomicFile(""), Error);
  try {
    AtomicFile file(folder.path() / "no" / "such" / "folder");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("No such file or directory"), std::string::npos) << error.what();
  }
}

TEST(Files, ReadTextIsBounded) {
  TemporaryFolder folder;
  write_file(folder / "a", std::string(100, 'x'));
  EXPECT_EQ(read_text(folder / "a", 100).size(), 100u);
  EXPECT_THROW(read_text(folder / "a", 99), Error);
  EXPECT_THROW(read_text("/dev/zero", 1000), Error);
  EXPECT_THROW(read_text(folder.path()), Error);
  EXPECT_THROW(read_text(folder / "missing"), Error);
}

TEST(Files, TemporaryFolderGoes) {
  fs::path path;
  {
    TemporaryFolder folder;
    path = folder.path();
    fs::create_directories(path / "deep" / "er");
    EXPECT_TRUE(fs::is_directory(path));
  }
  EXPECT_FALSE(fs::exists(path));
}
