#include "moiety/io/task_vector.h"

#include <gtest/gtest.h>

#include <limits>
#include <tuple>
#include <utility>

#include "message_of.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

TaskVectorHeader header_of(const std::string& form = "golomb") {
  TaskVectorHeader h;
  h.form = form;
  h.density = 0.2;
  h.alpha = 2.0;
  h.scale = 0.5f;
  h.entries = {{"a", {2, 3}, 0, 0}, {"b.c", {}, 0, 0}, {"z", {4, 0}, 0, 0}, {"zz", {70}, 0, 0}};
  h.notes = {{"base", "./base"}};
  return h;
}

TernaryMasks signs() {
  std::vector<int8_t> s(77, 0);
  s[1] = s[76] = 1;
  s[6] = s[40] = -1;
  return ternary_masks(s);
}

class TaskVectorForm : public testing::TestWithParam<const char*> {};

TEST_P(TaskVectorForm, ComesBack) {
  const std::string form = GetParam();
  const TemporaryFolder folder;
  std::vector<float> values;
  if (form == "prune") values = {1.5f, -2.0f, -0.25f, 3.0f};
  if (form == "dense") values.assign(77, 0.125f);
  TensorView head;
  head.name = "classifier.weight";
  head.format = Format::F32;
  head.shape = {2};
  const float numbers[2] = {7.0f, 8.0f};
  head.data = std::as_bytes(std::span(numbers));
  auto masks = signs();
  if (form == "prune") {
    for (size_t i = 0; i < 2; ++i) masks.positive[i] |= std::exchange(masks.negative[i], 0);
  }
  auto h = header_of(form);
  h.aliases = {{"tied", "a"}};
  const auto bytes = write_task_vector(folder / "x.tv", h, form == "dense" ? TernaryMasks() : masks, values, {head});
  EXPECT_EQ(bytes, static_cast<int64_t>(std::filesystem::file_size(folder / "x.tv")));
  EXPECT_TRUE(is_task_vector(folder / "x.tv"));
  const auto file = TaskVectorFile::open(folder / "x.tv");
  const auto& back = file->header();
  EXPECT_EQ(back.form, form);
  EXPECT_EQ(back.d, 77);
  EXPECT_EQ(back.kept, form == "dense" ? 77 : 4);
  EXPECT_EQ(back.density, 0.2);
  EXPECT_EQ(back.alpha, 2.0);
  EXPECT_EQ(back.scale, 0.5f);
  EXPECT_EQ(back.aliases.at("tied"), "a");
  EXPECT_EQ(back.notes.at("base"), "./base");
  ASSERT_EQ(back.entries.size(), 4u);
  EXPECT_EQ(back.entries[1].begin, 6);
  EXPECT_EQ(back.entries[2].end, 7);
  EXPECT_EQ(back.entries[3].shape, (std::vector<int64_t>{70}));
  ASSERT_EQ(file->others().size(), 1u);
  EXPECT_EQ(file->other("classifier.weight").to_float(), (std::vector<float>{7.0f, 8.0f}));
  if (form == "dense") {
    EXPECT_EQ(file->values(), values);
    EXPECT_THROW(file->masks(), Error);
  } else {
    EXPECT_EQ(file->masks(), masks);
  }
  if (form == "prune") {
    EXPECT_EQ(file->values(), values);
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, TaskVectorForm, testing::Values("golomb", "masks", "prune", "dense"),
                         [](const auto& info) { return std::string(info.param); });

TEST(TaskVectorFile, SignsOfNoScaleAreNotStored) {
  const TemporaryFolder folder;
  auto h = header_of();
  h.scale = 0.0f;
  write_task_vector(folder / "x.tv", h, signs());
  const auto file = TaskVectorFile::open(folder / "x.tv");
  EXPECT_EQ(file->header().kept, 0);
  EXPECT_EQ(file->masks(), TernaryMasks(77));
}

TEST(TaskVectorFile, WhatDoesNotFitIsNotWritten) {
  const TemporaryFolder folder;
  const auto says = [&](const TaskVectorHeader& h, const TernaryMasks& m, std::span<const float> values = {}) {
    return message_of([&] { write_task_vector(folder / "x.tv", h, m, values); });
  };
  EXPECT_NE(says(header_of(), TernaryMasks(76)).find("76 entries for tensors of 77"), std::string::npos);
  auto h = header_of();
  std::swap(h.entries[0], h.entries[1]);
  EXPECT_NE(says(h, signs()).find("names ascend"), std::string::npos);
  h = header_of();
  h.density = 0.0;
  EXPECT_NE(says(h, signs()).find("density"), std::string::npos);
  const float large[4] = {1.0f, 1e6f, 1.0f, 1.0f};
  EXPECT_NE(says(header_of("prune"), signs(), large).find("half precision"), std::string::npos);
  EXPECT_NE(says(header_of("prune"), signs()).find("0 values"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "x.tv"));
}

// ---- Hostile files ----

// The bytes of a file with one text of its header in place of another of the same length.
std::string changed(const TemporaryFolder& folder, const std::string& from, const std::string& to,
                    const std::string& form = "golomb") {
  write_task_vector(folder / "x.tv", header_of(form), signs());
  std::string bytes = read_text(folder / "x.tv");
  const size_t at = bytes.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  EXPECT_EQ(from.size(), to.size());
  return bytes.replace(at, from.size(), to);
}

std::string refusal(const std::string& bytes) {
  return message_of([&] { TaskVectorFile::parse(std::as_bytes(std::span(bytes)), "x.tv")->masks(); });
}

TEST(TaskVectorFile, HeadersThatCannotBeAreErrors) {
  const TemporaryFolder folder;
  const auto says = [&](const std::string& from, const std::string& to, const std::string& form = "golomb") {
    return refusal(changed(folder, from, to, form));
  };
  EXPECT_NE(says("\"task_vector\":\"1\"", "\"task_vector\":\"2\"").find("its version is 2"), std::string::npos);
  EXPECT_NE(says("\"task_vector\"", "\"task_rector\"").find("no compressed task vector"), std::string::npos);
  EXPECT_NE(says("\"nnz\":\"4\"", "\"nnz\":\"5\"").find("beyond the 77"), std::string::npos);
  EXPECT_NE(says("\"nnz\":\"4\"", "\"nnz\":\"2\"").find("follow the last"), std::string::npos);
  EXPECT_NE(says("\"nnz\":\"4\"", "\"nnz\":\"5\"", "masks").find("keep 4 entries"), std::string::npos);
  EXPECT_NE(says("\"d\":\"77\"", "\"d\":\"78\"").find("`d` says 78"), std::string::npos);
  EXPECT_NE(says("\"golomb\"", "\"golumb\"").find("unknown form"), std::string::npos);
  EXPECT_NE(says("\"full\"", "\"fool\"").find("unknown kind"), std::string::npos);
  EXPECT_NE(says("\"density\":\"0.2\"", "\"density\":\"1.2\"").find("density"), std::string::npos);
  EXPECT_NE(says("\"density\":\"0.2\"", "\"density\":\"nan\"").find("density"), std::string::npos);
  EXPECT_NE(says("\"alpha\":\"2\"", "\"alpha\":\"0\"").find("alpha"), std::string::npos);
  EXPECT_NE(says("[2,3]", "[2,x]").find("shapes"), std::string::npos);
  EXPECT_NE(says("\\\"b.c\\\"", "\\\"zzz\\\"").find("names ascend"), std::string::npos);
  EXPECT_NE(says("signs.golomb", "signs.gollum").find("no tensor 'signs.golomb'"), std::string::npos);
}

TEST(TaskVectorFile, EveryShorterFileIsAnError) {
  const TemporaryFolder folder;
  write_task_vector(folder / "x.tv", header_of(), signs());
  const std::string bytes = read_text(folder / "x.tv");
  ASSERT_EQ(refusal(bytes), "");
  for (size_t n = 0; n < bytes.size(); ++n) EXPECT_NE(refusal(bytes.substr(0, n)), "") << n;
}

TEST(TaskVectorFile, MasksOfBothSignsAreErrors) {
  const TemporaryFolder folder;
  write_task_vector(folder / "x.tv", header_of("masks"), signs());
  const std::string bytes = read_text(folder / "x.tv");
  // The file ends with the two words of the negative mask and the scale.
  for (const auto& [byte, bit, what] : std::vector<std::tuple<size_t, int, std::string>>{
           {bytes.size() - 20, 1, "both signs"}, {bytes.size() - 11, 5, "behind entry 77"}}) {
    std::string other = bytes;
    other[byte] = static_cast<char>(other[byte] | 1 << bit);
    EXPECT_NE(refusal(other).find(what), std::string::npos) << refusal(other);
  }
}

TEST(TaskVectorFile, ValuesThatAreNotFiniteAreErrors) {
  const TemporaryFolder folder;
  std::vector<float> values(77, 1.0f);
  values[5] = std::numeric_limits<float>::infinity();
  write_task_vector(folder / "x.tv", header_of("dense"), {}, values);
  EXPECT_NE(message_of([&] { TaskVectorFile::open(folder / "x.tv")->values(); }).find("value 5 is inf"),
            std::string::npos);
}

TEST(TaskVectorFile, OtherFilesAreNone) {
  const TemporaryFolder folder;
  write_file(folder / "text", "text");
  EXPECT_FALSE(is_task_vector(folder / "text"));
  EXPECT_FALSE(is_task_vector(folder.path()));
  EXPECT_FALSE(is_task_vector(folder / "absent"));
}

}  // namespace
}  // namespace moiety
