#include "moiety/io/mapped_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <string>

#include "message_of.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

TEST(MappedFile, SaysWhereAByteLies) {
  const TemporaryFolder folder;
  write_file(folder / "a", "0123456789");
  const auto file = MappedFile::open(folder / "a");
  const auto at = MappedFile::locate(file->bytes().data() + 7);
  ASSERT_TRUE(at.has_value());
  EXPECT_EQ(at->path, folder / "a");
  EXPECT_EQ(at->offset, 7u);
  const std::byte elsewhere{};
  EXPECT_FALSE(MappedFile::locate(&elsewhere).has_value());
}

TEST(MappedFile, CopiesWhatIsMappedAndWhatIsNot) {
  const TemporaryFolder folder;
  write_file(folder / "a", "0123456789");
  const auto file = MappedFile::open(folder / "a");
  std::string to(4, ' ');
  MappedFile::copy(file->bytes().data() + 3, std::as_writable_bytes(std::span(to)));
  EXPECT_EQ(to, "3456");
  const std::string memory = "abcd";
  MappedFile::copy(std::as_bytes(std::span(memory)).data(), std::as_writable_bytes(std::span(to)));
  EXPECT_EQ(to, "abcd");
  std::filesystem::resize_file(folder / "a", 5);
  EXPECT_NE(message_of([&] {
              MappedFile::copy(file->bytes().data() + 3, std::as_writable_bytes(std::span(to)));
            }).find("was cut short"),
            std::string::npos);
}

TEST(MappedFileDeathTest, AFileThatIsCutShortEndsInASentence) {
  const TemporaryFolder folder;
  write_file(folder / "cut", std::string(5 * 4096, 'x'));
  const auto file = MappedFile::open(folder / "cut");
  EXPECT_EXIT(
      {
        MappedFile::explain_lost_pages("who");
        std::filesystem::resize_file(folder / "cut", 4096);
        const volatile std::byte b = file->bytes()[4 * 4096 + 5];
        ::_exit(b == std::byte{0} ? 2 : 3);
      },
      testing::ExitedWithCode(1), "^who: .*/cut was cut short while it was in use");
}

TEST(MappedFileDeathTest, AnotherBusErrorStaysOne) {
  EXPECT_EXIT(
      {
        MappedFile::explain_lost_pages("who");
        std::raise(SIGBUS);
        std::raise(SIGBUS);
      },
      testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
}  // namespace moiety
