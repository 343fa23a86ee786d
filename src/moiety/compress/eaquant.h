#pragma once
// EAQuant (Fu et al. 2025, arXiv 2506.13329): quantization of weights and activations of a mixture without training.
// One smoothing vector that suits all experts, a router whose clipping keeps its choice, calibration tokens balanced
// over experts, and rotations with a zigzag permutation (DuQuant, arXiv 2406.01721) before every matrix. Everything
// computes in the type that it is given; random matrices come from a seed.
#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moiety/base/config.h"

namespace moiety {

struct EaquantConfig {
  int64_t weight_bits = 4, activation_bits = 4, router_bits = 8;
  double alpha = 0.6;             ///< of smoothing
  std::string aggregate = "max";  ///< max, frequency, router, weight, or none: the router's own vector
  bool with_router = false;       ///< the router votes on the smoothing vector
  double otsu_ratio = 0.65, otsu_smooth_rate = 0.7;
  int64_t block_size = 128;  ///< b of rotations
  int64_t rotation_steps = 256;
  double lac = 0.9;                    ///< activations: extremes times this
  double swc = 0.8;                    ///< weights by minmax: extremes times this
  std::string weight_method = "mse";   ///< or minmax
  std::string router_loss = "mse+kl";  ///< or kl, mse
  double kl_ratio = 0.0;               ///< kappa: the KL counts top_k + int(kappa (E - top_k)) experts
  double balance_ratio = 2.0;          ///< tokens of an expert, in even shares; 0: no balance
  int64_t seed = 2;
  void fields(Fields& f);
  std::string problem() const;
};

// --- Smoothing -------------------------------------------------------------------------------------------------------

/// What a mixture layer reads and holds.
struct SmoothingLayer {
  torch::Tensor act_max;      ///< [E, h]: max |x_c| over the tokens of each expert, 0 without any
  torch::Tensor router_max;   ///< [h]: the same over all tokens; undefined: the maximum over experts
  torch::Tensor router;       ///< [E, h]
  torch::Tensor gate, up;     ///< [E, d, h]
  torch::Tensor tokens;       ///< [E] int64, for `frequency`
  torch::Tensor router_prob;  ///< [E]: mean probability, for `router`
  torch::Tensor shared_gate,
      shared_up;  ///< [d', h] of a shared expert, whose own vector joins by maximum; or undefined
};
/// s [h] = max(1e-5, A^alpha / w^(1 - alpha)) with A and the columns' maxima w at least 1e-5, for matrices [.., h] that
/// read one input; A [h].
torch::Tensor smoothing_vector(const torch::Tensor& act_max, const std::vector<torch::Tensor>& matrices, double alpha);
/// One vector [h] for a mixture layer. Error: alpha outside (0, 1), numbers that are not finite, an unknown aggregate,
/// no tokens at all for `frequency`.
torch::Tensor smoothing_scale(const SmoothingLayer& layer, double alpha, const std::string& aggregate,
                              bool with_router = false);

/// In place: what writes an input (weight and bias of a norm, [h]) over s, what reads it [.., h] times s.
void fold_smoothing(const torch::Tensor& s, const std::vector<torch::Tensor>& writers,
                    const std::vector<torch::Tensor>& readers);

/// Per channel of what a down projection reads: extremes, exponentially averaged over samples (the first taken whole).
struct ChannelExtremes {
  torch::Tensor high, low;           ///< [d]
  void add(const torch::Tensor& x);  ///< [n, d]
};
/// What outlier channels are divided by [d] (1 for the others): rows of up, while columns of down are multiplied.
torch::Tensor outlier_scale(const torch::Tensor& high, const torch::Tensor& low, double ratio = 0.65,
                            double smooth_rate = 0.7);

// --- Rotation and permutation ----------------------------------------------------------------------------------------

/// x [n, h] B(R): every block of b channels times R [b, b] from the right. Error: b does not divide h.
torch::Tensor rotate_blocks(const torch::Tensor& x, const torch::Tensor& rotation);
/// Orthogonal [b, b] f64, the first row flat (1 / sqrt b), else random from the seed.
torch::Tensor flat_rotation(int64_t block, uint64_t seed);
/// R [b, b] f64 found greedily on x [n, h]: of the products of `steps` swapped flat rotations, each for the coordinate
/// of the largest |x|, the one after which max - min over all of x is smallest; the identity if none makes it smaller.
torch::Tensor greedy_rotation(const torch::Tensor& x, int64_t block, int64_t steps, uint64_t seed);
/// [h] int64: new position j takes channel perm[j]; channels by falling max |x_c| dealt to blocks of b in snake order.
torch::Tensor zigzag_permutation(const torch::Tensor& x, int64_t block);

/// R1, then the permutation, then R2; undefined: the identity.
struct Rotation {
  torch::Tensor first;  ///< [b, b]
  torch::Tensor perm;   ///< [h] int64
  torch::Tensor second;
  /// rows [n, h] -> the same rotated: inputs and matrices [out, h] alike, so that products stay.
  torch::Tensor apply(const torch::Tensor& x) const;
  torch::Tensor undo(const torch::Tensor& x) const;
};
/// Calibrated on x [n, h] of one set of matrices that read it. Error: b does not divide h, naming a divisor that would
/// do.
Rotation find_rotation(const torch::Tensor& x, int64_t block, int64_t steps, uint64_t seed);
/// The same with R1 and R2 given.
Rotation rotation_by(const torch::Tensor& x, const torch::Tensor& first, const torch::Tensor& second);

// --- Quantizers ------------------------------------------------------------------------------------------------------

/// Asymmetric, a row at a time: S = clamp((max - min) / (2^n - 1), 1e-5, 1e4), Z = round(-min / S), codes q = clamp(
/// round(w / S) + Z, 0, 2^n - 1), value (q - Z) S.
struct QuantizedRows {
  torch::Tensor values;              ///< [out, in], dequantized
  torch::Tensor scale, zero, ratio;  ///< [out, 1]; ratio: what both extremes were multiplied by
  torch::Tensor codes;               ///< [out, in]: q, in the type of the values
};
/// Extremes times `ratio`. `clamp_zero`: Z in 0 ... 2^n - 1 too. Error: bits outside 2 to 16.
QuantizedRows quantize_rows(const torch::Tensor& w, int64_t bits, double ratio, bool clamp_zero = false);
/// Of the ratios 0.35 + 0.0065 j, j = 0 ... 100, for every row that with the smallest squared error (with clamped Z);
/// the smallest ratio wins ties.
QuantizedRows search_rows(const torch::Tensor& w, int64_t bits);
/// By method mse (search) or minmax (`swc`).
QuantizedRows quantize_weight(const torch::Tensor& w, int64_t bits, const std::string& method, double swc);
/// Per token, extremes times `lac`: x [n, h] -> dequantized.
torch::Tensor quantize_activations(const torch::Tensor& x, int64_t bits, double lac);

/// A router [E, h] whose clipping keeps what it says of x [T, h]: loss kl (one ratio for all rows), mse+kl or mse (one
/// a row). `overlap`: mean share of the top_k that it still chooses.
struct RouterQuantization : QuantizedRows {
  double kl = 0;  ///< of the result
  double overlap = 0;
};
RouterQuantization calibrate_router(const torch::Tensor& router, const torch::Tensor& x, int64_t bits, int64_t top_k,
                                    const std::string& loss, double kl_ratio);

// --- Balance ---------------------------------------------------------------------------------------------------------

/// Calibration tokens of every expert: whole samples until it has `cap`, cut to that.
struct BalancedTokens {
  int64_t cap = 0;
  torch::Tensor index;     ///< [E, cap] int64: sample * T + position, -1 padding
  torch::Tensor count;     ///< [E] int64
  torch::Tensor fallback;  ///< [E] uint8: 1 for an expert without a token
};
/// cap = int(k / E * seq_length * ratio).
int64_t balance_cap(int64_t experts, int64_t top_k, int64_t seq_length, double ratio);
/// selected [samples, T, k] int64 (-1: unused slot).
BalancedTokens balance_tokens(const torch::Tensor& selected, int64_t experts, int64_t cap);

}  // namespace moiety
