#include "moiety/kernels/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>

#include "moiety/base/error.h"

namespace moiety {
namespace {

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows "f16c".
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

Isa detect() {
  Isa found = Isa::Portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    found = Isa::Avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bf16"))
      found = Isa::Avx512;
  }
#endif
  return found;
}

Isa limited() {
  const Isa found = detect();
  const char* wish = std::getenv("MOIETY_ISA");
  if (wish == nullptr || *wish == '\0') return found;
  for (Isa each : {Isa::Portable, Isa::Avx2, Isa::Avx512})
    if (isa_name(each) == wish) return each < found ? each : found;
  fail("MOIETY_ISA is '{}': it must be portable, avx2 or avx512", wish);
}

std::atomic<int> chosen{-1};

}  // namespace

Isa best_isa() {
  static const Isa best = limited();
  return best;
}

Isa isa() {
  const int value = chosen.load(std::memory_order_relaxed);
  return value < 0 ? best_isa() : static_cast<Isa>(value);
}

void set_isa(Isa value) {
  check(value <= best_isa(), "this machine has no {} (the best here is {})", isa_name(value), isa_name(best_isa()));
  chosen.store(static_cast<int>(value), std::memory_order_relaxed);
}

bool has_fast_bf16_products() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return best_isa() > Isa::Avx2 || (std::getenv("MOIETY_ISA") == nullptr && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"));
#else
  return true;
#endif
}

std::string_view isa_name(Isa value) {
  switch (value) {
    case Isa::Avx2:
      return "avx2";
    case Isa::Avx512:
      return "avx512";
    default:
      return "portable";
  }
}

}  // namespace moiety
