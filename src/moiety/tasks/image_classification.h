#pragma once
// Image classification: the task that trains vision models, and their accuracy.
#include <torch/types.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moiety/io/dataset.h"
#include "moiety/models/vision.h"
#include "moiety/train/task.h"

namespace moiety {

/// Images `indices` of `data` with their labels, decoded on all threads: `images` [B, C, H, W] u8, `targets` [B]. Error
/// naming the image: another size or number of channels than the model's, no label, a label that the model lacks.
MicroBatch image_batch(const Dataset& data, std::span<const int64_t> indices, const VisionConfig& config);

/// Logits [B, classes] f32 of the images of a micro-batch; bytes become -1 to 1.
torch::Tensor classify(VisionModel& model, const MicroBatch& batch, Pass& pass);

struct ImageScore {
  int64_t images = 0, right = 0;
  double nll = 0;  ///< sum of -log p of the labels
  double accuracy() const { return static_cast<double>(right) / static_cast<double>(images); }
  double accuracy_stderr() const;
  double loss() const { return nll / static_cast<double>(images); }
};

struct ImageScoring {
  int64_t batch = 250;
  int64_t limit = 0;  ///< only the first images; 0: all
  torch::Device device = torch::kCPU;
  Trace* trace = nullptr;  ///< sees all passes
  std::function<void(int64_t done, int64_t images)> progress;
};
/// How many images the model classifies as they are labelled, batch by batch in the order of the data; without
/// gradients, in evaluation mode.
ImageScore score_images(VisionModel& model, const Dataset& data, const ImageScoring& options = {});

struct ImageTaskConfig {
  std::string slug;
  double label_smoothing = 0.1;
  void fields(Fields& f);
};

/// Names of the classes that a checkpoint was trained on; empty when it does not say.
std::vector<std::string> class_names(const nlohmann::json& config);

}  // namespace moiety
