#include "moiety/io/low_rank_sparse.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

constexpr int64_t kMostTimes = 8192;

std::vector<int64_t> index_of(const TensorView& view, int64_t rows, int64_t out) {
  check(view.format == Format::I64 && view.shape == std::vector<int64_t>{rows},
        "tensor '{}' has to hold {} 64-bit integers", shown(view.name), rows);
  std::vector<int64_t> index(static_cast<size_t>(rows));
  if (rows > 0) std::memcpy(index.data(), view.data.data(), index.size() * sizeof(int64_t));
  int64_t before = -1;
  for (const int64_t i : index) {
    check(i > before && i < out, "tensor '{}': {} is no row of {} in ascending order", shown(view.name), i, out);
    before = i;
  }
  return index;
}

TensorView whole(const Checkpoint& checkpoint, const std::string& stem, const TensorInfo& info) {
  const int64_t out = info.shape[0], in = info.shape[1];
  const TensorView left_view = checkpoint.get(stem + ".left"), rows_view = checkpoint.get(stem + ".rows");
  const int64_t rank = left_view.shape[1];
  const auto left = left_view.to_float(), right = checkpoint.get(stem + ".right").to_float(),
             rows = rows_view.to_float();
  const auto index = index_of(checkpoint.get(stem + ".index"), rows_view.shape[0], out);
  const int64_t bytes = row_bytes(info.format, in);
  const auto data = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(out * bytes));
  std::vector<float> row(static_cast<size_t>(in));
  size_t next = 0;
  for (int64_t i = 0; i < out; ++i) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int64_t k = 0; k < rank; ++k) {
      const float factor = left[static_cast<size_t>(i * rank + k)];
      const float* from = right.data() + k * in;
      for (int64_t j = 0; j < in; ++j) row[static_cast<size_t>(j)] += factor * from[j];
    }
    if (next < index.size() && index[next] == i) {
      const float* from = rows.data() + static_cast<int64_t>(next++) * in;
      for (int64_t j = 0; j < in; ++j) row[static_cast<size_t>(j)] += from[j];
    }
    quantize_row(info.format, row.data(), data->data() + i * bytes, in);
  }
  return matrix_of(info, data);
}

}  // namespace

MatrixForm low_rank_sparse_form() {
  const auto open = [](std::shared_ptr<const Checkpoint> checkpoint, const nlohmann::json&) -> WholeMatrix {
    return [checkpoint](const std::string& stem, const std::vector<TensorInfo>& parts) {
      const TensorInfo &left = parts[0], &right = parts[1], &rows = parts[2], &index = parts[3];
      const bool plain = left.format == Format::F32 || left.format == Format::F16 || left.format == Format::BF16;
      check(plain && left.shape.size() == 2 && left.shape[1] > 0 && right.shape.size() == 2 && rows.shape.size() == 2 &&
                index.shape.size() == 1 && left.shape[1] == right.shape[0] && right.shape[1] == rows.shape[1] &&
                rows.shape[0] == index.shape[0] && rows.shape[0] <= left.shape[0],
            "{}: the tensors of '{}' do not make one matrix", checkpoint->path().string(), shown(stem));
      // A small file must not ask for a matrix without end: real ones hold a few hundred times what is stored.
      check(
          left.shape[0] / kMostTimes < (left.elements() + right.elements()) / std::max<int64_t>(1, right.shape[1]) + 1,
          "{}: '{}' would be a matrix {} x {} of rank {}", checkpoint->path().string(), shown(stem), left.shape[0],
          right.shape[1], left.shape[1]);
      OverlayTensor t;
      t.info.name = stem + ".weight";
      t.info.format = left.format;
      t.info.shape = {left.shape[0], right.shape[1]};
      t.get = [checkpoint, stem, info = t.info] { return whole(*checkpoint, stem, info); };
      return t;
    };
  };
  return {kLowRankSparse, {".left", ".right", ".rows", ".index"}, open};
}

}  // namespace moiety
