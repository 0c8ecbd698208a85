// Weights and states in fewer bytes; see rootfree_fused/reference/formats.py, which these follow to
// the bit. Each format has `decode` to float32 and `encode` from it, of the elements of a block.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "isa.h"

namespace rootfree_fused {

using c10::BFloat16;

constexpr int64_t block_size = 256;

constexpr uint32_t infinity_bits = 0x7f800000, nan_bits = 0x7fc00000;

ROOTFREE_INLINE uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
ROOTFREE_INLINE uint32_t magnitude_of(float x) { return bits_of(x) & 0x7fffffff; }

// Any NaN is the one that formats have. By a mask: a choice of a constant makes the compiler follow
// it through all that comes after.
ROOTFREE_INLINE uint32_t with_one_nan(uint32_t bits) {
  const uint32_t is_nan = (bits & 0x7fffffff) > infinity_bits ? ~0u : 0;
  return (bits & ~is_nan) | (nan_bits & is_nan);
}

ROOTFREE_INLINE uint32_t largest_magnitude(int64_t count, const float* values) {
  // Signed: AVX2 has that maximum, too, and the baseline makes it of a comparison.
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t m = magnitude_of(values[i]);
    largest = largest < m ? m : largest;
  }
  return largest;
}

// Random numbers ----------------------------------------------------------------------------------

// But for the last step of it, which leaves the upper 16 bits as they are.
ROOTFREE_INLINE uint32_t mix_upper(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  return (x ^ (x >> 15)) * 0x846ca68b;
}
ROOTFREE_INLINE uint32_t mix(uint32_t x) {
  x = mix_upper(x);
  return x ^ (x >> 16);
}

// The numbers of a stream at a step. That of an element is `mix` of its counter ^ key; from one
// element to the next the counter grows by `stride`.
struct Random {
  static constexpr uint32_t stride = 0x9e3779b1;
  uint32_t key, counter;  // that of element 0

  Random from(int64_t element) const {
    return {key, counter + static_cast<uint32_t>(element) * stride};
  }
};

inline Random random_of(uint32_t seed, uint32_t step, uint32_t stream, uint32_t first) {
  return {mix(seed ^ step * 0x9e3779b9) ^ mix(stream * 0x85ebca6b + 1), first * Random::stride};
}

// What is stored of elements that follow each other, at most a block of them, and their values.
struct Block {
  float* values;
  char *stored, *beside;  // its codes; the scale of the block, or the residuals of weights
  Random random;
};

// Two parts of a float32 --------------------------------------------------------------------------

ROOTFREE_INLINE float join(BFloat16 high, int16_t residual) {
  return std::bit_cast<float>((uint32_t(high.x) << 16) + uint32_t(int32_t(residual)));
}

// A bfloat16 weight and its residual: int16 keeps every bit, int8 those of 16 significant bits.
template <class Residual>
struct TwoParts {
  static constexpr int shift = 16 - 8 * sizeof(Residual);

  static ROOTFREE_INLINE void decode(int64_t count, Block block) {
    const auto* high = reinterpret_cast<const BFloat16*>(block.stored);
    const auto* residuals = reinterpret_cast<const Residual*>(block.beside);
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      const int16_t residual = residuals[i] * (1 << shift);
      // Below a zero that someone else has written, what is left does not count.
      const bool below_zero = (high[i].x & 0x7fff) == 0 && residual < 0;
      block.values[i] = join(high[i], below_zero ? 0 : residual);
    }
  }
  static ROOTFREE_INLINE void encode(int64_t count, Block block) {
    auto* high = reinterpret_cast<BFloat16*>(block.stored);
    auto* residuals = reinterpret_cast<Residual*>(block.beside);
    constexpr uint32_t half = (1u << shift) >> 1;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = with_one_nan(bits_of(block.values[i])) + half;
      high[i].x = (bits + 0x8000) >> 16;
      residuals[i] = bits >> shift;  // less `high`, to the bits that are kept
    }
  }
};

// One part ----------------------------------------------------------------------------------------

// To nearest.
template <class T>
struct Nearest {
  static ROOTFREE_INLINE void decode(int64_t count, Block block) {
    const auto* numbers = reinterpret_cast<const T*>(block.stored);
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) block.values[i] = numbers[i];
  }
  static ROOTFREE_INLINE void encode(int64_t count, Block block) {
    auto* numbers = reinterpret_cast<T*>(block.stored);
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) numbers[i] = block.values[i];
  }
};

// bfloat16, stochastically; no finite number becomes infinite.
struct Stochastic : Nearest<BFloat16> {
  static ROOTFREE_INLINE void encode(int64_t count, Block block) {
    auto* numbers = reinterpret_cast<uint16_t*>(block.stored);
    constexpr uint32_t largest = 0x7f7f0000;  // from which on nothing is rounded up
    uint32_t counter = block.random.counter;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i, counter += Random::stride) {
      const uint32_t rounding = mix_upper(counter ^ block.random.key) >> 16;
      const uint32_t added = magnitude_of(block.values[i]) < largest ? rounding : 0;
      numbers[i] = (with_one_nan(bits_of(block.values[i])) + added) >> 16;
    }
  }
};

// Parts of a scale ------------------------------------------------------------------------------

// Of formats with a scale the `Encoder` of a block writes that, and gives the code of an element.
template <class Format>
ROOTFREE_INLINE void encode_scaled(int64_t count, Block block) {
  const typename Format::Encoder encoder(count, block);
  if (encoder.zero) {
    std::fill_n(block.stored, count, 0);
    return;
  }
  uint32_t counter = block.random.counter;
  ROOTFREE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i, counter += Random::stride) {
    block.stored[i] = encoder(block.values[i], mix(counter ^ block.random.key));
  }
}

// int8: the sign, and the root of |x| over the largest of the block, stochastically.
struct S8 {
  static constexpr float levels = 127 * 127, inverse_levels = 1.0 / (127 * 127);
  static constexpr float least_scale = 0x1p-100f;  // below it a block is zero

  static ROOTFREE_INLINE void decode(int64_t count, Block block) {
    const auto* codes = reinterpret_cast<const int8_t*>(block.stored);
    const float scale = *reinterpret_cast<const float*>(block.beside);
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      const float level = codes[i];
      block.values[i] = level * std::abs(level) * inverse_levels * scale;
    }
  }
  struct Encoder {
    float unit;
    bool zero;  // all codes are

    ROOTFREE_INLINE Encoder(int64_t count, Block block) {
      const uint32_t largest = largest_magnitude(count, block.values);
      float scale = std::bit_cast<float>(largest);
      if (scale < least_scale) scale = 0;
      if (largest >= infinity_bits) scale = std::bit_cast<float>(nan_bits);
      *reinterpret_cast<float*>(block.beside) = scale;
      zero = !(scale > 0);
      unit = levels / scale;
    }
    ROOTFREE_INLINE int8_t operator()(float value, uint32_t random) const {
      const float level = std::abs(value) * unit;
      const int32_t k = std::sqrt(level), more = random >> 16;
      const int32_t between = (k * k << 16) + more * (2 * k + 1);  // k^2 and (k + 1)^2
      const int32_t up = between < static_cast<int32_t>(level * 0x1p16f) ? k + 1 : k;
      const int32_t code = up < 127 ? up : 127;
      return value < 0 ? -code : code;
    }
  };
  static ROOTFREE_INLINE void encode(int64_t count, Block block) {
    encode_scaled<S8>(count, block);
  }
};

// uint8: 5 bits of exponent and 3 of mantissa under the power of two of the block, stochastically;
// the least level is not zero.
struct E5M3 {
  static constexpr int32_t depth = 30, least_exponent = 31, not_finite = 255, largest_top = 0x7f7;

  static ROOTFREE_INLINE void decode(int64_t count, Block block) {
    const auto* codes = reinterpret_cast<const uint8_t*>(block.stored);
    const int32_t scale = *reinterpret_cast<const uint8_t*>(block.beside);
    if (scale == 0 || scale == not_finite) {
      std::fill_n(block.values, count, scale ? std::bit_cast<float>(nan_bits) : 0.0f);
      return;
    }
    const uint32_t base = static_cast<uint32_t>(scale - depth) << 3;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < count; ++i) {
      block.values[i] = std::bit_cast<float>((codes[i] + base) << 20);
    }
  }
  struct Encoder {
    int32_t base, bound;
    bool zero;

    ROOTFREE_INLINE Encoder(int64_t count, Block block) {
      const uint32_t largest = largest_magnitude(count, block.values);
      int32_t scale = largest >> 23;
      if (scale < least_exponent) scale = least_exponent;
      if (largest == 0) scale = 0;
      if (largest >= infinity_bits) scale = not_finite;
      *reinterpret_cast<uint8_t*>(block.beside) = scale;
      zero = scale == 0 || scale == not_finite;
      base = (scale - depth) * 8;
      bound = largest_top - base;
    }
    ROOTFREE_INLINE uint8_t operator()(float value, uint32_t random) const {
      const uint32_t top = (magnitude_of(value) + (random >> 12)) >> 20;
      const int32_t code = static_cast<int32_t>(top) - base;
      const int32_t bounded = code < bound ? code : bound;
      return bounded > 0 ? bounded : 0;
    }
  };
  static ROOTFREE_INLINE void encode(int64_t count, Block block) {
    encode_scaled<E5M3>(count, block);
  }
};

// Blocks of such states of the same elements: while roots are taken, random numbers are made.
template <class Format0, class Format1>
ROOTFREE_INLINE void encode_both(int64_t count, Block block0, Block block1) {
  const typename Format0::Encoder encoder0(count, block0);
  const typename Format1::Encoder encoder1(count, block1);
  if (encoder0.zero || encoder1.zero) {
    Format0::encode(count, block0);
    Format1::encode(count, block1);
    return;
  }
  uint32_t counter = block0.random.counter;  // of both
  ROOTFREE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i, counter += Random::stride) {
    block0.stored[i] = encoder0(block0.values[i], mix(counter ^ block0.random.key));
    block1.stored[i] = encoder1(block1.values[i], mix(counter ^ block1.random.key));
  }
}

}  // namespace rootfree_fused
