#include "moiety/tasks/image_classification.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/base/registry.h"
#include "moiety/io/peft.h"
#include "moiety/nn/tasks.h"
#include "moiety/train/open_run.h"

namespace moiety {

using nlohmann::json;
using torch::Tensor;

MicroBatch image_batch(const Dataset& data, std::span<const int64_t> indices, const VisionConfig& c) {
  check(data.kind() == SampleKind::image, "the data holds {} samples and no images", to_string(data.kind()));
  const auto count = static_cast<int64_t>(indices.size());
  auto pixels = torch::empty({count, c.image, c.image, c.channels}, torch::kUInt8);
  auto labels = torch::empty({count}, torch::kInt64);
  const int64_t bytes = c.image * c.image * c.channels;
  uint8_t* to = pixels.data_ptr<uint8_t>();
  int64_t* label = labels.data_ptr<int64_t>();
  run_tasks(count, [&](int64_t i) {
    const Sample s = data.get(indices[static_cast<size_t>(i)]);
    const Image& image = s.image;
    check(image.height == c.image && image.width == c.image && image.channels == c.channels,
          "{} has {} x {} pixels of {} channel(s); the model takes {} x {} of {}", s.where, image.height, image.width,
          image.channels, c.image, c.image, c.channels);
    check(s.label >= 0, "{} has no label", s.where);
    check(s.label < c.classes, "{} has the label {}, but the model has {} classes", s.where, s.label, c.classes);
    std::copy(image.pixels.begin(), image.pixels.end(), to + i * bytes);
    label[i] = s.label;
  });
  MicroBatch m;
  m.images = pixels.permute({0, 3, 1, 2}).contiguous();
  m.targets = labels;
  m.learned = m.tokens = count;
  return m;
}

Tensor classify(VisionModel& model, const MicroBatch& batch, Pass& pass) {
  return model.forward(batch.images.to(torch::kFloat32) / 127.5 - 1.0, pass);
}

double ImageScore::accuracy_stderr() const {
  if (images < 2) return 0.0;
  const double a = accuracy();
  return std::sqrt(a * (1.0 - a) / static_cast<double>(images - 1));
}

namespace {

Tensor nll_of(const Tensor& logits, const Tensor& labels, double smoothing = 0.0) {
  return at::cross_entropy_loss(logits, labels, {}, at::Reduction::Sum, /*ignore_index=*/-100, smoothing);
}

int64_t right_of(const Tensor& logits, const Tensor& labels) {
  return (logits.argmax(-1) == labels).sum().item<int64_t>();
}

std::vector<int64_t> in_order(int64_t begin, int64_t count) {
  std::vector<int64_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), begin);
  return out;
}

}  // namespace

ImageScore score_images(VisionModel& model, const Dataset& data, const ImageScoring& options) {
  check(options.batch >= 1, "a batch of {} images is none", options.batch);
  check(data.size() > 0, "there are no images");
  const torch::NoGradGuard frozen;
  const bool training = model.is_training();
  model.eval();
  const int64_t images = options.limit > 0 ? std::min(options.limit, data.size()) : data.size();
  ImageScore score;
  for (int64_t at = 0; at < images; at += options.batch) {
    const auto indices = in_order(at, std::min(options.batch, images - at));
    const MicroBatch m = image_batch(data, indices, model.config()).to(options.device);
    Pass pass;
    pass.trace = options.trace;
    const auto logits = classify(model, m, pass);
    score.nll += nll_of(logits, m.targets).item<double>();
    score.right += right_of(logits, m.targets);
    score.images += m.learned;
    if (options.progress) options.progress(score.images, images);
  }
  model.train(training);
  return score;
}

void ImageTaskConfig::fields(Fields& f) {
  f("slug", slug, "the task's name");
  f("label_smoothing", label_smoothing, "share of the label's probability that goes to all classes evenly, in training")
      .min(0)
      .max(0.99);
}

std::vector<std::string> class_names(const json& config) {
  const auto names = config.find("class_names");
  if (names == config.end() || !names->is_array()) return {};
  return reading_json("config.json", [&] { return names->get<std::vector<std::string>>(); });
}

namespace {

// Images in an order drawn anew every epoch; the position is the epoch and how many of it are taken.
class ImageRows : public RowSource {
 public:
  ImageRows(DatasetPtr data, VisionConfig config, uint64_t seed, bool shuffle)
      : data_(std::move(data)), config_(std::move(config)), seed_(seed), shuffle_(shuffle) {
    check(data_->size() > 0, "there are no images to learn from");
  }
  MicroBatch next(int64_t rows) override {
    std::vector<int64_t> indices;
    while (static_cast<int64_t>(indices.size()) < rows) {
      if (used_ == data_->size()) {
        used_ = 0;
        ++epoch_;
        order_.clear();
      }
      if (order_.empty())
        order_ = shuffle_ ? RandomStream(seed_, fmt::format("data.images.{}", epoch_)).permutation(data_->size())
                          : in_order(0, data_->size());
      indices.push_back(order_[static_cast<size_t>(used_++)]);
    }
    return image_batch(*data_, indices, config_);
  }
  int64_t epoch() const override { return epoch_; }
  int64_t documents() const override { return data_->size(); }
  int64_t rows_of_an_epoch() override { return data_->size(); }
  json state() const override { return {{"images", data_->size()}, {"epoch", epoch_}, {"used", used_}}; }
  void restore(const json& state) override {
    const auto before = state.at("images").get<int64_t>();
    check(before == data_->size(), "the data has {} images now and had {} when the run began: the position is lost",
          data_->size(), before);
    epoch_ = state.at("epoch").get<int64_t>();
    used_ = state.at("used").get<int64_t>();
    check(epoch_ >= 0 && used_ >= 0 && used_ <= data_->size(), "the saved position lies outside of the data");
    order_.clear();
  }

 private:
  DatasetPtr data_;
  VisionConfig config_;
  uint64_t seed_;
  bool shuffle_;
  int64_t epoch_ = 0, used_ = 0;
  std::vector<int64_t> order_;  // of the epoch
};

class ImageTask : public TrainTask {
 public:
  ImageTask(const TrainConfig& config, const TaskContext& context)
      : config_(config), settings_(parse<ImageTaskConfig>(config.task, "task")) {
    const ModelConfig& m = config.model;
    check(m.tokenizer.empty() && m.chat_template.empty(), "model: images have neither a tokenizer nor a chat template");
    check(dump(config.routing) == dump(RoutingConfig()),
          "routing: the mixture of a vision model has a rule of its own; model.config.moe holds its settings");
    torch::manual_seed(static_cast<uint64_t>(config.train.seed));
    LoadOptions options;
    options.dtype = config.train.dtype;
    options.device = context.device;
    options.trainable = true;
    if (!m.checkpoint.empty()) {
      const std::shared_ptr<const Checkpoint> checkpoint = Checkpoint::open(m.checkpoint);
      check(is_vision(checkpoint->config()), "{} is no vision model that moiety has saved (its model_type is {})",
            m.checkpoint, checkpoint->config().value("model_type", json()).dump());
      names_ = class_names(checkpoint->config());
      parts_ = config.parts.is_null() ? parts_of(checkpoint->config()) : config.parts;
      options.frozen_base = adapts(config, *checkpoint);
      if (options.frozen_base) {
        adapted_ = checkpoint;
        adapted_name_ = base_name(m.checkpoint);
      }
      model_ = context.weights ? load_vision(*checkpoint, parts_, options)
                               : make_vision(parse_vision_config(checkpoint->config(), m.checkpoint), options, parts_);
      return;
    }
    const bool file = m.config.is_string();
    const std::string where = file ? m.config.get<std::string>() : "model.config";
    const json given = file ? parse_json(read_text(where), where) : m.config;
    parts_ = config.parts.is_null() ? parts_of(given) : config.parts;
    model_ = make_vision(parse_vision_config(given, where), options, parts_);
  }

  std::string unit() const override { return "image"; }
  torch::nn::Module& model() override { return *model_; }

  void open_data() override {
    const DataConfig& d = config_.data;
    const auto seed = static_cast<uint64_t>(config_.train.seed);
    std::vector<DatasetPtr> training, held_out;
    for (const auto& source : d.sources) {
      check(!source.weight, "data.sources: images are one set and take no weights");
      auto data = open(source);
      if (d.held_out > 0) {
        auto [train, test] = split(data, d.held_out, seed);
        check(test->size() > 0, "{}: of {} image(s) none can be held out", source.path, data->size());
        held_out.push_back(std::move(test));
        data = std::move(train);
      }
      training.push_back(std::move(data));
    }
    for (const auto& source : d.held_out_sources) held_out.push_back(open(source));
    const auto join = [](std::vector<DatasetPtr> parts) {
      return parts.size() == 1 ? parts[0] : concatenate(std::move(parts));
    };
    rows_ = std::make_unique<ImageRows>(join(std::move(training)), model_->config(), seed, d.shuffle);
    if (held_out.empty()) return;
    const auto data = join(std::move(held_out));
    auto order = RandomStream(seed, "data.held_out").permutation(data->size());
    if (static_cast<int64_t>(order.size()) > config_.evaluation.tokens)
      order.resize(static_cast<size_t>(config_.evaluation.tokens));
    const auto batch =
        static_cast<size_t>(config_.evaluation.batch > 0 ? config_.evaluation.batch : config_.train.batch);
    held_out_.emplace();
    held_out_->documents = held_out_->learned = static_cast<int64_t>(order.size());
    for (size_t at = 0; at < order.size(); at += batch)
      held_out_->batches.push_back(
          image_batch(*data, std::span(order).subspan(at, std::min(batch, order.size() - at)), model_->config()));
  }

  RowSource& rows() override { return *rows_; }
  bool has_held_out() const override { return held_out_.has_value(); }

  Tensor loss(const MicroBatch& m, Pass& pass) override {
    return nll_of(classify(*model_, m, pass), m.targets, settings_.label_smoothing);
  }

  EvaluationResult evaluate(torch::Device device, Ranks* ranks) override {
    const auto sums =
        score_batches(*model_, *held_out_, device, ranks, [&](const MicroBatch& m, bool) -> std::vector<double> {
          Pass pass;
          const auto logits = classify(*model_, m, pass);
          return {nll_of(logits, m.targets).item<double>(), static_cast<double>(right_of(logits, m.targets))};
        });
    const auto images = static_cast<double>(held_out_->learned);
    return {sums[0] / images, 0.0, held_out_->learned, sums[1] / images, {}};
  }

  void write(const std::filesystem::path& folder, const std::string& dtype) const override {
    if (adapted_) return write_stored_adapter(folder, model_->stored(), parts_, *adapted_, adapted_name_);
    json config = model_->json();
    config["dtype"] = dtype_name(dtype);
    if (!names_.empty()) config["class_names"] = names_;
    write_file(folder / "config.json", config.dump(2) + "\n");
    write_stored(folder, model_->stored(), dtype);
  }

  int64_t row_units() const override { return 1; }

  int64_t activation_bytes() const override {
    // What the backward pass keeps of a block: about 14 values of the hidden size and 2 of every hidden unit a
    // position.
    const VisionConfig& c = model_->config();
    const int64_t side = c.image / c.patch, active = c.mixture ? c.moe.top_k : 1;
    const int64_t block = 14 * c.hidden + 2 * c.width * active + (c.mixture ? 3 * c.hidden * active : 0);
    const int64_t width = config_.train.dtype == "bf16" ? 2 : 4, positions = config_.train.batch * (side * side + 1);
    return positions * width * (config_.train.checkpoint_activations ? c.hidden * c.blocks + block : block * c.blocks);
  }

 private:
  DatasetPtr open(const SourceConfig& source) {
    DataOptions options = source.options();
    options.channels = static_cast<int>(model_->config().channels);
    auto data = Dataset::open(source.path, options);
    check(data->kind() == SampleKind::image, "{} holds {} samples: the task image-classification learns from images",
          source.path, to_string(data->kind()));
    const auto names = data->classes();
    if (names_.empty()) names_ = names;
    check(names.empty() || names == names_, "{} has other classes than the data before it, or the model that goes on",
          source.path);
    return data;
  }

  TrainConfig config_;
  ImageTaskConfig settings_;
  std::shared_ptr<VisionModel> model_;
  json parts_;                                 // beside its matrices; null: none
  std::shared_ptr<const Checkpoint> adapted_;  // they are all that learns: an adapter of this is written
  std::string adapted_name_;
  std::vector<std::string> names_;  // of classes
  std::unique_ptr<ImageRows> rows_;
  std::optional<HeldOut> held_out_;
};

const RegisterMethod registered(
    {.slug = "image-classification",
     .kind = "task",
     .title = "Image classification",
     .summary = "labelled images, by vision transformers with and without shared blocks and experts",
     .paper = {},
     .sites = {},
     .config = describe<ImageTaskConfig>,
     .make = MakeTrainTask([](const TrainConfig& config, const TaskContext& context) -> std::unique_ptr<TrainTask> {
       return std::make_unique<ImageTask>(config, context);
     })});

}  // namespace
}  // namespace moiety
