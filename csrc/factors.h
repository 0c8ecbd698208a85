// A factor K, stored as what products read, rounded to bfloat16, and the 16 bits of a float32 that
// remain; its update K <- K - step K m by a symmetric m, and K K^T.
#pragma once

#if defined(__x86_64__)
#include <bit>
#include <cmath>

#include "formats.h"
#include "tasks.h"

namespace rootfree_fused {

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

// Of a symmetric matrix, the share of a tile of the lower triangle and of its mirror image.
inline double symmetric_sum_of_squares(const Tile& tile) {
  return (tile.row == tile.column ? 1 : 2) * sum_of_squares(tile);
}

// A strip of what is there at the start of a step in which K is not updated.
inline void pack_unchanged(const FactorAxis& axis, int64_t strip, bool products_are_valid) {
  if (axis.cached && products_are_valid) {
    pack_product(axis, strip_of(axis, axis.product, strip));
  } else {
    pack_updated_factor(axis, strip_of(axis, axis.factor, strip));
  }
}

// K <- K - step K m, on a tile.
ROOTFREE_BF16 inline void update_factor(const FactorAxis& axis, int64_t task, float step) {
  Tile tile = square_tile(axis.size, task);
  prefetch(tile, axis.factor, axis.side);
  prefetch(tile, axis.residual, axis.side);
  multiply(tile, axis.left_factor, axis.change_then_product.as_right());
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t offset = (tile.row + i) * axis.side + tile.column;
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

// Both factors of those matrices whose gradient is not exactly zero; `step_of` an axis.
template <class Matrix, class StepOf>
void update_factors(Matrix* matrices, int64_t count, const StepOf& step_of) {
  for_each_block(
      matrices, count, square_tiles_of, square_tiles_of,
      [](int64_t size, int64_t, int64_t task) { return cost(square_tile(size, task), size); },
      [&](const auto& axis, const auto&, const Gram&, int64_t task) {
        if (axis.has_gradient) update_factor(axis, task, step_of(axis));
      });
}

template <class Matrix>
void update_products(Matrix* matrices, int64_t count) {
  const auto tasks = [](const FactorAxis& axis) {
    return axis.cached ? pairs_of_tiles_of : no_tasks;
  };
  for_each_block(
      matrices, count, tasks(matrices->rows), tasks(matrices->columns),
      [](int64_t size, int64_t, int64_t task) {
        return symmetric_cost(triangle_tile(size, task), size);
      },
      [](const FactorAxis& axis, const FactorAxis&, const Gram&, int64_t task) {
        Tile tile = triangle_tile(axis.size, task);
        multiply(tile, axis.factor_times_transpose());
        if (tile.row == tile.column) mirror(tile);
        visit_both(tile, [&](const Tile& part) {
          write(part, axis.product, axis.side);
          pack_product(axis, part.submatrix());
        });
      });
}

}  // namespace rootfree_fused
#endif
