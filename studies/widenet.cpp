// WideNet: one block for all depths, widened by experts and told apart by norms of its own, against blocks of their own
// and against sharing alone, on images of clothes.
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "moiety/base/error.h"
#include "moiety/models/vision.h"
#include "moiety/moe/routing_counts.h"
#include "moiety/nn/parameters.h"
#include "moiety/study/study.h"
#include "moiety/tasks/image_classification.h"

namespace moiety {
namespace {

using nlohmann::json;

constexpr const char* kImages = "/usr/share/datasets/fashion-mnist";
constexpr int64_t kTrained = 20000, kBatch = 128;
constexpr double kRate = 3e-3;

VisionConfig model_of(const std::string& arm) {
  VisionConfig c;  // 6 blocks, hidden size 64, 4 heads, patches of 7 x 7, 4 experts of 128, 2 a position
  if (arm == "vit") c.mixture = c.share_attention = c.share_ffn = false;
  if (arm == "shared-dense") c.mixture = false;
  if (arm == "shared-norms") c.share_norms = true;
  if (arm == "own-routers") c.share_router = false;
  return c;
}

ImageTraining training_of(const StudyCell& cell) {
  ImageTraining t;
  t.optimizer.lr = kRate;
  t.optimizer.weight_decay = 0.1;
  t.optimizer.beta2 = 0.999;
  t.schedule.name = "cosine";
  t.schedule.warmup = 0.05;
  t.schedule.floor = 0.05;
  t.batch = kBatch;
  t.epochs = static_cast<double>(cell.budget.steps) / static_cast<double>(kTrained / kBatch);
  t.seed = static_cast<uint64_t>(cell.seed);
  return t;
}

DatasetPtr images(const std::string& name) {
  const auto path = std::filesystem::path(kImages) / (name + "-images-idx3-ubyte.gz");
  check(std::filesystem::exists(path), "there is no {}: install the package dataset-fashion-mnist", path.string());
  return Dataset::open(path.string());
}

json measure(const StudyCell& cell) {
  torch::manual_seed(static_cast<uint64_t>(cell.seed));
  const auto train = read_images(images("train"), kTrained), test = read_images(images("t10k"));
  VisionModel model(model_of(cell.arm));
  train_images(model, train, training_of(cell));
  std::map<int64_t, RoutingCounts> loads;  // by block: how often each expert ran
  Trace trace;
  trace.on_record = [&](const Trace::Record& r) { loads[r.site.block].add(r, r.real); };
  json out{{"accuracy", 100.0 * image_accuracy(model, test, 250, &trace)}};
  out["parameters"] = static_cast<double>(parameter_count(model)) / 1e3;
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
      "Fashion-MNIST: 20000 of the training images, all test images, patches of 7 x 7 pixels; 6 blocks, hidden size "
      "64, 4 heads, feed-forward layers of 128 hidden units or 2 of 4 experts of 128; AdamW 0.003 with a cosine, "
      "label smoothing 0.1, batches of 128.";
  s.arms = {{"vit", "six blocks of their own, dense"},
            {"shared-dense", "one block six times, dense, with norms of its own at every depth"},
            {"widenet", "one block six times with experts and norms of its own at every depth: WideNet"},
            {"shared-norms", "WideNet whose norms are shared too", false},
            {"own-routers", "WideNet with a router at every depth", false}};
  s.metrics = {{"accuracy", "accuracy, %", 2}, {"parameters", "thousand parameters", 1}, {"variation", "variation", 3}};
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
    return json{{"images", kTrained}, {"batch", kBatch}, {"lr", kRate}, {"model", dump(VisionConfig())}};
  };
  return s;
}

const RegisterStudy registered("widenet", "WideNet: one block for all depths, widened by experts",
                               "sharing one block over depth, with and without experts, on images", study);

}  // namespace
}  // namespace moiety
