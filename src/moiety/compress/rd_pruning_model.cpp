#include "moiety/compress/rd_pruning_model.h"

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"
#include "moiety/io/overlay.h"
#include "moiety/models/decoder.h"
#include "moiety/moe/router.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using torch::Tensor;

// Choices of all layers that the exact dynamic program may hold.
constexpr int64_t kCells = int64_t{1} << 26;

const void* memory_of(const Tensor& t) {
  return t.const_data_ptr();
}

// What a tensor is called in a checkpoint, by where it lies.
class Names {
 public:
  explicit Names(const std::vector<StoredTensor>& stored) {
    for (const auto& s : stored) {
      const auto v = s.value();
      if (v.numel() > 0) all_.emplace(memory_of(v), std::pair(s.name, v.numel()));
    }
  }
  // Of matrix `index` of a stack (-1: of one that is alone); `otherwise` when the checkpoint stores it with others.
  std::string of(const Tensor& t, const Tensor& whole, int64_t index, const std::string& otherwise) const {
    if (const auto it = all_.find(memory_of(t)); it != all_.end() && it->second.second == t.numel())
      return it->second.first;
    if (const auto it = all_.find(memory_of(whole)); index >= 0 && it != all_.end())
      return fmt::format("{}[{}]", it->second.first, index);
    return otherwise;
  }

 private:
  std::map<const void*, std::pair<std::string, int64_t>> all_;
};

// The weights of a module's matrices, in the order of its modules.
class Finder {
 public:
  Finder(const torch::nn::Module& model, const std::vector<StoredTensor>& stored) : names_(stored) {
    for (const auto& m : model.modules(/*include_self=*/false))
      if (dynamic_cast<const Router*>(m.get()) != nullptr)
        for (const auto& p : m->parameters()) skipped_.insert(memory_of(p));
  }
  void skip(const Tensor& weight) {
    if (weight.defined()) skipped_.insert(memory_of(weight));
  }
  void add(const torch::nn::Module& module, int64_t stage) {
    for (const auto& item : module.named_modules("", /*include_self=*/false)) {
      if (const auto* m = dynamic_cast<const LinearImpl*>(item.value().get()); m != nullptr && m->weight.defined())
        add(m->weight, stage, item.key());
      if (const auto* m = dynamic_cast<const LinearStackImpl*>(item.value().get()); m != nullptr && m->weight.defined())
        add_stack(m->weight, stage, item.key());
    }
  }
  void add(const Tensor& weight, int64_t stage, const std::string& path) { add(weight, weight, -1, stage, path); }
  std::vector<PrunableLayer> take() { return std::move(layers_); }

 private:
  void add(const Tensor& weight, const Tensor& whole, int64_t index, int64_t stage, const std::string& path) {
    if (weight.numel() == 0 || !skipped_.insert(memory_of(weight)).second) return;
    layers_.push_back({names_.of(weight, whole, index, path), weight.detach(), stage});
  }
  void add_stack(const Tensor& weight, int64_t stage, const std::string& path) {
    for (int64_t e = 0; e < weight.size(0); ++e) add(weight[e], weight, e, stage, fmt::format("{}[{}]", path, e));
  }

  Names names_;
  std::set<const void*> skipped_;  // and those that are there already
  std::vector<PrunableLayer> layers_;
};

// What a pass knows about rows of plain tokens, made once for each shape.
class Contexts {
 public:
  const AttentionContext& of(int64_t batch, int64_t time) {
    auto& held = all_[{batch, time}];
    if (!held)
      held = std::make_unique<AttentionContext>(torch::arange(time, torch::kInt64).unsqueeze(0).expand({batch, time}),
                                                0, Tensor(), Tensor());
    return *held;
  }

 private:
  std::map<std::pair<int64_t, int64_t>, std::unique_ptr<AttentionContext>> all_;
};

// Rows of the head that are looked at; undefined: all.
Tensor drawn_entries(int64_t vocabulary, int64_t entries, uint64_t seed) {
  if (entries <= 0 || entries >= vocabulary) return {};
  auto drawn = RandomStream(seed, "rd-pruning.entries").sample(vocabulary, entries);
  std::sort(drawn.begin(), drawn.end());
  return torch::tensor(drawn, torch::kInt64);
}

Tensor logits_of(Decoder& model, const Tensor& x, const Tensor& entries) {
  return model.finished(entries.defined() ? torch::matmul(x, model.head->rows(entries, x.scalar_type()).t())
                                          : model.head(x));
}

}  // namespace

StagedModel stages_of(VisionModel& model) {
  StagedModel out;
  Finder finder(model, model.stored());
  const auto blocks = static_cast<int64_t>(model.body().blocks().size());
  out.stages.push_back([&model](const Tensor& images) { return model.embed(images); });
  finder.add(model.named_parameters(/*recurse=*/false)["patches"], 0, "patches");
  for (int64_t i = 0; i < blocks; ++i) {
    out.stages.push_back([&model, i](const Tensor& x) {
      Pass pass;
      return model.body().run_block(static_cast<size_t>(i), x, pass);
    });
    const auto& block = model.body().blocks()[static_cast<size_t>(i)];
    finder.add(*block.attention, i + 1);
    finder.add(*block.ffn, i + 1);
  }
  out.stages.push_back([&model](const Tensor& x) { return model.read_out(x); });
  finder.add(model, blocks + 1);
  out.layers = finder.take();
  return out;
}

StagedModel stages_of(CausalModel& causal, int64_t entries, uint64_t seed) {
  auto* decoder = dynamic_cast<Decoder*>(&causal);
  check(decoder != nullptr, "this model is no plain decoder, which is what can be pruned layer by layer");
  Decoder& model = *decoder;
  StagedModel out;
  Finder finder(model, model.stored());
  finder.skip(model.embed->weight);
  const auto contexts = std::make_shared<Contexts>();
  out.stages.push_back([&model](const Tensor& ids) { return model.embedded(ids); });
  for (int64_t i = 0; i < model.blocks(); ++i) {
    out.stages.push_back([&model, contexts, i](const Tensor& x) {
      Pass pass;
      pass.block = i;
      pass.slot = i;
      pass.batch = x.size(0);
      return model.layers[static_cast<size_t>(i)]->forward(x, contexts->of(x.size(0), x.size(1)), pass);
    });
    finder.add(*model.layers[static_cast<size_t>(i)], i + 1);
  }
  const auto drawn = drawn_entries(model.vocab_size(), entries, seed);
  out.stages.push_back([&model, drawn](const Tensor& x) { return logits_of(model, model.norm->forward(x), drawn); });
  if (model.head->weight.defined()) finder.add(model.head->weight, model.blocks() + 1, "lm_head");
  out.layers = finder.take();
  return out;
}

StagedModel stages_of(StagedEncoder& model) {
  StagedModel out;
  Finder finder(model, model.stored());
  out.stages.push_back([&model](const Tensor& ids) { return model.embedded(ids); });
  for (int64_t i = 0; i < model.blocks(); ++i) {
    out.stages.push_back([&model, i](const Tensor& x) { return model.run_block(i, x); });
    for (const Linear& matrix : model.matrices(i)) finder.add(matrix->weight, i + 1, fmt::format("blocks.{}", i));
  }
  out.stages.push_back([&model](const Tensor& x) { return model.sentence(x); });
  out.layers = finder.take();
  return out;
}

namespace {

std::vector<Tensor> weights_of(const StagedModel& model) {
  std::vector<Tensor> out;
  for (const auto& l : model.layers) out.push_back(l.weight);
  return out;
}

int64_t zeros(const Tensor& weight) {
  return weight.numel() - weight.count_nonzero().item<int64_t>();
}

struct Sizes {
  int64_t weights = 0, zeros = 0;
};
Sizes sizes_of(const StagedModel& model) {
  Sizes s;
  for (const auto& l : model.layers) {
    s.weights += l.weight.numel();
    s.zeros += zeros(l.weight);
  }
  return s;
}

// The finest unit whose table of choices is small enough.
int64_t unit_for(const RdProblem& p, double target) {
  const int64_t budget = rd_budget(p.num_weights, target);
  return budget <= kCells / static_cast<int64_t>(p.num_weights.size()) ? 1 : rd_unit(budget);
}

// Zeros in every layer at the end of one iteration.
std::vector<int64_t> by_curves(const StagedModel& model, const RdCurves& curves, double target, double floor,
                               PruningReport& report) {
  RdProblem p;
  const int64_t grid = curves.distortion.size(1) - 1;
  p.distortion = curves.distortion;
  for (const auto& l : model.layers) {
    const int64_t n = l.weight.numel();
    p.names.push_back(l.name);
    p.num_weights.push_back(n);
    p.min_index.push_back(rd_min_index(zeros(l.weight), n, grid));
    int64_t most = grid;
    while (most > p.min_index.back() &&
           static_cast<double>(n - rd_pruned(most, n, grid)) < floor * static_cast<double>(n) - 1e-6)
      --most;
    p.max_index.push_back(most);
  }
  const auto start = std::chrono::steady_clock::now();
  const auto a = rd_allocate(p, target, unit_for(p, target));
  report.seconds_of_allocation += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  report.predicted = a.distortion;
  return a.pruned;
}

std::vector<int64_t> by_shares(const StagedModel& model, const std::string& method, double target) {
  const auto weights = weights_of(model);
  const Sizes s = sizes_of(model);
  check(s.zeros < s.weights, "the model has no weights left to prune");
  const auto left = static_cast<double>(s.weights - s.zeros);
  const double amount = 1.0 - (1.0 - target) * static_cast<double>(s.weights) / left;
  const auto shares = pruning_baseline(method, weights, std::clamp(amount, 0.0, 1.0));
  std::vector<int64_t> out;
  for (size_t l = 0; l < weights.size(); ++l) out.push_back(pruned_by_share(weights[l], shares[l]));
  return out;
}

// How far the output moves under these masks, by the outputs before.
double moved(const StagedModel& model, const std::vector<Tensor>& batches, const std::vector<Tensor>& masks,
             bool worst_case) {
  RdCurves before;
  for (const Tensor& b : batches) {
    Tensor x = b;
    for (const auto& stage : model.stages) x = stage(x);
    before.output.push_back(x.to(torch::kFloat32));
  }
  return rd_joint_distortion(model, batches, before, masks, worst_case);
}

}  // namespace

PruningReport prune_layers(StagedModel& model, const std::vector<Tensor>& batches, const std::string& method,
                           const RdPruningConfig& config, const std::function<void(int64_t, int64_t)>& progress) {
  const torch::NoGradGuard frozen;
  const std::string problem = config.problem();
  check(problem.empty(), "{}", problem);
  check(!model.layers.empty(), "there is no layer that could be pruned");
  PruningReport report;
  for (const auto& l : model.layers) report.layers.push_back({l.name, l.weight.numel(), zeros(l.weight), 0});
  const Sizes before = sizes_of(model);
  const double sparse = static_cast<double>(before.zeros) / static_cast<double>(before.weights);
  check(config.sparsity + 1e-9 >= sparse, "the model is already {:.1f} % sparse, more than {:.1f} %", 100.0 * sparse,
        100.0 * config.sparsity);
  for (int64_t it = 1; it <= config.iterations; ++it) {
    const double target = rd_round_target(sparse, config.sparsity, it, config.iterations);
    std::vector<int64_t> pruned;
    if (method == "rd") {
      const auto curves = rd_curves(model, batches, config.grid, config.worst_case, [&](int64_t done, int64_t all) {
        if (progress) progress((it - 1) * all + done, config.iterations * all);
      });
      pruned = by_curves(model, curves, target, config.floor, report);
    } else {
      pruned = by_shares(model, method, target);
    }
    std::vector<Tensor> masks;
    for (size_t l = 0; l < pruned.size(); ++l)
      masks.push_back(rd_mask(model.layers[l].weight, model.layers[l].weight != 0, pruned[l]));
    if (!batches.empty()) report.joint = moved(model, batches, masks, config.worst_case);
    for (size_t l = 0; l < pruned.size(); ++l) model.layers[l].weight.masked_fill_(masks[l].logical_not(), 0.0);
  }
  for (size_t l = 0; l < model.layers.size(); ++l) report.layers[l].pruned = zeros(model.layers[l].weight);
  const Sizes after = sizes_of(model);
  report.weights = after.weights;
  report.pruned = after.zeros;
  return report;
}

PrunableModel open_prunable(const std::string& model, int64_t entries) {
  PrunableModel out;
  out.checkpoint = Checkpoint::open(model);
  check_prunable(*out.checkpoint);
  LoadOptions load;
  load.dtype = "f32";
  load.trainable = true;
  if (is_vision(out.checkpoint->config())) {
    out.vision = load_vision(*out.checkpoint, load);
    out.vision->eval();
    out.staged = stages_of(*out.vision);
  } else if (is_encoder(out.checkpoint->config())) {
    out.encoder = std::dynamic_pointer_cast<StagedEncoder>(load_encoder(*out.checkpoint, load));
    out.staged = stages_of(*out.encoder);
  } else {
    out.causal = load_causal(*out.checkpoint, load);
    out.causal->eval();
    out.staged = stages_of(*out.causal, entries);
  }
  return out;
}

std::shared_ptr<const Checkpoint> PrunableModel::now() const {
  return with_values(checkpoint, vision ? vision->stored() : encoder ? encoder->stored() : causal->stored());
}

double PrunableModel::zeros() const {
  const Sizes s = sizes_of(staged);
  check(s.weights > 0, "there is no layer that could be pruned");
  return static_cast<double>(s.zeros) / static_cast<double>(s.weights);
}

nlohmann::json PruningReport::json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& l : layers)
    list.push_back({{"layer", l.name}, {"weights", l.weights}, {"before", l.before}, {"pruned", l.pruned}});
  return {{"layers", list},         {"weights", weights}, {"pruned", pruned},
          {"predicted", predicted}, {"joint", joint},     {"allocation_seconds", seconds_of_allocation}};
}

void check_prunable(const Checkpoint& c) {
  check(c.gguf() == nullptr, "{}: a GGUF file holds rows in another order; convert it to a directory first",
        c.path().string());
  for (const TensorInfo& t : c.tensors())
    check(!is_block(t.format), "{}: '{}' is stored in blocks; prune before quantizing (`moiety convert`)",
          c.path().string(), shown(t.name));
}

std::shared_ptr<const Checkpoint> with_values(std::shared_ptr<const Checkpoint> base,
                                              const std::vector<StoredTensor>& stored) {
  check_prunable(*base);
  std::map<std::string, std::function<Tensor()>> values;
  for (const auto& s : stored) values[s.name] = s.value;
  std::vector<OverlayTensor> tensors;
  for (const TensorInfo& t : base->tensors()) {
    const auto it = values.find(t.name);
    if (it == values.end()) continue;
    OverlayTensor one;
    one.info = t;
    one.get = [value = it->second, format = t.format] {
      const torch::NoGradGuard frozen;
      return view_of(value(), format);
    };
    tensors.push_back(std::move(one));
  }
  nlohmann::json config = base->config();
  return overlay(std::move(base), std::move(config), std::move(tensors));
}

}  // namespace moiety
