// One axis of IF-Shampoo on a matrix: its factor K and momentum m, and what happens to a tile of them
// after the product that it comes from.
#pragma once

#if defined(__x86_64__)
#include <bit>
#include <cmath>

#include "product.h"

namespace rootfree_fused {

using c10::BFloat16;

// Hands out aligned pieces of the memory at `base`; without memory it only counts the bytes.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * sizeof(T), 64) * 64;
    return piece;
  }
  Packed packed(int64_t rows, int64_t columns) {
    return {take<uint32_t>(Packed::size(rows, columns)), ceil_div(rows, 2)};
  }
};

// One axis of one matrix. With a cached product P = ... K K^T, else P = ... K^T then K.
struct Axis {
  int64_t size, tiles;
  bool cached;
  BFloat16 *factor, *momentum, *product;
  int16_t* residual;
  // Packed: the factor and its transpose before the update, and after it; K K^T takes the memory of
  // the momentum and the new transpose that of the old factor, which are no longer needed then.
  Packed old, old_transposed, packed_momentum, now, now_transposed, packed_product;
  double *squares, *norms;  // partial sums: over strips of the factor, over tiles of the momentum

  int64_t pairs_of_tiles() const { return tiles * (tiles + 1) / 2; }

  void take_scratch(Arena& arena) {
    old = arena.packed(size, size);
    old_transposed = arena.packed(size, size);
    packed_momentum = arena.packed(size, size);
    now = cached ? Packed{} : arena.packed(size, size);
    now_transposed = old;
    packed_product = packed_momentum;
    squares = arena.take<double>(tiles);
    norms = arena.take<double>(pairs_of_tiles());
  }
};

inline double sum(const double* x, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += x[i];
  return total;
}

ROOTFREE_BF16 inline double sum_of_squares(const Tile& tile) {
  alignas(64) float columns[tile_size] = {};
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t j = 0; j < tile.columns; ++j) columns[j] += tile.values[i][j] * tile.values[i][j];
  }
  double total = 0;
  for (float column : columns) total += column;
  return total;
}

ROOTFREE_INLINE float join(BFloat16 high, int16_t residual) {
  return std::bit_cast<float>((uint32_t(high.x) << 16) + uint32_t(int32_t(residual)));
}

// Leaves the part that products read in `value`.
ROOTFREE_INLINE void split(float& value, BFloat16& high, int16_t& residual) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), rounded = (bits + 0x8000) & 0xffff0000;
  high.x = rounded >> 16;
  residual = bits - rounded;
  value = std::bit_cast<float>(rounded);
}

ROOTFREE_BF16 inline void pack_factor(const Axis& axis, int64_t strip, bool update) {
  const int64_t d = axis.size, row = strip * tile_size, rows = std::min(tile_size, d - row);
  const BFloat16* factor = axis.factor + row * d;
  if (update) {
    pack(axis.old, row, 0, factor, d, rows, d);
    pack_transposed(axis.old_transposed, 0, row, factor, d, rows, d);
    const int16_t* residual = axis.residual + row * d;
    alignas(64) float columns[tile_size] = {};
    for (int64_t first = 0; first < rows * d; first += tile_size) {
      const int64_t count = std::min(tile_size, rows * d - first);
      for (int64_t i = 0; i < count; ++i) {
        const float value = join(factor[first + i], residual[first + i]);
        columns[i] += value * value;
      }
    }
    axis.squares[strip] = 0;
    for (float column : columns) axis.squares[strip] += column;
  } else {
    pack_transposed(axis.now_transposed, 0, row, factor, d, rows, d);
    if (!axis.cached) pack(axis.now, row, 0, factor, d, rows, d);
  }
}

ROOTFREE_BF16 inline void write(const Tile& tile, BFloat16* to, int64_t stride) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    BFloat16* row = to + (tile.row + i) * stride + tile.column;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) row[j] = tile.values[i][j];
  }
}

// Writes a tile of a symmetric matrix, and its mirror image.
ROOTFREE_BF16 inline void write_symmetric(const Axis& axis, const Tile& tile, BFloat16* to,
                                   const Packed& packed) {
  write(tile, to, axis.size);
  pack(packed, tile);
  if (tile.row == tile.column) return;
  const Tile mirrored = transposed(tile);
  write(mirrored, to, axis.size);
  pack(packed, mirrored);
}

// m <- m + (1 - factor_momentum) (H - m), H = (gram - I) / 2
ROOTFREE_BF16 inline void update_momentum(const Axis& axis, int64_t pair, Tile& gram, double decay) {
  const bool diagonal = gram.row == gram.column;
  if (diagonal) {
    mirror(gram);
    for (int64_t i = 0; i < gram.rows; ++i) gram.values[i][i] -= 1;
  }
  const float weight = 1 - decay, half_weight = (1 - decay) / 2;
  for (int64_t i = 0; i < gram.rows; ++i) {
    const BFloat16* old = axis.momentum + (gram.row + i) * axis.size + gram.column;
    float* values = gram.values[i];
    for (int64_t j = 0; j < gram.columns; ++j) {
      const float m = old[j];
      values[j] = m - weight * m + half_weight * values[j];
    }
  }
  axis.norms[pair] = (diagonal ? 1 : 2) * sum_of_squares(gram);
  write_symmetric(axis, gram, axis.momentum, axis.packed_momentum);
}

// K <- K - factor_lr / max(1, ||m||) K m
ROOTFREE_BF16 inline void update_factor(const Axis& axis, Tile& tile, double factor_lr) {
  const double norm = std::sqrt(sum(axis.norms, axis.pairs_of_tiles()));
  const float step = factor_lr / (norm < 1 ? 1 : norm);  // NaN where the norm is
  multiply(tile, step, axis.old_transposed, axis.packed_momentum);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t offset = (tile.row + i) * axis.size + tile.column;
    BFloat16* high = axis.factor + offset;
    int16_t* residual = axis.residual + offset;
    float* values = tile.values[i];
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) {
      values[j] = join(high[j], residual[j]) - values[j];
      split(values[j], high[j], residual[j]);
    }
  }
  pack_transposed(axis.now_transposed, tile);
  if (!axis.cached) pack(axis.now, tile);
}

}  // namespace rootfree_fused
#endif
