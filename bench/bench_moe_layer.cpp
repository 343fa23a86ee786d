// Forward and backward of the mixture layer beside a dense layer of the same active work and the machine's own peak.
//   build/bin/bench_moe_layer [--benchmark_filter=mixture/f32]
// gflops: useful work over time (gathering, routing and activations count as nothing). peak_mib: memory that steps add
// at their fullest, gradients included. Memory is kept as `moiety train` keeps it. Threads: OMP_NUM_THREADS.
#include <benchmark/benchmark.h>
#include <malloc.h>
#include <torch/torch.h>

#include <fstream>
#include <string>

#include "moiety/base/memory.h"
#include "moiety/moe/mixture.h"

namespace {

using namespace moiety;

constexpr int64_t kHidden = 512, kWidth = 1024, kTokens = 2048, kChosen = 2;

// "VmHWM" or "VmRSS" of this process, MiB.
double status_mib(const char* key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.rfind(key, 0) == 0) return std::stod(line.substr(line.find_first_of("0123456789"))) / 1024.0;
  return 0.0;
}

void reset_peak() {
  std::ofstream("/proc/self/clear_refs") << 5;
}

torch::Tensor fresh(std::vector<int64_t> shape, torch::Dtype dtype) {
  return (torch::randn(shape) * 0.02).to(dtype).requires_grad_(true);
}

// Work of one step in FLOP: three products forward, twice that backward.
double work(int64_t pairs) {
  return 3.0 * 3.0 * 2.0 * static_cast<double>(pairs * kHidden * kWidth);
}

template <class Step>
void measure(benchmark::State& state, double flop, std::vector<torch::Tensor> leaves, Step step) {
  keep_freed_memory();
  ::malloc_trim(0);  // what earlier benchmarks have freed counts for nobody
  const double before = status_mib("VmRSS");
  reset_peak();
  for (int i = 0; i < 2; ++i) {
    for (auto& t : leaves) t.mutable_grad().reset();
    step();
  }
  state.counters["peak_mib"] = status_mib("VmHWM") - before;
  for (auto _ : state) {
    for (auto& t : leaves) t.mutable_grad().reset();
    step();
  }
  state.counters["gflops"] =
      benchmark::Counter(flop * 1e-9 * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
  state.counters["tokens_per_second"] =
      benchmark::Counter(static_cast<double>(kTokens * state.iterations()), benchmark::Counter::kIsRate);
}

void mixture(benchmark::State& state, torch::Dtype dtype) {
  torch::manual_seed(1);
  const int64_t experts = state.range(0);
  TopKRouterOptions options;
  options.top_k = kChosen;
  options.normalize = true;
  auto gate = fresh({experts, kHidden}, torch::kFloat32), g = fresh({experts, kWidth, kHidden}, dtype),
       u = fresh({experts, kWidth, kHidden}, dtype), d = fresh({experts, kHidden, kWidth}, dtype);
  Mixture layer(std::make_shared<TopKRouter>(Linear(gate), options),
                std::make_shared<GatedExperts>(LinearStack(g), LinearStack(u), LinearStack(d), activation("silu")));
  auto x = torch::randn({1, kTokens, kHidden}).to(dtype).requires_grad_(true);
  const auto out = torch::randn({1, kTokens, kHidden}).to(dtype);
  measure(state, work(kTokens * kChosen), {x, gate, g, u, d}, [&] {
    Pass pass;
    pass.training = true;
    layer.forward(x, pass).backward(out);
  });
}

void dense(benchmark::State& state, torch::Dtype dtype) {
  torch::manual_seed(1);
  auto g = fresh({kChosen * kWidth, kHidden}, dtype), u = fresh({kChosen * kWidth, kHidden}, dtype),
       d = fresh({kHidden, kChosen * kWidth}, dtype);
  FeedForward layer{Linear(g), Linear(u), Linear(d), activation("silu")};
  auto x = torch::randn({1, kTokens, kHidden}).to(dtype).requires_grad_(true);
  const auto out = torch::randn({1, kTokens, kHidden}).to(dtype);
  measure(state, work(kTokens * kChosen), {x, g, u, d}, [&] {
    Pass pass;
    layer.apply(x, pass).backward(out);
  });
}

// What a large product reaches: the measured peak of the machine.
void peak(benchmark::State& state, torch::Dtype dtype) {
  const auto a = torch::randn({2048, 2048}).to(dtype), b = torch::randn({2048, 2048}).to(dtype);
  auto c = torch::empty_like(a);
  for (auto _ : state) at::mm_out(c, a, b);
  state.counters["gflops"] = benchmark::Counter(
      2.0 * 2048.0 * 2048.0 * 2048.0 * 1e-9 * static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
}

BENCHMARK_CAPTURE(peak, f32, torch::kFloat32)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(peak, bf16, torch::kBFloat16)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(dense, f32, torch::kFloat32)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(dense, bf16, torch::kBFloat16)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(mixture, f32, torch::kFloat32)
    ->Arg(8)
    ->Arg(32)
    ->Arg(64)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(mixture, bf16, torch::kBFloat16)
    ->Arg(8)
    ->Arg(32)
    ->Arg(64)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
