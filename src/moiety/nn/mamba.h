#pragma once
// Mamba's layer in the place of attention: a gated causal convolution and a selective state space (Gu and Dao 2023,
// arXiv 2312.00752). Names, sizes and initialisation are those of transformers' MambaMixer.
#include <torch/types.h>

#include <vector>

#include "moiety/nn/attention.h"
#include "moiety/nn/linear.h"

namespace moiety {

/// (h, z) = in_proj x; h = silu(conv(h)); (dt, b, c) = x_proj h; y = scan(h, softplus(dt_proj dt), -exp(A_log), b, c);
/// out_proj((y + D h) silu(z)). Convolution and scan compute in f32.
class Mamba : public AttentionBase {
 public:
  struct Parts {
    Linear in{nullptr};             ///< in_proj [2 inner, d]
    Linear x{nullptr};              ///< x_proj [rank + 2 states, inner]
    Linear dt{nullptr};             ///< dt_proj [inner, rank] with a bias
    Linear out{nullptr};            ///< out_proj [d, inner]
    torch::Tensor conv, conv_bias;  ///< conv1d [inner, 1, kernel], [inner] or undefined
    torch::Tensor a_log, skip;      ///< A_log [inner, states], D [inner]
  };
  /// Error: parts whose sizes do not go together.
  explicit Mamba(Parts parts);

  /// Padding, on any side, changes neither convolution nor state, and gets 0 of both. A packed sequence begins anew.
  /// With a cache its slot holds the last inputs of the convolution [B, kernel - 1, inner] and the state [B, states,
  /// inner].
  torch::Tensor forward(const torch::Tensor& x, const AttentionContext& context, Pass& pass) override;
  std::vector<NamedMatrix> matrices() const override;

  Parts parts;

 private:
  int64_t inner_, rank_, states_, kernel_;
};

}  // namespace moiety
