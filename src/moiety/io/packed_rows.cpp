#include "moiety/io/packed_rows.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

using nlohmann::json;

const std::vector<std::string> kTypes = {"F32", "F16", "BF16"};

struct OneMatrix {
  std::optional<std::string> dtype;
  std::optional<int64_t> width;
  void fields(Fields& f) {
    f("dtype", dtype, "type of this matrix").choices(kTypes);
    f("width", width, "elements of a row").min(1).max(int64_t{1} << 40);
  }
};

struct PackedSettings {
  int64_t bits = 4;
  std::string dtype = "F32";
  std::map<std::string, OneMatrix> tensors;
  void fields(Fields& f) {
    f("bits", bits, "bits of a code").min(2).max(16);
    f("dtype", dtype, "type that the matrices had").choices(kTypes);
    f("tensors", tensors, "what is different for one of them");
  }
};

int64_t widest(int64_t bytes, int64_t bits) {
  return bytes * 8 / bits;
}

/// Whether nothing stands behind the last code.
bool unpack_row(const std::byte* packed, int64_t bits, std::span<uint32_t> codes) {
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  uint32_t held = 0;
  int64_t count = 0;
  for (uint32_t& code : codes) {
    for (; count < bits; count += 8) held |= std::to_integer<uint32_t>(*packed++) << count;
    code = held & mask;
    held >>= bits;
    count -= bits;
  }
  return held == 0;
}

TensorView whole(const Checkpoint& checkpoint, const TensorInfo& info, int64_t bits) {
  const TensorView q = checkpoint.get(info.name + ".q");
  const auto scale = checkpoint.get(info.name + ".scale").to_float(),
             zero = checkpoint.get(info.name + ".zero").to_float();
  const int64_t width = info.cols(), bytes = row_bytes(info.format, width);
  const auto data = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(info.rows() * bytes));
  std::vector<uint32_t> codes(static_cast<size_t>(width));
  std::vector<float> row(codes.size());
  for (int64_t i = 0; i < info.rows(); ++i) {
    const float s = scale[static_cast<size_t>(i)], z = zero[static_cast<size_t>(i)];
    check(std::isfinite(s) && s > 0.f, "tensor '{}.scale', row {}: {} is no scale", shown(info.name), i, s);
    check(std::isfinite(z) && z == std::floor(z), "tensor '{}.zero', row {}: {} is no whole number", shown(info.name),
          i, z);
    check(unpack_row(q.data.data() + i * q.cols(), bits, codes),
          "tensor '{}.q', row {}: {} codes of {} bits leave its last bits 0, and they are not", shown(info.name), i,
          width, bits);
    for (size_t j = 0; j < row.size(); ++j) row[j] = (static_cast<float>(codes[j]) - z) * s;
    quantize_row(info.format, row.data(), data->data() + i * bytes, width);
  }
  return matrix_of(info, data);
}

OverlayTensor bytes_of(std::string name, std::vector<int64_t> shape, std::vector<std::byte> bytes) {
  OverlayTensor t;
  t.info = {std::move(name), Format::U8, std::move(shape)};
  const auto held = std::make_shared<std::vector<std::byte>>(std::move(bytes));
  t.get = [info = t.info, held] { return matrix_of(info, held); };
  return t;
}

std::vector<int64_t> with_last(std::vector<int64_t> shape, int64_t last) {
  shape.back() = last;
  return shape;
}

}  // namespace

int64_t packed_row_bytes(int64_t width, int64_t bits) {
  return (width * bits + 7) / 8;
}

void pack_row(std::span<const int32_t> codes, int64_t bits, std::byte* out) {
  uint32_t held = 0;
  int64_t count = 0;
  for (const int32_t code : codes) {
    held |= static_cast<uint32_t>(code) << count;
    for (count += bits; count >= 8; count -= 8, held >>= 8) *out++ = static_cast<std::byte>(held & 255u);
  }
  if (count > 0) *out = static_cast<std::byte>(held);
}

MatrixForm packed_rows_form() {
  const auto open = [](std::shared_ptr<const Checkpoint> checkpoint, const json& section) -> WholeMatrix {
    const std::string where = checkpoint->path().string();
    const auto settings = parse<PackedSettings>(section, fmt::format("{}: config.json, moiety.{}", where, kPackedRows));
    return [checkpoint, where, settings](const std::string& stem, const std::vector<TensorInfo>& parts) {
      const TensorInfo &q = parts[0], &scale = parts[1], &zero = parts[2];
      check(q.format == Format::U8 && q.shape.size() >= 2 && q.elements() > 0,
            "{}: '{}' has to hold bytes in two dimensions or more", where, shown(q.name));
      for (const TensorInfo& each : {scale, zero})
        check(each.format == Format::F32 && each.shape == with_last(q.shape, 1),
              "{}: '{}' has to hold one F32 number for every row of '{}'", where, shown(each.name), shown(q.name));
      const auto found = settings.tensors.find(stem);
      const OneMatrix own = found == settings.tensors.end() ? OneMatrix() : found->second;
      const int64_t bytes = q.cols(), width = own.width.value_or(widest(bytes, settings.bits));
      check(width >= 1 && packed_row_bytes(width, settings.bits) == bytes,
            "{}: '{}' has rows of {} bytes; {} codes of {} bits take {}", where, shown(q.name), bytes, width,
            settings.bits, packed_row_bytes(width, settings.bits));
      OverlayTensor t;
      t.info = {stem, find_format(own.dtype.value_or(settings.dtype))->format, with_last(q.shape, width)};
      t.get = [checkpoint, info = t.info, bits = settings.bits] { return whole(*checkpoint, info, bits); };
      return t;
    };
  };
  return {kPackedRows, {".q", ".scale", ".zero"}, open};
}

PackedRows::PackedRows(int64_t bits) : bits_(bits) {
  check(bits >= 2 && bits <= 16, "{} bits a code: 2 to 16 are possible", bits);
}

void PackedRows::add(const TensorInfo& t, std::span<const int32_t> codes, std::vector<float> scale,
                     std::vector<float> zero) {
  const auto count = static_cast<size_t>(t.elements()), rows = static_cast<size_t>(t.rows());
  const bool plain = t.format == Format::F32 || t.format == Format::F16 || t.format == Format::BF16;
  check(
      plain && t.shape.size() >= 2 && count > 0 && codes.size() == count && scale.size() == rows && zero.size() == rows,
      "'{}': {} codes, {} scales and {} zeros for {} [{}]", shown(t.name), codes.size(), scale.size(), zero.size(),
      info(t.format).name, fmt::join(t.shape, ", "));
  for (const int32_t code : codes)
    check(code >= 0 && code >> bits_ == 0, "'{}': {} is no code of {} bits", shown(t.name), code, bits_);
  const int64_t width = t.cols(), bytes = packed_row_bytes(width, bits_);
  std::vector<std::byte> packed(rows * static_cast<size_t>(bytes));
  for (int64_t i = 0; i < t.rows(); ++i)
    pack_row(codes.subspan(static_cast<size_t>(i * width), static_cast<size_t>(width)), bits_,
             packed.data() + i * bytes);
  tensors_.push_back(bytes_of(t.name + ".q", with_last(t.shape, bytes), std::move(packed)));
  tensors_.push_back(overlay_of(t.name + ".scale", with_last(t.shape, 1), std::move(scale)));
  tensors_.push_back(overlay_of(t.name + ".zero", with_last(t.shape, 1), std::move(zero)));
  matrices_.push_back(t);
}

std::set<std::string> PackedRows::names() const {
  std::set<std::string> out;
  for (const TensorInfo& t : matrices_) out.insert(t.name);
  return out;
}

json PackedRows::section() const {
  const auto type_of = [](const TensorInfo& t) { return std::string(info(t.format).name); };
  const std::string dtype = matrices_.empty() ? "F32" : type_of(matrices_[0]);
  json out = {{"bits", bits_}, {"dtype", dtype}};
  for (const TensorInfo& t : matrices_) {
    if (type_of(t) != dtype) out["tensors"][t.name]["dtype"] = type_of(t);
    if (widest(packed_row_bytes(t.cols(), bits_), bits_) != t.cols()) out["tensors"][t.name]["width"] = t.cols();
  }
  return out;
}

}  // namespace moiety
