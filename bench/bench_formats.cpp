// Speed of decoding and of products, per format and instruction set. Bytes are those of the stored weights, so that
// products compare with the memory's bandwidth; "weights" counts elements.
//   bench_formats --benchmark_filter='dot/Q4_K.*'
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <vector>

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/dot.h"
#include "moiety/kernels/format.h"

namespace moiety {
namespace {

struct Matrix {
  Format format;
  int64_t rows, cols;
  std::vector<std::byte> data;

  Matrix(Format format, int64_t rows, int64_t cols) : format(format), rows(rows), cols(cols) {
    const int64_t stride = row_bytes(format, cols);
    data.resize(static_cast<size_t>(rows * stride));
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.f, 0.02f);
    std::vector<float> x(static_cast<size_t>(cols));
    // A few different rows are enough; quantizing all of a large matrix takes longer than the measurement.
    for (int64_t r = 0; r < rows; ++r) {
      std::byte* to = data.data() + r * stride;
      if (r < 16) {
        for (float& v : x) v = normal(random);
        quantize_row(format, x.data(), to, cols);
      } else {
        std::copy(data.data() + (r % 16) * stride, data.data() + (r % 16 + 1) * stride, to);
      }
    }
  }
};

void count(benchmark::State& state, const Matrix& m) {
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(m.data.size()));
  state.counters["weights"] =
      benchmark::Counter(static_cast<double>(state.iterations() * m.rows * m.cols), benchmark::Counter::kIsRate);
}

void decode(benchmark::State& state, Format format, Isa isa) {
  const Matrix m(format, 512, 1536);
  set_isa(isa);
  std::vector<float> out(static_cast<size_t>(m.cols));
  const int64_t stride = row_bytes(format, m.cols);
  for (auto _ : state) {
    for (int64_t r = 0; r < m.rows; ++r) dequantize_row(format, m.data.data() + r * stride, out.data(), m.cols);
    benchmark::DoNotOptimize(out.data());
  }
  count(state, m);
  set_isa(best_isa());
}

void dot(benchmark::State& state, Format format, Isa isa, int64_t rows, int64_t cols) {
  const Matrix m(format, rows, cols);
  set_isa(isa);
  std::vector<float> x(static_cast<size_t>(cols), 0.f), y(static_cast<size_t>(rows));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.f;
  QuantizedRow q;
  for (auto _ : state) {
    if (is_block(format)) {
      quantize_activations(format, x.data(), cols, q);
      dot_rows(format, m.data.data(), rows, cols, q, y.data());
    } else {
      dot_rows_float(format, m.data.data(), rows, cols, x.data(), y.data());
    }
    benchmark::DoNotOptimize(y.data());
  }
  count(state, m);
  set_isa(best_isa());
}

[[maybe_unused]] const bool registered = [] {
  for (const FormatInfo& f : formats()) {
    if (!f.can_quantize) continue;
    for (Isa isa : {Isa::Portable, Isa::Avx2, Isa::Avx512}) {
      if (isa > best_isa()) continue;
      const std::string end = "/" + std::string(f.name) + "/" + std::string(isa_name(isa));
      benchmark::RegisterBenchmark(("decode" + end).c_str(), decode, f.format, isa);
      benchmark::RegisterBenchmark(("dot" + end + "/cached").c_str(), dot, f.format, isa, 256, 1536);
      if (f.block <= 32) benchmark::RegisterBenchmark(("dot" + end + "/576x576").c_str(), dot, f.format, isa, 576, 576);
      benchmark::RegisterBenchmark(("dot" + end + "/memory").c_str(), dot, f.format, isa, 65536, 1536);
    }
  }
  return true;
}();

}  // namespace
}  // namespace moiety
