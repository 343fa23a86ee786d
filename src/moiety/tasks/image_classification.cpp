#include "moiety/tasks/image_classification.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/base/random.h"

namespace moiety {

using torch::Tensor;

ImageSet read_images(const DatasetPtr& data, int64_t limit, uint64_t seed) {
  check(data->kind() == SampleKind::image, "these data hold {} and no images", to_string(data->kind()));
  check(data->size() > 0, "there are no images");
  std::vector<int64_t> order(static_cast<size_t>(data->size()));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (limit > 0 && limit < data->size()) order = RandomStream(seed, "images").sample(data->size(), limit);
  ImageSet out;
  std::vector<int64_t> labels;
  uint8_t* next = nullptr;
  for (const int64_t i : order) {
    const Sample s = data->get(i);
    check(s.label >= 0, "{} has no label", s.where);
    const Image& image = s.image;
    if (!out.pixels.defined()) {
      out.pixels =
          torch::empty({static_cast<int64_t>(order.size()), image.height, image.width, image.channels}, torch::kUInt8);
      next = out.pixels.data_ptr<uint8_t>();
    }
    check(
        image.height == out.pixels.size(1) && image.width == out.pixels.size(2) && image.channels == out.pixels.size(3),
        "{} has {} x {} pixels of {} channel(s), the images before it {} x {} of {}", s.where, image.height,
        image.width, image.channels, out.pixels.size(1), out.pixels.size(2), out.pixels.size(3));
    next = std::copy(image.pixels.begin(), image.pixels.end(), next);
    labels.push_back(s.label);
  }
  out.pixels = out.pixels.permute({0, 3, 1, 2}).contiguous();
  out.labels = torch::tensor(labels, torch::kInt64);
  return out;
}

namespace {

Tensor floats(const Tensor& pixels) {
  return pixels.to(torch::kFloat32) / 127.5 - 1.0;
}

std::vector<Slot> slots_of(const VisionModel& model, const OptimizerConfig& config) {
  std::vector<Slot> slots;
  std::set<const void*> seen;  // shared modules are listed once for every place
  for (const auto& item : model.named_parameters()) {
    if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    Slot slot;
    slot.name = item.key();
    slot.parameter = item.value();
    slot.lr = config.lr;
    const bool decays = item.value().dim() > 1 && item.key().find("bias") == std::string::npos &&
                        item.key().find("embedding") == std::string::npos;
    slot.weight_decay = decays ? config.weight_decay : 0.0;
    slots.push_back(std::move(slot));
  }
  return slots;
}

}  // namespace

void train_images(VisionModel& model, const ImageSet& data, const ImageTraining& t) {
  check(t.batch >= 1 && t.epochs > 0.0, "a batch of {} images and {} epochs teach nothing", t.batch, t.epochs);
  check(data.labels.max().item<int64_t>() < model.config().classes, "there is a label {}, but the model has {} classes",
        data.labels.max().item<int64_t>(), model.config().classes);
  const int64_t batch = std::min(t.batch, data.size()), of_epoch = data.size() / batch;  // whole batches only
  const int64_t steps = std::max<int64_t>(1, std::llround(t.epochs * static_cast<double>(of_epoch)));
  const auto optimizer = make_optimizer(t.optimizer, slots_of(model, t.optimizer));
  RandomStream order(t.seed, "image_classification.order");
  std::vector<int64_t> rows;
  model.train();
  for (int64_t step = 0; step < steps; ++step) {
    if (step % of_epoch == 0) rows = order.permutation(data.size());
    const auto now = torch::tensor(
        std::vector<int64_t>(rows.begin() + step % of_epoch * batch, rows.begin() + (step % of_epoch + 1) * batch),
        torch::kInt64);
    Pass pass;
    pass.training = true;
    const auto logits = model.forward(floats(data.pixels.index_select(0, now)), pass);
    auto loss = torch::cross_entropy_loss(logits, data.labels.index_select(0, now), {}, at::Reduction::Mean, -100,
                                          t.label_smoothing);
    if (t.on_step) t.on_step(step + 1, steps, loss.item<double>());
    for (const auto& [name, value] : pass.losses) loss = loss + value;
    optimizer->zero_grad();
    loss.backward();
    clip_gradients(optimizer->slots(), t.optimizer.clip);
    optimizer->step(schedule_factor(t.schedule, step, steps));
  }
}

double image_accuracy(VisionModel& model, const ImageSet& data, int64_t batch, Trace* trace) {
  check(batch >= 1, "a batch of {} images is none", batch);
  const torch::NoGradGuard frozen;
  const bool training = model.is_training();
  model.eval();
  int64_t right = 0;
  for (int64_t at = 0; at < data.size(); at += batch) {
    const int64_t count = std::min(batch, data.size() - at);
    Pass pass;
    pass.trace = trace;
    const auto logits = model.forward(floats(data.pixels.narrow(0, at, count)), pass);
    right += (logits.argmax(-1) == data.labels.narrow(0, at, count)).sum().item<int64_t>();
  }
  model.train(training);
  return static_cast<double>(right) / static_cast<double>(data.size());
}

}  // namespace moiety
