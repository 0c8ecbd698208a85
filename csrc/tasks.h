// The tiles of IF-Shampoo's matrices as tasks, and which thread works on which.
#pragma once

#if defined(__x86_64__)
#include <torch/csrc/stable/ops.h>

#include <variant>

#include "axis.h"

namespace rootfree_fused {

using c10::Half;

// To a parameter's or a gradient's numbers, of one of the dtypes that are served.
using ParamPointer = std::variant<float*, BFloat16*, Half*>;
using GradPointer = std::variant<const float*, const BFloat16*, const Half*>;

// A parameter G of `rows` x `columns`, with C on its rows and K on its columns.
struct Matrix {
  Axis rows, columns;
  ParamPointer param;
  float* momentum_buffer;  // null without momentum
  GradPointer grad;

  Right packed_grad;
  bool* strip_has_gradient;                 // whether a strip of the gradient is not exactly zero
  Left rows_applied;                        // C^T G, later C C^T G
  Gram transformed, transformed_transpose;  // M = C^T G K for M M^T, and M^T for M^T M
  // In memory of M, which has been read by then, what is between the two factors of a product that
  // is not cached: C^T G, and C C^T G K.
  Right between_on_rows;
  Left between_on_columns;

  void take_scratch(Arena& arena) {
    rows.take_scratch(arena);
    columns.take_scratch(arena);
    packed_grad = arena.take_right(rows.size, columns.size);
    strip_has_gradient = arena.take<bool>(rows.strips());
    rows_applied = arena.take_left(rows.size, columns.size);
    transformed = arena.take_gram(rows.size, columns.size);
    transformed_transpose = arena.take_gram(columns.size, rows.size);
    between_on_rows = transformed_transpose.x_transposed;
    between_on_columns = transformed.x;
  }
  int64_t tiles() const { return rows.tiles * columns.tiles; }
  Tile tile(int64_t task) const {
    return {task / columns.tiles * tile_size, task % columns.tiles * tile_size, rows.size,
            columns.size};
  }
};

inline Tile square_tile(const Axis& axis, int64_t task) {
  return {task / axis.tiles * tile_size, task % axis.tiles * tile_size, axis.size, axis.size};
}

// The task-th tile of the lower triangle.
inline Tile triangle_tile(const Axis& axis, int64_t task) {
  int64_t row = 0;
  while (task > row) task -= ++row;
  return {row * tile_size, task * tile_size, axis.size, axis.size};
}

// What a tile costs, in products of 16 x 16 sums: what follows a product passes over the tile.
inline int64_t cost(const Tile& tile, int64_t depth) {
  constexpr int64_t passing = 64;
  return ceil_div(tile.rows, lanes) * ceil_div(tile.columns, lanes) * (depth + passing);
}

// On the diagonal of a symmetric product the blocks above it are left out.
inline int64_t symmetric_cost(const Tile& tile, int64_t depth) {
  return cost(tile, tile.row == tile.column ? depth * 5 / 8 : depth);
}

// Tasks of one kind for `count` matrices of one shape, in order. Each thread takes a stretch that
// costs as much as those of the others: tiles at an edge cost less. Stretches, since a thread finds
// in its cache what it wrote in the stage before: taking the next tile that is free is slower.
template <class Cost, class Body>
void for_each(Matrix* matrices, int64_t count, int64_t tasks, const Cost& cost_of,
              const Body& body) {
  int64_t each = 0;
  for (int64_t task = 0; task < tasks; ++task) each += cost_of(*matrices, task);
  const int64_t threads = std::min<int64_t>(count * tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const AmxRegisters registers;
    int64_t before = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t own = cost_of(matrices[i], task);
        const int64_t thread = (2 * before + own) * threads / (2 * count * each);
        if (first <= thread && thread < last) body(matrices[i], task);
        before += own;
      }
    }
  });
}

// Tasks on both axes: `on_rows` of the first, then `on_columns` of the second. `body` gets the axis
// of the task, the other axis, and M or, for the axis of the columns, M^T.
template <class Cost, class Body>
void for_each_axis(Matrix* matrices, int64_t count, int64_t on_rows, int64_t on_columns,
                   const Cost& cost_of, const Body& body) {
  for_each(
      matrices, count, on_rows + on_columns,
      [&](const Matrix& m, int64_t task) {
        return task < on_rows ? cost_of(m.rows, m.columns, task)
                              : cost_of(m.columns, m.rows, task - on_rows);
      },
      [&](Matrix& m, int64_t task) {
        if (task < on_rows) {
          body(m.rows, m.columns, m.transformed, task);
        } else {
          body(m.columns, m.rows, m.transformed_transpose, task - on_rows);
        }
      });
}

// Products along an axis.
inline int64_t cost_on_rows(const Matrix& m, int64_t task) {
  return cost(m.tile(task), m.rows.size);
}
inline int64_t cost_on_columns(const Matrix& m, int64_t task) {
  return cost(m.tile(task), m.columns.size);
}

}  // namespace rootfree_fused
#endif
