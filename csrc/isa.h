// Instruction sets. A loop is compiled once for each, and the best that the machine has is chosen
// when it runs: a wheel built on one machine works on another.
#pragma once

#include <atomic>

#define ROOTFREE_INLINE inline __attribute__((always_inline))

// Before a loop in which no iteration reads what another one writes.
#if defined(__clang__)
#define ROOTFREE_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define ROOTFREE_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__)
#define ROOTFREE_AVX2 __attribute__((target("avx2,fma")))
#define ROOTFREE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define ROOTFREE_AVX2
#define ROOTFREE_AVX512
#endif

namespace rootfree_fused {

enum Isa { BASELINE, AVX2, AVX512, ISA_COUNT };

inline constexpr const char* isa_names[ISA_COUNT] = {"baseline", "avx2", "avx512"};

inline bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return isa == BASELINE || (isa == AVX2 && avx2) || (isa == AVX512 && avx512);
#else
  return isa == BASELINE;
#endif
}

// The instruction set in use: the best supported, unless a test chooses another.
inline std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{isa_supported(AVX512) ? AVX512
                              : isa_supported(AVX2) ? AVX2
                                                    : BASELINE};
  return isa;
}

}  // namespace rootfree_fused
