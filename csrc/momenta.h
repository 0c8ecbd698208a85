// IF-Shampoo's update of the factors. On the rows of a gradient G (d_C x d_K), with B loss terms:
//
//   M  = C^T G K
//   H  = (B / d_K M M^T + damping tr(K^T K) / d_K C^T C - I) / 2
//   m <- m + (1 - factor_momentum) (H - m)
//   C <- C - factor_lr / max(1, ||m||) C m
//
// and on its columns with M^T, the two factors exchanged.
#pragma once

#if defined(__x86_64__)
#include "factors.h"
#include "update.h"

namespace rootfree_fused {

struct FactorOptions {
  double factor_lr, factor_momentum, damping, batch_size;
};

struct MomentumAxis : FactorAxis {
  BFloat16* momentum;
  // Partial sums of squares: over strips of the factor, over tiles of the momentum.
  double *factor_squares, *momentum_squares;

  void take_scratch(Arena& arena) {
    FactorAxis::take_scratch(arena);
    factor_squares = arena.take<double>(tasks(strips_of));
    momentum_squares = arena.take<double>(tasks(pairs_of_tiles_of));
  }
  void narrow_to(int64_t block) {
    FactorAxis::narrow_to(block);
    momentum += block * side * side;
    factor_squares += block * strips_of(side);
    momentum_squares += block * pairs_of_tiles_of(side);
  }
};

struct MomentumMatrix : FactorMatrix<MomentumAxis> {
  bool* strip_has_gradient;  // whether a strip of the gradient is not exactly zero

  void take_scratch(Arena& arena) {
    FactorMatrix::take_scratch(arena);
    strip_has_gradient = arena.take<bool>(strips_of(rows.size));
  }
};

// A limit of the specification: the norm of m stays finite in float32.
constexpr float largest_momentum = 0x1p48f;

// Of a strip of a block of K before its update.
ROOTFREE_BF16 inline double sum_of_factor_squares(const FactorAxis& axis, int64_t strip) {
  const Submatrix<BFloat16> factor = strip_of(axis, axis.factor, strip);
  const int16_t* residual = axis.residual + factor.row * axis.side;
  const int64_t numel = factor.rows * axis.side;  // zeros behind a shorter block
  alignas(64) float columns[tile_size] = {};
  for (int64_t first = 0; first < numel; first += tile_size) {
    const int64_t count = std::min(tile_size, numel - first);
    for (int64_t i = 0; i < count; ++i) {
      const float value = join(factor.values[first + i], residual[first + i]);
      columns[i] += value * value;
    }
  }
  double total = 0;
  for (float column : columns) total += column;
  return total;
}

// m <- m + (1 - factor_momentum) (H - m), H = (gram_scale gram - I) / 2, on a tile.
ROOTFREE_BF16 inline void average_momentum(const MomentumAxis& axis, int64_t pair, Tile& gram,
                                           double gram_scale, double factor_momentum) {
  const bool diagonal = gram.row == gram.column;
  if (diagonal) mirror(gram);
  const float weight = 1 - factor_momentum, half_weight = (1 - factor_momentum) / 2,
              gram_weight = half_weight * gram_scale;
  for (int64_t i = 0; i < gram.rows; ++i) {
    const BFloat16* old = axis.momentum + (gram.row + i) * axis.side + gram.column;
    float* values = gram.values[i];
    for (int64_t j = 0; j < gram.columns; ++j) {
      const float m = old[j];
      values[j] = m - weight * m + gram_weight * values[j];
    }
    if (diagonal) values[i] -= half_weight;
    for (int64_t j = 0; j < gram.columns; ++j) values[j] = within(values[j], largest_momentum);
  }
  axis.momentum_squares[pair] = symmetric_sum_of_squares(gram);
  visit_both(gram, [&](const Tile& part) {
    write(part, axis.momentum, axis.side);
    pack(axis.change_then_product.as_right(), part.submatrix());
  });
}

// On a tile of the lower triangle; `transformed` is M, or M^T for the axis of its columns.
inline void update_momentum(const MomentumAxis& axis, const MomentumAxis& other,
                            const Gram& transformed, int64_t pair, const FactorOptions& options) {
  const double mean_square = sum(other.factor_squares, other.tasks(strips_of)) / other.size;
  const double gram_scale = options.batch_size / other.size;
  Tile gram = triangle_tile(axis.size, pair);
  prefetch(gram, axis.momentum, axis.side);
  multiply(gram, axis.transpose_times_factor());
  scale(gram, options.damping * mean_square / gram_scale);
  multiply(gram, transformed, true);
  average_momentum(axis, pair, gram, gram_scale, options.factor_momentum);
}

// The momenta of the matrices whose gradient is not exactly zero; the others stay as they are.
inline void update_momenta(MomentumMatrix* matrices, int64_t count, const FactorOptions& options) {
  const MomentumMatrix& shape = *matrices;
  for_each(
      matrices, count, shape.tiles(), cost_on_rows<MomentumMatrix>,
      [](MomentumMatrix& m, int64_t task) {
        if (!m.rows.has_gradient) return;
        Tile tile = m.tile(task);
        m.multiply_rows(tile, m.rows.packed_transpose.as_left(), m.packed_update);
        pack(m.rows_applied, tile.submatrix());
      });
  for_each(
      matrices, count, shape.tiles(), cost_on_columns<MomentumMatrix>,
      [](MomentumMatrix& m, int64_t task) {
        if (!m.rows.has_gradient) return;
        Tile tile = m.tile(task);
        m.multiply_columns(tile, m.rows_applied, m.columns.packed_factor.as_right());
        pack(m.transformed, tile.submatrix());
        pack_transposed(m.transformed_transpose, tile.submatrix());
      });
  for_each_block(
      matrices, count, pairs_of_tiles_of, pairs_of_tiles_of,
      [](int64_t size, int64_t other_size, int64_t task) {
        return symmetric_cost(triangle_tile(size, task), size + other_size);
      },
      [&](const MomentumAxis& axis, const MomentumAxis& other, const Gram& transformed,
          int64_t task) {
        if (axis.has_gradient) update_momentum(axis, other, transformed, task, options);
      });
}

// factor_lr / max(1, ||m||)
inline float factor_step(const MomentumAxis& axis, double factor_lr) {
  const double norm = std::sqrt(sum(axis.momentum_squares, pairs_of_tiles_of(axis.size)));
  return factor_lr / (norm < 1 ? 1 : norm);  // NaN where the norm is
}

}  // namespace rootfree_fused
#endif
