// How the operands of bfloat16 products A B lie in memory, and the tiles of 64 x 64 of the results.
//
// Pairs of neighbours along the depth (the columns of A, the rows of B) lie together in 32 bits,
// and 16 by 16 pairs in a block: a Left has panels of 16 rows of A, block after block along the
// depth, and in a block a row after the other. A Right has panels of 16 columns of B, and in a
// block a pair of rows after the other. Blocks are whole; beyond the edges lie zeros.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

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

constexpr int64_t block_depth = 2 * lanes, pairs_per_block = lanes * lanes;

struct Packed {
  uint32_t* data = nullptr;
  int64_t depth = 0, panel_size = 0;

  Packed() = default;
  Packed(uint32_t* memory, int64_t whole_depth)
      : data(memory), depth(whole_depth), panel_size(size(depth, lanes)) {}

  static int64_t size(int64_t depth, int64_t across) {
    return ceil_div(depth, block_depth) * ceil_div(across, lanes) * pairs_per_block;
  }
  // The block at multiples of 32 and 16.
  uint32_t* at(int64_t along, int64_t across) const {
    return data + across / lanes * panel_size + along / block_depth * pairs_per_block;
  }
  // What begins at such multiples, and along the depth is `count` long.
  Packed piece(int64_t along, int64_t across, int64_t count) const {
    Packed result = *this;
    result.data = at(along, across);
    result.depth = count;
    return result;
  }
};
struct Left : Packed {
  uint32_t* at(int64_t row, int64_t column) const { return Packed::at(column, row); }
  Left columns(int64_t first, int64_t count) const { return {piece(first, 0, count)}; }
  Left rows(int64_t first) const { return {piece(0, first, depth)}; }
};
struct Right : Packed {
  Right rows(int64_t first, int64_t count) const { return {piece(first, 0, count)}; }
  Right columns(int64_t first) const { return {piece(0, first, depth)}; }
};

// What X X^T is made of.
struct Gram {
  Left x;
  Right x_transposed;
  // Of X from a row on.
  Gram rows(int64_t first) const { return {x.rows(first), x_transposed.columns(first)}; }
};

// Memory of a square matrix, or of a stack of them as blocks on a diagonal, that some stages of a
// step hold as a left operand and others as a right one: what reads it must name the side by which
// it was packed last.
struct PackedSquare {
  Packed memory;
  Left as_left() const { return {memory}; }
  Right as_right() const { return {memory}; }
  PackedSquare block(int64_t first, int64_t size) const { return {memory.piece(0, first, size)}; }
};

// Numbers of a matrix from (row, column) on, in rows `stride` apart.
template <class T>
struct Submatrix {
  int64_t row, column, rows, columns;
  const T* values;
  int64_t stride;
};

// A tile of a product, at (row, column) of it. Whole vectors are written, so that what lies beyond
// the edges is zero as in the operands.
struct Tile {
  int64_t row, column, rows, columns;
  alignas(64) float values[tile_size][tile_size];

  Tile(int64_t first_row, int64_t first_column, int64_t end_of_rows, int64_t end_of_columns)
      : row(first_row),
        column(first_column),
        rows(std::min(tile_size, end_of_rows - row)),
        columns(std::min(tile_size, end_of_columns - column)) {}
  Submatrix<float> submatrix() const { return {row, column, rows, columns, values[0], tile_size}; }
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

ROOTFREE_BF16 inline void scale(Tile& tile, float by) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (float& value : tile.values[i]) value *= by;
  }
}

// Mirrors what is below the diagonal of a block of 16 x 16 to above it.
ROOTFREE_BF16 inline void mirror_block(float* block) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(block + i * tile_size);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_mask_store_epi32(block + i * tile_size, __mmask16(0xfffe << i), r[i]);
  }
}

// Completes a tile on the diagonal of a symmetric matrix, of which `multiply` skips the blocks above
// the diagonal, so that it is symmetric to the bit.
ROOTFREE_BF16 inline void mirror(Tile& tile) {
  for (int64_t i = 0; i < tile.rows; i += lanes) {
    for (int64_t j = 0; j < i; j += lanes) transpose_block(&tile.values[i][j], &tile.values[j][i]);
    mirror_block(&tile.values[i][i]);
  }
}

ROOTFREE_BF16 ROOTFREE_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= lanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}
// The first `count` of 16 numbers, then zeros.
ROOTFREE_BF16 ROOTFREE_INLINE __m512 load(const float* x, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), x);
}
ROOTFREE_BF16 ROOTFREE_INLINE __m512 load(const c10::Half* x, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), x));
}
// In bfloat16: the first `count` numbers of two vectors of 16, one after the other.
template <class T>
ROOTFREE_BF16 ROOTFREE_INLINE __m512i load_bf16(const T* low, int64_t low_count, const T* high,
                                                int64_t high_count) {
  return (__m512i)_mm512_cvtne2ps_pbh(load(high, high_count), load(low, low_count));
}
ROOTFREE_BF16 ROOTFREE_INLINE __m512i load_bf16(const c10::BFloat16* low, int64_t low_count,
                                                const c10::BFloat16* high, int64_t high_count) {
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first_lanes(low_count), low)),
      _mm256_maskz_loadu_epi16(first_lanes(high_count), high), 1);
}

ROOTFREE_BF16 inline void store(const __m512i (&r)[16], uint32_t* to) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * lanes, r[i]);
}

// A block of a Left, or of a Right transposed: 16 rows of 32 numbers, as they lie. A whole one needs
// no masks.
template <bool whole, class T>
ROOTFREE_BF16 ROOTFREE_INLINE void load_rows(const Submatrix<T>& from, int64_t i, int64_t j,
                                             __m512i (&r)[16]) {
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const T* row = from.values + (i + k) * from.stride + j;
    const int64_t count = whole ? block_depth : i + k < from.rows ? from.columns - j : 0;
    r[k] = load_bf16(row, count, row + lanes, count - lanes);
  }
}
template <class T>
ROOTFREE_BF16 ROOTFREE_INLINE void load_rows(const Submatrix<T>& from, int64_t i, int64_t j,
                                             __m512i (&r)[16]) {
  if (i + lanes <= from.rows && j + block_depth <= from.columns) {
    load_rows<true>(from, i, j, r);
  } else {
    load_rows<false>(from, i, j, r);
  }
}

// A block of a Right, or of a Left transposed: 16 pairs of rows of 16 numbers.
template <bool whole, class T>
ROOTFREE_BF16 ROOTFREE_INLINE void load_pairs(const Submatrix<T>& from, int64_t i, int64_t j,
                                              __m512i (&r)[16]) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const int64_t row = i + 2 * k, count = whole ? lanes : from.columns - j;
    const T* even = from.values + row * from.stride + j;
    const __m512i pair = load_bf16(even, whole || row < from.rows ? count : 0, even + from.stride,
                                   whole || row + 1 < from.rows ? count : 0);
    r[k] = _mm512_permutexvar_epi16(interleave, pair);
  }
}
template <class T>
ROOTFREE_BF16 ROOTFREE_INLINE void load_pairs(const Submatrix<T>& from, int64_t i, int64_t j,
                                              __m512i (&r)[16]) {
  if (i + block_depth <= from.rows && j + lanes <= from.columns) {
    load_pairs<true>(from, i, j, r);
  } else {
    load_pairs<false>(from, i, j, r);
  }
}

// Blocks of rows are those of a Left, blocks of pairs those of a Right, and of the other operand of
// the transposed matrix.
template <bool of_pairs, class Operand, class T>
ROOTFREE_BF16 void pack_blocks(const Operand& to, const Submatrix<T>& from) {
  constexpr bool transposes = of_pairs != std::is_same_v<Operand, Right>;
  constexpr int64_t rows = of_pairs ? block_depth : lanes, columns = of_pairs ? lanes : block_depth;
  for (int64_t i = 0; i < from.rows; i += rows) {
    for (int64_t j = 0; j < from.columns; j += columns) {
      __m512i r[16];
      if constexpr (of_pairs) {
        load_pairs(from, i, j, r);
      } else {
        load_rows(from, i, j, r);
      }
      const int64_t row = from.row + i, column = from.column + j;
      if constexpr (transposes) transpose(r);
      store(r, transposes ? to.at(column, row) : to.at(row, column));
    }
  }
}

template <class Operand, class T>
void pack(const Operand& to, const Submatrix<T>& from) {
  pack_blocks<std::is_same_v<Operand, Right>>(to, from);
}
template <class Operand, class T>
void pack_transposed(const Operand& to, const Submatrix<T>& from) {
  pack_blocks<std::is_same_v<Operand, Left>>(to, from);
}

// Both operands of X X^T: a block is read and rounded once, for either of them.
template <class T>
ROOTFREE_BF16 void pack(const Gram& to, const Submatrix<T>& x) {
  for (int64_t i = 0; i < x.rows; i += lanes) {
    for (int64_t j = 0; j < x.columns; j += block_depth) {
      __m512i r[16];
      load_rows(x, i, j, r);
      store(r, to.x.at(x.row + i, x.column + j));
      transpose(r);
      store(r, to.x_transposed.at(x.column + j, x.row + i));
    }
  }
}
// X being the transpose of what is packed.
template <class T>
ROOTFREE_BF16 void pack_transposed(const Gram& to, const Submatrix<T>& x) {
  for (int64_t i = 0; i < x.rows; i += block_depth) {
    for (int64_t j = 0; j < x.columns; j += lanes) {
      __m512i r[16];
      load_pairs(x, i, j, r);
      store(r, to.x_transposed.at(x.row + i, x.column + j));
      transpose(r);
      store(r, to.x.at(x.column + j, x.row + i));
    }
  }
}

}  // namespace rootfree_fused
#endif
