// IF-Shampoo's update of the factors. On the rows of a gradient G (d_C x d_K), with B loss terms:
//
//   M  = C^T G K
//   H  = (B / d_K M M^T + damping tr(K^T K) / d_K C^T C - I) / 2
//   m <- m + (1 - factor_momentum) (H - m)
//   C <- C - factor_lr / max(1, ||m||) C m
//
// and on its columns with M^T, the two factors exchanged. A factor is stored as what products read,
// rounded to bfloat16, and the 16 bits of a float32 that remain.
#pragma once

#if defined(__x86_64__)
#include <bit>
#include <cmath>

#include "tasks.h"
#include "update.h"

namespace rootfree_fused {

struct FactorOptions {
  double factor_lr, factor_momentum, damping, batch_size;
};

// A limit of the specification: the norm of m stays finite in float32.
constexpr float largest_momentum = 0x1p48f;

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

// Packs a strip of K before its update and sums its squares.
ROOTFREE_BF16 inline void pack_factor(const Axis& axis, int64_t strip) {
  const Submatrix<BFloat16> factor = strip_of(axis, axis.factor, strip);
  pack(axis.left_factor, factor);
  pack_transposed(axis.transpose_times_factor(), factor);
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
  axis.factor_squares[strip] = 0;
  for (float column : columns) axis.factor_squares[strip] += column;
}

// m <- m + (1 - factor_momentum) (H - m), H = (gram_scale gram - I) / 2, on a tile.
ROOTFREE_BF16 inline void average_momentum(const Axis& axis, int64_t pair, Tile& gram,
                                           double gram_scale, double factor_momentum) {
  const bool diagonal = gram.row == gram.column;
  if (diagonal) mirror(gram);
  const float weight = 1 - factor_momentum, half_weight = (1 - factor_momentum) / 2,
              gram_weight = half_weight * gram_scale;
  for (int64_t i = 0; i < gram.rows; ++i) {
    const BFloat16* old = axis.momentum + (gram.row + i) * axis.size + gram.column;
    float* values = gram.values[i];
    for (int64_t j = 0; j < gram.columns; ++j) {
      const float m = old[j];
      values[j] = m - weight * m + gram_weight * values[j];
    }
    if (diagonal) values[i] -= half_weight;
    for (int64_t j = 0; j < gram.columns; ++j) values[j] = within(values[j], largest_momentum);
  }
  axis.momentum_squares[pair] = (diagonal ? 1 : 2) * sum_of_squares(gram);
  write_symmetric(gram, axis.momentum, axis.size,
                  [&](const auto& part) { pack(axis.momentum_then_product.as_right(), part); });
}

// On a tile of the lower triangle; `transformed` is M, or M^T for the axis of its columns.
inline void update_momentum(const Axis& axis, const Axis& other, const Gram& transformed,
                            int64_t pair, const FactorOptions& options) {
  const double mean_square = sum(other.factor_squares, other.strips()) / other.size;
  const double gram_scale = options.batch_size / other.size;
  Tile gram = triangle_tile(axis, pair);
  multiply(gram, axis.transpose_times_factor());
  scale(gram, options.damping * mean_square / gram_scale);
  multiply(gram, transformed, true);
  average_momentum(axis, pair, gram, gram_scale, options.factor_momentum);
}

// K <- K - factor_lr / max(1, ||m||) K m, on a tile.
ROOTFREE_BF16 inline void update_factor(const Axis& axis, int64_t task, double factor_lr) {
  const double norm = std::sqrt(sum(axis.momentum_squares, axis.pairs_of_tiles()));
  const float step = factor_lr / (norm < 1 ? 1 : norm);  // NaN where the norm is
  Tile tile = square_tile(axis, task);
  multiply(tile, axis.left_factor, axis.momentum_then_product.as_right());
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
  pack_updated_factor(axis, tile.submatrix());
}

// The factors of the matrices whose gradient is not exactly zero; the others stay as they are.
inline void update_factors(Matrix* matrices, int64_t count, const FactorOptions& options) {
  const Matrix& shape = *matrices;
  for_each(matrices, count, shape.tiles(), cost_on_rows, [](Matrix& m, int64_t task) {
    if (!m.rows.has_gradient) return;
    Tile tile = m.tile(task);
    multiply(tile, m.rows.packed_transpose.as_left(), m.packed_grad);
    pack(m.rows_applied, tile.submatrix());
  });
  for_each(matrices, count, shape.tiles(), cost_on_columns, [](Matrix& m, int64_t task) {
    if (!m.rows.has_gradient) return;
    Tile tile = m.tile(task);
    multiply(tile, m.rows_applied, m.columns.packed_factor.as_right());
    pack(m.transformed, tile.submatrix());
    pack_transposed(m.transformed_transpose, tile.submatrix());
  });
  for_each_axis(
      matrices, count, shape.rows.pairs_of_tiles(), shape.columns.pairs_of_tiles(),
      [](const Axis& axis, const Axis& other, int64_t task) {
        return symmetric_cost(triangle_tile(axis, task), axis.size + other.size);
      },
      [&](const Axis& axis, const Axis& other, const Gram& transformed, int64_t task) {
        if (axis.has_gradient) update_momentum(axis, other, transformed, task, options);
      });
  for_each_axis(
      matrices, count, shape.rows.square_tiles(), shape.columns.square_tiles(),
      [](const Axis& axis, const Axis&, int64_t task) {
        return cost(square_tile(axis, task), axis.size);
      },
      [&](const Axis& axis, const Axis&, const Gram&, int64_t task) {
        if (axis.has_gradient) update_factor(axis, task, options.factor_lr);
      });
}

}  // namespace rootfree_fused
#endif
