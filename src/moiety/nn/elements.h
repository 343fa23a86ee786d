#pragma once
// Tensors as kernels see them: f32 as it is, bf16 as its bits.
#include <torch/types.h>

#include <cstdint>
#include <type_traits>

namespace moiety {

template <class T>
using Bits = std::conditional_t<std::is_same_v<T, at::BFloat16>, uint16_t, T>;

template <class T>
Bits<T>* bits(const torch::Tensor& t) {
  return reinterpret_cast<Bits<T>*>(t.data_ptr<T>());
}

/// Whether kernels may read a tensor as it lies: f32, in one piece, in the processor's memory.
inline bool plain_f32(const torch::Tensor& t) {
  return t.is_cpu() && t.scalar_type() == torch::kFloat32 && t.is_contiguous();
}

}  // namespace moiety
