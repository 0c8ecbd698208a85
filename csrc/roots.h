// RootFreeShampoo's update of S and K of both axes, for a gradient G (m x n) of mean square 1. On
// its rows, A, the columns being B:
//
//   S <- S + (1 - beta2) (Y Y^T / n - S),  Y = G K_B       (Z^T Z / m, Z = K_A^T G, on its columns)
//   E  = K^T (S + lam I) K - I,            lam = damping mean(diag S)
//   K <- K - (b / 2) K E,                  b = 1 / max(1, min(||E||_F, sqrt(||E^2||_F)))
//
// Operands are rounded to bfloat16, E after I has been taken from it.
#pragma once

#if defined(__x86_64__)
#include "factors.h"
#include "update.h"

namespace rootfree_fused {

struct RootOptions {
  double beta2, damping;
};

struct RootAxis : FactorAxis {
  float* gram;  // S, symmetric to the bit

  Left gram_then_error;     // S, then E: the right operand E is `change_then_product`
  Right gram_times_factor;  // T = S K + lam K
  double* traces;           // of S, over the tiles on its diagonal
  float lam;
  // Partial sums of squares of E and of E^2, over tiles of the lower triangle.
  double *error_squares, *squared_error_squares;

  void take_scratch(Arena& arena) {
    FactorAxis::take_scratch(arena);
    gram_then_error = arena.take_left(size, side);
    gram_times_factor = arena.take_right(side, size);
    traces = arena.take<double>(tiles());
    error_squares = arena.take<double>(tasks(pairs_of_tiles_of));
    squared_error_squares = arena.take<double>(tasks(pairs_of_tiles_of));
  }
  void narrow_to(int64_t block) {
    const int64_t first = block * side;
    FactorAxis::narrow_to(block);
    gram += first * side;
    gram_then_error = gram_then_error.rows(first).columns(0, size);
    gram_times_factor = gram_times_factor.columns(first).rows(0, size);
    traces += block * tiles_of(side);
    error_squares += block * pairs_of_tiles_of(side);
    squared_error_squares += block * pairs_of_tiles_of(side);
  }
  Gram both_of_error() const { return {gram_then_error, change_then_product.as_right()}; }
  double error_norm() const { return std::sqrt(sum(error_squares, pairs_of_tiles_of(size))); }
};

struct RootMatrix : FactorMatrix<RootAxis> {
  float* row_square_avg;  // null where rows are not balanced
  double step;

  double* strip_squares;  // sums of squares of strips of the gradient, as it is
  Left left_grad;         // G
  Right right_grad;
  // P and, a row after the other, the sums of its squares by tiles; what a row is multiplied by.
  float* preconditioned;
  double* row_squares;
  float* row_scales;

  void take_scratch(Arena& arena) {
    FactorMatrix::take_scratch(arena);
    strip_squares = arena.take<double>(strips_of(rows.size));
    left_grad = arena.take_left(rows.size, columns.size);
    right_grad = arena.take_right(rows.size, columns.size);
    preconditioned = arena.take<float>(rows.size * columns.size);
    row_squares = arena.take<double>(rows.size * columns.tiles());
    row_scales = arena.take<float>(rows.size);
  }
};

// Y, then Z.
inline void transform_grads(RootMatrix* matrices, int64_t count) {
  const int64_t tiles = matrices->tiles();
  for_each(
      matrices, count, 2 * tiles,
      [&](const RootMatrix& m, int64_t task) {
        return task < tiles ? cost_on_columns(m, task) : cost_on_rows(m, task - tiles);
      },
      [&](RootMatrix& m, int64_t task) {
        if (!m.rows.has_gradient) return;
        Tile tile = m.tile(task % tiles);
        if (task < tiles) {
          m.multiply_columns(tile, m.left_grad, m.columns.packed_factor.as_right());
          pack(m.transformed, tile.submatrix());
        } else {
          m.multiply_rows(tile, m.rows.packed_transpose.as_left(), m.right_grad);
          pack_transposed(m.transformed_transpose, tile.submatrix());
        }
      });
}

// S <- S + weight (gram_scale gram - S), on a tile of the lower triangle.
ROOTFREE_BF16 inline void average_gram(const RootAxis& axis, Tile& gram, float gram_scale,
                                       float weight) {
  const bool diagonal = gram.row == gram.column;
  if (diagonal) mirror(gram);
  double trace = 0;
  for (int64_t i = 0; i < gram.rows; ++i) {
    const float* old = axis.gram + (gram.row + i) * axis.side + gram.column;
    float* values = gram.values[i];
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < gram.columns; ++j) {
      values[j] = lerp(old[j], gram_scale * values[j], weight);
    }
    if (diagonal) trace += values[i];
  }
  if (diagonal) axis.traces[gram.row / tile_size] = trace;
  visit_both(gram, [&](const Tile& part) {
    write(part, axis.gram, axis.side);
    pack(axis.gram_then_error, part.submatrix());
  });
}

// T, on a tile.
ROOTFREE_BF16 inline void multiply_gram(const RootAxis& axis, int64_t task) {
  Tile tile = square_tile(axis.size, task);
  prefetch(tile, axis.factor, axis.side);
  multiply(tile, axis.gram_then_error, axis.packed_factor.as_right());
  for (int64_t i = 0; i < tile.rows; ++i) {
    const BFloat16* factor = axis.factor + (tile.row + i) * axis.side + tile.column;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) {
      tile.values[i][j] += axis.lam * float(factor[j]);
    }
  }
  pack(axis.gram_times_factor, tile.submatrix());
}

// E, on a tile of the lower triangle.
inline void find_error(const RootAxis& axis, int64_t pair) {
  Tile error = triangle_tile(axis.size, pair);
  multiply(error, axis.packed_transpose.as_left(), axis.gram_times_factor, false, true);
  if (error.row == error.column) {
    mirror(error);
    for (int64_t i = 0; i < error.rows; ++i) error.values[i][i] -= 1;
  }
  axis.error_squares[pair] = symmetric_sum_of_squares(error);
  // Of the tile and of its mirror image: E is its own transpose.
  pack(axis.both_of_error(), error.submatrix());
  if (error.row != error.column) pack_transposed(axis.both_of_error(), error.submatrix());
}

// The sum of the squares of E^2, on a tile of the lower triangle.
inline void square_error(const RootAxis& axis, int64_t pair) {
  Tile tile = triangle_tile(axis.size, pair);
  multiply(tile, axis.both_of_error());
  if (tile.row == tile.column) mirror(tile);
  axis.squared_error_squares[pair] = symmetric_sum_of_squares(tile);
}

// b / 2. Up to ||E||_F = 1 it is 1 / 2 whatever ||E^2||_F. A NaN of the second norm alone, whose
// squares overflow before those of the first, is ignored.
inline float root_step(const RootAxis& axis) {
  double bound = axis.error_norm();
  if (bound > 1) {
    const double squares = sum(axis.squared_error_squares, pairs_of_tiles_of(axis.size));
    bound = std::fmin(bound, std::sqrt(std::sqrt(squares)));
  }
  return 0.5 / (bound < 1 ? 1 : bound);  // NaN where the norm is
}

// S and K of the matrices whose gradient is not exactly zero; the others stay as they are.
inline void update_roots(RootMatrix* matrices, int64_t count, const RootOptions& options) {
  transform_grads(matrices, count);
  for_each_block(
      matrices, count, pairs_of_tiles_of, pairs_of_tiles_of,
      [](int64_t size, int64_t other_size, int64_t task) {
        return symmetric_cost(triangle_tile(size, task), other_size);
      },
      [&](const RootAxis& axis, const RootAxis& other, const Gram& transformed, int64_t task) {
        if (!axis.has_gradient) return;
        Tile gram = triangle_tile(axis.size, task);
        prefetch(gram, axis.gram, axis.side);
        multiply(gram, transformed);
        average_gram(axis, gram, 1.0 / other.size, 1 - options.beta2);
      });
  for (RootMatrix* m = matrices; m < matrices + count; ++m) {
    for (RootAxis* axis : {&m->rows, &m->columns}) {
      if (!axis->has_gradient) continue;
      axis->lam = options.damping * sum(axis->traces, axis->tiles()) / axis->size;
    }
  }
  for_each_block(
      matrices, count, square_tiles_of, square_tiles_of,
      [](int64_t size, int64_t, int64_t task) { return cost(square_tile(size, task), size); },
      [](const RootAxis& axis, const RootAxis&, const Gram&, int64_t task) {
        if (axis.has_gradient) multiply_gram(axis, task);
      });
  const auto triangle_cost = [](int64_t size, int64_t, int64_t task) {
    return symmetric_cost(triangle_tile(size, task), size);
  };
  for_each_block(matrices, count, pairs_of_tiles_of, pairs_of_tiles_of, triangle_cost,
                 [](const RootAxis& axis, const RootAxis&, const Gram&, int64_t task) {
                   if (axis.has_gradient) find_error(axis, task);
                 });
  for_each_block(matrices, count, pairs_of_tiles_of, pairs_of_tiles_of, triangle_cost,
                 [](const RootAxis& axis, const RootAxis&, const Gram&, int64_t task) {
                   if (axis.has_gradient && axis.error_norm() > 1) square_error(axis, task);
                 });
  update_factors(matrices, count, root_step);
}

}  // namespace rootfree_fused
#endif
