#include "moiety/offload/low_experts.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/io/gguf.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

constexpr std::string_view kEnd = "_exps.weight";

bool is_stack(const TensorInfo& t) {
  return t.shape.size() == 3 && t.name.starts_with("blk.") && t.name.ends_with(kEnd);
}

std::string low_of(const std::string& name) {
  return name.substr(0, name.size() - std::string_view("weight").size()) + "low.weight";
}

std::vector<std::byte> encoded(const TensorView& view, Format format) {
  const int64_t rows = view.rows(), cols = view.cols();
  const int64_t from = row_bytes(view.format, cols), to = row_bytes(format, cols);
  std::vector<std::byte> out(static_cast<size_t>(rows * to));
  parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(cols));
    for (int64_t r = first; r < last; ++r) {
      dequantize_row(view.format, view.data.data() + r * from, row.data(), cols);
      if (format == Format::TQ2_0) fit_ternary(row);
      quantize_row(format, row.data(), out.data() + r * to, cols);
    }
  });
  return out;
}

}  // namespace

void fit_ternary(std::span<float> row) {
  for (size_t begin = 0; begin < row.size(); begin += 256) {
    const auto block = row.subspan(begin, std::min<size_t>(256, row.size() - begin));
    double mean = 0.0;
    for (const float w : block) mean += std::abs(static_cast<double>(w));
    mean /= static_cast<double>(block.size());
    if (mean == 0.0) continue;
    double product = 0.0, square = 0.0;
    const auto sign = [&](float w) { return std::clamp(std::nearbyint(static_cast<double>(w) / mean), -1.0, 1.0); };
    for (const float w : block) {
      const double t = sign(w);
      product += static_cast<double>(w) * t;
      square += t * t;
    }
    const double scale = square > 0.0 ? product / square : 0.0;
    for (float& w : block) w = static_cast<float>(scale * sign(w));
  }
}

LowExpertsReport add_low_experts(const Checkpoint& checkpoint, Format format, const std::filesystem::path& file,
                                 bool overwrite, const std::function<void(int64_t, int64_t)>& progress) {
  check(format == Format::Q4_0 || format == Format::TQ2_0, "low-precision copies are in q4_0 or tq2_0, not {}",
        info(format).name);
  const auto gguf = checkpoint.gguf();
  check(gguf != nullptr,
        "{} is no GGUF file, and copies of experts lie in one: `moiety convert {} -o MODEL.gguf` first",
        checkpoint.path().string(), checkpoint.path().string());
  check(file.extension() == ".gguf", "{}: copies of experts lie in a GGUF file, so its name must end in .gguf",
        file.string());
  std::error_code ec;
  check(!std::filesystem::equivalent(file, checkpoint.path(), ec), "{} is the model itself; write another file",
        file.string());
  check(overwrite || !std::filesystem::exists(file), "{} is there already; remove it, or ask to --overwrite",
        file.string());
  LowExpertsReport out;
  GgufWriter writer(file);
  for (const auto& [key, value] : gguf->metadata())
    if (key != "general.alignment" && !key.starts_with("split.")) writer.set(key, value);
  std::vector<std::pair<TensorInfo, std::string>> low;  // and the original's name
  for (const TensorInfo& t : gguf->tensors()) {
    check(!t.name.ends_with("_exps.low.weight"), "{} has low-precision copies of its experts already",
          checkpoint.path().string());
    writer.declare(t);
    out.bytes_before += t.bytes();
  }
  out.bytes = out.bytes_before;
  for (const TensorInfo& t : gguf->tensors()) {
    if (!is_stack(t)) continue;
    TensorInfo copy{low_of(t.name), format, t.shape};
    if (format == Format::TQ2_0 && t.cols() % 256 != 0) {
      copy.format = Format::Q4_0;
      ++out.narrow;
    }
    check(t.cols() % info(copy.format).block == 0, "tensor '{}': rows of {} cannot be stored in {}", t.name, t.cols(),
          info(copy.format).name);
    check(copy.bytes() < t.bytes(), "tensor '{}' is stored in {}: a copy in {} would not be smaller{}", t.name,
          info(t.format).name, info(copy.format).name,
          copy.format != format ? " (its rows are no multiple of 256, which tq2_0 needs)" : "");
    writer.declare(copy);
    out.bytes += copy.bytes();
    low.emplace_back(copy, t.name);
  }
  check(!low.empty(), "{} has no stacked experts (blk.N.ffn_gate_exps.weight): there is nothing to copy",
        checkpoint.path().string());
  int64_t done = 0;
  const auto wrote = [&](const TensorInfo& t) {
    done += t.bytes();
    if (progress) progress(done, out.bytes);
  };
  for (const TensorInfo& t : gguf->tensors()) {
    writer.write(t.name, gguf->get(t.name).data);
    wrote(t);
  }
  for (const auto& [copy, name] : low) {
    writer.write(copy.name, encoded(gguf->get(name), copy.format));
    wrote(copy);
    ++out.tensors;
  }
  writer.finish();
  return out;
}

}  // namespace moiety
