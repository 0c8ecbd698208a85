// One axis of a matrix with a bfloat16 factor K, dense or in blocks on its diagonal, and how K is
// packed for products.
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
  PackedSquare take_square(int64_t side, int64_t size) { return {take_left(size, side)}; }
};

constexpr int64_t strip_size = block_depth;  // rows that are packed at once

// How many tasks of a kind a square matrix of this size is.
using TasksOf = int64_t (*)(int64_t size);
inline int64_t strips_of(int64_t size) { return ceil_div(size, strip_size); }
inline int64_t tiles_of(int64_t size) { return ceil_div(size, tile_size); }
inline int64_t square_tiles_of(int64_t size) { return tiles_of(size) * tiles_of(size); }
inline int64_t pairs_of_tiles_of(int64_t size) { return tiles_of(size) * (tiles_of(size) + 1) / 2; }
inline int64_t no_tasks(int64_t) { return 0; }

struct Range {
  int64_t first, end;
};

// What the methods share of an axis. With a cached product P = ... K K^T, else P = ... K^T then K.
//
// K has blocks of `side` rows and columns on its diagonal: one if it is dense, else a multiple of
// `strip_size`. The last is shorter where they are more than the axis is long: it lies at the start
// of its memory, and zeros, which are never written, lie behind. A block is an axis too.
struct FactorAxis {
  int64_t size, side;
  bool on_rows, cached, has_gradient;  // the gradient is not exactly zero
  BFloat16 *factor, *product;          // one block after the other
  int16_t* residual;

  // K^T and K: before K's update the operands of K^T K, after it those of `pack_updated_factor`.
  PackedSquare packed_transpose, packed_factor;
  Left left_factor;  // K before its update, to be multiplied by the change
  // The change of K, a symmetric right operand; once K has been updated K K^T, a left operand on
  // rows, a right one on columns.
  PackedSquare change_then_product;

  Gram transpose_times_factor() const {
    return {packed_transpose.as_left(), packed_factor.as_right()};
  }
  Gram factor_times_transpose() const {
    return {packed_factor.as_left(), packed_transpose.as_right()};
  }

  // Of all blocks.
  int64_t tasks(TasksOf of) const { return size / side * of(side) + of(size % side); }
  int64_t tiles() const { return tasks(tiles_of); }
  // Where blocks and tiles are.
  Range block_at(int64_t place) const {
    const int64_t first = place / side * side;
    return {first, std::min(first + side, size)};
  }
  Range tile(int64_t task) const {
    const int64_t each = tiles_of(side), block = task / each * side;
    return {block + task % each * tile_size, block_at(block).end};
  }

  void take_scratch(Arena& arena) {
    packed_transpose = arena.take_square(side, size);
    packed_factor = arena.take_square(side, size);
    left_factor = arena.take_left(size, side);
    change_then_product = arena.take_square(side, size);
  }
  void narrow_to(int64_t block) {
    const auto [first, end] = block_at(block * side);
    size = end - first;
    factor += first * side;
    residual += first * side;
    if (cached) product += first * side;
    packed_transpose = packed_transpose.block(first, size);
    packed_factor = packed_factor.block(first, size);
    left_factor = left_factor.rows(first).columns(0, size);
    change_then_product = change_then_product.block(first, size);
  }
};

// The rows of a strip of a block of a matrix of the axis' size.
inline Submatrix<BFloat16> strip_of(const FactorAxis& axis, const BFloat16* matrix, int64_t strip) {
  const int64_t d = axis.size, row = strip * strip_size;
  return {row, 0, std::min(strip_size, d - row), d, matrix + row * axis.side, axis.side};
}

// A strip of K before its update: for products with K from either side.
inline void pack_factor(const FactorAxis& axis, int64_t strip) {
  const Submatrix<BFloat16> factor = strip_of(axis, axis.factor, strip);
  pack(axis.left_factor, factor);
  pack_transposed(axis.transpose_times_factor(), factor);
}

// A part of K after its update: for K K^T, or for the two products that take its place.
template <class T>
void pack_updated_factor(const FactorAxis& axis, const Submatrix<T>& part) {
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
void pack_product(const FactorAxis& axis, const Submatrix<T>& part) {
  if (axis.on_rows) {
    pack(axis.change_then_product.as_left(), part);
  } else {
    pack(axis.change_then_product.as_right(), part);
  }
}

template <class T>
ROOTFREE_BF16 inline void write(const Tile& tile, T* to, int64_t stride) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* row = to + (tile.row + i) * stride + tile.column;
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < tile.columns; ++j) row[j] = tile.values[i][j];
  }
}

// Asks for the part of a matrix at a tile, so that it comes from memory while the tile is computed.
template <class T>
inline void prefetch(const Tile& tile, const T* matrix, int64_t stride) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T* row = matrix + (tile.row + i) * stride + tile.column;
    for (int64_t j = 0; j < tile.columns; j += line) __builtin_prefetch(row + j);
  }
}

// Visits a tile of the lower triangle of a symmetric matrix, and its mirror image.
template <class Visit>
void visit_both(const Tile& tile, const Visit& visit) {
  visit(tile);
  if (tile.row != tile.column) visit(transposed(tile));
}

}  // namespace rootfree_fused
#endif
