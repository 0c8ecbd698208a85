// The preconditioned P = C C^T N K K^T of an N, and IF-Shampoo's descent along it.
#pragma once

#if defined(__x86_64__)
#include "tasks.h"
#include "update.h"

namespace rootfree_fused {

// Gives each tile of P to `take(matrix, tile, task)`.
template <class Matrix, class Take>
void precondition(Matrix* matrices, int64_t count, const Take& take) {
  const int64_t tiles = matrices->tiles();
  if (!matrices->rows.cached) {
    for_each(matrices, count, tiles, cost_on_rows<Matrix>, [](Matrix& m, int64_t task) {
      Tile tile = m.tile(task);
      m.multiply_rows(tile, m.rows.packed_transpose.as_left(), m.packed_update);
      pack(m.between_on_rows, tile.submatrix());
    });
  }
  for_each(matrices, count, tiles, cost_on_rows<Matrix>, [](Matrix& m, int64_t task) {
    Tile tile = m.tile(task);
    if (m.rows.cached) {
      m.multiply_rows(tile, m.rows.change_then_product.as_left(), m.packed_update);
    } else {
      m.multiply_rows(tile, m.rows.packed_factor.as_left(), m.between_on_rows);
    }
    pack(m.rows_applied, tile.submatrix());
  });
  if (!matrices->columns.cached) {
    for_each(matrices, count, tiles, cost_on_columns<Matrix>, [](Matrix& m, int64_t task) {
      Tile tile = m.tile(task);
      m.multiply_columns(tile, m.rows_applied, m.columns.packed_factor.as_right());
      pack(m.between_on_columns, tile.submatrix());
    });
  }
  for_each(matrices, count, tiles, cost_on_columns<Matrix>, [&](Matrix& m, int64_t task) {
    Tile tile = m.tile(task);
    if (m.columns.cached) {
      m.multiply_columns(tile, m.rows_applied, m.columns.change_then_product.as_right());
    } else {
      m.multiply_columns(tile, m.between_on_columns, m.columns.packed_transpose.as_right());
    }
    take(m, tile, task);
  });
}

template <class P>
ROOTFREE_BF16 void update_tile(const Descent<float>& descent, P* params, float* momentum_buffer,
                               const Tile& preconditioned, int64_t stride) {
  for (int64_t i = 0; i < preconditioned.rows; ++i) {
    const int64_t offset = (preconditioned.row + i) * stride + preconditioned.column;
    P* param = params + offset;
    const float* values = preconditioned.values[i];
    if (momentum_buffer) {
      float* buffer = momentum_buffer + offset;
      ROOTFREE_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < preconditioned.columns; ++j) {
        float p = param[j];
        update(descent, p, values[j], buffer[j]);
        param[j] = p;
      }
    } else {
      ROOTFREE_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < preconditioned.columns; ++j) {
        float p = param[j], none = 0;
        update(descent, p, values[j], none);
        param[j] = p;
      }
    }
  }
}

template <class Matrix>
void update_params(Matrix* matrices, int64_t count, const DescentOptions& options) {
  const Descent<float> descent(options);
  precondition(matrices, count, [&](Matrix& m, const Tile& tile, int64_t) {
    const auto update_param = [&](auto* param) {
      update_tile(descent, param, m.momentum_buffer, tile, m.columns.size);
    };
    std::visit(update_param, m.param);
  });
}

}  // namespace rootfree_fused
#endif
