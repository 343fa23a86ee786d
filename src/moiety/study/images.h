#pragma once
// What studies on images share: real ones in memory, a small vision transformer that has learned half of the clothes,
// domains that follow each other, and steps over any loss.
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/models/vision.h"
#include "moiety/nn/pass.h"
#include "moiety/study/study.h"
#include "moiety/train/optimizer.h"

namespace moiety {

struct LabelledImages {
  torch::Tensor images;  ///< [N, 1, 28, 28] f32, -1 to 1
  torch::Tensor labels;  ///< [N] int64
};
LabelledImages joined(const std::vector<LabelledImages>& parts);

/// Of Fashion-MNIST (Debian's dataset-fashion-mnist), of each of `classes` the images `from` to `from + count`, class
/// by class. `file`: train or t10k. Error: it is not installed, or has too few.
LabelledImages fashion_images(const std::string& file, const std::vector<int64_t>& classes, int64_t from,
                              int64_t count);
/// The 1797 handwritten digits of 8 x 8 pixels that the Python package scikit-learn carries (UCI, CC BY 4.0), as large
/// as clothes: bilinear. Error: no such package is installed.
LabelledImages digit_images();

/// One task of a stream. Labels count over the whole stream: no two domains share one.
struct ImageDomain {
  std::string name;
  int64_t first = 0, classes = 0;  ///< its labels
  LabelledImages train, tuning, test;
};
/// Clothes 5 and 6; 7 to 9; digits; all clothes, inverted; digits turned by 90 degrees: 35 classes.
std::vector<ImageDomain> image_domains();

/// For Study::settings, and in sentences for Study::setup.
nlohmann::json image_settings();
std::string image_setup();

/// The folder of a vision transformer that has learned clothes 0 to 4; trained by the first cell that asks.
std::filesystem::path image_base(const StudyCell& cell, int64_t seed);
/// That model, or another in a folder, frozen, with parts beside its matrices; null: none.
std::shared_ptr<VisionModel> open_vision(const std::filesystem::path& folder, const nlohmann::json& parts);

/// Unit vectors [B, hidden]: the mean of the model's last positions.
torch::Tensor unit_embeddings(VisionModel& model, const torch::Tensor& images, Pass& pass);

/// What of a model learns at that rate, without decay: parts beside matrices where there are some (trained_slots()).
std::vector<Slot> slots_at(torch::nn::Module& model, double rate);
/// Steps over slots of a model: AdamW, a cosine to 5 % behind 5 % warm-up, clip 1. `loss` gets a pass that trains,
/// whose auxiliary losses count.
void learn_by(torch::nn::Module& model, std::vector<Slot> slots, int64_t steps,
              const std::function<torch::Tensor(Pass& pass)>& loss);

/// Rows of a set in orders drawn anew every time through: rows of one batch, [n] int64.
class DrawnRows {
 public:
  DrawnRows(int64_t size, uint64_t seed, std::string stream);
  torch::Tensor next(int64_t n);

 private:
  int64_t size_, round_ = 0;
  uint64_t seed_;
  std::string stream_;
  std::vector<int64_t> left_;
};

}  // namespace moiety
