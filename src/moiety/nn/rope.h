#pragma once
// Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the scalings in use: linear, dynamic NTK, YaRN
// (2309.00071), LongRoPE (2402.13753), Llama 3.
#include <torch/types.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace moiety {

struct RopeConfig {
  double theta = 10000.0;
  std::string type = "default";  ///< default, linear, dynamic, yarn, longrope (su), llama3
  nlohmann::json parameters =
      nlohmann::json::object();  ///< factor, beta_fast, long_factor, ... as config.json names them
  int64_t head_dim = 0;
  double partial = 1.0;                   ///< share of head_dim that is rotated
  int64_t max_positions = 2048;           ///< max_position_embeddings
  bool interleaved = false;               ///< pairs (2i, 2i+1) instead of (i, i + dim/2)
  bool scale_by_length = false;           ///< Phi-3.5-MoE: short_mscale / long_mscale by length, short factors always
  std::vector<float> frequency_divisors;  ///< per-frequency divisors that a file carries instead of a rule
};

class Rope {
 public:
  explicit Rope(const RopeConfig& config);

  /// positions [B, T] int64 -> cos, sin [B, 1, T, dim/2] f32, for sequences whose longest position is in `positions`.
  std::pair<torch::Tensor, torch::Tensor> angles(const torch::Tensor& positions) const;
  /// x [B, H, T, D] rotated in its first dim() features.
  torch::Tensor rotate(const torch::Tensor& x, const std::pair<torch::Tensor, torch::Tensor>& angles) const;
  int64_t dim() const { return dim_; }
  bool interleaved() const { return config_.interleaved; }

 private:
  std::vector<float> frequencies(int64_t length) const;
  RopeConfig config_;
  int64_t dim_;
  double attention_factor_ = 1.0;
  std::vector<float> always_;  // the frequencies where no length changes them, else none
};

}  // namespace moiety
