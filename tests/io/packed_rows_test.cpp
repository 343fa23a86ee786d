#include "moiety/io/packed_rows.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <map>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/safetensors.h"

namespace moiety {
namespace {

using nlohmann::json;

struct Tensor {
  Format format;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};

Tensor bytes(std::vector<int64_t> shape, const std::vector<uint8_t>& values) {
  const auto span = std::as_bytes(std::span(values));
  return {Format::U8, std::move(shape), {span.begin(), span.end()}};
}

Tensor numbers(std::vector<int64_t> shape, const std::vector<float>& values) {
  const auto span = std::as_bytes(std::span(values));
  return {Format::F32, std::move(shape), {span.begin(), span.end()}};
}

std::string stored(const TemporaryFolder& folder, const json& section, const std::map<std::string, Tensor>& tensors) {
  write_file(folder / "config.json", json{{"model_type", "mixtral"}, {"moiety", {{kPackedRows, section}}}}.dump());
  std::vector<TensorInfo> infos;
  for (const auto& [name, t] : tensors) infos.push_back({name, t.format, t.shape});
  SafetensorsWriter writer(folder / "model.safetensors", infos);
  for (const auto& [name, t] : tensors) writer.write(name, t.bytes);
  writer.finish();
  return folder.path().string();
}

// Codes 1 2 3 and 4 5 15 of four bits.
std::map<std::string, Tensor> matrix() {
  return {{"w.weight.q", bytes({2, 2}, {0x21, 0x03, 0x54, 0x0f})},
          {"w.weight.scale", numbers({2, 1}, {0.5f, 2.f})},
          {"w.weight.zero", numbers({2, 1}, {1.f, -1.f})}};
}

json section() {
  return {{"bits", 4}, {"dtype", "F32"}, {"tensors", {{"w.weight", {{"width", 3}}}}}};
}

std::vector<std::byte> copied(const TensorView& v) {
  return {v.data.begin(), v.data.end()};
}

TEST(PackedRows, MatricesAreWholeWhereTheyAreRead) {
  const TemporaryFolder folder;
  const auto checkpoint = Checkpoint::open(stored(folder, section(), matrix()));
  ASSERT_EQ(checkpoint->tensors().size(), 1u);
  EXPECT_EQ(checkpoint->get("w.weight").to_float(), (std::vector<float>{0.f, 0.5f, 1.f, 10.f, 12.f, 32.f}));
  EXPECT_FALSE(checkpoint->config().contains("moiety"));
  EXPECT_FALSE(checkpoint->has("w.weight.q"));
  ASSERT_EQ(stored_tensors(*checkpoint).size(), 3u);
  EXPECT_EQ(stored_tensors(*checkpoint)[0].bytes(), 4);
}

TEST(PackedRows, CodesLieDenselyFromTheLowestBitOn) {
  const auto packed = [](const std::vector<int32_t>& codes, int64_t bits) {
    std::vector<std::byte> out(static_cast<size_t>(packed_row_bytes(static_cast<int64_t>(codes.size()), bits)));
    pack_row(codes, bits, out.data());
    std::vector<int> values;
    for (const std::byte b : out) values.push_back(std::to_integer<int>(b));
    return values;
  };
  EXPECT_EQ(packed({1, 2, 3, 0, 2}, 2), (std::vector<int>{0b00111001, 0b10}));
  EXPECT_EQ(packed({1, 2, 7}, 3), (std::vector<int>{0b11010001, 0b1}));
  EXPECT_EQ(packed({1, 15, 8}, 4), (std::vector<int>{0xf1, 0x08}));
  EXPECT_EQ(packed({200, 3}, 8), (std::vector<int>{200, 3}));
  EXPECT_EQ(packed({0x1234}, 16), (std::vector<int>{0x34, 0x12}));
}

RC_GTEST_PROP(PackedRows, ComeBackBitByBit, ()) {
  const auto bits = *rc::gen::inRange<int64_t>(2, 17);
  RandomStream random(*rc::gen::arbitrary<uint64_t>(), "packed");
  PackedRows packed(bits);
  std::map<std::string, std::pair<TensorInfo, std::vector<std::byte>>> want;
  const auto count = *rc::gen::inRange<int64_t>(1, 4);
  for (int64_t m = 0; m < count; ++m) {
    TensorInfo info;
    info.name = fmt::format("matrix.{}.weight", m);
    info.format = *rc::gen::element(Format::F32, Format::BF16, Format::F16);
    info.shape =
        *rc::gen::container<std::vector<int64_t>>(*rc::gen::inRange<size_t>(2, 4), rc::gen::inRange<int64_t>(1, 20));
    std::vector<int32_t> codes(static_cast<size_t>(info.elements()));
    for (auto& c : codes) c = static_cast<int32_t>(random.below(uint64_t{1} << bits));
    std::vector<float> scale, zero, values;
    for (int64_t r = 0; r < info.rows(); ++r) {
      scale.push_back(static_cast<float>(random.uniform()) * 0.01f + 1e-5f);
      zero.push_back(static_cast<float>(random.below(4000)) - 2000.f);
      for (int64_t j = 0; j < info.cols(); ++j)
        values.push_back((static_cast<float>(codes[values.size()]) - zero.back()) * scale.back());
    }
    std::vector<std::byte> plain(static_cast<size_t>(info.bytes()));
    for (int64_t r = 0; r < info.rows(); ++r)
      quantize_row(info.format, values.data() + r * info.cols(), plain.data() + r * row_bytes(info.format, info.cols()),
                   info.cols());
    packed.add(info, codes, scale, zero);
    want[info.name] = {info, plain};
  }
  std::map<std::string, Tensor> tensors;
  int64_t stored_bytes = 0, bound = 0;
  for (const OverlayTensor& t : packed.tensors()) {
    tensors[t.info.name] = {t.info.format, t.info.shape, copied(t.get())};
    stored_bytes += t.info.bytes();
  }
  const TemporaryFolder folder;
  const auto read = Checkpoint::open(stored(folder, packed.section(), tensors));
  RC_ASSERT(read->tensors().size() == want.size());
  for (const auto& [name, expected] : want) {
    const TensorView got = read->get(name);
    RC_ASSERT(got.format == expected.first.format);
    RC_ASSERT(got.shape == expected.first.shape);
    RC_ASSERT(copied(got) == expected.second);
    bound += expected.first.rows() * ((expected.first.cols() * bits + 7) / 8 + 8);
  }
  RC_ASSERT(stored_bytes == bound);
}

TEST(PackedRows, WhatDoesNotFitIsNamed) {
  const auto refusal = [](const json& settings, const std::map<std::string, Tensor>& changed,
                          const std::string& without = "") {
    const TemporaryFolder folder;
    auto tensors = matrix();
    for (const auto& [name, t] : changed) tensors[name] = t;
    tensors.erase(without);
    return message_of([&] { Checkpoint::open(stored(folder, settings, tensors))->get("w.weight"); });
  };
  const auto says = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  says(refusal(section(), {}, "w.weight.scale"), "'w.weight.q' lacks 'w.weight.scale'");
  says(refusal(section(), {}, "w.weight.zero"), "'w.weight.q' lacks 'w.weight.zero'");
  says(refusal(section(), {{"w.weight", numbers({1}, {0.f})}}), "whole and in parts");
  says(refusal(section(), {{"w.weight.scale", numbers({1, 2}, {1.f, 1.f})}}), "one F32 number for every row");
  says(refusal(section(), {{"w.weight.zero", bytes({2, 1}, {1, 1})}}), "one F32 number for every row");
  says(refusal(section(), {{"w.weight.q", bytes({4}, {1, 2, 3, 4})}}), "two dimensions or more");
  says(refusal(section(), {{"w.weight.q", numbers({2, 1}, {1.f, 2.f})}}), "has to hold bytes");
  says(refusal(section(), {{"w.weight.q", bytes({2, 2}, {0x21, 0x13, 0x54, 0x0f})}}), "leave its last bits 0");
  says(refusal(section(), {{"w.weight.scale", numbers({2, 1}, {1.f, 0.f})}}), "row 1: 0 is no scale");
  says(refusal(section(), {{"w.weight.scale", numbers({2, 1}, {NAN, 1.f})}}), "row 0: nan is no scale");
  says(refusal(section(), {{"w.weight.zero", numbers({2, 1}, {0.5f, 1.f})}}), "0.5 is no whole number");
  auto settings = section();
  settings["tensors"]["w.weight"]["width"] = 5;
  says(refusal(settings, {}), "rows of 2 bytes; 5 codes of 4 bits take 3");
  settings = section();
  settings["bits"] = 1;
  says(refusal(settings, {}), "bits");
  settings["bits"] = 17;
  says(refusal(settings, {}), "bits");
  settings = section();
  settings["dtype"] = "I64";
  says(refusal(settings, {}), "dtype");
  settings = section();
  settings["bit"] = 4;
  says(refusal(settings, {}), "bit");
}

TEST(PackedRows, WhatCannotBePackedIsRefused) {
  EXPECT_NE(message_of([] { PackedRows(17); }).find("2 to 16"), std::string::npos);
  PackedRows packed(4);
  const std::vector<int32_t> codes = {1, 16}, fine = {1, 15};
  const TensorInfo info{"w", Format::F32, {1, 2}};
  EXPECT_NE(message_of([&] { packed.add(info, codes, {1.f}, {0.f}); }).find("16 is no code of 4 bits"),
            std::string::npos);
  EXPECT_NE(message_of([&] { packed.add(info, fine, {1.f, 1.f}, {0.f}); }).find("2 scales"), std::string::npos);
  EXPECT_NE(message_of([&] {
              packed.add({"w", Format::I64, {1, 2}}, fine, {1.f}, {0.f});
            }).find("I64"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
