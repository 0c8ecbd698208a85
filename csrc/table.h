// The tensors of one CUDA launch, in the kernel's arguments, and how its threads walk them. All of
// it also compiles for the CPU, where the tests run it.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "operands.h"
#include "update.h"

namespace rootfree_fused {

// A block of threads updates a chunk of one tensor, 8 elements a thread: 4 to 8 loads of 16 bytes in
// flight at 43 to 57 registers (sm_80, sm_90, sm_100), so 8 to 10 blocks on a multiprocessor. Not
// yet measured on a GPU.
constexpr int chunk_size = 1024;
constexpr int threads_per_chunk = 128;

struct Row {
  char* data[OPERANDS];  // STATE1 is null where there is no momentum buffer
  int64_t numel;
  uint32_t first_chunk, place;  // place: index in the caller's lists
};

// From CUDA 12.1 on a kernel takes 32,764 bytes of arguments.
constexpr int table_capacity = 680;

template <class Rule>
struct Table {
  Rule rule;  // at lr 1 where lr is on the device, without the bias correction of `steps`
  float log_beta1 = 0, log_beta2 = 0;
  const float* lr_float = nullptr;  // one of the two where lr is on the device
  const double* lr_double = nullptr;
  const float* steps = nullptr;
  uint32_t row_count = 0, chunk_count = 0;
  Row rows[table_capacity];
};

static_assert(sizeof(Table<Rmsprop<float>>) <= 32764 && sizeof(Table<Adamw<float>>) <= 32764);

// Cuts rows into tables, and calls launch(table) for each.
template <class Rule, class Launch>
void launch_tables(Table<Rule>& table, const std::vector<Row>& rows, Launch launch) {
  for (size_t i = 0; i < rows.size();) {
    table.row_count = table.chunk_count = 0;
    for (; i < rows.size() && table.row_count < table_capacity; ++i) {
      Row& row = table.rows[table.row_count++] = rows[i];
      row.first_chunk = table.chunk_count;
      table.chunk_count += static_cast<uint32_t>((row.numel + chunk_size - 1) / chunk_size);
    }
    launch(table);
  }
}

template <class Rule>
ROOTFREE_INLINE const Row& find_row(const Table<Rule>& table, uint32_t chunk) {
  uint32_t row = 0, end = table.row_count;
  while (end - row > 1) {
    const uint32_t middle = (row + end) / 2;
    (table.rows[middle].first_chunk <= chunk ? row : end) = middle;
  }
  return table.rows[row];
}

template <class Rule>
ROOTFREE_INLINE Rule current_rule(const Table<Rule>& table, uint32_t place) {
  Rule rule = table.rule;
  const float step = table.steps ? table.steps[place] : 0.0f;
  if (table.lr_float) rule.scale_lr(*table.lr_float);
  if (table.lr_double) rule.scale_lr(static_cast<float>(*table.lr_double));
  if constexpr (std::is_same_v<Rule, Adamw<float>>) {
    if (table.steps) {
      rule.correct_bias(-std::expm1(step * table.log_beta1), -std::expm1(step * table.log_beta2));
    }
  }
  return rule;
}

// Elements that are moved in accesses of up to 16 bytes.
template <class T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Vector {
  T values[width];
};

// What one thread does of elements [begin, end), which lie in one chunk. It reads lr after it has
// sent all other loads, and waits for memory once.
template <int width, bool two_states, class P, class G, class Rule>
ROOTFREE_INLINE void update_vectors(const Table<Rule>& table, const Row& row, int64_t begin,
                                    int64_t end, int thread) {
  if (begin == end) return;
  constexpr int count = chunk_size / threads_per_chunk / width;
  const int64_t first = begin + thread * width;
  const int rest = static_cast<int>(end - first);
  auto* param = reinterpret_cast<Vector<P, width>*>(row.data[PARAM] + first * sizeof(P));
  auto* grad = reinterpret_cast<const Vector<G, width>*>(row.data[GRAD] + first * sizeof(G));
  auto* state0 = reinterpret_cast<Vector<float, width>*>(row.data[STATE0] + first * sizeof(float));
  auto* state1 = reinterpret_cast<Vector<float, width>*>(row.data[STATE1] + first * sizeof(float));
  Vector<P, width> p[count];
  Vector<G, width> g[count];
  Vector<float, width> s0[count], s1[count] = {};
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (k * threads_per_chunk * width >= rest) continue;
    p[k] = param[k * threads_per_chunk];
    g[k] = grad[k * threads_per_chunk];
    s0[k] = state0[k * threads_per_chunk];
    if (two_states) s1[k] = state1[k * threads_per_chunk];
  }
  const Rule rule = current_rule(table, row.place);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (k * threads_per_chunk * width >= rest) continue;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      float value = static_cast<float>(p[k].values[j]);
      update(rule, value, static_cast<float>(g[k].values[j]), s0[k].values[j], s1[k].values[j]);
      p[k].values[j] = static_cast<P>(value);
    }
    param[k * threads_per_chunk] = p[k];
    state0[k * threads_per_chunk] = s0[k];
    if (two_states) state1[k * threads_per_chunk] = s1[k];
  }
}

ROOTFREE_INLINE bool is_aligned(const Row& row) {
  uintptr_t bits = 0;
  for (char* data : row.data) bits |= reinterpret_cast<uintptr_t>(data);
  return bits % 16 == 0;
}

// What one thread does: vectors of 16 bytes of the narrowest operand where all are aligned, then
// the rest element by element.
template <bool two_states, class P, class G, class Rule>
ROOTFREE_INLINE void update_chunk(const Table<Rule>& table, uint32_t chunk, int thread) {
  constexpr int width = 16 / sizeof(P);
  const Row& row = find_row(table, chunk);
  const int64_t begin = static_cast<int64_t>(chunk - row.first_chunk) * chunk_size;
  const int64_t end = begin + chunk_size < row.numel ? begin + chunk_size : row.numel;
  const int64_t vectors_end = is_aligned(row) ? end - end % width : begin;
  update_vectors<width, two_states, P, G>(table, row, begin, vectors_end, thread);
  update_vectors<1, two_states, P, G>(table, row, vectors_end, end, thread);
}

}  // namespace rootfree_fused
