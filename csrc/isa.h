// Instruction sets. A loop is compiled once for each, and the best that the machine has is chosen
// when it runs: a wheel built on one machine works on another.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

enum Isa { BASELINE, AVX2, AVX512, AMX, ISA_COUNT };  // AMX: AVX512 with AMX for products

inline constexpr const char* isa_names[ISA_COUNT] = {"baseline", "avx2", "avx512", "amx"};

inline bool amx_supported() {
#if defined(__x86_64__) && defined(__linux__)
  // By CPUID, since clang 14 to 16 know no name for AMX: bits of EDX in leaf 7.
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  // Linux gives the registers of tiles to processes that ask for them.
  constexpr int request_permission = 0x1023, tile_data = 18;
  return __builtin_cpu_supports("avx512bf16") && edx & amx_tile && edx & amx_bf16 &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return isa == BASELINE || (isa == AVX2 && avx2) || (isa == AVX512 && avx512) ||
         (isa == AMX && avx512 && amx_supported());
#else
  return isa == BASELINE;
#endif
}

// The instruction set in use: the best supported, unless a test chooses another.
inline std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{isa_supported(AMX)      ? AMX
                              : isa_supported(AVX512) ? AVX512
                              : isa_supported(AVX2)   ? AVX2
                                                      : BASELINE};
  return isa;
}

// A function compiled for every instruction set; it is ROOTFREE_INLINE, and so is what it calls.
template <auto function>
struct Compiled;

template <class... Arguments, void (*function)(Arguments...)>
struct Compiled<function> {
  static void baseline(Arguments... arguments) { function(arguments...); }
  ROOTFREE_AVX2 static void avx2(Arguments... arguments) { function(arguments...); }
  ROOTFREE_AVX512 static void avx512(Arguments... arguments) { function(arguments...); }
  // For the one in use.
  static auto current() {
    constexpr decltype(function) all[ISA_COUNT] = {baseline, avx2, avx512, avx512};
    return all[isa_in_use()];
  }
};

}  // namespace rootfree_fused
