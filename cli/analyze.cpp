// moiety analyze: what goes on inside a model while it reads text.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "analyze.h"
#include "moiety/analyze/routing.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/progress.h"
#include "moiety/models/vision.h"
#include "moiety/offload/checkpoint_experts.h"
#include "moiety/offload/edgemoe.h"
#include "moiety/offload/record.h"
#include "moiety/tasks/image_classification.h"
#include "moiety/tasks/scoring.h"
#include "open_model.h"
#include "verb.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

std::vector<AnalyzeSetup>& registered() {
  static std::vector<AnalyzeSetup> all;
  return all;
}

struct Options {
  Common common;
  std::vector<std::string> texts, images;
  int64_t limit = 1000;
  std::string out, html;
  int64_t context = 0, batch_size = 8, limit_tokens = 0, top_tokens = 8;
};

/// One bar an expert; of neighbours that share one, the largest. `most` fills it.
std::string bars(const std::vector<double>& values, double most) {
  constexpr std::string_view kBars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  const size_t columns = std::min<size_t>(values.size(), 64);
  std::string out;
  for (size_t c = 0; c < columns; ++c) {
    const size_t begin = c * values.size() / columns, end = std::max(begin + 1, (c + 1) * values.size() / columns);
    const double value =
        *std::max_element(values.begin() + static_cast<int64_t>(begin), values.begin() + static_cast<int64_t>(end));
    out += kBars[static_cast<size_t>(std::clamp(most > 0 ? value / most * 8.0 : 0.0, 0.0, 7.0))];
  }
  return out;
}

void print_table(const json& report) {
  fmt::print("{:>5} {:<10} {:>7} {:>6} {:>8} {:>8} {:>7} {:>10} {:>7} {:>7}  load\n", "layer", "site", "experts",
             "chosen", "even", "largest", "unused", "indecision", "repeat", "informs");
  for (const auto& l : report["layers"]) {
    const auto share = l["share"].get<std::vector<double>>();
    const auto round = l["round"].get<int64_t>();
    fmt::print("{:>5} {:<10} {:>7} {:>6.2f} {:>8.3f} {:>7.2f}x {:>7} {:>10.3f} {:>6.1f}% {:>7}  {}\n",
               l["layer"].get<int64_t>(), l["site"].get<std::string>() + (round > 0 ? fmt::format("#{}", round) : ""),
               share.size(), l["experts_per_token"].get<double>(), l["load_entropy_normalized"].get<double>(),
               l["imbalance"].get<double>(), l["unused"].get<int64_t>(), l["token_entropy_normalized"].get<double>(),
               100.0 * l["repetition"].get<double>(),
               l.contains("mutual_information") ? fmt::format("{:.3f}", l["mutual_information"].get<double>()) : "",
               bars(share, *std::max_element(share.begin(), share.end())));
  }
  const auto& s = report["summary"];
  fmt::print(
      "\n{} tokens, {} layers with experts, {} of {} experts unused, largest load {:.2f}x even, neighbouring layers "
      "share "
      "{:.3f} nats\n",
      report["tokens"].get<int64_t>(), s["layers"].get<int64_t>(), s["unused"].get<int64_t>(),
      s["experts"].get<int64_t>(), s["worst_imbalance"].get<double>(), s["mean_mutual_information"].get<double>());
}

// Writes and prints a report.
int finish(const Options& o, json report, std::chrono::steady_clock::time_point start) {
  report["model"] = o.common.model;
  report["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const auto dumped = [&] { return report.dump(2, ' ', false, json::error_handler_t::replace) + "\n"; };
  if (!o.out.empty()) write_file(o.out, dumped());
  if (!o.html.empty()) write_file(o.html, routing_page(report));
  if (o.common.json)
    std::cout << dumped();
  else
    print_table(report);
  return 0;
}

// The positions of images in place of the tokens of texts.
int run_image_routing(const Options& o) {
  const auto start = std::chrono::steady_clock::now();
  const auto checkpoint = open_checkpoint(o.common);
  check(is_vision(checkpoint->config()), "{} is no vision model that moiety has saved: it reads --text",
        o.common.model);
  const auto model = load_vision(*checkpoint, {o.common.dtype, torch::Device(o.common.device)});
  const int64_t side = model->config().image / model->config().patch, positions = side * side + 1;
  RoutingStatistics statistics(static_cast<int64_t>(o.images.size()));
  json files = json::array();
  int64_t seen = 0;
  for (size_t i = 0; i < o.images.size(); ++i) {
    DataOptions options;
    options.channels = static_cast<int>(model->config().channels);
    Trace trace;
    trace.on_record = [&](const Trace::Record& record) {
      const int64_t rows = record.routing.experts.size(0) / positions;
      statistics.add(record, torch::zeros({rows, positions}, torch::kInt64),
                     torch::ones({rows, positions}, torch::kBool), static_cast<int64_t>(i));
    };
    ImageScoring scoring;
    scoring.limit = o.limit;
    scoring.device = torch::Device(o.common.device);
    scoring.trace = &trace;
    const auto score = score_images(*model, *Dataset::open(o.images[i], options), scoring);
    files.push_back({{"file", o.images[i]}, {"tokens", score.images * positions}, {"images", score.images}});
    seen += score.images;
  }
  check(!statistics.sites().empty(), "no block of the model has routed anything: it has no mixture of experts");
  json report = to_json(statistics, o.images);
  report["family"] = checkpoint->config().value("model_type", "");
  report["texts"] = std::move(files);
  report["tokens"] = seen * positions;
  report["settings"] = {{"limit", o.limit}, {"dtype", o.common.dtype}};
  return finish(o, std::move(report), start);
}

int run_routing(const Options& o) {
  check(o.texts.empty() != o.images.empty(), "give either --text FILE or, for a vision model, --images DATA");
  if (!o.images.empty()) return run_image_routing(o);
  OpenModel open = open_causal(o.common);
  RoutingOptions options;
  options.context = o.context > 0 ? o.context : std::min<int64_t>(512, open.model->context_length());
  options.batch_size = o.batch_size;
  options.count_ids = o.top_tokens > 0;
  if (adds_bos(*open.tokenizer)) options.bos = *open.tokenizer->bos();
  std::vector<RoutingText> texts;
  json files = json::array();
  int64_t tokens = 0;
  for (const auto& path : o.texts) {
    const std::string text = read_text(path, int64_t{4} << 30);
    auto ids = open.tokenizer->encode(text, false);
    check(!ids.empty(), "{} gives no tokens", path);
    if (o.limit_tokens > 0 && static_cast<int64_t>(ids.size()) > o.limit_tokens)
      ids.resize(static_cast<size_t>(o.limit_tokens));
    files.push_back({{"file", path}, {"tokens", ids.size()}});
    tokens += static_cast<int64_t>(ids.size());
    texts.push_back({path, std::move(ids)});
  }
  const auto start = std::chrono::steady_clock::now();
  std::optional<Progress> progress;
  const auto statistics = analyze_routing(*open.model, texts, options, [&](int64_t done, int64_t windows) {
    if (!progress) progress.emplace("routing", windows, "window");
    progress->set(done);
  });
  progress.reset();
  json report = to_json(statistics, o.texts, open.tokenizer.get(), o.top_tokens);
  report["family"] = open.checkpoint->config().value("model_type", "");
  report["texts"] = std::move(files);
  report["tokens"] = tokens;
  report["settings"] = {{"context", options.context},
                        {"batch_size", o.batch_size},
                        {"limit_tokens", o.limit_tokens},
                        {"bos", options.bos >= 0},
                        {"dtype", o.common.dtype}};
  return finish(o, std::move(report), start);
}

// The ids of all texts, and what every router chose on them.
ExpertTraces traces_of(const OpenModel& open, const std::vector<std::string>& texts, int64_t limit_tokens,
                       int64_t context) {
  std::vector<int64_t> ids;
  for (const auto& path : texts) {
    auto more = open.tokenizer->encode(read_text(path, int64_t{4} << 30), false);
    check(!more.empty(), "{} gives no tokens", path);
    if (limit_tokens > 0 && static_cast<int64_t>(more.size()) > limit_tokens)
      more.resize(static_cast<size_t>(limit_tokens));
    ids.insert(ids.end(), more.begin(), more.end());
  }
  std::optional<Progress> progress;
  return record_experts(*open.model, ids, adds_bos(*open.tokenizer) ? *open.tokenizer->bos() : -1,
                        context > 0 ? context : std::min<int64_t>(512, open.model->context_length()),
                        [&](int64_t done, int64_t total) {
                          if (!progress) progress.emplace("experts", total, "token");
                          progress->set(done);
                        });
}

struct TraceOptions {
  Common common;
  std::vector<std::string> texts;
  std::string out;
  int64_t context = 0, limit_tokens = 0, capacity_high = 0, capacity_low = 0;
  double t1 = 0.6, t2 = 0.9, share = 0.25, bits_high = 16, bits_low = 4;
  std::vector<double> shares;
  bool calibrate = false;
};

int run_traces(const TraceOptions& o) {
  const OpenModel open = open_causal(o.common);
  const ExpertTraces traces = traces_of(open, o.texts, o.limit_tokens, o.context);
  write_traces(o.out, traces);
  json report = {{"output", o.out},       {"tokens", traces.tokens},           {"layers", traces.layers},
                 {"top_k", traces.top_k}, {"num_experts", traces.num_experts}, {"router_hash", traces.router_hash}};
  std::string remark;
  if (o.calibrate) {
    double t1 = o.t1, t2 = o.t2;
    if (!o.shares.empty()) {
      check(o.shares.size() == 2, "--shares takes two numbers: the share of high, and that of high or low precision");
      std::tie(t1, t2) = score_quantiles(traces, o.shares[0], o.shares[1]);
    }
    const int64_t all = traces.layers * traces.num_experts;
    // By default the bytes of a quarter of all experts, four to one.
    const double bytes = o.share * static_cast<double>(all);
    const int64_t high = o.capacity_high > 0
                             ? o.capacity_high
                             : std::max<int64_t>(traces.top_k, static_cast<int64_t>((t1 < 1 ? 0.8 : 1.0) * bytes));
    const int64_t low =
        o.capacity_high > 0 || t1 >= 1 ? o.capacity_low : static_cast<int64_t>(0.2 * bytes * o.bits_high / o.bits_low);
    const auto found = calibrate_hobbit(traces, t1, t2, high, low, o.bits_low, o.bits_high);
    const auto file = hobbit_file(open.checkpoint->path().string());
    write_calibration(file, found);
    report["calibration"] = {{"file", file},
                             {"t1", t1},
                             {"t2", t2},
                             {"capacity_high", high},
                             {"capacity_low", low},
                             {"penalty", found.penalty},
                             {"penalty_even", found.penalty_even},
                             {"weights",
                              {{"lru", found.weights.lru},
                               {"lfu", found.weights.lfu},
                               {"lhu", found.weights.lhu},
                               {"fld", found.weights.fld}}}};
    remark = fmt::format(
        "wrote {}: t1 {:.3f}, t2 {:.3f}, weights lru {:.1f} lfu {:.1f} lhu {:.1f} fld {:.1f} at {} and {} experts in "
        "memory; misses cost {:.0f}, with equal weights {:.0f}\n",
        file, t1, t2, found.weights.lru, found.weights.lfu, found.weights.lhu, found.weights.fld, high, low,
        found.penalty, found.penalty_even);
  }
  if (o.common.json) {
    std::cout << report.dump(2) << "\n";
    return 0;
  }
  fmt::print("wrote {}: {} tokens, {} layers of {} experts, {} a token\n{}", o.out, traces.tokens, traces.layers,
             traces.num_experts, traces.top_k, remark);
  return 0;
}

struct PathOptions {
  Common common;
  std::vector<std::string> texts;
  std::string out;
  int64_t context = 0, limit_tokens = 0;
};

int run_paths(const PathOptions& o) {
  const OpenModel open = open_causal(o.common);
  const ExpertTraces t = traces_of(open, o.texts, o.limit_tokens, o.context);
  write_expert_paths(o.out, t.experts, t.layers, t.top_k, t.num_experts, t.router_hash);
  if (o.common.json) {
    std::cout << json{{"output", o.out},  {"tokens", t.tokens},           {"layers", t.layers},
                      {"top_k", t.top_k}, {"num_experts", t.num_experts}, {"router_hash", t.router_hash}}
                     .dump(2)
              << "\n";
    return 0;
  }
  fmt::print("wrote {}: the paths of {} tokens through {} layers of {} experts, {} a token\n", o.out, t.tokens,
             t.layers, t.num_experts, t.top_k);
  return 0;
}

const Register analyze({
    "analyze",
    "See inside a model while it reads text: how its routers use the experts",
    "moiety analyze routing olmoe/ --text book.txt\n"
    "moiety analyze routing olmoe/ --text prose.txt code.py --html routing.html\n"
    "moiety analyze routing olmoe/ --text book.txt --limit-tokens 20000 -o routing.json\n"
    "moiety analyze expert-traces m.gguf --text book.txt -o traces.safetensors --calibrate\n"
    "moiety analyze expert-paths m.gguf --text book.txt -o paths.safetensors\n"
    "moiety analyze super-experts olmoe/ --text book.txt --evaluate -o report.json\n"
    "moiety analyze routing VISION-MODEL --images t10k-images-idx3-ubyte.gz",
    [](CLI::App& app) {
      auto o = std::make_shared<Options>();
      app.require_subcommand(1);
      CLI::App& routing = *app.add_subcommand(
          "routing",
          "Expert load, co-activation and entropy of every router, as a table, JSON and a page with heatmaps");
      add_common(routing, o->common);
      routing.add_option("--text", o->texts, "Text files to read; the load of each is also reported on its own");
      routing.add_option("--images", o->images,
                         "Vision models: labelled images, an IDX file or a folder with a folder for each class");
      routing.add_option("--limit", o->limit, "Use only the first images; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      routing
          .add_option("--context", o->context,
                      "Tokens that the model sees at a time, in windows that do not overlap (default: 512, or the "
                      "model's limit)")
          ->check(CLI::Range(1, 1 << 30));
      routing.add_option("--limit-tokens", o->limit_tokens, "Use only the first tokens of each text; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      routing.add_option("--batch-size", o->batch_size, "Windows at a time")
          ->check(CLI::Range(1, 65536))
          ->capture_default_str();
      routing
          .add_option("--top-tokens", o->top_tokens,
                      "How many of its most specific tokens to list for every expert; 0: none")
          ->check(CLI::Range(0, 1000))
          ->capture_default_str();
      routing.add_option("-o,--output", o->out, "Write the JSON to this file");
      routing.add_option("--html", o->html, "Write a page with heatmaps to this file; it needs nothing else");
      auto t = std::make_shared<TraceOptions>();
      CLI::App& traces = *app.add_subcommand(
          "expert-traces", "Which experts every token of a text takes, for replays; and HOBBIT's weights from them");
      add_common(traces, t->common);
      traces.add_option("--text", t->texts, "Text files to read")->required();
      traces.add_option("-o,--output", t->out, "Where to write the trace (safetensors)")->required();
      traces.add_option("--context", t->context, "Tokens of a sequence (default: 512, or the model's limit)")
          ->check(CLI::Range(2, 1 << 30));
      traces.add_option("--limit-tokens", t->limit_tokens, "Use only the first tokens of each text; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      auto* calibrate = traces.add_flag("--calibrate", t->calibrate,
                                        "Also find the weights of HOBBIT's cache, and write them to MODEL.hobbit.json");
      const auto share = CLI::Range(0.0, 1.0);
      traces.add_option("--t1", t->t1, "See --offload hobbit")->check(share)->capture_default_str()->needs(calibrate);
      traces.add_option("--t2", t->t2, "See --offload hobbit")->check(share)->capture_default_str()->needs(calibrate);
      traces
          .add_option("--shares", t->shares,
                      "Set t1 and t2 so that these shares of all uses ask for high, and for high or low precision")
          ->delimiter(',')
          ->check(share)
          ->needs(calibrate);
      traces.add_option("--expert-share", t->share, "Share of all experts that memory holds")
          ->check(share)
          ->capture_default_str()
          ->needs(calibrate);
      traces.add_option("--capacity-high", t->capacity_high, "Experts in memory in high precision, instead")
          ->check(CLI::PositiveNumber)
          ->needs(calibrate);
      traces.add_option("--capacity-low", t->capacity_low, "And in low precision")
          ->check(CLI::NonNegativeNumber)
          ->needs(calibrate);
      traces.add_option("--bits-high", t->bits_high, "Bits of a weight in high precision")
          ->check(CLI::PositiveNumber)
          ->capture_default_str();
      traces.add_option("--bits-low", t->bits_low, "And in low")->check(CLI::PositiveNumber)->capture_default_str();
      auto p = std::make_shared<PathOptions>();
      CLI::App& paths = *app.add_subcommand(
          "expert-paths", "The paths that tokens of a text take through the experts, for --offload edgemoe");
      add_common(paths, p->common);
      paths.add_option("--text", p->texts, "Text files to read")->required();
      paths.add_option("-o,--output", p->out, "Where to write the paths (safetensors)")->required();
      paths.add_option("--context", p->context, "Tokens of a sequence (default: 512, or the model's limit)")
          ->check(CLI::Range(2, 1 << 30));
      paths.add_option("--limit-tokens", p->limit_tokens, "Use only the first tokens of each text; 0: all")
          ->check(CLI::NonNegativeNumber)
          ->capture_default_str();
      auto ways = std::make_shared<std::vector<AnalyzeWay>>();
      for (const auto& setup : registered()) ways->push_back(setup(app));
      return [o, t, p, ways, traces = &traces, paths = &paths] {
        for (const AnalyzeWay& way : *ways)
          if (way.app->parsed()) return way.run();
        return traces->parsed() ? run_traces(*t) : paths->parsed() ? run_paths(*p) : run_routing(*o);
      };
    },
});

}  // namespace

RegisterAnalyze::RegisterAnalyze(AnalyzeSetup setup) {
  registered().push_back(std::move(setup));
}

}  // namespace moiety::cli
