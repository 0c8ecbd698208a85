// How the operands of bfloat16 products lie in memory, and the tiles of 64 x 64 of the results.
//
// A packed matrix lies in panels of 16 columns. A panel has one vector for each pair of rows, whose
// i-th 32-bit lane holds rows 2k and 2k+1 of its column i; beyond the edges lie zeros.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "isa.h"

#define ROOTFREE_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))

#if !defined(__clang__)  // g++ 12 takes the undefined lanes of its own intrinsics for a mistake
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace rootfree_fused {

constexpr int64_t lanes = 16, tile_size = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Packed {
  uint32_t* data;
  int64_t pairs;

  static constexpr int64_t size(int64_t rows, int64_t columns) {
    return ceil_div(rows, 2) * ceil_div(columns, lanes) * lanes;
  }
  uint32_t* at(int64_t pair, int64_t panel) const { return data + (panel * pairs + pair) * lanes; }
};

// A tile of a product, at (row, column) of it. Whole vectors are written, so that what lies beyond
// the edges is zero as in the operands.
struct Tile {
  int64_t row, column, rows, columns;
  alignas(64) float values[tile_size][tile_size];

  Tile(int64_t first_row, int64_t first_column, int64_t total_rows, int64_t total_columns)
      : row(first_row),
        column(first_column),
        rows(std::min(tile_size, total_rows - row)),
        columns(std::min(tile_size, total_columns - column)) {}
};

// Transposes 16 x 16 lanes of 32 bits.
ROOTFREE_BF16 inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// to[j][i] = from[i][j] for blocks of 16 x 16.
ROOTFREE_BF16 inline void transpose_block(const float* from, float* to) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(from + i * tile_size);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * tile_size, r[i]);
}

ROOTFREE_BF16 inline Tile transposed(const Tile& tile) {
  Tile result(tile.column, tile.row, tile.column + tile.columns, tile.row + tile.rows);
  for (int64_t i = 0; i < tile.rows; i += lanes) {
    for (int64_t j = 0; j < tile.columns; j += lanes) {
      transpose_block(&tile.values[i][j], &result.values[j][i]);
    }
  }
  return result;
}

// Completes a tile on the diagonal, of which `multiply` skips the blocks above the diagonal. Blocks
// on it are whole, and symmetric to the bit: x y = y x, and the sums have one order.
ROOTFREE_BF16 inline void mirror(Tile& tile) {
  for (int64_t i = 0; i < tile.rows; i += lanes) {
    for (int64_t j = 0; j < i; j += lanes) transpose_block(&tile.values[i][j], &tile.values[j][i]);
  }
}

// The first `count` of 32 numbers in bfloat16, then zeros.
ROOTFREE_BF16 ROOTFREE_INLINE __m512i load_bf16(const c10::BFloat16* x, int64_t count) {
  return _mm512_maskz_loadu_epi16(_cvtu32_mask32(count >= 32 ? ~0u : (1u << count) - 1), x);
}
ROOTFREE_BF16 ROOTFREE_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= lanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}
ROOTFREE_BF16 ROOTFREE_INLINE __m512i load_bf16(const float* x, int64_t count) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first_lanes(count - lanes), x + lanes),
                                      _mm512_maskz_loadu_ps(first_lanes(count), x));
}
ROOTFREE_BF16 ROOTFREE_INLINE __m512i load_bf16(const c10::Half* x, int64_t count) {
  const __m256i low = _mm256_maskz_loadu_epi16(first_lanes(count), x);
  const __m256i high = _mm256_maskz_loadu_epi16(first_lanes(count - lanes), x + lanes);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(high), _mm512_cvtph_ps(low));
}

// Packs `rows` x `columns` numbers of rows `stride` apart, as rows from `row` (even) and columns from
// `column` (a multiple of 32) on.
template <class T>
ROOTFREE_BF16 void pack(const Packed& to, int64_t row, int64_t column, const T* from,
                        int64_t stride, int64_t rows, int64_t columns) {
  const __m512i interleave_low = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
      3, 34, 2, 33, 1, 32, 0);
  const __m512i interleave_high = _mm512_add_epi16(interleave_low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < columns; j += 32) {
    const int64_t count = columns - j;
    for (int64_t i = 0; i < rows; i += 2) {
      const T* source = from + i * stride + j;
      const __m512i even = load_bf16(source, count);
      const __m512i odd = load_bf16(source + stride, i + 1 < rows ? count : 0);
      uint32_t* out = to.at((row + i) / 2, (column + j) / lanes);
      _mm512_store_si512(out, _mm512_permutex2var_epi16(even, interleave_low, odd));
      if (count <= lanes) continue;
      _mm512_store_si512(out + to.pairs * lanes,
                         _mm512_permutex2var_epi16(even, interleave_high, odd));
    }
  }
}

// Packs the transpose of `rows` x `columns` numbers, as columns from `column` and rows from `row` on,
// both multiples of 32.
template <class T>
ROOTFREE_BF16 void pack_transposed(const Packed& to, int64_t row, int64_t column, const T* from,
                                   int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < columns; j += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) {
        r[k] = load_bf16(from + (i + k) * stride + j, i + k < rows ? columns - j : 0);
      }
      transpose(r);
      uint32_t* out = to.at((row + j) / 2, (column + i) / lanes);
      const int64_t pairs = std::min<int64_t>(lanes, ceil_div(columns - j, 2));
      for (int64_t k = 0; k < pairs; ++k) _mm512_store_si512(out + k * lanes, r[k]);
    }
  }
}

ROOTFREE_BF16 inline void pack(const Packed& to, const Tile& tile) {
  pack(to, tile.row, tile.column, tile.values[0], tile_size, tile.rows, tile.columns);
}
ROOTFREE_BF16 inline void pack_transposed(const Packed& to, const Tile& tile) {
  pack_transposed(to, tile.column, tile.row, tile.values[0], tile_size, tile.rows, tile.columns);
}

}  // namespace rootfree_fused
#endif
