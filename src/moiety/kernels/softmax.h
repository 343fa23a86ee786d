#pragma once
// The elementwise work of attention between its matrix products, row by row of a block of scores. Elements are f32, or
// bf16 as its bits; sums and intermediate values are f32.
#include <cstdint>

namespace moiety {

/// How n products of a query with keys become logits: z = scale * score, then softcap * tanh(z / softcap) unless that
/// is 0; -infinity where `seen` [n], unless null, is false.
struct Logits {
  int64_t n;
  float scale;
  float softcap;
  const bool* seen;
};

struct SoftmaxSums {
  float log_sum;  ///< log(sum of e^z + e^sink); +infinity where nothing is seen, so that e^(z - log_sum) is 0
  float factor;   ///< what e^(z - largest) is multiplied with to be a probability; 0 where nothing is seen
};

/// to = e^(z - largest), not yet probabilities; `sink` is a further logit, -infinity for none. Overwrites `scores`,
/// which `to` may be.
SoftmaxSums softmax_row(const Logits& logits, float* scores, float sink, float* to);
SoftmaxSums softmax_row(const Logits& logits, float* scores, float sink, uint16_t* to);

/// p = e^(z - log_sum), and for dp, the gradients of p, those of the scores: ds = p (dp - delta) dz/dscore, delta being
/// the sum of p * dp. p may be `scores`, ds may be `dp`. With a null dp only p.
void softmax_backward(const Logits& logits, const float* scores, const float* dp, float log_sum, float delta, float* p,
                      float* ds);
void softmax_backward(const Logits& logits, const float* scores, const float* dp, float log_sum, float delta,
                      uint16_t* p, uint16_t* ds);

/// The sum of a * b.
float row_dot(const float* a, const float* b, int64_t n);
float row_dot(const uint16_t* a, const uint16_t* b, int64_t n);

/// out = factor * x; may be in place.
void scale_row(const float* x, float factor, float* out, int64_t n);
void scale_row(const float* x, float factor, uint16_t* out, int64_t n);

}  // namespace moiety
