// RD-pruning: does sharing zeros out by measured distortion curves disturb a net's output least, and what does that do
// for its accuracy, on images of clothes?
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/compress/rd_pruning_model.h"
#include "moiety/study/study.h"
#include "moiety/tasks/image_classification.h"
#include "moiety/train/prune_and_retrain.h"
#include "moiety/train/run_folder.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

constexpr const char* kImages = "/usr/share/datasets/fashion-mnist";
constexpr int64_t kBatch = 128, kMoved = 1024;
constexpr double kRate = 3e-3, kMlpRate = 1e-3;
constexpr int64_t kMlpEpochs = 3, kRounds = 3;
constexpr double kAgain = 0.9, kAgainRate = 1e-3;  // how sparse what trains again is, and its rate
const std::vector<double> kSparsities{0.5, 0.7, 0.8, 0.9, 0.95};
const std::vector<double> kJudged{0.7, 0.8, 0.9};
const std::vector<std::string> kNets{"mlp", "vit"};
const std::vector<std::string> kOthers{"uniform", "uniform-plus", "global", "lamp", "erk"};

VisionConfig vit() {
  VisionConfig c;  // 6 blocks of their own, hidden size 64, 4 heads, patches of 7 x 7, 128 hidden units
  c.mixture = c.share_attention = c.share_ffn = false;
  return c;
}

DatasetPtr data(const std::string& name) {
  const auto path = fs::path(kImages) / (name + "-images-idx3-ubyte.gz");
  check(fs::exists(path), "there is no {}: install the package dataset-fashion-mnist", path.string());
  return Dataset::open(path.string());
}

// Images as they are classified, from -1 to 1, and their labels.
struct Images {
  Tensor pixels, labels;
};
Images images(const std::string& name, int64_t count, uint64_t seed) {
  const auto all = data(name);
  auto order = RandomStream(seed, "rd-pruning." + name).permutation(all->size());
  order.resize(std::min(order.size(), static_cast<size_t>(count)));
  const auto m = image_batch(*all, order, vit());
  return {m.images.to(torch::kFloat32) / 127.5 - 1.0, m.targets};
}

// 784-300-100-10 with ReLU, Adam for three epochs.
std::vector<Tensor> train_mlp(int64_t seed) {
  torch::manual_seed(static_cast<uint64_t>(seed));
  torch::nn::Sequential net(torch::nn::Linear(784, 300), torch::nn::ReLU(), torch::nn::Linear(300, 100),
                            torch::nn::ReLU(), torch::nn::Linear(100, 10));
  torch::optim::Adam adam(net->parameters(), torch::optim::AdamOptions(kMlpRate));
  const auto train = images("train", 60000, static_cast<uint64_t>(seed));
  for (int64_t epoch = 0; epoch < kMlpEpochs; ++epoch) {
    const auto order = torch::randperm(train.pixels.size(0), torch::kInt64);
    for (int64_t at = 0; at < order.size(0); at += kBatch) {
      const auto rows = order.slice(0, at, std::min(order.size(0), at + kBatch));
      adam.zero_grad();
      torch::cross_entropy_loss(net->forward(train.pixels.index_select(0, rows).flatten(1)),
                                train.labels.index_select(0, rows))
          .backward();
      adam.step();
    }
  }
  std::vector<Tensor> out;
  for (const auto& p : net->parameters()) out.push_back(p.detach().clone());
  return out;
}

TrainConfig vit_run(const fs::path& folder, int64_t steps, int64_t seed) {
  TrainConfig c;
  c.task = {{"slug", "image-classification"}, {"label_smoothing", 0.1}};
  c.model.config = dump(vit());
  SourceConfig source;
  source.path = (fs::path(kImages) / "train-images-idx3-ubyte.gz").string();
  c.data.sources.push_back(source);
  c.train.steps = steps;
  c.train.batch = kBatch;
  c.train.seed = seed;
  c.optimizer.lr = kRate;
  c.optimizer.weight_decay = 0.1;
  c.optimizer.beta2 = 0.999;
  c.schedule.name = "cosine";
  c.schedule.warmup = 0.05;
  c.schedule.floor = 0.05;
  c.output.folder = folder.string();
  return c;
}

// A trained net; `opened` holds what the stages of a transformer refer to.
struct Net {
  StagedModel staged;
  PrunableModel opened;
};
fs::path trained_vit(const StudyCell& cell) {
  const auto folder = cell.once(fmt::format("vit-{}", cell.seed), [&](const fs::path& to) {
    Trainer(vit_run(to / "run", cell.budget.steps, cell.seed)).run();
  });
  return folder / "run/last";
}
Net open_net(const StudyCell& cell, const std::string& name) {
  data("train");  // complains in words
  Net net;
  if (name == "mlp") {
    const auto folder = cell.once(fmt::format("mlp-{}", cell.seed), [&](const fs::path& to) {
      NamedTensors all;
      const auto parameters = train_mlp(cell.seed);
      for (size_t i = 0; i < parameters.size(); ++i) all[fmt::format("p{}", i)] = parameters[i];
      write_tensors(to / "mlp.safetensors", all);
    });
    auto all = read_tensors(folder / "mlp.safetensors");
    net.staged = relu_mlp({all["p0"], all["p2"], all["p4"]}, {all["p1"], all["p3"], all["p5"]});
    // Images come as they are.
    net.staged.stages[0] = [first = net.staged.stages[0]](const Tensor& x) { return first(x.flatten(1)); };
    return net;
  }
  net.opened = open_prunable(trained_vit(cell).string());
  net.staged = net.opened.staged;
  return net;
}

double accuracy(const StagedModel& net, const Images& test) {
  int64_t right = 0;
  for (int64_t at = 0; at < test.pixels.size(0); at += 500) {
    Tensor x = test.pixels.slice(0, at, at + 500);
    for (const auto& stage : net.stages) x = stage(x);
    right += (x.argmax(1) == test.labels.slice(0, at, at + 500)).sum().item<int64_t>();
  }
  return 100.0 * static_cast<double>(right) / static_cast<double>(test.pixels.size(0));
}

// What curves of an arm are measured on.
std::vector<Tensor> curve_inputs(const StudyCell& cell, int64_t samples) {
  torch::manual_seed(static_cast<uint64_t>(cell.seed) + 17);
  const auto x = cell.arm == "rd-blind" ? torch::randn({samples, 1, 28, 28})
                                        : images("train", samples, static_cast<uint64_t>(cell.seed) + 99).pixels;
  return x.split(256);
}
int64_t vit_samples(const StudyCell& cell) {
  return cell.budget.full() ? 256 : 128;
}
int64_t vit_grid(const StudyCell& cell) {
  return cell.budget.full() ? 50 : 20;
}
std::string method_of(const std::string& arm) {
  return arm.starts_with("rd") ? "rd" : arm == "uniform-plus" ? "uniform+" : arm;
}

// How many weights go from every layer at each sparsity, by one way of sharing them out.
class Allocation {
 public:
  Allocation(const StudyCell& cell, const StagedModel& net, const std::string& name) : net_(net), arm_(cell.arm) {
    if (method_of(arm_) != "rd") return;
    const bool large = name == "vit";
    batches_ = curve_inputs(cell, large ? vit_samples(cell) : 1024);
    curves_ = rd_curves(net, batches_, large ? vit_grid(cell) : 100, true);
    problem_.distortion = curves_.distortion;
    for (const auto& l : net.layers) {
      problem_.names.push_back(l.name);
      problem_.num_weights.push_back(l.weight.numel());
    }
  }
  std::vector<Tensor> masks(double sparsity, json& extra) {
    std::vector<int64_t> gone;
    if (!batches_.empty()) {
      const auto start = std::chrono::steady_clock::now();
      const auto a = rd_allocate(problem_, sparsity);
      extra["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      extra["sum"] = a.distortion;
      gone = a.pruned;
    } else {
      std::vector<Tensor> weights;
      for (const auto& l : net_.layers) weights.push_back(l.weight);
      const auto shares = pruning_baseline(method_of(arm_), weights, sparsity);
      for (size_t l = 0; l < weights.size(); ++l) gone.push_back(pruned_by_share(weights[l], shares[l]));
    }
    std::vector<Tensor> out;
    for (size_t l = 0; l < gone.size(); ++l) out.push_back(rd_mask(net_.layers[l].weight, {}, gone[l]));
    if (!batches_.empty())
      extra["additivity"] =
          rd_joint_distortion(net_, batches_, curves_, out, true) / std::max(1e-12, extra["sum"].get<double>());
    return out;
  }

 private:
  const StagedModel& net_;
  std::string arm_;
  std::vector<Tensor> batches_;
  RdCurves curves_;
  RdProblem problem_;
};

std::string metric(const std::string& net, const char* what, double sparsity) {
  return fmt::format("{}_{}_{:.0f}", net, what, 100.0 * sparsity);
}

// Percent of test images right when the transformer is pruned and trains again, in rounds.
double trained_again(const StudyCell& cell, const Images& test) {
  RdPruningConfig c;
  c.sparsity = kAgain;
  c.grid = vit_grid(cell);
  c.iterations = cell.arm == "rd-rounds" ? kRounds : 1;
  TrainConfig run = vit_run(cell.folder / "again", cell.budget.steps / 2 / c.iterations, cell.seed + 1000);
  run.optimizer.lr = kAgainRate;
  RetrainingOptions options;
  options.batches = [&](const PrunableModel&) {
    return method_of(cell.arm) == "rd" ? curve_inputs(cell, vit_samples(cell)) : std::vector<Tensor>();
  };
  const auto model = prune_and_retrain(trained_vit(cell).string(), method_of(cell.arm), c, run, options).model;
  const torch::NoGradGuard frozen;
  return accuracy(open_prunable(model.string()).staged, test);
}

json measure(const StudyCell& cell) {
  json out, curve = json::array();
  const auto test = images("t10k", 10000, 0);
  out["vit_again"] = trained_again(cell, test);
  if (cell.arm == "rd-rounds") return out;
  const torch::NoGradGuard frozen;
  for (const auto& name : kNets) {
    torch::AutoGradMode learning(true);
    const Net net = open_net(cell, name);
    torch::AutoGradMode measuring(false);
    out[name + "_dense"] = accuracy(net.staged, test);
    Allocation allocation(cell, net.staged, name);
    const std::vector<Tensor> others{test.pixels.slice(0, 0, kMoved)};
    RdCurves before;
    Tensor y = others[0];
    for (const auto& stage : net.staged.stages) y = stage(y);
    before.output = {y};
    for (const double sparsity : kSparsities) {
      json extra = json::object();
      const auto masks = allocation.masks(sparsity, extra);
      out[metric(name, "moved", sparsity)] = rd_joint_distortion(net.staged, others, before, masks, true);
      std::vector<Tensor> saved;
      for (size_t l = 0; l < masks.size(); ++l) {
        Tensor w = net.staged.layers[l].weight;
        saved.push_back(w.clone());
        w.mul_(masks[l]);
      }
      out[metric(name, "right", sparsity)] = accuracy(net.staged, test);
      for (size_t l = 0; l < masks.size(); ++l) Tensor(net.staged.layers[l].weight).copy_(saved[l]);
      extra.update({{"net", name}, {"sparsity", sparsity}});
      curve.push_back(extra);
      if (extra.contains("additivity") && sparsity == 0.7) out[name + "_additivity"] = extra["additivity"];
    }
  }
  out["curve"] = curve;
  return out;
}

// Mean over the sparsities that are judged.
double mean_right(const StudyTable& t, const std::string& arm, const std::string& net) {
  double sum = 0.0;
  for (const double s : kJudged) sum += t.mean(arm, metric(net, "right", s));
  return sum / static_cast<double>(kJudged.size());
}

struct Compared {
  bool lowest = true, above_uniform = false;  // on every seed; on average
  double best_other = 0.0, own = 0.0, uniform = 0.0;
  std::string best_name;
};
Compared compare(const StudyTable& t, const std::string& net) {
  Compared c;
  for (const double s : kJudged) {
    const std::string moved = metric(net, "moved", s);
    const auto own = t.values("rd", moved);
    for (const auto& arm : kOthers) {
      if (!t.has(arm)) continue;
      const auto other = t.values(arm, moved);
      for (size_t i = 0; i < own.size(); ++i) c.lowest = c.lowest && own[i] < other.at(i);
    }
    c.above_uniform = c.above_uniform || t.mean("rd", moved) > t.mean("uniform", moved);
  }
  c.own = mean_right(t, "rd", net);
  c.uniform = mean_right(t, "uniform", net);
  for (const auto& arm : kOthers)
    if (t.has(arm) && (c.best_name.empty() || mean_right(t, arm, net) > c.best_other)) {
      c.best_other = mean_right(t, arm, net);
      c.best_name = arm;
    }
  return c;
}

StudyOutcome judge(const StudyTable& t) {
  const auto mlp = compare(t, "mlp"), vit = compare(t, "vit");
  const bool enough = t.values("rd", "mlp_dense").size() >= 2;
  const auto near = [](const Compared& c, double points) { return c.own >= c.best_other - points; };
  StudyOutcome o;
  o.verdict =
      !enough ? StudyOutcome::inconclusive
      : mlp.lowest && vit.lowest && near(mlp, 1.0) && near(vit, 1.0) && mlp.own > mlp.uniform && vit.own > vit.uniform
          ? StudyOutcome::reproduced
      : mlp.above_uniform || vit.above_uniform || !near(mlp, 3.0) || !near(vit, 3.0) ? StudyOutcome::not_reproduced
                                                                                     : StudyOutcome::inconclusive;
  const auto text = [&](const char* name, const std::string& net, const Compared& c) {
    return fmt::format(
        "{}: mean accuracy at 70, 80 and 90 % {:.2f} % (dense {:.2f} %), uniform {:.2f} %, the best other, {}, {:.2f} "
        "%; "
        "its output moved least on every seed and at each of them: {}; moved at 70 %: {:.3g}, uniform {:.3g}, global "
        "{:.3g}. Together the layers moved the output {:.2f} times the sum of what each does alone.",
        name, c.own, t.mean("rd", net + "_dense"), c.uniform, c.best_name, c.best_other, c.lowest ? "yes" : "no",
        t.mean("rd", metric(net, "moved", 0.7)), t.mean("uniform", metric(net, "moved", 0.7)),
        t.mean("global", metric(net, "moved", 0.7)), t.mean("rd", net + "_additivity"));
  };
  std::string again;
  for (const std::string arm : {"rd", "rd-rounds", "lamp", "erk", "uniform", "global"})
    if (t.has(arm)) again += fmt::format("{}{} {:.2f} %", again.empty() ? "" : ", ", arm, t.mean(arm, "vit_again"));
  o.reason =
      fmt::format("{} {} At {:.0f} % and trained again: {}.{}", text("MLP", "mlp", mlp),
                  text("Transformer", "vit", vit), 100.0 * kAgain, again, enough ? "" : " One seed decides nothing.");
  o.headline = fmt::format(
      "70 to 90 % pruned: {:.1f} % and {:.1f} % of images right, uniform {:.1f} % and {:.1f} %; {:.0f} % pruned and "
      "trained again {:.1f} %, uniform {:.1f} %",
      mlp.own, vit.own, mlp.uniform, vit.uniform, 100.0 * kAgain, t.mean("rd", "vit_again"),
      t.mean("uniform", "vit_again"));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Layer sparsities by rate-distortion curves prune better than uniform, global, LAMP and ERK ones: up to +1.0 "
      "points on CIFAR-10 (ResNet-32), +4.7 on ImageNet (VGG-16); a ResNet-50 keeps 75.59 of 76.14 % at 58 % sparsity "
      "in "
      "one shot.";
  s.setup = fmt::format(
      "Fashion-MNIST. An MLP 784-300-100-10 (Adam, rate 0.001, three epochs) and a vision transformer of 6 blocks "
      "(hidden size 64, patches of 7 x 7; AdamW with a cosine, rate 0.003, batches of 128), pruned in one shot without "
      "training again. Curves: the worst of 1024 training images in 100 steps (MLP), of 256 in 50 (transformer; 128 in "
      "20 in a short run). Accuracy is that of all test images, `moved` the largest mean square of the change of an "
      "image's logits among 1024 test images. Trained again: the transformer at {:.0f} %, for half of its steps at "
      "rate "
      "{}, with the zeros held; not part of the rule.",
      100.0 * kAgain, kAgainRate);
  s.arms = {{"rd", "rate-distortion curves and dynamic programming: RD-pruning"},
            {"uniform", "the same share of every layer"},
            {"global", "the smallest weights of all layers together"},
            {"lamp", "the least LAMP scores of all layers together"},
            {"erk", "survivors in proportion to the sum of a layer's dimensions: ERK"},
            {"uniform-plus", "uniform, with a fifth of the last layer kept and first convolutions whole", false},
            {"rd-blind", "RD-pruning whose curves are measured on noise", false}};
  s.arms.push_back({"rd-rounds", fmt::format("RD-pruning in {} rounds with training in between", kRounds), false});
  for (const auto& net : kNets) {
    const std::string title = net == "mlp" ? "MLP" : "transformer";
    s.metrics.push_back({metric(net, "right", 0.7), title + " at 70 %", 2});
    s.metrics.push_back({metric(net, "right", 0.8), "80 %", 2});
    s.metrics.push_back({metric(net, "right", 0.9), "90 %", 2});
    s.metrics.push_back({metric(net, "moved", 0.7), "moved at 70 %", 3});
    s.metrics.push_back({metric(net, "moved", 0.9), "at 90 %", 3});
  }
  s.metrics.push_back({"vit_again", "90 %, trained again", 2});
  s.rule =
      "Reproduced: on every seed, on both nets and at 70, 80 and 90 % RD-pruning moves the output of test images less "
      "than "
      "all other allocations (its own on noise apart), its accuracy averaged over these sparsities is above uniform's "
      "and "
      "at most 1 point below that of the best other one. Not reproduced: on one of the nets it moves the output more "
      "than "
      "uniform on average at one of these sparsities, or its accuracy is more than 3 points below the best other one. "
      "Else, and with one seed, inconclusive.";
  s.full = {.seeds = 3, .steps = 500};
  s.brief = {.seeds = 1, .steps = 200};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    return json{{"rate", kRate},   {"mlp_rate", kMlpRate}, {"mlp_epochs", kMlpEpochs},
                {"batch", kBatch}, {"model", dump(vit())}, {"again", {kAgain, kAgainRate, kRounds}}};
  };
  return s;
}

const RegisterStudy registered("rd-pruning", "RD-pruning: layer sparsities by distortion curves",
                               "one-shot pruning of an MLP and a vision transformer by six allocations", study);

}  // namespace
}  // namespace moiety
