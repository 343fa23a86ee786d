// WideNet: one block for all depths, widened by experts and told apart by norms of its own, against blocks of their own
// and against sharing alone, on images of clothes.
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/models/vision.h"
#include "moiety/moe/routing_counts.h"
#include "moiety/nn/parameters.h"
#include "moiety/study/study.h"
#include "moiety/tasks/image_classification.h"
#include "moiety/train/trainer.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr const char* kImages = "/usr/share/datasets/fashion-mnist";
constexpr int64_t kTuned = 5000, kBatch = 128;
constexpr double kHeldOut = 2.0 / 3.0;                               // of the 60000 training images: 20000 are learned
constexpr double kRate = 3e-3, kLowest = 7.5e-4, kHighest = 2.4e-2;  // the search begins at kRate
constexpr int64_t kTuningSeed = 1000;

VisionConfig model_of(const std::string& arm) {
  VisionConfig c;  // 6 blocks, hidden size 64, 4 heads, patches of 7 x 7, 4 experts of 128, 2 a position
  if (arm == "vit") c.mixture = c.share_attention = c.share_ffn = false;
  if (arm == "shared-dense") c.mixture = false;
  if (arm == "shared-norms") c.share_norms = true;
  if (arm == "own-routers") c.share_router = false;
  return c;
}

DatasetPtr images(const std::string& name) {
  const auto path = std::filesystem::path(kImages) / (name + "-images-idx3-ubyte.gz");
  check(std::filesystem::exists(path), "there is no {}: install the package dataset-fashion-mnist", path.string());
  return Dataset::open(path.string());
}

// Trains one arm; two thirds of the training images are held out, of which `scored` are scored at the end.
std::unique_ptr<Trainer> trained(const StudyCell& cell, const std::string& name, int64_t steps, int64_t seed,
                                 double rate, int64_t scored) {
  images("train");  // complains in words
  TrainConfig c;
  c.task = {{"slug", "image-classification"}, {"label_smoothing", 0.1}};
  c.model.config = dump(model_of(cell.arm));
  SourceConfig source;
  source.path = (std::filesystem::path(kImages) / "train-images-idx3-ubyte.gz").string();
  c.data.sources.push_back(source);
  c.data.held_out = kHeldOut;
  c.train.steps = steps;
  c.train.batch = kBatch;
  c.train.seed = seed;
  c.train.log_every = std::max<int64_t>(1, steps / 20);
  c.optimizer.lr = rate;
  c.optimizer.weight_decay = 0.1;
  c.optimizer.beta2 = 0.999;
  c.schedule.name = "cosine";
  c.schedule.warmup = 0.05;
  c.schedule.floor = 0.05;
  c.evaluation.tokens = scored;
  c.evaluation.batch = 250;
  c.output.folder = (cell.folder / name).string();
  TrainOptions options;
  options.resume = TrainOptions::restart;
  auto trainer = std::make_unique<Trainer>(c, options);
  return trainer;
}

// The best of 0.0015, 0.003, 0.006 for this arm, and of rates beyond while the best one lies at the edge: on a seed of
// its own, half as long as the budget. {rate, tried: {rate: accuracy on training images that were held out}}.
json tuned_rate(const StudyCell& cell) {
  const auto folder = cell.once("rate-" + cell.arm, [&](const std::filesystem::path& to) {
    std::map<double, double> tried;
    const auto attempt = [&](double rate) {
      const auto trainer =
          trained(cell, "rate", std::max<int64_t>(1, cell.budget.steps / 2), kTuningSeed, rate, kTuned);
      tried[rate] = 100.0 * trainer->run().evaluation->accuracy.value();
    };
    for (const double rate : {kRate / 2, kRate, kRate * 2}) attempt(rate);
    const auto best = [&] {
      return std::max_element(tried.begin(), tried.end(),
                              [](const auto& a, const auto& b) { return a.second < b.second; })
          ->first;
    };
    while (best() == tried.begin()->first && best() / 2 >= kLowest) attempt(best() / 2);
    while (best() == tried.rbegin()->first && best() * 2 <= kHighest) attempt(best() * 2);
    json list = json::object();
    for (const auto& [rate, accuracy] : tried) list[fmt::format("{}", rate)] = accuracy;
    write_file(to / "rate.json", json{{"rate", best()}, {"tried", list}}.dump(1) + "\n");
  });
  return parse_json(read_text(folder / "rate.json"), "rate.json");
}

json measure(const StudyCell& cell) {
  const json tuned = tuned_rate(cell);
  const auto trainer = trained(cell, "run", cell.budget.steps, cell.seed, tuned.at("rate").get<double>(), 2);
  trainer->run();
  auto& model = dynamic_cast<VisionModel&>(trainer->module());
  std::map<int64_t, RoutingCounts> loads;  // by block: how often each expert ran
  Trace trace;
  trace.on_record = [&](const Trace::Record& r) { loads[r.site.block].add(r, r.real); };
  ImageScoring scoring;
  scoring.trace = &trace;
  json out{{"accuracy", 100.0 * score_images(model, *images("t10k"), scoring).accuracy()}};
  out["parameters"] = static_cast<double>(parameter_count(model)) / 1e3;
  out["rate"] = 1e3 * tuned.at("rate").get<double>();
  out["tried"] = tuned.at("tried");
  double apart = 0;
  for (const auto& [i, a] : loads)
    for (const auto& [j, b] : loads) apart = std::max(apart, 0.5 * (a.share() - b.share()).abs().sum().item<double>());
  if (!loads.empty()) out["variation"] = apart;
  for (const auto& [block, n] : loads) {
    const auto share = n.share().contiguous();
    out["loads"].push_back(std::vector<double>(share.data_ptr<double>(), share.data_ptr<double>() + share.numel()));
  }
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto dense = t.difference("widenet", "shared-dense", "accuracy"),
             norms = t.difference("widenet", "shared-norms", "accuracy"),
             routers = t.difference("widenet", "own-routers", "accuracy");
  const double wide = t.mean("widenet", "accuracy"), vit = t.mean("vit", "accuracy"),
               shared = t.mean("shared-dense", "accuracy");
  const double size = t.mean("widenet", "parameters") / t.mean("vit", "parameters");
  StudyOutcome o;
  o.verdict = dense.higher() && wide >= vit - 0.5 ? StudyOutcome::reproduced
              : dense.lower() || wide < vit - 1.0 ? StudyOutcome::not_reproduced
                                                  : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "WideNet classifies {:.2f} % of the test images, six blocks of their own {:.2f} %, with {:.2f} of their "
      "parameters; "
      "a shared block without experts {:.2f} %. Against that block: {}. Own norms against shared ones: {}; one router "
      "against one a block: {}. The largest total variation between the loads of two blocks is {:.3f}.",
      wide, vit, size, shared, dense.text(), norms.text(), routers.text(), t.mean("widenet", "variation"));
  o.headline = fmt::format(
      "{:.1f} % of images with {:.2f} of the parameters of a ViT ({:.1f} %); without experts "
      "{:.1f} %",
      wide, size, vit, shared);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "On ImageNet-1K WideNet-L reaches 79.5 % with 40M parameters, ViT-B 78.6 % with 87M; a shared block without "
      "experts, or without norms of its own at every depth, loses clearly.";
  s.setup =
      "Fashion-MNIST: 20000 of the training images, drawn for every seed, all test images, patches of 7 x 7 pixels; 6 "
      "blocks, hidden size "
      "64, 4 heads, feed-forward layers of 128 hidden units or 2 of 4 experts of 128; AdamW with a cosine, label "
      "smoothing 0.1, batches of 128. Every arm has a learning rate of its own, the best of 0.0015, 0.003, 0.006 (and "
      "beyond while the best one lies at the edge) on 5000 training images that it does not learn, with a seed apart "
      "from "
      "those that are measured and half as many steps.";
  s.arms = {{"vit", "six blocks of their own, dense"},
            {"shared-dense", "one block six times, dense, with norms of its own at every depth"},
            {"widenet", "one block six times with experts and norms of its own at every depth: WideNet"},
            {"shared-norms", "WideNet whose norms are shared too", false},
            {"own-routers", "WideNet with a router at every depth", false}};
  s.metrics = {{"accuracy", "accuracy, %", 2},
               {"parameters", "thousand parameters", 1},
               {"variation", "variation", 3},
               {"rate", "learning rate, thousandths", 2}};
  s.rule =
      "Reproduced: WideNet's accuracy is above that of the shared dense block on every seed and by more than two "
      "standard errors, and its mean at most 0.5 points below that of six blocks of their own. Not reproduced: it is "
      "clearly below the shared dense block, or more than 1 point below six blocks. Else inconclusive. Norms and "
      "routers are reported with their spread; at this size neither is expected to show.";
  s.full = {.seeds = 3, .steps = 500};
  s.brief = {.seeds = 1, .steps = 156};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    return json{{"held_out", kHeldOut},
                {"batch", kBatch},
                {"tuned_on", kTuned},
                {"rates_from", kRate},
                {"model", dump(VisionConfig())}};
  };
  return s;
}

const RegisterStudy registered("widenet", "WideNet: one block for all depths, widened by experts",
                               "sharing one block over depth, with and without experts, on images", study);

}  // namespace
}  // namespace moiety
