// One axis of IF-Shampoo on a matrix: its factor K and momentum m, and how they are packed.
#pragma once

#if defined(__x86_64__)
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
  Left take_left(int64_t rows, int64_t columns) {
    return {{take<uint32_t>(Packed::size(columns, rows)), columns}};
  }
  Right take_right(int64_t rows, int64_t columns) {
    return {{take<uint32_t>(Packed::size(rows, columns)), rows}};
  }
  Gram take_gram(int64_t rows, int64_t columns) {
    return {take_left(rows, columns), take_right(columns, rows)};
  }
  PackedSquare take_square(int64_t size) { return {take_left(size, size)}; }
};

constexpr int64_t strip_size = block_depth;  // rows that are packed at once

// One axis of one matrix. With a cached product P = ... K K^T, else P = ... K^T then K.
struct Axis {
  int64_t size, tiles;
  bool on_rows, cached, has_gradient;  // the gradient is not exactly zero
  BFloat16 *factor, *momentum, *product;
  int16_t* residual;

  // K^T and K: before K's update the operands of K^T K, after it those of `pack_updated_factor`.
  PackedSquare packed_transpose, packed_factor;
  Left left_factor;  // K before its update, for K m
  // m as a right operand; once K has been updated K K^T, a left operand on rows, a right one on
  // columns.
  PackedSquare momentum_then_product;
  // Partial sums of squares: over strips of the factor, over tiles of the momentum.
  double *factor_squares, *momentum_squares;

  Gram transpose_times_factor() const {
    return {packed_transpose.as_left(), packed_factor.as_right()};
  }
  Gram factor_times_transpose() const {
    return {packed_factor.as_left(), packed_transpose.as_right()};
  }

  int64_t strips() const { return ceil_div(size, strip_size); }
  int64_t square_tiles() const { return tiles * tiles; }
  int64_t pairs_of_tiles() const { return tiles * (tiles + 1) / 2; }

  void take_scratch(Arena& arena) {
    packed_transpose = arena.take_square(size);
    packed_factor = arena.take_square(size);
    left_factor = arena.take_left(size, size);
    momentum_then_product = arena.take_square(size);
    factor_squares = arena.take<double>(strips());
    momentum_squares = arena.take<double>(pairs_of_tiles());
  }
};

// The rows of a strip of a matrix of the axis' size.
inline Submatrix<BFloat16> strip_of(const Axis& axis, const BFloat16* matrix, int64_t strip) {
  const int64_t d = axis.size, row = strip * strip_size;
  return {row, 0, std::min(strip_size, d - row), d, matrix + row * d, d};
}

// A part of K after its update: for K K^T, or for the two products that take its place.
template <class T>
void pack_updated_factor(const Axis& axis, const Submatrix<T>& part) {
  if (axis.cached) {
    pack(axis.factor_times_transpose(), part);
  } else if (axis.on_rows) {
    pack_transposed(axis.packed_transpose.as_left(), part);
    pack(axis.packed_factor.as_left(), part);
  } else {
    pack(axis.packed_factor.as_right(), part);
    pack_transposed(axis.packed_transpose.as_right(), part);
  }
}

// K K^T, or a part of it.
template <class T>
void pack_product(const Axis& axis, const Submatrix<T>& part) {
  if (axis.on_rows) {
    pack(axis.momentum_then_product.as_left(), part);
  } else {
    pack(axis.momentum_then_product.as_right(), part);
  }
}

ROOTFREE_BF16 inline void write(const Tile& tile, BFloat16* to, int64_t stride) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    BFloat16* row = to + (tile.row + i) * stride + tile.column;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) row[j] = tile.values[i][j];
  }
}

// Writes a tile of a symmetric matrix, and its mirror image; `pack_part` packs either.
template <class PackPart>
void write_symmetric(const Tile& tile, BFloat16* to, int64_t stride, const PackPart& pack_part) {
  write(tile, to, stride);
  pack_part(tile.submatrix());
  if (tile.row == tile.column) return;
  const Tile mirrored = transposed(tile);
  write(mirrored, to, stride);
  pack_part(mirrored.submatrix());
}

}  // namespace rootfree_fused
#endif
