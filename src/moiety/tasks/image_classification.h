#pragma once
// Image classification: images in memory, a training loop, accuracy.
#include <torch/types.h>

#include <functional>
#include <map>
#include <string>

#include "moiety/io/dataset.h"
#include "moiety/models/vision.h"
#include "moiety/train/optimizer.h"
#include "moiety/train/schedule.h"

namespace moiety {

struct ImageSet {
  torch::Tensor pixels;  ///< [N, C, H, W] u8
  torch::Tensor labels;  ///< [N] int64
  int64_t size() const { return labels.size(0); }
};

/// All samples, or `limit` of them that are drawn from the seed. Error for other samples than labelled images, and for
/// images of different sizes.
ImageSet read_images(const DatasetPtr& data, int64_t limit = 0, uint64_t seed = 0);

struct ImageTraining {
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  int64_t batch = 128;
  double epochs = 1.0;
  double label_smoothing = 0.1;
  uint64_t seed = 0;  ///< of the order of the images; everything else is drawn from torch's random state
  std::function<void(int64_t step, int64_t steps, double loss)> on_step;
};

/// Minimises cross-entropy against smoothed labels plus the losses that the model's routers report. Norms, biases and
/// positions have no weight decay; parameters that several blocks share count once. Error for labels that the model
/// does not have.
void train_images(VisionModel& model, const ImageSet& data, const ImageTraining& training);

/// Share of images whose label is the most likely one; `trace` sees all passes.
double image_accuracy(VisionModel& model, const ImageSet& data, int64_t batch = 256, Trace* trace = nullptr);

}  // namespace moiety
