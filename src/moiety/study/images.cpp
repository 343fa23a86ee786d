#include "moiety/study/images.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <span>
#include <string_view>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/io/image.h"
#include "moiety/io/python_packages.h"
#include "moiety/train/open_run.h"
#include "moiety/train/schedule.h"

namespace moiety {

namespace fs = std::filesystem;
using nlohmann::json;
using torch::Tensor;

namespace {

constexpr const char* kClothes = "/usr/share/datasets/fashion-mnist";
constexpr const char* kDigits = "sklearn/datasets/data/digits.csv.gz";
constexpr int64_t kSide = 28, kDigitSide = 8;
constexpr double kDigitWhite = 16.0;
// Of a class: what the base learns, and what a task has.
constexpr int64_t kBaseImages = 4000, kTrain = 200, kHeldOut = 50;
constexpr int64_t kBaseClasses = 5, kBaseSteps = 1000, kShortBaseSteps = 120, kBaseBatch = 64;
constexpr double kBaseRate = 2e-3;

VisionConfig base_config() {
  VisionConfig c;
  c.image = kSide;
  c.hidden = 64;
  c.blocks = 4;
  c.heads = 4;
  c.width = 128;
  c.classes = kBaseClasses;
  c.dropout = 0.0;
  c.mixture = c.share_attention = c.share_ffn = false;
  return c;
}

LabelledImages rows_of(const LabelledImages& all, const Tensor& rows) {
  return {all.images.index_select(0, rows), all.labels.index_select(0, rows)};
}

std::vector<int64_t> range(int64_t begin, int64_t end) {
  std::vector<int64_t> out;
  for (int64_t i = begin; i < end; ++i) out.push_back(i);
  return out;
}

ImageDomain clothes(const std::string& name, const std::vector<int64_t>& classes, int64_t from) {
  ImageDomain d;
  d.name = name;
  d.classes = static_cast<int64_t>(classes.size());
  d.train = fashion_images("train", classes, from, kTrain);
  d.tuning = fashion_images("train", classes, from + kTrain, kHeldOut);
  d.test = fashion_images("t10k", classes, 0, kHeldOut);
  return d;
}

// Half of the digits to learn, a quarter to choose rates by, a quarter to measure on.
ImageDomain digits(const std::string& name, int64_t turns) {
  LabelledImages all = digit_images();
  all.images = torch::rot90(all.images, turns, {2, 3}).contiguous();
  std::vector<int64_t> rows[3];
  for (int64_t i = 0; i < all.labels.size(0); ++i) rows[i % 4 < 2 ? 0 : i % 4 - 1].push_back(i);
  ImageDomain d;
  d.name = name;
  d.classes = 10;
  d.train = rows_of(all, torch::tensor(rows[0]));
  d.tuning = rows_of(all, torch::tensor(rows[1]));
  d.test = rows_of(all, torch::tensor(rows[2]));
  return d;
}

}  // namespace

LabelledImages joined(const std::vector<LabelledImages>& parts) {
  std::vector<Tensor> images, labels;
  for (const auto& p : parts) {
    images.push_back(p.images);
    labels.push_back(p.labels);
  }
  return {torch::cat(images), torch::cat(labels)};
}

LabelledImages fashion_images(const std::string& file, const std::vector<int64_t>& classes, int64_t from,
                              int64_t count) {
  const fs::path images = fs::path(kClothes) / (file + "-images-idx3-ubyte.gz"),
                 labels = fs::path(kClothes) / (file + "-labels-idx1-ubyte.gz");
  check(fs::exists(images) && fs::exists(labels), "there is no {}: install the package dataset-fashion-mnist",
        images.string());
  static std::map<std::string, std::pair<IdxArray, IdxArray>> opened;  // a cell asks several times
  if (opened.count(file) == 0) opened[file] = {read_idx(images), read_idx(labels)};
  const auto& [pixels, names] = opened.at(file);
  check(pixels.shape.size() == 3 && names.shape.size() == 1 && pixels.shape[0] == names.shape[0] &&
            pixels.shape[1] == kSide && pixels.shape[2] == kSide,
        "{} and its labels are not the clothes that were expected", images.string());
  std::vector<int64_t> rows, own;
  for (const int64_t c : classes) {
    int64_t seen = 0;
    for (int64_t i = 0; i < names.shape[0] && seen < from + count; ++i) {
      if (names.data[static_cast<size_t>(i)] != c || ++seen <= from) continue;
      rows.push_back(i);
      own.push_back(c);
    }
    check(seen == from + count, "{} has {} images of class {}, not {}", images.string(), seen, c, from + count);
  }
  auto out = torch::empty({static_cast<int64_t>(rows.size()), 1, kSide, kSide}, torch::kUInt8);
  for (size_t i = 0; i < rows.size(); ++i)
    std::copy_n(pixels.data.data() + rows[i] * kSide * kSide, kSide * kSide,
                out.data_ptr<uint8_t>() + static_cast<int64_t>(i) * kSide * kSide);
  return {out.to(torch::kFloat32) / 127.5 - 1.0, torch::tensor(own)};
}

LabelledImages digit_images() {
  fs::path file;
  for (const auto& folder : python_package_folders())
    if (file.empty() && fs::exists(folder / kDigits)) file = folder / kDigits;
  check(!file.empty(), "the digits of scikit-learn are not there: no Python that is known has {}", kDigits);
  const std::string packed = read_text(file);
  const auto bytes = gunzip(std::as_bytes(std::span(packed)), file.string(), uint64_t{16} << 20);
  // Rows of 64 pixels, 0 to 16, and the digit.
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  std::vector<float> pixels;
  std::vector<int64_t> labels;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    int64_t column = 0;
    for (size_t i = at; i < end; ++column) {
      double value = -1;
      const auto [rest, error] = std::from_chars(text.data() + i, text.data() + end, value);
      const bool pixel = column < kDigitSide * kDigitSide;
      check(error == std::errc() && value >= 0 && value <= (pixel ? kDigitWhite : 9.0),
            "{}: row {} is not the pixels of a digit and its name", file.string(), labels.size() + 1);
      if (pixel)
        pixels.push_back(static_cast<float>(value / kDigitWhite * 2.0 - 1.0));
      else
        labels.push_back(static_cast<int64_t>(value));
      i = static_cast<size_t>(rest - text.data()) + 1;
    }
    check(column == kDigitSide * kDigitSide + 1, "{}: row {} has {} numbers", file.string(), labels.size(), column);
    at = end + 1;
  }
  const auto n = static_cast<int64_t>(labels.size());
  check(n > 0, "{}: there are no digits", file.string());
  const auto small = torch::tensor(pixels).view({n, 1, kDigitSide, kDigitSide});
  return {at::upsample_bilinear2d(small, {kSide, kSide}, /*align_corners=*/false), torch::tensor(labels)};
}

std::vector<ImageDomain> image_domains() {
  std::vector<ImageDomain> out;
  out.push_back(clothes("clothes-5-6", {5, 6}, 0));
  out.push_back(clothes("clothes-7-9", {7, 8, 9}, 0));
  out.push_back(digits("digits", 0));
  // Other images than those of the first two tasks.
  out.push_back(clothes("inverted", range(0, 10), kBaseImages));
  for (LabelledImages* part : {&out.back().train, &out.back().tuning, &out.back().test}) part->images.neg_();
  out.push_back(digits("turned-digits", 1));
  int64_t first = 0;
  for (ImageDomain& d : out) {
    d.first = first;
    for (LabelledImages* part : {&d.train, &d.tuning, &d.test}) {
      const auto lowest = part->labels.min();  // a domain's labels follow each other
      part->labels = part->labels - lowest + first;
    }
    first += d.classes;
  }
  return out;
}

json image_settings() {
  return {{"model", dump(base_config())},
          {"base", {kBaseImages, kBaseSteps, kShortBaseSteps, kBaseBatch, kBaseRate}},
          {"task", {kTrain, kHeldOut}}};
}

std::string image_setup() {
  const VisionConfig c = base_config();
  return fmt::format(
      "A vision transformer of {} blocks, hidden size {}, patches of {} x {} pixels, which has learned Fashion-MNIST's "
      "classes 0 to 4 for {} steps ({} in a short run) of {} images, frozen. A stream of five tasks: classes 5 and 6; "
      "7 to 9; the digits of scikit-learn, enlarged from 8 x 8 pixels; all clothes, inverted; digits turned by 90 "
      "degrees. {} images of a class of clothes are learned and {} of the test set measured; of the digits a half and "
      "a quarter",
      c.blocks, c.hidden, c.patch, c.patch, kBaseSteps, kShortBaseSteps, kBaseBatch, kTrain, kHeldOut);
}

fs::path image_base(const StudyCell& cell, int64_t seed) {
  return cell.once(fmt::format("image-base-{}", seed), [&](const fs::path& to) {
    torch::manual_seed(static_cast<uint64_t>(seed));
    const auto model = make_vision(base_config(), {.dtype = "f32", .device = torch::kCPU, .trainable = true});
    const auto data = fashion_images("train", range(0, kBaseClasses), 0, kBaseImages);
    DrawnRows rows(data.labels.size(0), static_cast<uint64_t>(seed), "image-base");
    const int64_t steps = cell.budget.full() ? kBaseSteps : kShortBaseSteps;
    learn_by(*model, slots_at(*model, kBaseRate), steps, [&](Pass& pass) {
      const auto now = rows_of(data, rows.next(kBaseBatch));
      return torch::nn::functional::cross_entropy(model->forward(now.images, pass), now.labels);
    });
    write_file(to / "config.json", model->json().dump(2) + "\n");
    write_stored(to, model->stored(), "f32");
  });
}

std::shared_ptr<VisionModel> open_vision(const fs::path& folder, const json& parts) {
  LoadOptions options;
  options.dtype = "f32";
  options.trainable = !parts.is_null();
  options.frozen_base = true;
  auto out = load_vision(*Checkpoint::open(folder.string()), parts, options);
  out->eval();
  return out;
}

Tensor unit_embeddings(VisionModel& model, const Tensor& images, Pass& pass) {
  return torch::nn::functional::normalize(model.pooled(model.body().forward(model.embed(images), pass)));
}

std::vector<Slot> slots_at(torch::nn::Module& model, double rate) {
  TrainConfig config;
  config.optimizer.lr = rate;
  config.optimizer.weight_decay = 0.0;
  return trained_slots(model, config);
}

void learn_by(torch::nn::Module& model, std::vector<Slot> slots, int64_t steps,
              const std::function<Tensor(Pass&)>& loss) {
  const OptimizerConfig config;
  const ScheduleConfig schedule{.name = "cosine", .warmup = 0.05, .floor = 0.05};
  const auto optimizer = make_optimizer(config, std::move(slots));
  model.train();
  for (int64_t step = 0; step < steps; ++step) {
    Pass pass;
    pass.training = true;
    auto sum = loss(pass);
    for (const auto& [name, value] : pass.losses) sum = sum + value;
    check(torch::isfinite(sum).item<bool>(), "the loss of step {} is no number", step);
    sum.backward();
    const auto norm = gradient_norm(optimizer->slots(), config.clip);
    optimizer->step(schedule_factor(schedule, step, steps), norm.scale);
    optimizer->zero_grad();
  }
  model.eval();
}

DrawnRows::DrawnRows(int64_t size, uint64_t seed, std::string stream)
    : size_(size), seed_(seed), stream_(std::move(stream)) {
  check(size > 0, "there are no rows to draw");
}

Tensor DrawnRows::next(int64_t n) {
  std::vector<int64_t> out;
  while (static_cast<int64_t>(out.size()) < n) {
    if (left_.empty()) left_ = RandomStream(seed_, fmt::format("{}.{}", stream_, round_++)).permutation(size_);
    out.push_back(left_.back());
    left_.pop_back();
  }
  return torch::tensor(out);
}

}  // namespace moiety
