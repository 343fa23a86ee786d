// HOBBIT: with experts on a slow disk, what do mixed precision, reading ahead and the cache's priority each bring?
#include <fmt/format.h>
#include <torch/torch.h>

#include <chrono>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/offload/checkpoint_experts.h"
#include "moiety/offload/low_experts.h"
#include "moiety/offload/offload.h"
#include "moiety/offload/record.h"
#include "moiety/study/language.h"
#include "moiety/tasks/scoring.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr int64_t kExperts = 16, kTopK = 2;
constexpr double kRate = 300e6;  // bytes a second: an expert takes some seven times as long as a layer computes
constexpr double kShare = 0.25;  // of all experts' bytes are in memory

LanguageRecipe recipe() {
  LanguageRecipe r;
  r.hidden = 256;
  r.width = 256;
  r.heads = 4;
  r.length = 128;
  r.lr = 2e-3;
  r.held_out_tokens = 512;
  return r;
}

// The trained mixture as GGUF files: experts in half precision with four- or two-bit copies, and in four bits alone.
std::filesystem::path base_of(const StudyCell& cell) {
  return cell.once(fmt::format("base-{}-{}", cell.budget.steps, cell.seed), [&](const std::filesystem::path& folder) {
    const LanguageRecipe r = recipe();
    train_language(cell,
                   {.recipe = r,
                    .parts = json::array(),
                    .config = {{"model_type", "mixtral"},
                               {"num_local_experts", kExperts},
                               {"num_experts_per_tok", kTopK},
                               {"head_dim", r.hidden / r.heads},
                               {"router_aux_loss_coef", 0.01}}},
                   "base");
    const auto trained = Checkpoint::open((cell.folder / "base" / "last").string());
    WriteOptions half, four, two;
    half.type = "f16";
    four.type = two.type = "f16";
    four.tensor_types = {{"_exps", "q4_0"}};
    two.tensor_types = {{"_exps", "tq2_0"}};
    write_gguf(*trained, folder / "half.gguf", half);
    write_gguf(*trained, folder / "four.gguf", four);
    const auto file = Checkpoint::open((folder / "half.gguf").string());
    add_low_experts(*file, Format::Q4_0, folder / "half-four.gguf", false);
    add_low_experts(*file, Format::TQ2_0, folder / "half-two.gguf", false);
    // Routing of text that was learned calibrates the cache.
    const auto model = load_causal(*file);
    model->eval();
    std::vector<int64_t> ids;
    for (const auto& [name, rows] : learned_text(r)) {
      const auto some = rows.batches.at(0).ids.slice(0, 0, 2).to(torch::kInt64).reshape({-1});
      ids.insert(ids.end(), some.const_data_ptr<int64_t>(), some.const_data_ptr<int64_t>() + some.numel());
    }
    write_traces(folder / "traces.safetensors", record_experts(*model, ids, -1, r.length));
  });
}

struct Arm {
  std::string file, policy;
  double t1 = 1.0, t2 = 1.0;
  int64_t lookahead = 0;
  bool calibrated = true;
  bool cache = true;
};

Arm arm_of(const std::string& name) {
  if (name == "on-demand") return {.file = "half.gguf", .policy = "lru", .cache = false};
  if (name == "lru" || name == "lfu") return {.file = "half.gguf", .policy = name};
  if (name == "all-four-bits") return {.file = "four.gguf", .policy = "lru"};
  if (name == "high-only") return {.file = "half.gguf", .policy = "hobbit", .lookahead = 2};
  Arm a{.file = name == "hobbit-two-bits" ? "half-two.gguf" : "half-four.gguf",
        .policy = "hobbit",
        .t1 = 0.6,
        .t2 = 0.9,
        .lookahead = 2};
  if (name == "no-read-ahead") a.lookahead = 0;
  if (name == "one-ahead") a.lookahead = 1;
  if (name == "recency-only") a.calibrated = false;
  return a;
}

json measure(const StudyCell& cell) {
  const auto folder = base_of(cell);
  const Arm arm = arm_of(cell.arm);
  const auto checkpoint = Checkpoint::open((folder / arm.file).string());
  const auto model = load_causal(*checkpoint, {.leave_experts = true});
  model->eval();
  OffloadOptions options;
  options.policy = arm.policy;
  options.read.rate = kRate;
  // The memory of every arm is that of a quarter of the half-precision experts.
  const LanguageRecipe r = recipe();
  const int64_t all = r.layers * kExperts;
  const auto high_bytes = static_cast<double>(3 * r.hidden * r.width * 2);
  const double memory = kShare * static_cast<double>(all) * high_bytes;
  const bool low = arm.t1 < 1.0;
  const double low_bytes = arm.file == "half-two.gguf" ? high_bytes * 2.0625 / 16 : high_bytes * 4.5 / 16;
  const double own = arm.file == "four.gguf" ? low_bytes : high_bytes;
  options.capacity_high = arm.cache ? static_cast<int64_t>((low ? 0.8 : 1.0) * memory / own) : kTopK;
  options.capacity_low = low ? static_cast<int64_t>(0.2 * memory / low_bytes) : 0;
  const double bits_low = arm.file == "half-two.gguf" ? 2 : 4;
  if (arm.policy == "hobbit") {
    HobbitWeights w{1, 0, 0, 0};
    if (arm.calibrated)
      w = calibrate_hobbit(read_traces((folder / "traces.safetensors").string()), arm.t1, arm.t2, options.capacity_high,
                           options.capacity_low, bits_low, 16)
              .weights;
    options.settings = {{"t1", arm.t1},
                        {"t2", arm.t2},
                        {"lookahead", arm.lookahead},
                        {"weights", {{"lru", w.lru}, {"lfu", w.lfu}, {"lhu", w.lhu}, {"fld", w.fld}}}};
  }
  const auto offload = Offload::attach(*model, *checkpoint, options);
  offload->start({.context = r.length});
  double nll = 0.0;
  int64_t tokens = 0;
  std::map<std::string, HeldOut> text = held_out_text(r);
  const auto start = std::chrono::steady_clock::now();
  for (const auto& [name, rows] : text) {
    // A row of every source: a sequence each, token by token.
    const auto ids = rows.batches.at(0).ids.slice(0, 0, 1).to(torch::kInt64);
    const auto scores = score_tokens(*model, ids, {}, 0, false, /*stepwise=*/true);
    nll -= scores.logprob.sum().item<double>();
    tokens += ids.size(1) - 1;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const StoreStats s = offload->stats();
  const auto n = static_cast<double>(tokens);
  const auto& c = s.counts;
  return {{"tokens_per_second", n / seconds},
          {"kilobytes_per_token", static_cast<double>(s.bytes_read) / n / 1e3},
          {"penalty", (static_cast<double>(c.miss_high) + static_cast<double>(c.miss_low) * bits_low / 16.0) / n},
          {"hit_rate", 100.0 * s.hit_rate()},
          {"perplexity", std::exp(nll / n)},
          {"altered", 100.0 * static_cast<double>(c.altered) / static_cast<double>(c.pairs)},
          {"guess_precision", c.guessed > 0 ? static_cast<double>(c.right) / static_cast<double>(c.guessed) : 0.0},
          {"settings", offload->policy().settings()}};
}

StudyOutcome judge(const StudyTable& t) {
  const auto speed = t.difference("hobbit", "lru", "tokens_per_second"),
             quality = t.difference("hobbit", "lru", "perplexity");
  const bool near = quality.mean < 2.0;
  StudyOutcome o;
  o.verdict = speed.mean >= 20.0 && (speed.higher() || speed.percent.size() < 2) && near ? StudyOutcome::reproduced
              : speed.mean <= 0.0 || quality.mean > 5.0                                  ? StudyOutcome::not_reproduced
                                                                                         : StudyOutcome::inconclusive;
  o.reason =
      fmt::format("Tokens a second of HOBBIT against LRU in full precision at the same memory: {}; perplexity: {}. ",
                  speed.text(), quality.text());
  for (const auto& [arm, what] : {std::pair{"one-ahead", "reading one layer ahead"},
                                  {"no-read-ahead", "without reading ahead"},
                                  {"recency-only", "with recency alone in the cache"},
                                  {"high-only", "in high precision only"},
                                  {"hobbit-two-bits", "with two-bit copies"}})
    if (t.has(arm))
      o.reason += fmt::format("HOBBIT {}: {:.1f} tokens/s, perplexity {:.3f}, penalty {:.3f}. ", what,
                              t.mean(arm, "tokens_per_second"), t.mean(arm, "perplexity"), t.mean(arm, "penalty"));
  if (t.has("all-four-bits"))
    o.reason += fmt::format("All experts in four bits: {}.", t.difference("all-four-bits", "lru", "perplexity").text());
  o.headline =
      fmt::format("{:.2f} times LRU's tokens/s at equal memory ({:.2f} without reading ahead), perplexity {:+.2f} %",
                  1.0 + speed.mean / 100,
                  t.mean("no-read-ahead", "tokens_per_second") / t.mean("lru", "tokens_per_second"), quality.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Dynamic precision alone decodes 1.19 to 1.57 times as fast, the cache's miss penalty is 4.7 to 8.7 % below "
      "LRU's "
      "and 2.1 to 4.2 % below LFU's, reading ahead brings about 5 %; GSM8K falls by at most a point.";
  s.setup =
      recipe().text() + fmt::format(
                            "; every block has {} experts of width 256, two a token, in half precision on disk "
                            "behind a limit of {:.0f} MB/s; memory holds a quarter of their bytes in every arm. "
                            "Held-out text is read token by token, a sequence of 128 of every source; the cache's "
                            "weights are calibrated on text that was learned.",
                            kExperts, kRate * 1e-6);
  s.arms = {{"on-demand", "no cache"},
            {"lru", "least recently used, full precision"},
            {"lfu", "least frequently used, full precision"},
            {"hobbit", "HOBBIT with four-bit copies, t1 0.6, t2 0.9"},
            {"one-ahead", "the same reading one layer ahead instead of two"},
            {"no-read-ahead", "the same without reading ahead"},
            {"recency-only", "the same with recency alone in the cache's priority"},
            {"high-only", "reading ahead and the priority, all in full precision"},
            {"hobbit-two-bits", "HOBBIT with two-bit copies"},
            {"all-four-bits", "all experts in four bits, least recently used"}};
  s.metrics = {{"tokens_per_second", "tokens/s", 1}, {"kilobytes_per_token", "kB a token", 1},
               {"penalty", "penalty a token", 3},    {"hit_rate", "in memory, %", 1},
               {"perplexity", "perplexity", 4},      {"altered", "low or left out, %", 1}};
  s.rule =
      "Reproduced: HOBBIT decodes at least 1.2 times as fast as LRU in full precision at equal memory, on every seed "
      "and "
      "by more than two standard errors, with perplexity at most 2 % higher. Not reproduced: no faster, or perplexity "
      "more than 5 % higher. Else inconclusive. The parts are reported.";
  s.full = {.seeds = 3, .steps = 400};
  s.brief = {.seeds = 1, .steps = 120};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    json out = recipe().settings();
    out["rate"] = kRate;
    out["share"] = kShare;
    return out;
  };
  return s;
}

const RegisterStudy registered("hobbit", "HOBBIT: mixed precision, read-ahead and a weighing cache",
                               "decoding with experts on a slow disk at equal memory, and what each part brings",
                               study);

}  // namespace
}  // namespace moiety
