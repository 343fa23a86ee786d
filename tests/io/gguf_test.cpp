#include "moiety/io/gguf.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <set>

#include "moiety/base/error.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;

class Folder {
 public:
  Folder() {
    static int counter = 0;
    path_ = fs::temp_directory_path() / ("moiety-gguf-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    fs::create_directories(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

std::span<const std::byte> bytes_of(const std::string& s) {
  return std::as_bytes(std::span(s.data(), s.size()));
}
std::string text_of(std::span<const std::byte> b) {
  return {reinterpret_cast<const char*>(b.data()), b.size()};
}

/// Writes the bytes of a file by hand, right or wrong.
struct Builder {
  std::string out;
  template <class T>
  Builder& put(T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Builder& text(const std::string& s) {
    put(static_cast<uint64_t>(s.size()));
    out += s;
    return *this;
  }
  Builder& start(int64_t tensors, int64_t keys, uint32_t version = 3) {
    out = "GGUF";
    return put(version).put(tensors).put(keys);
  }
  Builder& tensor(const std::string& name, std::vector<int64_t> sizes, int32_t type, uint64_t offset) {
    text(name).put(static_cast<uint32_t>(sizes.size()));
    for (int64_t s : sizes) put(s);
    return put(type).put(offset);
  }
  Builder& data(size_t bytes, size_t alignment = 32) {
    out.resize((out.size() + alignment - 1) / alignment * alignment, '\0');
    out.append(bytes, 'd');
    return *this;
  }
};

std::shared_ptr<const GgufFile> parse(std::string file) {
  const auto owner = std::make_shared<const std::string>(std::move(file));
  return GgufFile::parse(bytes_of(*owner), "memory", owner);
}

void expect_refusal(const Builder& b, const std::string& part) {
  try {
    parse(b.out);
    ADD_FAILURE() << "accepted, expected: " << part;
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find("memory"), 0u) << e.what();
  }
}

Builder small_file(uint32_t version = 3) {
  Builder b;
  b.start(2, 4, version);
  b.text("general.architecture").put(int32_t{8}).text("llama");
  b.text("n").put(int32_t{4}).put(uint32_t{7});
  b.text("list").put(int32_t{9}).put(int32_t{8}).put(uint64_t{2}).text("one").text("");
  b.text("flag").put(int32_t{7}).put(uint8_t{1});
  b.tensor("w", {32, 2}, 2, 0).tensor("v", {3}, 0, 64);
  return b.data(64 + 12);
}

TEST(Gguf, ReadsAFile) {
  for (uint32_t version : {2u, 3u}) {
    const std::string file = small_file(version).out;
    const auto g = GgufFile::parse(bytes_of(file), "memory");
    EXPECT_EQ(g->version(), version);
    EXPECT_EQ(g->string("general.architecture"), "llama");
    EXPECT_EQ(g->integer("n"), 7);
    EXPECT_EQ(g->number("n"), 7.0);
    EXPECT_EQ(g->numbers("n"), std::vector<double>{7});
    EXPECT_EQ(g->boolean("flag"), true);
    ASSERT_NE(g->strings("list"), nullptr);
    EXPECT_EQ(*g->strings("list"), (std::vector<std::string_view>{"one", ""}));
    EXPECT_GE(g->strings("list")->front().data(), file.data());  // points into the file
    ASSERT_EQ(g->tensors().size(), 2u);
    const TensorView w = g->get("w");
    EXPECT_EQ(w.shape, (std::vector<int64_t>{2, 32}));  // slowest first
    EXPECT_EQ(w.format, Format::Q4_0);
    EXPECT_EQ(w.data.size(), 36u);
    EXPECT_EQ(g->get("v").data.size(), 12u);
    EXPECT_EQ(g->find("absent"), nullptr);
    EXPECT_EQ(g->string("absent"), std::nullopt);
    EXPECT_EQ(g->strings("absent"), nullptr);
    EXPECT_TRUE(g->numbers("absent").empty());
    EXPECT_THROW(g->get("absent"), Error);
  }
}

TEST(Gguf, TypedAccessNamesTheKey) {
  const auto g = parse(small_file().out);
  const auto wrong = [](auto&& f, const std::string& key) {
    try {
      f();
      ADD_FAILURE() << key;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(key), std::string::npos) << e.what();
    }
  };
  wrong([&] { g->string("n"); }, "n is a uint32");
  wrong([&] { g->integer("general.architecture"); }, "general.architecture is a string");
  wrong([&] { g->integer("list"); }, "list is an array of string");
  wrong([&] { g->boolean("n"); }, "bool");
  wrong([&] { g->strings("n"); }, "array of strings");
  wrong([&] { g->number("flag"); }, "flag is a bool");
  wrong([&] { g->numbers("list"); }, "list");
  wrong([&] { g->numbers("flag"); }, "flag");
}

TEST(Gguf, TruncationAtEveryByte) {
  const std::string whole = small_file().out;
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_THROW(parse(whole.substr(0, n)), Error) << n;
  EXPECT_NO_THROW(parse(whole + "trailing"));
}

TEST(Gguf, AnyChangedByteIsReadOrRefused) {
  const std::string whole = small_file().out;
  for (size_t at = 0; at < whole.size(); ++at)
    for (int value : {0, 1, 2, 9, 0x1f, 0x20, 0x7f, 0x80, 0xff}) {
      std::string changed = whole;
      changed[at] = static_cast<char>(value);
      try {
        const auto g = parse(changed);
        for (const TensorInfo& t : g->tensors()) EXPECT_EQ(g->get(t.name).data.size(), static_cast<size_t>(t.bytes()));
      } catch (const Error&) {
      }
    }
}

TEST(Gguf, RefusesOtherFilesAndVersions) {
  expect_refusal(Builder{"GGML"}, "not a GGUF file");
  expect_refusal(Builder{""}, "not a GGUF file");
  expect_refusal(Builder().start(0, 0, 1), "version 1");
  expect_refusal(Builder().start(0, 0, 4), "version 4");
  expect_refusal(Builder().start(0, 0, 3u << 24), "big-endian");
}

TEST(Gguf, RefusesCountsThatTheFileCannotHold) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  for (int64_t n : {int64_t{1}, int64_t{1} << 40, most, int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
    expect_refusal(Builder().start(n, 0), std::to_string(n) + " tensors");
    expect_refusal(Builder().start(0, n), std::to_string(n) + " keys");
  }
  for (uint64_t n : {uint64_t{1000}, ~uint64_t{0}, ~uint64_t{0} / 4 + 1, ~uint64_t{0} / 8 + 1}) {
    for (int32_t type : {0, 5, 6, 8, 10})
      expect_refusal(Builder().start(0, 1).text("k").put(int32_t{9}).put(type).put(n).data(64), std::to_string(n));
    Builder b;
    b.start(0, 1).put(n);
    b.out.append(20, 'x');
    expect_refusal(b, std::to_string(n));
    b.start(0, 1).text("k").put(int32_t{8}).put(n);
    b.out.append(20, 'x');
    expect_refusal(b, std::to_string(n));
  }
}

TEST(Gguf, RefusesBadKeys) {
  const auto key = [](auto&& fill, int64_t keys = 1) {
    Builder b;
    b.start(0, keys);
    fill(b);
    return b.data(64);
  };
  expect_refusal(key([](Builder& b) { b.text("k").put(int32_t{13}).put(uint64_t{0}); }), "type 13");
  expect_refusal(key([](Builder& b) { b.text("k").put(int32_t{-1}).put(uint64_t{0}); }), "type -1");
  expect_refusal(key([](Builder& b) { b.text("k").put(int32_t{9}).put(int32_t{9}).put(uint64_t{0}); }), "arrays");
  expect_refusal(key([](Builder& b) { b.text("k").put(int32_t{9}).put(int32_t{77}).put(uint64_t{0}); }), "77");
  expect_refusal(key([](Builder& b) { b.text("k").put(int32_t{7}).put(uint8_t{2}); }), "bool");
  expect_refusal(key([](Builder& b) { b.text("k").put(int32_t{9}).put(int32_t{7}).put(uint64_t{1}).put(uint8_t{3}); }),
                 "bool");
  expect_refusal(key([](Builder& b) { b.text("\xff\xfe").put(int32_t{7}).put(uint8_t{0}); }), "UTF-8");
  expect_refusal(key([](Builder& b) { b.text(std::string(65536, 'k')).put(int32_t{7}).put(uint8_t{0}); }), "65536");
  expect_refusal(key(
                     [](Builder& b) {
                       b.text("k").put(int32_t{4}).put(uint32_t{0});
                       b.text("k").put(int32_t{4}).put(uint32_t{0});
                     },
                     2),
                 "twice");
  EXPECT_NO_THROW(parse(key([](Builder& b) { b.text(std::string(65535, 'k')).put(int32_t{7}).put(uint8_t{0}); }).out));
}

TEST(Gguf, RefusesBadAlignment) {
  const auto with = [](auto value, int32_t type) {
    return Builder().start(0, 1).text("general.alignment").put(type).put(value).data(8);
  };
  for (uint32_t a : {0u, 3u, 33u, 0xffffffffu}) expect_refusal(with(a, 4), "power of two");
  expect_refusal(with(uint64_t{32}, 10), "uint32");
  EXPECT_NO_THROW(parse(with(uint32_t{1u << 31}, 4).out));
}

TEST(Gguf, OtherAlignmentMovesTheData) {
  Builder b;
  b.start(1, 1)
      .text("general.alignment")
      .put(int32_t{4})
      .put(uint32_t{256})
      .tensor("w", {4}, 0, 256)
      .data(256 + 16, 256);
  b.out.back() = 'e';
  const auto g = parse(b.out);
  EXPECT_EQ(text_of(g->get("w").data), std::string(15, 'd') + "e");
}

TEST(Gguf, RefusesBadTensors) {
  const auto one = [](std::vector<int64_t> sizes, int32_t type = 0, uint64_t offset = 0) {
    return Builder().start(1, 0).tensor("w", std::move(sizes), type, offset).data(256);
  };
  expect_refusal(one({}), "0 dimensions");
  expect_refusal(one({1, 1, 1, 1, 1}), "5 dimensions");
  for (int64_t size : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::min()})
    expect_refusal(one({4, size}), "must be positive");
  expect_refusal(one({33}, 2), "multiple of the 32-element blocks");
  expect_refusal(one({128}, 12), "256");
  expect_refusal(one({4}, 0, 16), "alignment");
  expect_refusal(one({65}, 0, 0), "past the end");
  expect_refusal(one({4}, 0, 256), "past the end");
  expect_refusal(one({4}, 0, ~uint64_t{0} - 31), "past the end");
  const int64_t big = int64_t{1} << 32;
  expect_refusal(one({big, big}), "overflows");
  expect_refusal(one({std::numeric_limits<int64_t>::max()}), "overflows");
  expect_refusal(one({big, 1 << 20}), "past the end");
  expect_refusal(Builder().start(2, 0).tensor("w", {4}, 0, 0).tensor("w", {4}, 0, 32).data(64), "twice");
  expect_refusal(Builder().start(2, 0).tensor("w", {16}, 0, 0).tensor("v", {4}, 0, 32).data(64), "overlap");
  expect_refusal(Builder().start(2, 0).tensor("w", {4}, 0, 32).tensor("v", {9}, 0, 0).data(64), "overlap");
  expect_refusal(Builder().start(1, 0).tensor(std::string(64, 'w'), {4}, 0, 0).data(64), "64 bytes");
  expect_refusal(Builder().start(1, 0).tensor("\xc0", {4}, 0, 0).data(64), "UTF-8");
  EXPECT_NO_THROW(parse(Builder().start(1, 0).tensor(std::string(63, 'w'), {4}, 0, 0).data(64).out));
}

TEST(Gguf, NamesTheTypesItRefuses) {
  const std::pair<int, const char*> types[] = {
      {9, "Q8_1"}, {15, "Q8_K"},  {10, "Q2_K"},   {11, "Q3_K"},    {20, "IQ4_NL"},  {23, "IQ4_XS"},  {26, "I32"},
      {28, "F64"}, {40, "NVFP4"}, {4, "removed"}, {33, "removed"}, {99, "unknown"}, {-1, "unknown"}, {-5, "unknown"}};
  for (const auto& [id, name] : types) expect_refusal(Builder().start(1, 0).tensor("w", {256}, id, 0).data(4096), name);
}

TEST(Gguf, SplitModels) {
  const Folder folder;
  const auto part = [&](int i, int n, int total, const std::string& name, int named_as = -1) {
    GgufWriter w(folder / fmt::format("m-{:05}-of-{:05}.gguf", named_as < 0 ? i + 1 : named_as, n));
    if (i == 0) w.set("general.architecture", std::string("llama"));
    GgufValue v;
    v.type = 2;
    v.value = static_cast<uint64_t>(i);
    w.set("split.no", v);
    v.value = static_cast<uint64_t>(n);
    w.set("split.count", v);
    GgufValue t;
    t.type = 5;
    t.value = static_cast<int64_t>(total);
    w.set("split.tensors.count", t);
    w.declare({name, Format::F32, {2}});
    w.write(name, bytes_of("1234567" + std::to_string(i)));
    w.finish();
  };
  part(0, 3, 3, "a");
  part(1, 3, 3, "b");
  EXPECT_THROW(GgufFile::open(folder / "m-00001-of-00003.gguf"), Error);  // a part is missing
  part(2, 3, 3, "c");
  for (int i = 1; i <= 3; ++i) {
    const auto g = GgufFile::open(folder / fmt::format("m-{:05}-of-00003.gguf", i));
    EXPECT_EQ(g->tensors().size(), 3u);
    EXPECT_EQ(text_of(g->get("a").data), "12345670");
    EXPECT_EQ(text_of(g->get("c").data), "12345672");
    EXPECT_EQ(g->string("general.architecture"), "llama");
    EXPECT_EQ(g->find("split.count"), nullptr);
  }
  TensorView kept = GgufFile::open(folder / "m-00001-of-00003.gguf")->get("c");  // outlives the file
  EXPECT_EQ(text_of(kept.data), "12345672");
  part(2, 3, 3, "a");
  EXPECT_THROW(GgufFile::open(folder / "m-00001-of-00003.gguf"), Error);  // a name in two parts
  part(2, 3, 4, "c");
  EXPECT_THROW(GgufFile::open(folder / "m-00001-of-00003.gguf"), Error);  // counts differ
  part(1, 3, 3, "c", 3);
  EXPECT_THROW(GgufFile::open(folder / "m-00001-of-00003.gguf"), Error);  // wrong number
  fs::copy_file(folder / "m-00001-of-00003.gguf", folder / "other.gguf");
  EXPECT_THROW(GgufFile::open(folder / "other.gguf"), Error);  // the name says nothing of parts
}

// ---- writing --------------------------------------------------------------------------------------------------------

TEST(GgufWriter, EveryTypeOfValueSurvives) {
  const Folder folder;
  Builder b;
  b.start(0, 24);
  b.text("u8").put(int32_t{0}).put(uint8_t{200});
  b.text("i8").put(int32_t{1}).put(int8_t{-100});
  b.text("u16").put(int32_t{2}).put(uint16_t{60000});
  b.text("i16").put(int32_t{3}).put(int16_t{-30000});
  b.text("u32").put(int32_t{4}).put(uint32_t{4000000000u});
  b.text("i32").put(int32_t{5}).put(int32_t{-2000000000});
  b.text("f32").put(int32_t{6}).put(0.1f);
  b.text("bool").put(int32_t{7}).put(uint8_t{1});
  b.text("string").put(int32_t{8}).text("grün");
  b.text("u64").put(int32_t{10}).put(~uint64_t{0});
  b.text("i64").put(int32_t{11}).put(std::numeric_limits<int64_t>::min());
  b.text("f64").put(int32_t{12}).put(0.1);
  b.text("au8").put(int32_t{9}).put(int32_t{0}).put(uint64_t{2}).put(uint8_t{1}).put(uint8_t{255});
  b.text("ai8").put(int32_t{9}).put(int32_t{1}).put(uint64_t{1}).put(int8_t{-1});
  b.text("au16").put(int32_t{9}).put(int32_t{2}).put(uint64_t{1}).put(uint16_t{65535});
  b.text("ai16").put(int32_t{9}).put(int32_t{3}).put(uint64_t{1}).put(int16_t{-32768});
  b.text("au32").put(int32_t{9}).put(int32_t{4}).put(uint64_t{1}).put(~uint32_t{0});
  b.text("ai32").put(int32_t{9}).put(int32_t{5}).put(uint64_t{2}).put(int32_t{-7}).put(int32_t{7});
  b.text("af32").put(int32_t{9}).put(int32_t{6}).put(uint64_t{1}).put(0.3f);
  b.text("abool").put(int32_t{9}).put(int32_t{7}).put(uint64_t{2}).put(uint8_t{1}).put(uint8_t{0});
  b.text("astr").put(int32_t{9}).put(int32_t{8}).put(uint64_t{2}).text("a").text(std::string("\0b", 2));
  b.text("au64").put(int32_t{9}).put(int32_t{10}).put(uint64_t{1}).put(~uint64_t{0});
  b.text("ai64").put(int32_t{9}).put(int32_t{11}).put(uint64_t{0});
  b.text("af64").put(int32_t{9}).put(int32_t{12}).put(uint64_t{1}).put(1e300);
  b.data(0);
  const auto g = parse(b.out);
  EXPECT_EQ(g->integer("i64"), std::numeric_limits<int64_t>::min());
  EXPECT_THROW(g->integer("u64"), Error);  // does not fit
  EXPECT_EQ(g->numbers("ai32"), (std::vector<double>{-7, 7}));
  EXPECT_EQ(g->numbers("f32"), std::vector<double>{0.1f});
  EXPECT_EQ(g->number("u64"), 18446744073709551615.0);
  GgufWriter w(folder / "x");
  for (const auto& [key, value] : g->metadata()) w.set(key, value);
  w.finish();
  const auto file = MappedFile::open(folder / "x");
  EXPECT_EQ(text_of(file->bytes()), b.out);  // byte for byte
}

TEST(GgufWriter, TensorsAlignedAndInOrder) {
  const Folder folder;
  {
    GgufWriter w(folder / "x", 64);
    w.set_u32("a.block_count", 3);
    w.set_u32("a.block_count", 4);  // the last one counts
    w.set_f32("eps", 1e-5f);
    w.set_bool("flag", false);
    w.set_array("tokens", std::vector<std::string>{"x", "yy"});
    w.set_array_f32("scores", {0.5f, -1.f});
    w.set_array_i32("types", {1, -3});
    w.declare({"q", Format::Q8_0, {2, 3, 32}});
    w.declare({"s", Format::F32, {}});
    w.write("q", bytes_of(std::string(100, 'q')));
    w.write("q", bytes_of(std::string(104, 'r')));
    w.write("s", bytes_of("1234"));
    EXPECT_FALSE(fs::exists(folder / "x"));
    w.finish();
  }
  const auto g = GgufFile::open(folder / "x");
  EXPECT_EQ(g->integer("a.block_count"), 4);
  EXPECT_EQ(g->integer("general.alignment"), 64);
  EXPECT_EQ(g->number("eps"), 1e-5f);
  EXPECT_EQ(g->boolean("flag"), false);
  EXPECT_EQ(g->strings("tokens")->at(1), "yy");
  EXPECT_EQ(g->numbers("scores"), (std::vector<double>{0.5, -1}));
  EXPECT_EQ(g->get("q").shape, (std::vector<int64_t>{2, 3, 32}));
  EXPECT_EQ(text_of(g->get("q").data), std::string(100, 'q') + std::string(104, 'r'));
  EXPECT_EQ(g->get("s").shape, std::vector<int64_t>{1});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(g->get("s").data.data()) % 64, 0u);
}

TEST(GgufWriter, RefusesWrongUse) {
  const Folder folder;
  EXPECT_THROW(GgufWriter(folder / "x", 48), Error);
  {
    GgufWriter w(folder / "x");
    EXPECT_THROW(w.declare({std::string(64, 'n'), Format::F32, {1}}), Error);
    EXPECT_THROW(w.declare({"t", Format::I64, {1}}), Error);
    EXPECT_THROW(w.declare({"t", Format::F32, {1, 1, 1, 1, 1}}), Error);
    EXPECT_THROW(w.declare({"t", Format::F32, {0}}), Error);
    EXPECT_THROW(w.declare({"t", Format::Q4_K, {576}}), Error);
    w.declare({"t", Format::F32, {1}});
    EXPECT_THROW(w.declare({"t", Format::F32, {1}}), Error);
    EXPECT_THROW(w.finish(), Error);
    EXPECT_THROW(w.write("u", bytes_of("1234")), Error);
    EXPECT_THROW(w.write("t", bytes_of("12345")), Error);
    EXPECT_THROW(w.set(std::string(65536, 'k'), std::string("v")), Error);
    GgufValue v;
    v.type = 0;
    v.value = uint64_t{256};
    EXPECT_THROW(w.set("k", v), Error);  // does not fit uint8
    v.type = 3;
    v.value = 1.0;
    EXPECT_THROW(w.set("k", v), Error);
    v.type = 4;
    v.value = uint64_t{3};
    EXPECT_THROW(w.set("general.alignment", v), Error);
    w.write("t", bytes_of("1234"));
    EXPECT_THROW(w.set_u32("late", 1), Error);
    EXPECT_THROW(w.declare({"late", Format::F32, {1}}), Error);
    EXPECT_THROW(w.write("t", bytes_of("1")), Error);
  }
  EXPECT_TRUE(fs::is_empty(folder.path()));  // nothing remains without finish()
}

RC_GTEST_PROP(GgufWriter, RoundTrip, ()) {
  const Folder folder;
  std::vector<TensorInfo> tensors;
  std::vector<std::string> contents;
  const int n = *rc::gen::inRange(0, 6);
  for (int i = 0; i < n; ++i) {
    TensorInfo t;
    t.name = "t" + std::to_string(i);
    do {
      t.format = formats()[static_cast<size_t>(*rc::gen::inRange<int>(0, static_cast<int>(formats().size())))].format;
    } while (info(t.format).gguf_id < 0);
    t.shape = *rc::gen::container<std::vector<int64_t>>(*rc::gen::inRange(0, 3), rc::gen::inRange<int64_t>(1, 4));
    t.shape.push_back(info(t.format).block * *rc::gen::inRange<int64_t>(1, 4));
    std::string data(static_cast<size_t>(t.bytes()), '\0');
    for (size_t k = 0; k < data.size(); ++k) data[k] = static_cast<char>(i * 31 + static_cast<int>(k * k));
    tensors.push_back(t);
    contents.push_back(data);
  }
  const uint32_t alignment = 1u << *rc::gen::inRange(0, 10);
  GgufWriter w(folder / "x", alignment);
  w.set("name", std::string("value"));
  for (const TensorInfo& t : tensors) w.declare(t);
  for (size_t i = 0; i < tensors.size(); ++i) w.write(tensors[i].name, bytes_of(contents[i]));
  w.finish();
  const auto g = GgufFile::open(folder / "x");
  RC_ASSERT(g->string("name") == std::optional<std::string>("value"));
  RC_ASSERT(g->tensors().size() == tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView v = g->get(tensors[i].name);
    RC_ASSERT(v.format == tensors[i].format && v.shape == tensors[i].shape);
    RC_ASSERT(text_of(v.data) == contents[i]);
    RC_ASSERT(reinterpret_cast<uintptr_t>(v.data.data()) % std::min(alignment, 4096u) == 0);
  }
}

TEST(Gguf, ALargeVocabularyOpensQuickly) {
  const Folder folder;
  {
    std::vector<std::string> tokens(262144);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = "token" + std::to_string(i);
    GgufWriter w(folder / "x");
    w.set_array("tokenizer.ggml.tokens", tokens);
    w.set_array_f32("tokenizer.ggml.scores", std::vector<float>(tokens.size(), -1.f));
    w.set_array_i32("tokenizer.ggml.token_type", std::vector<int32_t>(tokens.size(), 1));
    w.finish();
  }
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const auto g = GgufFile::open(folder / "x");
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    EXPECT_EQ(g->strings("tokenizer.ggml.tokens")->back(), "token262143");
  }
#if !defined(__SANITIZE_ADDRESS__)
  EXPECT_LT(best, 0.1);
#endif
}

}  // namespace
}  // namespace moiety
