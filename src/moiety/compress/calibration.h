#pragma once
// What a model's routers and experts do on a text, gathered in one pass and saved as a file that several methods share:
// how often and how strongly experts are used, the Gram matrix of router logits, how much experts write.
#include <torch/types.h>

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "moiety/compress/expert_layers.h"
#include "moiety/models/model.h"
#include "moiety/models/text_windows.h"

namespace moiety {

/// Of one mixture layer. Padding is never counted.
struct LayerCalibration {
  int64_t block = 0;
  int64_t tokens = 0;
  torch::Tensor load;    ///< [rows] int64: tokens that chose the expert
  torch::Tensor gates;   ///< [rows] f64: sum of the gates really applied, 0 where not chosen
  torch::Tensor gram;    ///< [rows, rows] f64: R^T R of the raw logits R [tokens, rows]
  torch::Tensor pairs;   ///< [experts] int64: (token, expert) pairs; rows that share an expert are one pair
  torch::Tensor output;  ///< [experts] f64: sum over pairs of gate * |expert(x)|_2

  torch::Tensor usage() const;       ///< [rows] f64: load over all choices. Error: there are none
  torch::Tensor importance() const;  ///< [rows] f64: gates over tokens
  /// [experts] f64: mean over the tokens of an expert of gate * |expert(x)|_2; 0 for one that was never chosen (REAP:
  /// Lasby et al. 2025, arXiv 2510.13999).
  torch::Tensor saliency() const;
};

class Calibration {
 public:
  std::vector<LayerCalibration> layers;  ///< in the order of depth
  std::string model;                     ///< fingerprint, see model_fingerprint
  std::string texts;                     ///< of the token ids and the windows they were read in
  int64_t batches = 0;                   ///< read so far
  int64_t windows = 0, done = 0;         ///< in all, and read so far

  bool complete() const { return windows > 0 && done == windows; }
  const LayerCalibration& of_block(int64_t block) const;  ///< Error: there is none
  void save(const std::filesystem::path& file) const;
  /// Error: no such file, damaged, of another version.
  static Calibration load(const std::filesystem::path& file);
};

/// Tells models apart: config, and all routers' weights.
std::string model_fingerprint(const ExpertLayers& layers);

struct CalibrationOptions {
  WindowOptions windows;
  /// Goes on from there, and is written every `save_every` seconds and at the end; empty: nothing is saved.
  std::filesystem::path file;
  double save_every = 30.0;
  std::function<void(int64_t done, int64_t windows)> progress;
};

/// Reads the texts (token ids each). A complete file of the same model and texts is taken as it is, a partial one goes
/// on; the result is bit-identical. Error: a file of another model or other texts, a model whose mixtures are not those
/// of `layers`, no token; see each_window.
Calibration calibrate(CausalModel& model, const ExpertLayers& layers, const std::vector<std::vector<int64_t>>& texts,
                      const CalibrationOptions& options);

}  // namespace moiety
