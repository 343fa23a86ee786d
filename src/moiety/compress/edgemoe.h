#pragma once
// EdgeMoE's expert-wise quantization (Yi et al. 2023, arXiv 2308.14352): every expert gets its own bit width, the
// narrower of two for the least important ones, so that the model loses no more than a stated tolerance. Losses are
// relative, (A(full) - A(v)) / A(full), and always measured on the model, never summed.
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/kernels/channel_quant.h"

namespace moiety {

struct EdgeMoeConfig {
  double tolerance = 0.02;                      ///< P
  std::vector<int64_t> widths = {2, 4, 8, 32};  ///< what experts may get; 16: half, 32: as they are
  int64_t k0 = -1;                              ///< where the walk starts; -1: half of the experts
  int64_t step = 0;                             ///< of the walk; 0: a 32nd of the experts, at least 1
  std::string int2_scale = "max";               ///< or fit
  void fields(Fields& f);
  std::string problem() const;
  Int2Scale int2() const { return int2_scale == "fit" ? Int2Scale::fit : Int2Scale::max; }
};

/// The two widths that experts may get.
struct BitBounds {
  int64_t low = 0, high = 0;
};
/// High: the narrowest width whose uniform loss is at most `tolerance`, 32 if none; low: the next narrower of `widths`,
/// the same if there is none. `losses` in the order of `widths`, which may have any. Error: other numbers of both,
/// widths outside of 2, 4, 8, 16, 32, a tolerance outside [0, 1).
BitBounds bit_bounds(const std::vector<int64_t>& widths, const std::vector<double>& losses, double tolerance);

/// Flat indices by ascending sensitivity, ties by the lower index: the first are quantized hardest.
std::vector<int64_t> sensitivity_order(std::span<const double> sensitivity);

/// k in 0..n of experts with the low width: from k0 (clamped) up by `step` while loss(k + step) is within the
/// tolerance, or down while loss(k) is not; loss is called for the k that are tried only.
int64_t walk_bits(int64_t n, int64_t k0, int64_t step, double tolerance, const std::function<double(int64_t)>& loss);

struct BitAssignment {
  BitBounds bounds;
  std::vector<int64_t> order;  ///< see sensitivity_order
  int64_t k = 0;               ///< experts with bounds.low: the first of `order`
  std::vector<int64_t> bits;   ///< by flat index
};
/// Bounds, order, and the walk; `second_pass`: once more from the k found, by steps of 1. With bounds.low ==
/// bounds.high k is n and nothing is measured. loss(k, bits so far): the loss of the model in which the first k have
/// the low width.
BitAssignment assign_bits(const EdgeMoeConfig& config, const std::vector<double>& uniform_loss,
                          std::span<const double> sensitivity,
                          const std::function<double(int64_t k, const std::vector<int64_t>& bits)>& loss,
                          bool second_pass = true);

/// What a search has measured; survives being stopped. Losses by what they were measured of.
struct EdgeMoeMeasurements {
  std::string fingerprint;  ///< of the model, the text and all settings that losses depend on
  std::map<std::string, double> accuracy;
  /// Empty when the file is not there or belongs to another search.
  static EdgeMoeMeasurements load(const std::string& file, const std::string& fingerprint);
  void save(const std::string& file) const;
};

/// The model as the search sees it.
class EdgeMoeModel {
 public:
  virtual ~EdgeMoeModel() = default;
  virtual int64_t experts() const = 0;  ///< N = L * E
  /// Gives every expert a width; only what differs is changed.
  virtual void set_bits(const std::vector<int64_t>& bits) = 0;
  /// A of the model as it is, higher is better.
  virtual double accuracy() = 0;
  /// Experts that no token of the evaluation reaches as the model is now: their own width changes nothing. May be
  /// empty when that is not known.
  virtual std::vector<bool> unused() { return {}; }
};

struct EdgeMoeSearch {
  double full = 0.0;                 ///< A of the whole model
  std::vector<double> uniform_loss;  ///< in the order of widths
  std::vector<double> sensitivity;   ///< [N]
  BitAssignment assignment;
  double loss = 0.0;        ///< of the model with `assignment`
  int64_t evaluations = 0;  ///< made now; others came from the file
};
/// Steps 1 to 3: uniform widths, sensitivities (one expert at 2 bits, all others at 4), walk. The model has the bits
/// found at the end. `measured` gains what is measured, `changed` is called after each. `progress` gets what is done,
/// of how many (the walk not counted), and what runs. Error: A(full) not above 0.
EdgeMoeSearch search_bits(EdgeMoeModel& model, const EdgeMoeConfig& config, EdgeMoeMeasurements& measured,
                          const std::function<void()>& changed,
                          const std::function<void(int64_t, int64_t, const std::string&)>& progress = {});

}  // namespace moiety
