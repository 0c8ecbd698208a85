// Gradients of micro-batches added up, and their squares or signs, on lists of CPU tensors: one
// parallel region over chunks of them all. The last lines register the body of `accumulate_`.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "codecs.h"
#include "lists.h"

namespace rootfree_fused {
namespace {

enum class Part { NONE, SQUARE, SIGN };

// sum <- sum + w g, part <- part + (w g)^2 or w sign(g); both start at 0 with the first.
template <Part part, bool first, class G, class T>
ROOTFREE_INLINE void add_parts(double weight, char* sums, char* parts, const char* grads,
                               int64_t count) {
  const T w = static_cast<T>(weight);
  T *sum_of = reinterpret_cast<T*>(sums), *part_of = reinterpret_cast<T*>(parts);
  const G* grad = reinterpret_cast<const G*>(grads);
  ROOTFREE_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const T g = w * static_cast<T>(grad[i]);
    sum_of[i] = first ? g : sum_of[i] + g;
    if constexpr (part != Part::NONE) {
      const T own = part == Part::SQUARE ? g * g : w * sign(g);
      part_of[i] = first ? own : part_of[i] + own;
    }
  }
}

using Add = void (*)(double weight, char* sums, char* parts, const char* grads, int64_t count);

template <Part part, class G, class T>
Add select_first(bool first) {
  return first ? Compiled<add_parts<part, true, G, T>>::current()
               : Compiled<add_parts<part, false, G, T>>::current();
}

template <Part part>
Add select_dtypes(int32_t sum, int32_t grad, bool first, size_t i) {
  const int32_t f64 = aoti_torch_dtype_float64();
  const auto& [f32, bf16, f16, i8, i16, u8] = dtypes();
  if (sum == f32 && grad == f32) return select_first<part, float, float>(first);
  if (sum == f32 && grad == bf16) return select_first<part, c10::BFloat16, float>(first);
  if (sum == f32 && grad == f16) return select_first<part, c10::Half, float>(first);
  if (sum == f64 && grad == f64) return select_first<part, double, double>(first);
  if (sum == f64 && grad == f32) return select_first<part, float, double>(first);
  STD_TORCH_CHECK(false, "there is no kernel for the dtypes of sums[", i, "] and its gradient");
}

Add select(Part part, int32_t sum, int32_t grad, bool first, size_t i) {
  if (part == Part::NONE) return select_dtypes<Part::NONE>(sum, grad, first, i);
  if (part == Part::SQUARE) return select_dtypes<Part::SQUARE>(sum, grad, first, i);
  return select_dtypes<Part::SIGN>(sum, grad, first, i);
}

struct Task : Chunked {
  Add add;
  Elements sums, parts, grads;
};

void accumulate_tensors(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 6);
  const TensorHandles sums = arguments.next_tensors(), parts = arguments.next_tensors(),
                      grads = arguments.next_tensors();
  const auto weight = arguments.next<double>();
  const bool signs = arguments.next<bool>(), first = arguments.next<bool>();
  const Part part = parts.empty() ? Part::NONE : signs ? Part::SIGN : Part::SQUARE;
  STD_TORCH_CHECK(grads.size() == sums.size() && (parts.empty() || parts.size() == sums.size()),
                  "the lists of tensors differ in length");
  std::vector<Task> tasks;
  int64_t chunks = 0;
  for (size_t i = 0; i < sums.size(); ++i) {  // checks everything before anything is written
    const Entry entry{"sums", "its part and gradient", i};
    Task task{{get(aoti_torch_get_numel, sums[i]), chunks},
              select(part, dtype(sums[i]), dtype(grads[i]), first, i),
              elements_of(sums[i], sums[i], true, entry),
              {},
              elements_of(grads[i], sums[i], false, entry)};
    if (!parts.empty()) {
      STD_TORCH_CHECK(dtype(parts[i]) == dtype(sums[i]), "parts[", i,
                      "] must have the dtype of its sum");
      task.parts = elements_of(parts[i], sums[i], true, entry);
    }
    chunks += chunk_count(task.numel);
    tasks.push_back(std::move(task));
  }
  for_each_chunk(tasks, [&](const Task& task, int64_t begin, int64_t end) {
    alignas(64) char gathered[3][chunk_size * sizeof(double)];
    for (; begin < end; begin += chunk_size) {
      const int64_t stop = std::min(begin + chunk_size, end);
      char* sum = task.sums.read(begin, stop, gathered[0]);
      char* part = task.parts.read(begin, stop, gathered[1]);
      task.add(weight, sum, part, task.grads.read(begin, stop, gathered[2]), stop - begin);
      task.sums.write(begin, stop, sum);
      task.parts.write(begin, stop, part);
    }
  });
}

}  // namespace
}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("accumulate_", rootfree_fused::accumulate_tensors);
}
