#pragma once
// EAQuant over a whole decoder (arXiv 2506.13329): calibration block by block, weights rounded to their grid, and the
// part that rotates and quantizes what the matrices read.
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "moiety/compress/eaquant.h"
#include "moiety/io/checkpoint.h"
#include "moiety/nn/beside.h"

namespace moiety {

/// What a part `eaquant` is told.
struct EaquantPartConfig {
  int64_t activation_bits = 4;
  double lac = 0.9;
  int64_t block_size = 128;
  void fields(Fields& f);
};

/// Beside matrices that are stored rotated, on the grid of their weights: they read what they read rotated, and
/// quantized token by token.
class QuantizedInputs : public Beside {
 public:
  QuantizedInputs(std::vector<LinearImpl*> matrices, Rotation rotation, EaquantPartConfig config);
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) override;
  /// The matrix in the base that it had; what it reads is then not quantized.
  torch::Tensor merged(const torch::Tensor& weight, int64_t place) const override;

 private:
  std::vector<LinearImpl*> matrices_;
  Rotation rotation_;
  EaquantPartConfig config_;
};

/// The same beside the matrices of experts, each with a rotation of its own.
class QuantizedExpertInputs : public BesideStack {
 public:
  QuantizedExpertInputs(LinearStackImpl* stack, std::vector<Rotation> rotations, EaquantPartConfig config);
  torch::Tensor apply(const torch::Tensor& x, const std::vector<int64_t>& counts, torch::Tensor y) override;
  torch::Tensor delta(int64_t expert) const override;

 private:
  LinearStackImpl* stack_;
  std::vector<Rotation> rotations_;
  EaquantPartConfig config_;
};

/// The decoder quantized, as a checkpoint: weights of attention and routed experts rotated and rounded to
/// `weight_bits`, routers rounded to `router_bits`, and parts `eaquant` that rotate and quantize what matrices read.
/// `samples`: token ids of one length each. `report` gets what was found in every layer (overlap of the router's
/// choice, its KL, tokens of the rarest expert). `packed`: weights are codes as a file holds them (io/packed_rows.h),
/// which with_whole_matrices() makes the very numbers that they are otherwise, in the types that they had. Error: no
/// mixture, another attention than that of queries, keys and values, sizes that blocks do not divide, fewer tokens than
/// experts, parts there already, GGUF.
std::shared_ptr<const Checkpoint> eaquant_checkpoint(std::shared_ptr<const Checkpoint> base,
                                                     const EaquantConfig& config,
                                                     const std::vector<std::vector<int64_t>>& samples,
                                                     nlohmann::json* report = nullptr,
                                                     const std::function<void(int64_t, int64_t)>& progress = {},
                                                     bool packed = false);

}  // namespace moiety
