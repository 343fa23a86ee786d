#pragma once
// Elements of f32 and bf16 (as its bits) alike, for tests over both.
#include <cstdint>

#include "moiety/kernels/half.h"

namespace moiety {

inline float value(float x) {
  return x;
}
inline float value(uint16_t x) {
  return bf16_to_float(x);
}
inline void set(float& to, float x) {
  to = x;
}
inline void set(uint16_t& to, float x) {
  to = float_to_bf16(x);
}

}  // namespace moiety
