// EdgeMoE: do widths of their own cost less than one width for all, do paths tell the next experts, and does that make
// experts on a slow disk faster?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/compress/edgemoe_experts.h"
#include "moiety/io/edge_experts.h"
#include "moiety/io/safetensors.h"
#include "moiety/offload/edgemoe.h"
#include "moiety/offload/offload.h"
#include "moiety/offload/record.h"
#include "moiety/study/language.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kLayers = 5, kExperts = 16, kWidth = 128, kAll = kLayers * kExperts;
constexpr double kTolerance = 0.02, kReadRate = 64e6;
constexpr int64_t kSizes[] = {8, 20, 40};  // experts in a buffer: a tenth, a quarter, a half

LanguageRecipe recipe() {
  LanguageRecipe r;
  r.layers = kLayers;
  return r;
}

LanguageRecipe with_tokens(int64_t tokens) {
  LanguageRecipe r = recipe();
  r.held_out_tokens = tokens;
  return r;
}

std::vector<int64_t> ids_of(const std::map<std::string, HeldOut>& text) {
  std::vector<int64_t> ids;
  for (const auto& [name, rows] : text)
    for (const auto& batch : rows.batches) {
      const auto real = batch.mask.defined() ? batch.ids.masked_select(batch.mask) : batch.ids.flatten().contiguous();
      ids.insert(ids.end(), real.const_data_ptr<int64_t>(), real.const_data_ptr<int64_t>() + real.numel());
    }
  return ids;
}

double accuracy_on(CausalModel& model, const std::map<std::string, HeldOut>& text) {
  return std::exp(-measure_language(model, text)["nats"].get<double>());
}

void write_edge(const EdgeMoeExperts& experts, EdgeLayout layout, const Checkpoint& source, const fs::path& file) {
  write_edge_experts(edge_experts_path(file), layout, Int2Scale::max,
                     [&](int64_t l, int64_t e) { return experts.original(l, e); });
  write_edge_model(source, file, layout);
}

int64_t expert_bytes(const EdgeLayout& layout, const std::vector<int64_t>& bits) {
  int64_t bytes = 0;
  for (const int64_t b : bits) bytes += layout.stored_bytes(b);
  return bytes;
}

// The trained model, its search, the mixed model's files, and paths of learned and of held-out text.
fs::path prepared(const StudyCell& cell) {
  return cell.once(fmt::format("made-{}", cell.seed), [&](const fs::path& folder) {
    StudyCell own = cell;
    own.folder = folder;
    RoutingConfig balanced;
    balanced.balance = "switch";
    balanced.coef = 0.01;
    train_language(own, {.recipe = recipe(),
                         .config = {{"model_type", "olmoe"},  // a top-1 gate that is not renormalised
                                    {"intermediate_size", kWidth},
                                    {"num_experts", kExperts},
                                    {"num_experts_per_tok", 1},
                                    {"norm_topk_prob", false}},
                         .routing = balanced});
    const auto trained = Checkpoint::open((folder / "run" / "last").string());
    WriteOptions whole;
    whole.type = "f32";
    write_gguf(*trained, folder / "m.gguf", whole);
    const auto source = Checkpoint::open((folder / "m.gguf").string());
    const std::shared_ptr<CausalModel> model = load_causal(*source);
    model->eval();
    const std::string hash = router_hash(*model);
    const auto record = [&](const std::vector<int64_t>& ids, const char* name) {
      const ExpertTraces t = record_experts(*model, ids, -1, recipe().length);
      write_expert_paths((folder / name).string(), t.experts, t.layers, t.top_k, t.num_experts, hash);
    };
    record(ids_of(learned_text(recipe())), "learned.safetensors");
    record(ids_of(held_out_text(with_tokens(2048))), "held-out.safetensors");

    const auto searched = learned_text(with_tokens(1024)), unseen = held_out_text(recipe());
    EdgeMoeExperts experts(model, Int2Scale::max, [&](CausalModel& m) { return accuracy_on(m, searched); });
    EdgeMoeMeasurements measured;
    EdgeMoeConfig config;
    auto found = search_bits(experts, config, measured, {});
    // A model that 2 bits cost less than the tolerance leaves nothing to choose: then half of what they cost.
    config.tolerance = found.uniform_loss[0] > kTolerance ? kTolerance : found.uniform_loss[0] / 2.0;
    found = search_bits(experts, config, measured, {});
    EdgeLayout layout = experts.layout();
    layout.router_hash = hash;
    write_edge(experts, layout, *source, folder / "mixed.gguf");

    std::map<std::string, std::vector<int64_t>> bits;
    for (const int64_t width : {2, 4, 8, 32})
      bits[fmt::format("int{}", width)] = std::vector<int64_t>(static_cast<size_t>(kAll), width);
    bits["mixed"] = found.assignment.bits;
    auto& shuffled = bits["mixed-random"] = found.assignment.bits;
    RandomStream random(static_cast<uint64_t>(cell.seed), "edgemoe: widths at random");
    random.shuffle(shuffled);
    json out = {{"tolerance", config.tolerance},
                {"low", found.assignment.bounds.low},
                {"high", found.assignment.bounds.high},
                {"k", found.assignment.k},
                {"sensitivity", found.sensitivity}};
    experts.set_bits(bits["int32"]);
    const double full = accuracy_on(*model, searched), full_unseen = accuracy_on(*model, unseen);
    for (const auto& [name, b] : bits) {
      experts.set_bits(b);
      out["variants"][name] = {{"loss", 100.0 * (full - accuracy_on(*model, searched)) / full},
                               {"loss_unseen", 100.0 * (full_unseen - accuracy_on(*model, unseen)) / full_unseen},
                               {"kib", static_cast<double>(expert_bytes(layout, b)) / 1024.0}};
    }
    write_file(folder / "made.json", out.dump(1));
  });
}

// Share of the tokens of a trace whose expert is the most probable one, over the layers that have two before them.
double top1_rate(const fs::path& made, const std::string& by) {
  const auto paths = read_expert_paths((made / "learned.safetensors").string());
  const auto file = SafetensorsFile::open(made / "held-out.safetensors");
  const TensorView view = file->get("profile_trace");
  const int64_t tokens = view.shape[0];
  const auto at = [&](int64_t t, int64_t n) {
    return static_cast<int64_t>(static_cast<int8_t>(view.data[static_cast<size_t>(t * kLayers + n)]));
  };
  int64_t right = 0, all = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = 2; n < kLayers; ++n) {
      const ExpertSet two = {at(t, n - 2)}, one = {at(t, n - 1)};
      const auto p = by == "two-layers"  ? paths.probability(n, two, one)
                     : by == "one-layer" ? paths.probability_of_one(n, one)
                                         : paths.share(n);
      right += descending(p).front() == at(t, n);
      ++all;
    }
  return 100.0 * static_cast<double>(right) / static_cast<double>(all);
}

// What came first leaves first.
class Fifo : public OffloadPolicy {
 public:
  Fifo() : came_(static_cast<size_t>(kAll)) {}
  void used(const ExpertVersion& v, int64_t, bool hit, const Moment&) override {
    if (!hit) came_[static_cast<size_t>(v.layer * kExperts + v.expert)] = ++clock_;
  }
  size_t victim(std::span<const ExpertVersion> candidates, const Moment&) override {
    return lowest(candidates, [&](const ExpertVersion& v) {
      return static_cast<double>(came_[static_cast<size_t>(v.layer * kExperts + v.expert)]);
    });
  }

 private:
  int64_t clock_ = 0;
  std::vector<int64_t> came_;
};

json hit_rates(const fs::path& made, const std::string& policy) {
  const auto paths = std::make_shared<const ExpertPaths>(read_expert_paths((made / "learned.safetensors").string()));
  const auto file = SafetensorsFile::open(made / "held-out.safetensors");
  const TensorView view = file->get("profile_trace");
  std::vector<int64_t> trace;
  for (const std::byte b : view.data) trace.push_back(static_cast<int8_t>(b));
  json out;
  for (const int64_t size : kSizes) {
    std::shared_ptr<OffloadPolicy> p;
    const PolicySetup setup{.layers = kLayers, .experts = kExperts, .top_k = 1};
    if (policy == "score") {
      EdgeMoePolicyConfig config;
      config.preload = 0;
      p = std::make_shared<EdgeMoe>(paths, config);
    } else if (policy == "fifo") {
      p = std::make_shared<Fifo>();
    } else {
      p = factory<MakeOffloadPolicy>(get_method("policy", policy))(setup, json::object());
    }
    const auto r = replay_paths(trace, kLayers, 1, kExperts, p, size);
    out[fmt::format("hits_{}", size)] = 100.0 * static_cast<double>(r.hits) / static_cast<double>(r.hits + r.demand);
  }
  return out;
}

// Milliseconds a token, one after another, teacher-forced on held-out text.
json time_per_token(const fs::path& made, const std::string& arm) {
  OffloadOptions options;
  options.read.rate = kReadRate;
  const bool widths = arm != "on-demand", ahead = arm == "preload" || arm == "buffer";
  if (ahead) {
    options.policy = "edgemoe";
    options.settings = {{"preload", 2}, {"expert_paths", (made / "learned.safetensors").string()}};
    options.capacity_high = arm == "buffer" ? kAll / 4 : 3;
  } else {
    options.policy = "lru";
    options.capacity_high = 1;
  }
  const auto source = Checkpoint::open((made / (widths ? "mixed.gguf" : "m.gguf")).string());
  const std::shared_ptr<CausalModel> model = load_causal(*edge_outline(source), {.leave_experts = true});
  model->eval();
  const auto offload = Offload::attach(*model, *source, options);
  offload->start({.context = recipe().length});
  const torch::NoGradGuard frozen;
  std::vector<double> seconds;
  for (const auto& [name, rows] : held_out_text(with_tokens(128))) {
    const auto ids = rows.batches.front().ids.narrow(0, 0, 1);
    auto cache = model->make_cache();
    for (int64_t t = 0; t < ids.size(1); ++t) {
      Pass pass;
      pass.cache = &cache;
      const auto start = std::chrono::steady_clock::now();
      model->forward(ids.narrow(1, t, 1), pass);
      // The first tokens fill the buffer.
      if (t >= 16) seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  }
  std::sort(seconds.begin(), seconds.end());
  const StoreStats s = offload->stats();
  const auto tokens = static_cast<double>(s.counts.steps) / kLayers;
  json out = {{"ms", 1e3 * seconds[seconds.size() / 2]},
              {"kib_token", static_cast<double>(s.bytes_read) / 1024.0 / tokens},
              {"stall_ms", 1e3 * s.stall_seconds / tokens}};
  if (ahead && s.counts.ahead > 0)
    out["ahead_used"] = 100.0 * static_cast<double>(s.counts.ahead_used) / static_cast<double>(s.counts.ahead);
  return out;
}

json measure(const StudyCell& cell) {
  const fs::path made = prepared(cell);
  const json all = parse_json(read_text(made / "made.json"), "made.json");
  const std::string& arm = cell.arm;
  if (all["variants"].contains(arm)) {
    json out = all["variants"][arm];
    if (arm == "mixed")
      for (const char* key : {"tolerance", "low", "high", "k", "sensitivity"}) out[key] = all[key];
    return out;
  }
  if (arm == "two-layers" || arm == "one-layer" || arm == "frequency") return {{"rate", top1_rate(made, arm)}};
  if (arm == "score" || arm == "lru" || arm == "lfu" || arm == "fifo") return hit_rates(made, arm);
  return time_per_token(made, arm);
}

// For every seed: does it hold?
std::pair<int64_t, int64_t> held(const StudyTable& t, const std::function<bool(int64_t)>& on) {
  int64_t yes = 0, all = 0;
  for (const auto& [seed, values] : t.cells("mixed")) {
    yes += on(seed);
    ++all;
  }
  return {yes, all};
}

StudyOutcome judge(const StudyTable& t) {
  const auto value = [&](const char* arm, int64_t seed, const std::string& metric) {
    return t.cells(arm).at(seed).at(metric).get<double>();
  };
  // What a model of the mixed one's size would lose on the line between the two uniform widths.
  const auto line = [&](int64_t seed) {
    const auto mixed = t.cells("mixed").at(seed);
    const std::string low = fmt::format("int{}", mixed.at("low").get<int64_t>()),
                      high = fmt::format("int{}", mixed.at("high").get<int64_t>());
    const double s0 = value(low.c_str(), seed, "kib"), s1 = value(high.c_str(), seed, "kib");
    const double l0 = value(low.c_str(), seed, "loss_unseen"), l1 = value(high.c_str(), seed, "loss_unseen");
    return s0 == s1 ? l0 : l1 + (l0 - l1) * (s1 - mixed.at("kib").get<double>()) / (s1 - s0);
  };
  const auto widths = held(t, [&](int64_t s) {
    return value("mixed", s, "loss_unseen") < line(s) &&
           value("mixed", s, "loss_unseen") < value("mixed-random", s, "loss_unseen");
  });
  const auto paths = held(t, [&](int64_t s) {
    return value("two-layers", s, "rate") > value("one-layer", s, "rate") &&
           value("one-layer", s, "rate") > value("frequency", s, "rate");
  });
  const auto time = held(t, [&](int64_t s) {
    return value("on-demand", s, "ms") > value("widths", s, "ms") &&
           value("widths", s, "ms") > value("preload", s, "ms") &&
           value("preload", s, "ms") > value("buffer", s, "ms") &&
           value("on-demand", s, "ms") >= 1.5 * value("preload", s, "ms");
  });
  const auto cache = held(t, [&](int64_t s) {
    for (const int64_t size : kSizes)
      for (const char* other : {"lru", "lfu", "fifo"})
        if (value("score", s, fmt::format("hits_{}", size)) <= value(other, s, fmt::format("hits_{}", size)))
          return false;
    return true;
  });
  double lines = 0;
  for (const auto& [seed, values] : t.cells("mixed")) lines += line(seed) / static_cast<double>(widths.second);
  StudyOutcome o;
  const auto all = [](const std::pair<int64_t, int64_t>& p) { return p.first == p.second; };
  o.verdict = widths.second > 1 && all(widths) && all(paths) && all(time) && all(cache) ? StudyOutcome::reproduced
              : widths.first == 0 || paths.first == 0 || time.first == 0                ? StudyOutcome::not_reproduced
                                                                                        : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Widths ({} of {} seeds): on unseen text the mixed model loses {:.2f} %, the line between one width for all at "
      "its size {:.2f} %, the same widths at random {:.2f} %. Paths ({} of {}): the most probable expert is right for "
      "{:.1f} % by two layers, {:.1f} % by one, {:.1f} % by frequency. Time a token ({} of {}): {:.2f} ms on demand, "
      "{:.2f} with the widths, {:.2f} with reading ahead, {:.2f} with a quarter of the experts in memory, {:.2f}x in "
      "all. Buffer ({} of {}): hits with a quarter in memory {:.1f} % by the score, {:.1f} % LRU, {:.1f} % LFU, {:.1f} "
      "% FIFO.",
      widths.first, widths.second, t.mean("mixed", "loss_unseen"), lines, t.mean("mixed-random", "loss_unseen"),
      paths.first, paths.second, t.mean("two-layers", "rate"), t.mean("one-layer", "rate"), t.mean("frequency", "rate"),
      time.first, time.second, t.mean("on-demand", "ms"), t.mean("widths", "ms"), t.mean("preload", "ms"),
      t.mean("buffer", "ms"), t.mean("on-demand", "ms") / t.mean("buffer", "ms"), cache.first, cache.second,
      t.mean("score", "hits_20"), t.mean("lru", "hits_20"), t.mean("lfu", "hits_20"), t.mean("fifo", "hits_20"));
  o.headline = fmt::format(
      "{:.2f}x a token by widths, reading ahead and a buffer; next expert foreseen {:.0f} % ({:.0f} % "
      "by frequency); mixed widths lose {:.2f} %, the line {:.2f} %",
      t.mean("on-demand", "ms") / t.mean("buffer", "ms"), t.mean("two-layers", "rate"), t.mean("frequency", "rate"),
      t.mean("mixed", "loss_unseen"), lines);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Switch Transformers with 8 experts a layer: mixed widths take 0.81 GB and lose 0.89 %, INT4 0.85 GB and 2.04 %; "
      "with 16: 0.95 GB and 1.95 % against 1.03 GB and 3.15 %. On a Jetson TX2 a token takes 0.789 s on demand, 0.392 "
      "with the widths, 0.305 with reading ahead, 0.245 with a buffer; the buffer's score beats FIFO, LRU and LFU.";
  s.setup = fmt::format(
      "A byte-level decoder of {} blocks, hidden size 64, whose feed-forward layers are top-1 mixtures of {} experts "
      "of "
      "width {}, trained here once a seed with a balance loss on seven kinds of text. The search measures on learned "
      "text, the table's losses on unseen text too; the tolerance is 2 %, or half of what INT2 loses where that is "
      "less. Paths are counted on learned text and asked on unseen text. Experts are read from disk past the page "
      "cache "
      "at 64 MB/s, tokens one after another, the median counts. On demand: nothing is kept.",
      kLayers, kExperts, kWidth);
  s.arms = {{"int32", "all experts as they are"},
            {"int8", "all experts at 8 bits"},
            {"int4", "all experts at 4 bits"},
            {"int2", "all experts at 2 bits"},
            {"mixed", "the bit search"},
            {"mixed-random", "as many of both widths, at random"},
            {"two-layers", "most probable expert after two layers"},
            {"one-layer", "after one layer"},
            {"frequency", "most frequent expert"},
            {"on-demand", "experts as they are, read when wanted"},
            {"widths", "mixed widths, read when wanted"},
            {"preload", "and the two most probable read ahead"},
            {"buffer", "and a quarter of the experts kept"},
            {"score", "EdgeMoE's score, no reading ahead"},
            {"lru", "least recently used leaves"},
            {"lfu", "least frequently used leaves"},
            {"fifo", "first in, first out"}};
  s.metrics = {{"kib", "experts, KiB", 0},
               {"loss", "loss, %", 2},
               {"loss_unseen", "loss on unseen text, %", 2},
               {"rate", "right, %", 1},
               {"ms", "ms a token", 2},
               {"kib_token", "KiB read a token", 0},
               {"ahead_used", "read ahead and used, %", 0},
               {"hits_8", "hits with 8, %", 1},
               {"hits_20", "with 20", 1},
               {"hits_40", "with 40 of 80", 1}};
  s.rule =
      "Reproduced: on every seed, and two or more: (1) on unseen text the mixed model loses less than the line between "
      "its two uniform widths at its size, and less than the same widths at random; (2) two layers foresee more "
      "experts "
      "than one, and one more than frequency; (3) every step makes tokens faster, and reading ahead with the widths is "
      "at least 1.5x as fast as on demand; (4) the score has more hits than FIFO, LRU and LFU at every size. Not "
      "reproduced: (1), (2) or (3) holds on no seed. Else inconclusive.";
  s.full = {.seeds = 3, .steps = 600};
  s.brief = {.seeds = 1, .steps = 150};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    json settings = recipe().settings();
    settings.update({{"experts", kExperts}, {"expert_width", kWidth}, {"read_rate", kReadRate}});
    return settings;
  };
  return s;
}

const RegisterStudy registered("edgemoe", "EdgeMoE: a width for every expert, paths that tell the next ones",
                               "mixed widths, reading ahead and a buffer against experts on demand", study);

}  // namespace
}  // namespace moiety
