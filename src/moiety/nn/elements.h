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

}  // namespace moiety
