#pragma once
// Which instruction set the kernels use, chosen once at run time.
#include <string_view>

namespace moiety {

enum class Isa {
  Portable,  ///< plain C++
  Avx2,      ///< AVX2, FMA, F16C
  Avx512,    ///< AVX-512 F, BW, VL, DQ, VNNI, BF16
};

/// The best set that this machine has. The environment variable MOIETY_ISA (portable, avx2, avx512) lowers it.
Isa best_isa();
/// The set in use: best_isa() unless set_isa() changed it.
Isa isa();
/// Chooses a set for the whole process (tests and benchmarks). Throws Error when the machine lacks it.
void set_isa(Isa value);
/// Whether products of bf16 matrices are about as fast as those of f32. On x86 torch's need AVX-512; without it they
/// take more than ten times as long. Other processors: unknown, true.
bool has_fast_bf16_products();
std::string_view isa_name(Isa value);

}  // namespace moiety
