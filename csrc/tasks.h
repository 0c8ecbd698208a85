// Matrices, their tiles as tasks, and which thread works on which.
#pragma once

#if defined(__x86_64__)
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <variant>
#include <vector>

#include "axis.h"

namespace rootfree_fused {

using c10::Half;

// To a parameter's or a gradient's numbers, of one of the dtypes that are served.
using ParamPointer = std::variant<float*, BFloat16*, Half*>;
using GradPointer = std::variant<const float*, const BFloat16*, const Half*>;

// What the methods share of a parameter of `rows` x `columns`, with C on its rows and K on its
// columns.
template <class Axis>
struct FactorMatrix {
  Axis rows, columns;
  ParamPointer param;
  float* momentum_buffer;
  GradPointer grad;

  Right packed_update;                      // what is preconditioned
  Left rows_applied;                        // a product of it on the rows
  Gram transformed, transformed_transpose;  // the X of X X^T on either axis
  // In their memory, which has been read by then: what is between the two factors of a product that
  // is not cached.
  Right between_on_rows;
  Left between_on_columns;

  void take_scratch(Arena& arena) {
    rows.take_scratch(arena);
    columns.take_scratch(arena);
    packed_update = arena.take_right(rows.size, columns.size);
    rows_applied = arena.take_left(rows.size, columns.size);
    transformed = arena.take_gram(rows.size, columns.size);
    transformed_transpose = arena.take_gram(columns.size, rows.size);
    between_on_rows = transformed_transpose.x_transposed;
    between_on_columns = transformed.x;
  }
  Axis& axis(int k) { return k == 0 ? rows : columns; }
  // Of which each is in one block of either axis.
  int64_t tiles() const { return rows.tiles() * columns.tiles(); }
  Tile tile(int64_t task) const {
    const int64_t across = columns.tiles();
    const Range row = rows.tile(task / across), column = columns.tile(task % across);
    return {row.first, column.first, row.end, column.end};
  }
  // tile = F X or X F, F being a factor or its transpose: of X only what a block of F meets.
  void multiply_rows(Tile& tile, const Left& factor, const Right& x) const {
    const auto [first, end] = rows.block_at(tile.row);
    multiply(tile, factor.columns(0, end - first), x.rows(first, end - first));
  }
  void multiply_columns(Tile& tile, const Left& x, const Right& factor) const {
    const auto [first, end] = columns.block_at(tile.column);
    multiply(tile, x.columns(first, end - first), factor.rows(0, end - first));
  }
};

inline Tile square_tile(int64_t size, int64_t task) {
  const int64_t tiles = tiles_of(size);
  return {task / tiles * tile_size, task % tiles * tile_size, size, size};
}

// The task-th tile of the lower triangle.
inline Tile triangle_tile(int64_t size, int64_t task) {
  int64_t row = 0;
  while (task > row) task -= ++row;
  return {row * tile_size, task * tile_size, size, size};
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
template <class Matrix, class Cost, class Body>
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

// A task of an axis: its block, an axis of its own, and which of the block's it is.
template <class Axis>
struct BlockTask {
  int64_t block, first, size, task;
  const Axis& axis;

  BlockTask(const Axis& of, TasksOf tasks_of, int64_t all)
      : block(all / tasks_of(of.side)), task(all % tasks_of(of.side)), axis(of) {
    first = axis.block_at(block * axis.side).first;
    size = axis.block_at(first).end - first;
  }
  Axis narrowed() const {
    Axis result = axis;
    result.narrow_to(block);
    return result;
  }
};

// Tasks on the blocks of both axes, `on_rows` of the first, then `on_columns` of the second.
// `cost_of` gets the size of the task's block, that of the other axis, and which of the block's
// tasks it is; `body` the block, the other axis, the block's rows of `transformed` or, for the axis
// of the columns, of its transpose, and the task.
template <class Matrix, class Cost, class Body>
void for_each_block(Matrix* matrices, int64_t count, TasksOf on_rows, TasksOf on_columns,
                    const Cost& cost_of, const Body& body) {
  const int64_t of_rows = matrices->rows.tasks(on_rows);
  const int64_t of_columns = matrices->columns.tasks(on_columns);
  for_each(
      matrices, count, of_rows + of_columns,
      [&](const Matrix& m, int64_t task) {
        if (task < of_rows) {
          const BlockTask at(m.rows, on_rows, task);
          return cost_of(at.size, m.columns.size, at.task);
        }
        const BlockTask at(m.columns, on_columns, task - of_rows);
        return cost_of(at.size, m.rows.size, at.task);
      },
      [&](Matrix& m, int64_t task) {
        if (task < of_rows) {
          const BlockTask at(m.rows, on_rows, task);
          body(at.narrowed(), m.columns, m.transformed.rows(at.first), at.task);
        } else {
          const BlockTask at(m.columns, on_columns, task - of_rows);
          body(at.narrowed(), m.rows, m.transformed_transpose.rows(at.first), at.task);
        }
      });
}

// Products along an axis.
template <class Matrix>
int64_t cost_on_rows(const Matrix& m, int64_t task) {
  return cost(m.tile(task), m.rows.side);
}
template <class Matrix>
int64_t cost_on_columns(const Matrix& m, int64_t task) {
  return cost(m.tile(task), m.columns.side);
}

// At least `bytes` of memory, kept for the calling thread's next step: faulting in fresh pages
// takes a tenth of a step.
inline char* scratch(int64_t bytes) {
  constexpr int64_t huge_page = 1 << 21;
  static thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, std::free);
  static thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    memory.reset();
    const int64_t rounded = ceil_div(bytes, huge_page) * huge_page;
    memory.reset(static_cast<char*>(std::aligned_alloc(huge_page, rounded)));
    STD_TORCH_CHECK(memory, "out of memory: a step needs ", rounded, " bytes");
    madvise(memory.get(), rounded, MADV_HUGEPAGE);
    capacity = rounded;
  }
  return memory.get();
}

// Many matrices are shared among the threads, each from start to end in the cache of one; of a few,
// the tiles are. Neither changes a sum. `run` steps `count` matrices that have their scratch.
template <class Matrix, class Run>
void run_all(std::vector<Matrix>& matrices, const Run& run) {
  if (matrices.empty()) return;
  const int64_t count = matrices.size(), threads = torch::stable::get_num_threads();
  const int64_t tiles = matrices[0].tiles();
  const bool share_tiles = count % threads != 0 && count < 8 * threads;
  const int64_t together = share_tiles ? std::min(count, ceil_div(8 * threads, tiles)) : 1;
  const int64_t workers = share_tiles ? 1 : std::min(count, threads);
  Arena measure;
  for (int64_t i = 0; i < together; ++i) matrices[i].take_scratch(measure);
  char* memory = scratch(workers * measure.used);

  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    for (int64_t first; (first = next.fetch_add(together)) < count;) {
      const int64_t size = std::min(together, count - first);
      Arena arena{memory + worker * measure.used};
      for (int64_t i = first; i < first + size; ++i) matrices[i].take_scratch(arena);
      run(&matrices[first], size);
    }
  };
  if (workers == 1) {
    work(0);
  } else {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  }
}

}  // namespace rootfree_fused
#endif
