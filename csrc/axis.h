// One axis of IF-Shampoo on a matrix: its factor K and momentum m, and what happens to a tile of them
// after the product that it comes from.
#pragma once

#if defined(__x86_64__)
#include <bit>
#include <cmath>

#include "product.h"
#include "update.h"

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
  Left left(int64_t rows, int64_t columns) {
    return {{take<uint32_t>(Packed::size(columns, rows)), columns}};
  }
  Right right(int64_t rows, int64_t columns) {
    return {{take<uint32_t>(Packed::size(rows, columns)), rows}};
  }
  Gram gram(int64_t rows, int64_t columns) { return {left(rows, columns), right(columns, rows)}; }
};

// Limits of the specification: a norm of m stays finite in float32.
constexpr float largest_gradient = 0x1p40f, largest_momentum = 0x1p48f;

constexpr int64_t strip_size = block_depth;  // rows that are packed at once

// One axis of one matrix. With a cached product P = ... K K^T, else P = ... K^T then K.
struct Axis {
  int64_t size, tiles;
  bool on_rows, cached, told;  // told: the gradient is not exactly zero
  BFloat16 *factor, *momentum, *product;
  int16_t* residual;
  // K^T, K and the momentum. After the update `now` is K, in the memory of K^T, which is no longer
  // needed then; without a cached product it is one operand of two, and K^T has the other (`keep`).
  Gram transposed;
  Left left;
  Right packed_momentum;
  Gram now;
  // K K^T, a left operand on rows and a right one on columns, in the memory of the momentum.
  Left left_product;
  Right right_product;
  double *squares, *norms;  // partial sums: over strips of the factor, over tiles of the momentum

  int64_t strips() const { return ceil_div(size, strip_size); }
  int64_t square_tiles() const { return tiles * tiles; }
  int64_t pairs_of_tiles() const { return tiles * (tiles + 1) / 2; }

  void take_scratch(Arena& arena) {
    transposed = arena.gram(size, size);
    left = arena.left(size, size);
    packed_momentum = arena.right(size, size);
    now = {{transposed.x_transposed}, {transposed.x}};
    left_product = {packed_momentum};
    right_product = packed_momentum;
    squares = arena.take<double>(strips());
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

// Packs K after its update: for K K^T, or for what takes the place of a product with it.
template <class T>
void keep(const Axis& axis, const Block<T>& factor) {
  if (axis.cached) {
    pack(axis.now, factor);
  } else if (axis.on_rows) {
    pack_transposed(axis.transposed.x, factor);
    pack(axis.now.x, factor);
  } else {
    pack(axis.transposed.x_transposed, factor);
    pack_transposed(axis.now.x_transposed, factor);
  }
}

// The rows of a strip of a matrix of the axis' size.
inline Block<BFloat16> strip_of(const Axis& axis, const BFloat16* matrix, int64_t strip) {
  const int64_t d = axis.size, row = strip * strip_size;
  return {row, 0, std::min(strip_size, d - row), d, matrix + row * d, d};
}

ROOTFREE_BF16 inline void pack_factor(const Axis& axis, int64_t strip) {
  const Block<BFloat16> factor = strip_of(axis, axis.factor, strip);
  pack(axis.left, factor);
  pack_transposed(axis.transposed, factor);
  const int64_t numel = factor.rows * factor.columns;
  const int16_t* residual = axis.residual + factor.row * factor.columns;
  alignas(64) float columns[tile_size] = {};
  for (int64_t first = 0; first < numel; first += tile_size) {
    const int64_t count = std::min(tile_size, numel - first);
    for (int64_t i = 0; i < count; ++i) {
      const float value = join(factor.values[first + i], residual[first + i]);
      columns[i] += value * value;
    }
  }
  axis.squares[strip] = 0;
  for (float column : columns) axis.squares[strip] += column;
}

ROOTFREE_BF16 inline void write(const Tile& tile, BFloat16* to, int64_t stride) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    BFloat16* row = to + (tile.row + i) * stride + tile.column;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) row[j] = tile.values[i][j];
  }
}

// Writes a tile of a symmetric matrix, and its mirror image.
template <class Operand>
void write_symmetric(const Axis& axis, const Tile& tile, BFloat16* to, const Operand& packed) {
  write(tile, to, axis.size);
  pack(packed, tile.block());
  if (tile.row == tile.column) return;
  const Tile mirrored = transposed(tile);
  write(mirrored, to, axis.size);
  pack(packed, mirrored.block());
}

// m <- m + (1 - factor_momentum) (H - m), H = (scale gram - I) / 2
ROOTFREE_BF16 inline void update_momentum(const Axis& axis, int64_t pair, Tile& gram, double scale,
                                          double decay) {
  const bool diagonal = gram.row == gram.column;
  if (diagonal) mirror(gram);
  const float weight = 1 - decay, half_weight = (1 - decay) / 2, of_gram = half_weight * scale;
  for (int64_t i = 0; i < gram.rows; ++i) {
    const BFloat16* old = axis.momentum + (gram.row + i) * axis.size + gram.column;
    float* values = gram.values[i];
    for (int64_t j = 0; j < gram.columns; ++j) {
      const float m = old[j];
      values[j] = m - weight * m + of_gram * values[j];
    }
    if (diagonal) values[i] -= half_weight;
    for (int64_t j = 0; j < gram.columns; ++j) values[j] = within(values[j], largest_momentum);
  }
  axis.norms[pair] = (diagonal ? 1 : 2) * sum_of_squares(gram);
  write_symmetric(axis, gram, axis.momentum, axis.packed_momentum);
}

// K <- K - factor_lr / max(1, ||m||) K m
ROOTFREE_BF16 inline void update_factor(const Axis& axis, Tile& tile, double factor_lr) {
  const double norm = std::sqrt(sum(axis.norms, axis.pairs_of_tiles()));
  const float step = factor_lr / (norm < 1 ? 1 : norm);  // NaN where the norm is
  multiply(tile, axis.left, axis.packed_momentum);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t offset = (tile.row + i) * axis.size + tile.column;
    BFloat16* high = axis.factor + offset;
    int16_t* residual = axis.residual + offset;
    float* values = tile.values[i];
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) {
      values[j] = join(high[j], residual[j]) - step * values[j];
      split(values[j], high[j], residual[j]);
    }
  }
  keep(axis, tile.block());
}

}  // namespace rootfree_fused
#endif
