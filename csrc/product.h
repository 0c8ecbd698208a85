// bfloat16 products A B of packed operands with float32 sums: by vectors (AVX512_BF16), or on
// machines that have them by the tiles of AMX, which multiply several times as fast.
#pragma once

#if defined(__x86_64__)
#include <atomic>

#include "packed.h"

#define ROOTFREE_AMX \
  __attribute__((    \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")))

namespace rootfree_fused {

constexpr int64_t depth_at_once = 256;  // two panels of either side fill 32 KiB

// vdpbf16ps multiplies pairs: B is read by whole vectors and A lane by lane.
// C (8 x 16 vectors) = A B, or C + A B.
template <int vectors>
ROOTFREE_BF16 inline void multiply_block(const uint32_t* a, const uint32_t* b, int64_t panel_size,
                                         int64_t pairs, float* c, bool add) {
  __m512 sums[8][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    for (int v = 0; v < vectors; ++v) {
      sums[i][v] = add ? _mm512_load_ps(c + i * tile_size + v * lanes) : _mm512_setzero_ps();
    }
  }
  for (; pairs > 0; pairs -= lanes, a += pairs_per_block) {
    const int64_t here = std::min(lanes, pairs);
#pragma GCC unroll 2
    for (int64_t k = 0; k < here; ++k, b += lanes) {
      __m512bh right[vectors];
      for (int v = 0; v < vectors; ++v) {
        right[v] = (__m512bh)_mm512_load_si512(b + v * panel_size);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const auto left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * lanes + k]));
        for (int v = 0; v < vectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    for (int v = 0; v < vectors; ++v) _mm512_store_ps(c + i * tile_size + v * lanes, sums[i][v]);
  }
}

ROOTFREE_BF16 inline void multiply_vectors(Tile& tile, const Left& a, const Right& b, bool add,
                                           bool symmetric) {
  const int64_t panels = ceil_div(tile.columns, lanes), blocks = 2 * ceil_div(tile.rows, lanes);
  const bool lower = symmetric && tile.row == tile.column;
  for (int64_t first = 0; first < a.depth; first += depth_at_once, add = true) {
    const int64_t pairs = ceil_div(std::min(depth_at_once, a.depth - first), 2);
    for (int64_t j = 0; j < panels; j += 2) {
      const uint32_t* right = b.at(first, tile.column + j * lanes);
      for (int64_t i = lower ? 2 * j : 0; i < blocks; ++i) {
        const uint32_t* left = a.at(tile.row + i / 2 * lanes, first) + i % 2 * 8 * lanes;
        float* out = &tile.values[i * 8][j * lanes];
        const auto body = j + 1 < panels ? multiply_block<2> : multiply_block<1>;
        body(left, right, b.panel_size, pairs, out, add);
      }
    }
  }
}

// AMX: C (16 x 16) += A B for a block of either operand.

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

// C (16 rows x 16 columns) = A B or C + A B for `rows` panels of A and `columns` of B, of `count`
// blocks each.
template <int rows, int columns>
ROOTFREE_AMX inline void multiply_blocks(const uint32_t* a, int64_t a_panel, const uint32_t* b,
                                         int64_t b_panel, int64_t count, float* c, bool add) {
  constexpr int64_t c_row = tile_size * sizeof(float), below = lanes * tile_size;
  if (add) {
    _tile_loadd(0, c, c_row);
    if constexpr (columns > 1) _tile_loadd(1, c + lanes, c_row);
    if constexpr (rows > 1) _tile_loadd(2, c + below, c_row);
    if constexpr (rows > 1 && columns > 1) _tile_loadd(3, c + below + lanes, c_row);
  } else {
    _tile_zero(0);
    if constexpr (columns > 1) _tile_zero(1);
    if constexpr (rows > 1) _tile_zero(2);
    if constexpr (rows > 1 && columns > 1) _tile_zero(3);
  }
  for (; count > 0; --count, a += pairs_per_block, b += pairs_per_block) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns > 1) {
      _tile_loadd(7, b + b_panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(5, a + a_panel, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if constexpr (columns > 1) _tile_stored(1, c + lanes, c_row);
  if constexpr (rows > 1) _tile_stored(2, c + below, c_row);
  if constexpr (rows > 1 && columns > 1) _tile_stored(3, c + below + lanes, c_row);
}

ROOTFREE_AMX inline void multiply_amx(Tile& tile, const Left& a, const Right& b, bool add,
                                      bool symmetric) {
  const int64_t columns = ceil_div(tile.columns, lanes), rows = ceil_div(tile.rows, lanes);
  const bool lower = symmetric && tile.row == tile.column;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // tile loads do not say that they read
  for (int64_t first = 0; first < a.depth; first += depth_at_once, add = true) {
    const int64_t count = ceil_div(std::min(depth_at_once, a.depth - first), block_depth);
    for (int64_t j = 0; j < columns; j += 2) {
      for (int64_t i = lower ? j : 0; i < rows; i += 2) {
        const bool wide = j + 1 < columns;
        const auto body = i + 1 < rows ? (wide ? multiply_blocks<2, 2> : multiply_blocks<2, 1>)
                                       : (wide ? multiply_blocks<1, 2> : multiply_blocks<1, 1>);
        body(a.at(tile.row + i * lanes, first), a.panel_size,
             b.at(first, tile.column + j * lanes), b.panel_size, count,
             &tile.values[i * lanes][j * lanes], add);
      }
    }
  }
}

// tile = A B, or tile + A B; of a tile on the diagonal of a symmetric product only what `mirror`
// needs.
inline void multiply(Tile& tile, const Left& a, const Right& b, bool add = false,
                     bool symmetric = false) {
  const auto body = isa_in_use() == AMX ? multiply_amx : multiply_vectors;
  body(tile, a, b, add, symmetric);
}

// tile = X X^T, or tile + X X^T, as above.
inline void multiply(Tile& tile, const Gram& x, bool add = false) {
  multiply(tile, x.x, x.x_transposed, add, true);
}

}  // namespace rootfree_fused
#endif
