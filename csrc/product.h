// bfloat16 products X^T Y of packed operands with float32 sums: by vectors (AVX512_BF16), or on
// machines that have them by the tiles of AMX, which multiply several times as fast.
#pragma once

#if defined(__x86_64__)
#include <atomic>

#include "packed.h"

#define ROOTFREE_AMX \
  __attribute__((            \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")))

namespace rootfree_fused {

constexpr int64_t pairs_at_once = 256;  // a panel of X and two of Y fill an L1 cache of 48 KiB

// vdpbf16ps multiplies pairs: Y is read by whole vectors and X lane by lane.
// C (8 x 16 vectors) = scale A^T B, or C + scale A^T B.
template <int vectors>
ROOTFREE_BF16 inline void multiply_block(const uint32_t* a, const uint32_t* b, int64_t panel_stride,
                                         int64_t pairs, float* c, float scale, bool add) {
  __m512 sums[8][vectors];
#pragma GCC unroll 8
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k, a += lanes, b += lanes) {
    __m512bh right[vectors];
    for (int v = 0; v < vectors; ++v) {
      right[v] = (__m512bh)_mm512_load_si512(b + v * panel_stride);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const auto left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
      for (int v = 0; v < vectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
    }
  }
  const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    for (int v = 0; v < vectors; ++v) {
      float* out = c + i * tile_size + v * lanes;
      const __m512 scaled = _mm512_mul_ps(sums[i][v], factor);
      _mm512_store_ps(out, add ? _mm512_add_ps(_mm512_load_ps(out), scaled) : scaled);
    }
  }
}

ROOTFREE_BF16 inline void multiply_vectors(Tile& tile, float scale, const Packed& x,
                                           const Packed& y, bool add, bool symmetric) {
  const int64_t panels = ceil_div(tile.columns, lanes), blocks = 2 * ceil_div(tile.rows, lanes);
  const bool lower = symmetric && tile.row == tile.column;
  for (int64_t first = 0; first < x.pairs; first += pairs_at_once, add = true) {
    const int64_t pairs = std::min(pairs_at_once, x.pairs - first);
    for (int64_t j = 0; j < panels; j += 2) {
      const uint32_t* right = y.at(first, tile.column / lanes + j);
      for (int64_t i = lower ? 2 * j : 0; i < blocks; ++i) {
        const uint32_t* left = x.at(first, tile.row / lanes + i / 2) + i % 2 * 8;
        float* out = &tile.values[i * 8][j * lanes];
        if (j + 1 < panels) {
          multiply_block<2>(left, right, y.pairs * lanes, pairs, out, scale, add);
        } else {
          multiply_block<1>(left, right, 0, pairs, out, scale, add);
        }
      }
    }
  }
}

// AMX: C (16 x 16) += A B, where a row of A (16 x 16 pairs) belongs to one row of C and a row of B to
// one pair. B is a block of a panel of Y as it lies; A is one of X, its lanes transposed.

// The registers of the calling thread, all eight of 16 rows of 64 bytes, while it multiplies.
class AmxRegisters {
 public:
  ROOTFREE_AMX AmxRegisters() : configured_(isa_in_use() == AMX) {
    struct alignas(64) Layout {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static constexpr Layout layout = {
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (configured_) _tile_loadconfig(&layout);
  }
  ROOTFREE_AMX ~AmxRegisters() {
    if (configured_) _tile_release();
  }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;

 private:
  bool configured_;
};

using AmxBlock = uint32_t[lanes][lanes];

// C (16 rows x 16 columns) = scale A^T B or C + scale A^T B for `rows` x `columns` blocks, of A one
// `left_stride` and of B one `right_stride` after the other, but the last of B from `last`.
template <int rows, int columns>
ROOTFREE_AMX inline void multiply_blocks(const AmxBlock* left, int64_t left_stride,
                                         const uint32_t* right, int64_t right_stride,
                                         const AmxBlock* last, int64_t count, float* c,
                                         float scale, bool add) {
  _tile_zero(0);
  if constexpr (columns > 1) _tile_zero(1);
  if constexpr (rows > 1) _tile_zero(2);
  if constexpr (rows > 1 && columns > 1) _tile_zero(3);
  for (int64_t k = 0; k < count; ++k) {
    const bool at_last = last && k + 1 == count;
    const uint32_t* b = at_last ? last[0][0] : right + k * lanes * lanes;
    _tile_loadd(4, left[k], 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns > 1) {
      _tile_loadd(7, at_last ? last[1][0] : b + right_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(5, left[left_stride + k], 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[rows * lanes][columns * lanes];
  constexpr int64_t row_bytes = columns * 64;
  _tile_stored(0, sums, row_bytes);
  if constexpr (columns > 1) _tile_stored(1, sums[0] + lanes, row_bytes);
  if constexpr (rows > 1) _tile_stored(2, sums[lanes], row_bytes);
  if constexpr (rows > 1 && columns > 1) _tile_stored(3, sums[lanes] + lanes, row_bytes);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows * lanes; ++i) {
    for (int64_t v = 0; v < columns; ++v) {
      float* out = c + i * tile_size + v * lanes;
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(sums[i] + v * lanes), factor);
      _mm512_store_ps(out, add ? _mm512_add_ps(_mm512_load_ps(out), scaled) : scaled);
    }
  }
}

// Transposes the lanes of 16 pairs, of which `count` exist; the others become zeros.
ROOTFREE_AMX inline void transpose_pairs(const uint32_t* from, int64_t count, AmxBlock& to) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = i < count ? _mm512_load_si512(from + i * lanes) : _mm512_setzero_si512();
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to[i], r[i]);
}

ROOTFREE_AMX inline void multiply_amx(Tile& tile, float scale, const Packed& x, const Packed& y,
                                      bool add, bool symmetric) {
  constexpr int64_t blocks_at_once = pairs_at_once / lanes;
  alignas(64) AmxBlock left[tile_size / lanes][blocks_at_once];  // X of this tile: 64 KiB
  alignas(64) AmxBlock last[2];
  const int64_t columns = ceil_div(tile.columns, lanes), rows = ceil_div(tile.rows, lanes);
  const bool lower = symmetric && tile.row == tile.column;
  for (int64_t first = 0; first < x.pairs; first += pairs_at_once, add = true) {
    const int64_t pairs = std::min(pairs_at_once, x.pairs - first);
    const int64_t count = ceil_div(pairs, lanes), rest = pairs % lanes;
    for (int64_t i = 0; i < rows; ++i) {
      const uint32_t* panel = x.at(first, tile.row / lanes + i);
      for (int64_t k = 0; k < count; ++k) {
        transpose_pairs(panel + k * lanes * lanes, pairs - k * lanes, left[i][k]);
      }
    }
    for (int64_t j = 0; j < columns; j += 2) {
      const uint32_t* right = y.at(first, tile.column / lanes + j);
      const int64_t stride = y.pairs * lanes;
      const bool wide = j + 1 < columns;
      if (rest) {  // what follows the last pair of a panel is not zero
        for (int v = 0; v <= wide; ++v) {
          const uint32_t* from = right + v * stride + (count - 1) * lanes * lanes;
          for (int64_t k = 0; k < lanes; ++k) {
            _mm512_store_si512(last[v][k], k < rest ? _mm512_load_si512(from + k * lanes)
                                                    : _mm512_setzero_si512());
          }
        }
      }
      std::atomic_signal_fence(std::memory_order_seq_cst);  // tile loads do not say that they read
      for (int64_t i = lower ? j : 0; i < rows; i += 2) {
        const auto body = i + 1 < rows ? (wide ? multiply_blocks<2, 2> : multiply_blocks<2, 1>)
                                       : (wide ? multiply_blocks<1, 2> : multiply_blocks<1, 1>);
        body(left[i], blocks_at_once, right, stride, rest ? last : nullptr, count,
             &tile.values[i * lanes][j * lanes], scale, add);
      }
    }
  }
}

// tile = scale X^T Y, or tile + scale X^T Y; of a tile on the diagonal of a symmetric product only
// what `mirror` needs.
inline void multiply(Tile& tile, float scale, const Packed& x, const Packed& y, bool add = false,
                     bool symmetric = false) {
  const auto body = isa_in_use() == AMX ? multiply_amx : multiply_vectors;
  body(tile, scale, x, y, add, symmetric);
}

}  // namespace rootfree_fused
#endif
