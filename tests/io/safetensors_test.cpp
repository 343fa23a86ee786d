#include "moiety/io/safetensors.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "moiety/base/error.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;

class Folder {
 public:
  Folder() {
    static int counter = 0;
    path_ = fs::temp_directory_path() /
            ("moiety-safetensors-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    fs::create_directories(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }
  std::set<std::string> names() const {
    std::set<std::string> all;
    for (const auto& each : fs::directory_iterator(path_)) all.insert(each.path().filename().string());
    return all;
  }

 private:
  fs::path path_;
};

std::span<const std::byte> bytes_of(const std::string& s) {
  return std::as_bytes(std::span(s.data(), s.size()));
}
std::string text_of(std::span<const std::byte> b) {
  return {reinterpret_cast<const char*>(b.data()), b.size()};
}

std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t n = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &n, 8);
  return file + header + data;
}

std::shared_ptr<const SafetensorsFile> parse(std::string file) {
  const auto owner = std::make_shared<const std::string>(std::move(file));
  return SafetensorsFile::parse(bytes_of(*owner), "memory", owner);
}

// The message of the Error; fails the test when there is none.
std::string refusal(const std::string& file) {
  try {
    parse(file);
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find("memory"), 0u) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "accepted: " << file.substr(8, 200);
  return "";
}
void expect_refusal(const std::string& header, const std::string& data, const std::string& part) {
  const std::string message = refusal(file_of(header, data));
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

const std::string kGood =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},"c":{"dtype":"I64","shape":[],"data_offsets":[11,19]}})";
const std::string kData = std::string("\0\0\x80\x3f\0\0\0\xc0", 8) + "xyz" + std::string("\x05\0\0\0\0\0\0\0", 8);

TEST(Safetensors, ReadsAFile) {
  const auto file = parse(file_of(kGood, kData));
  ASSERT_EQ(file->tensors().size(), 3u);
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_EQ(file->tensors()[0].name, "a");
  EXPECT_EQ(file->get("a").shape, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(file->get("a").to_float(), (std::vector<float>{1.f, -2.f}));
  EXPECT_EQ(text_of(file->get("b").data), "xyz");
  EXPECT_EQ(file->get("c").to_float(), (std::vector<float>{5.f}));
  EXPECT_EQ(file->get("c").rows(), 1);
  EXPECT_EQ(file->get("c").cols(), 1);
  EXPECT_FALSE(file->has("d"));
  EXPECT_THROW(file->get("d"), Error);
}

TEST(Safetensors, EntriesInAnyOrderAndEmptyTensors) {
  const auto file = parse(file_of(
      R"({"z":{"data_offsets":[4,8],"shape":[1],"dtype":"F32"},"e":{"dtype":"F16","shape":[0,7],"data_offsets":[4,4]},)"
      R"("y":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}   )",
      std::string("\1\0\1\0"
                  "abcd",
                  8)));
  ASSERT_EQ(file->tensors().size(), 3u);
  EXPECT_EQ(file->tensors()[0].name, "y");
  EXPECT_EQ(file->tensors()[2].name, "z");
  EXPECT_EQ(file->get("y").to_float(), (std::vector<float>{1, 0, 1, 0}));
  EXPECT_EQ(text_of(file->get("z").data), "abcd");
  EXPECT_TRUE(file->get("e").data.empty());
  EXPECT_TRUE(file->get("e").to_float().empty());
  EXPECT_TRUE(parse(file_of("{}", ""))->tensors().empty());
}

TEST(Safetensors, TruncationAtEveryByte) {
  const std::string whole = file_of(kGood, kData);
  for (size_t n = 0; n < whole.size(); ++n) refusal(whole.substr(0, n));
  refusal(whole + "x");
}

TEST(Safetensors, AnyChangedByteIsReadOrRefused) {
  const std::string whole = file_of(kGood, kData);
  for (size_t at = 0; at < whole.size(); ++at)
    for (int value : {0, 1, 0x22, 0x2d, 0x39, 0x5b, 0x7b, 0x7d, 0x80, 0xff}) {
      std::string changed = whole;
      changed[at] = static_cast<char>(value);
      try {
        const auto file = parse(changed);
        for (const TensorInfo& t : file->tensors())
          EXPECT_EQ(file->get(t.name).data.size(), static_cast<size_t>(t.bytes()));
      } catch (const Error&) {
      }
    }
}

TEST(Safetensors, RefusesBadHeaders) {
  expect_refusal("", "", "'{'");
  expect_refusal("[]", "", "'{'");
  expect_refusal(" {}", "", "'{'");
  expect_refusal("{\"a\":", "", "JSON");
  expect_refusal("{} x", "", "JSON");
  expect_refusal("{\"a\":1}", "", "must be an object");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[1]}})", "", "data_offsets");
  expect_refusal(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", "1234", "shape");
  expect_refusal(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", "1234", "dtype");
  expect_refusal(R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", "1234", "F33");
  expect_refusal(R"({"a":{"dtype":"Q4_0","shape":[32],"data_offsets":[0,18]}})", std::string(18, 'x'), "Q4_0");
  expect_refusal(R"({"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}})", "1234", "f32");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "1234", "negative");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", "1234", "fraction");
  expect_refusal(R"({"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}})", "1234", "string");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", "1234", "array");
  expect_refusal(R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})", "1234", "number");
  expect_refusal(R"({"a":{"dtype":null,"shape":[1],"data_offsets":[0,4]}})", "1234", "null");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", "1234", "data_offsets");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", "1234", "data_offsets");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", "1234", "data_offsets");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}})", "1234", "more");
  expect_refusal(R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "1234", "twice");
  expect_refusal(R"({"__metadata__":{"a":1}})", "", "string");
  expect_refusal(R"({"__metadata__":[]})", "", "__metadata__");
  expect_refusal(R"({"__metadata__":{"a":"1","a":"2"}})", "", "twice");
  expect_refusal("{\"\xff\":{}}", "", "JSON");
}

TEST(Safetensors, RefusesBadOffsets) {
  const auto one = [](const std::string& name, int from, int to) {
    return "\"" + name + "\":{\"dtype\":\"U8\",\"shape\":[" + std::to_string(to - from) + "],\"data_offsets\":[" +
           std::to_string(from) + "," + std::to_string(to) + "]}";
  };
  expect_refusal("{" + one("a", 0, 4) + "," + one("b", 3, 6) + "}", "123456", "overlap");
  expect_refusal("{" + one("a", 0, 4) + "," + one("b", 0, 4) + "}", "1234", "overlap");
  expect_refusal("{" + one("a", 0, 2) + "," + one("b", 4, 6) + "}", "123456", "belong to no tensor");
  expect_refusal("{" + one("a", 1, 4) + "}", "1234", "belong to no tensor");
  expect_refusal("{" + one("a", 0, 3) + "}", "1234", "belong to no tensor");
  expect_refusal("{" + one("a", 0, 5) + "}", "1234", "past the end");
  expect_refusal("{" + one("a", 0, 4) + "," + one("a", 4, 8) + "}", "12345678", "twice");
  expect_refusal(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "1234", "needs 8 bytes");
}

TEST(Safetensors, RefusesOverflow) {
  for (const std::string shape : {"9223372036854775807,9223372036854775807", "4294967296,4294967296",
                                  "4611686018427387904", "0,9223372036854775807,9223372036854775807"})
    expect_refusal(R"({"a":{"dtype":"F32","shape":[)" + shape + R"(],"data_offsets":[0,4]}})", "1234", "overflow");
  expect_refusal(R"({"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,4]}})", "1234", "dimension");
  expect_refusal(R"({"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4]}})", "1234", "fraction");
  expect_refusal(R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}})",
                 "1234", "");
  std::string shape = "1";
  for (int i = 0; i < 100; ++i) shape += ",1";
  expect_refusal(R"({"a":{"dtype":"U8","shape":[)" + shape + R"(],"data_offsets":[0,1]}})", "1", "dimensions");
}

TEST(Safetensors, RefusesHugeHeaderLengths) {
  for (uint64_t n : {uint64_t{3}, uint64_t{100'000'001}, ~uint64_t{0}, uint64_t{1} << 63, ~uint64_t{0} - 7}) {
    std::string file = file_of("{}", "");
    std::memcpy(file.data(), &n, 8);
    EXPECT_NE(refusal(file).find(std::to_string(n)), std::string::npos);
  }
}

TEST(Safetensors, DeepNestingIsRefusedAtOnce) {
  std::string deep = "{\"a\":";
  for (int i = 0; i < 1'000'000; ++i) deep += '[';
  expect_refusal(deep, "", "array");
  std::string objects = "{\"__metadata__\":{\"x\":";
  for (int i = 0; i < 1'000'000; ++i) objects += "{\"x\":";
  expect_refusal(objects, "", "object");
}

TEST(Safetensors, OpensOnlyRegularFiles) {
  const Folder folder;
  EXPECT_THROW(SafetensorsFile::open(folder / "missing"), Error);
  EXPECT_THROW(SafetensorsFile::open(folder.path()), Error);
  EXPECT_THROW(SafetensorsFile::open("/dev/null"), Error);
  std::ofstream(folder / "empty").close();
  EXPECT_THROW(SafetensorsFile::open(folder / "empty"), Error);
}

// ---- writing --------------------------------------------------------------------------------------------------------

TensorInfo tensor(const std::string& name, Format format, std::vector<int64_t> shape) {
  return {name, format, std::move(shape)};
}

TEST(SafetensorsWriter, AppearsOnlyWhenFinished) {
  const Folder folder;
  {
    SafetensorsWriter w(folder / "x.safetensors", {tensor("a", Format::F32, {2})});
    w.write("a", bytes_of("12345678"));
    EXPECT_FALSE(fs::exists(folder / "x.safetensors"));
  }
  EXPECT_TRUE(folder.names().empty());  // neither the file nor the temporary one
  std::ofstream(folder / "x.safetensors") << "old";
  {
    SafetensorsWriter w(folder / "x.safetensors", {tensor("a", Format::F32, {2})});
    EXPECT_THROW(w.finish(), Error);  // not complete
  }
  std::string old;
  std::ifstream(folder / "x.safetensors") >> old;
  EXPECT_EQ(old, "old");
  SafetensorsWriter w(folder / "x.safetensors", {tensor("a", Format::F32, {2}), tensor("e", Format::F32, {0})},
                      {{"k", "v"}});
  w.write("a", bytes_of("1234"));
  w.write("a", bytes_of("5678"));
  w.finish();
  EXPECT_EQ(folder.names(), std::set<std::string>{"x.safetensors"});
  const auto file = SafetensorsFile::open(folder / "x.safetensors");
  EXPECT_EQ(text_of(file->get("a").data), "12345678");
  EXPECT_EQ(file->metadata().at("k"), "v");
  EXPECT_TRUE(file->has("e"));
}

TEST(SafetensorsWriter, RefusesWrongUse) {
  const Folder folder;
  const fs::path path = folder / "x";
  EXPECT_THROW(SafetensorsWriter(path, {tensor("a", Format::Q4_0, {32})}), Error);
  EXPECT_THROW(SafetensorsWriter(path, {tensor("a", Format::F32, {1}), tensor("a", Format::F32, {1})}), Error);
  EXPECT_THROW(SafetensorsWriter(path, {tensor("a", Format::F32, {-1})}), Error);
  EXPECT_THROW(SafetensorsWriter(path, {tensor("a\xff", Format::F32, {1})}), Error);
  EXPECT_THROW(SafetensorsWriter(path, {tensor("__metadata__", Format::F32, {1})}), Error);
  EXPECT_THROW(SafetensorsWriter(folder / "no/such/folder/x", {}), Error);
  SafetensorsWriter w(path, {tensor("a", Format::U8, {2}), tensor("b", Format::U8, {2})});
  EXPECT_THROW(w.write("b", bytes_of("12")), Error);
  w.write("a", bytes_of("1"));
  EXPECT_THROW(w.write("b", bytes_of("12")), Error);
  EXPECT_THROW(w.write("a", bytes_of("23")), Error);
  w.write("a", bytes_of("2"));
  w.write("b", bytes_of("34"));
  EXPECT_THROW(w.write("b", bytes_of("5")), Error);
  w.finish();
  EXPECT_EQ(folder.names(), std::set<std::string>{"x"});
}

RC_GTEST_PROP(SafetensorsWriter, RoundTripWithEveryTensorAligned, ()) {
  const Folder folder;
  const Format kinds[] = {Format::U8, Format::BF16, Format::F32, Format::F64, Format::BOOL, Format::I16};
  const int n = *rc::gen::inRange(0, 8);
  std::vector<TensorInfo> tensors;
  std::vector<std::string> contents;
  for (int i = 0; i < n; ++i) {
    TensorInfo t;
    t.name = "tensor \"" + std::to_string(i) + "\" ü";
    t.format = kinds[*rc::gen::inRange(0, 6)];
    t.shape = *rc::gen::container<std::vector<int64_t>>(*rc::gen::inRange(0, 4), rc::gen::inRange<int64_t>(0, 5));
    std::string data(static_cast<size_t>(t.bytes()), '\0');
    for (char& c : data) c = static_cast<char>(*rc::gen::inRange(0, 2));
    tensors.push_back(t);
    contents.push_back(data);
  }
  SafetensorsWriter w(folder / "x", tensors, {{"key", "value"}});
  for (int i = 0; i < n; ++i) {
    const std::string& c = contents[static_cast<size_t>(i)];
    const size_t cut = c.size() / 3;
    w.write(tensors[static_cast<size_t>(i)].name, bytes_of(c).first(cut));
    w.write(tensors[static_cast<size_t>(i)].name, bytes_of(c).subspan(cut));
  }
  w.finish();
  const auto file = SafetensorsFile::open(folder / "x");
  RC_ASSERT(file->tensors().size() == static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    const TensorInfo& t = tensors[static_cast<size_t>(i)];
    const TensorView v = file->get(t.name);
    RC_ASSERT(v.shape == t.shape && v.format == t.format);
    RC_ASSERT(text_of(v.data) == contents[static_cast<size_t>(i)]);
    RC_ASSERT(v.data.empty() ||
              reinterpret_cast<uintptr_t>(v.data.data()) % static_cast<uintptr_t>(info(t.format).bytes) == 0);
  }
}

TEST(ShardedWriter, OneShard) {
  const Folder folder;
  {
    ShardedWriter w(folder / "out");
    w.add(tensor("odd", Format::U8, {3}), bytes_of("abc"));
    w.add(tensor("f", Format::F32, {2}), bytes_of("12345678"));
    EXPECT_TRUE(fs::is_empty(folder / "out"));
    w.finish();
  }
  const auto file = SafetensorsFile::open(folder / "out/model.safetensors");
  EXPECT_EQ(text_of(file->get("odd").data), "abc");
  EXPECT_EQ(text_of(file->get("f").data), "12345678");
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder / "out"), {}), 1);
}

TEST(ShardedWriter, ManyShardsAndAnIndex) {
  const Folder folder;
  std::ofstream(folder / "model.safetensors") << "of an older checkpoint";
  std::ofstream(folder / "model-00001-of-00009.safetensors") << "of an older checkpoint";
  std::ofstream(folder / "notes.safetensors") << "kept";
  std::map<std::string, std::string> contents;
  ShardedWriter w(folder.path(), 100);
  for (int i = 0; i < 10; ++i) {
    const std::string name = "t" + std::to_string(i), data(static_cast<size_t>(20 + 7 * i), static_cast<char>('a' + i));
    contents[name] = data;
    w.add(tensor(name, i % 2 == 0 ? Format::U8 : Format::I8, {static_cast<int64_t>(data.size())}), bytes_of(data));
  }
  EXPECT_EQ(folder.names().count("model.safetensors.index.json"), 0u);
  w.finish();
  nlohmann::json index;
  std::ifstream(folder / "model.safetensors.index.json") >> index;
  EXPECT_EQ(index["metadata"]["total_size"], 20 * 10 + 7 * 45);
  ASSERT_EQ(index["weight_map"].size(), 10u);
  std::set<std::string> shards;
  for (const auto& [name, data] : contents) {
    const std::string shard = index["weight_map"][name];
    shards.insert(shard);
    EXPECT_EQ(text_of(SafetensorsFile::open(folder / shard)->get(name).data), data);
  }
  EXPECT_GT(shards.size(), 3u);
  const std::string total = std::to_string(100000 + shards.size()).substr(1);
  EXPECT_EQ(shards.count("model-00001-of-" + total + ".safetensors"), 1u);
  for (const std::string& shard : shards) {
    int64_t size = 0;
    const auto file = SafetensorsFile::open(folder / shard);
    for (const TensorInfo& t : file->tensors()) size += t.bytes();
    EXPECT_LE(size, 100);
  }
  std::set<std::string> expected = shards;
  expected.insert({"model.safetensors.index.json", "notes.safetensors"});
  EXPECT_EQ(folder.names(), expected);
}

TEST(ShardedWriter, LargeShardsGoThroughTheReservedHeader) {
  const Folder folder;
  ShardedWriter w(folder.path());
  const std::string big(size_t{9} << 20, 'x'), odd(1001, 'o');
  for (int i = 0; i < 3; ++i) {
    w.add(tensor("big" + std::to_string(i), Format::F32, {9 << 18}), bytes_of(big));
    w.add(tensor("odd" + std::to_string(i), Format::U8, {1001}), bytes_of(odd));
  }
  w.finish();
  const auto file = SafetensorsFile::open(folder / "model.safetensors");
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(text_of(file->get("big" + std::to_string(i)).data), big);
    EXPECT_EQ(text_of(file->get("odd" + std::to_string(i)).data), odd);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(file->get("big" + std::to_string(i)).data.data()) % 8, 0u);
  }
}

TEST(ShardedWriter, AHeaderThatOutgrowsItsSpaceStartsAnotherShard) {
  const Folder folder;
  ShardedWriter w(folder.path());
  const std::string big(size_t{17} << 20, 'x'), name(100'000, 'n');
  w.add(tensor("big", Format::U8, {17 << 20}), bytes_of(big));
  for (int i = 0; i < 12; ++i) w.add(tensor(name + std::to_string(i), Format::U8, {8}), bytes_of("12345678"));
  w.finish();
  EXPECT_TRUE(fs::exists(folder / "model-00002-of-00002.safetensors"));
  EXPECT_TRUE(SafetensorsFile::open(folder / "model-00002-of-00002.safetensors")->has(name + "11"));
  EXPECT_THROW(ShardedWriter(folder / "other").add(tensor(std::string(2'000'000, 'n'), Format::U8, {1}), bytes_of("1")),
               Error);
}

TEST(ShardedWriter, LeavesNothingWithoutFinish) {
  const Folder folder;
  {
    ShardedWriter w(folder.path(), 10);
    w.add(tensor("a", Format::U8, {8}), bytes_of("12345678"));
    w.add(tensor("b", Format::U8, {8}), bytes_of("12345678"));
    EXPECT_THROW(w.add(tensor("b", Format::U8, {8}), bytes_of("12345678")), Error);
    EXPECT_THROW(w.add(tensor("c", Format::U8, {8}), bytes_of("1234")), Error);
    EXPECT_THROW(w.add(tensor("c", Format::Q8_0, {32}), bytes_of(std::string(34, 'x'))), Error);
  }
  EXPECT_TRUE(folder.names().empty());
  ShardedWriter(folder / "empty").finish();
  EXPECT_TRUE(SafetensorsFile::open(folder / "empty/model.safetensors")->tensors().empty());
}

}  // namespace
}  // namespace moiety
