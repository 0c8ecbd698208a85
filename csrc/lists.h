// What the operators on lists of tensors share: scalars of a call, and threads on chunks of them
// all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace rootfree_fused {

// Threads split at multiples of a chunk, so that whether an element is in a vector or in a tail,
// and with which others it is in a block, is the same for every number of them. Strided operands
// are gathered a chunk at a time.
constexpr int64_t chunk_size = 1024;
// Fewer elements are not worth waking a thread for; ATen's grain size.
constexpr int64_t min_elements_per_thread = 32768;

inline int64_t chunk_count(int64_t numel) { return (numel + chunk_size - 1) / chunk_size; }

// What a task is of, and where its chunks are among those of all.
struct Chunked {
  int64_t numel, first_chunk;
};

// Gives all elements to `body(task, first, last)`, in one parallel region. Each Task is Chunked.
template <class Task, class Body>
void for_each_chunk(const std::vector<Task>& tasks, const Body& body) {
  if (tasks.empty()) return;
  const int64_t chunks = tasks.back().first_chunk + chunk_count(tasks.back().numel);
  int64_t elements = 0;
  for (const auto& task : tasks) elements += task.numel;
  // In chunks as full as these are on average.
  const int64_t grain_size = chunks * min_elements_per_thread / std::max<int64_t>(elements, 1);
  torch::stable::parallel_for(0, chunks, grain_size, [&](int64_t begin, int64_t end) {
    const auto before = [](int64_t chunk, const auto& task) { return chunk < task.first_chunk; };
    auto task = std::upper_bound(tasks.begin(), tasks.end(), begin, before) - 1;
    for (; task != tasks.end() && task->first_chunk < end; ++task) {
      const int64_t first = std::max<int64_t>(0, begin - task->first_chunk) * chunk_size;
      const int64_t last = std::min(task->numel, (end - task->first_chunk) * chunk_size);
      body(*task, first, last);
    }
  });
}

// The step of each parameter.
inline std::vector<double> read_steps(AtenTensorHandle steps, size_t count) {
  STD_TORCH_CHECK(is_cpu(steps) && dtype(steps) == aoti_torch_dtype_float32() &&
                      get(aoti_torch_get_dim, steps) == 1 &&
                      get(aoti_torch_get_numel, steps) == static_cast<int64_t>(count),
                  "steps must be a 1-D float32 CPU tensor with one entry for each parameter");
  const auto* data = static_cast<const float*>(get(torch_get_const_data_ptr, steps));
  const int64_t stride = *get(aoti_torch_get_strides, steps);
  std::vector<double> all(count);
  for (size_t i = 0; i < count; ++i) {
    all[i] = data[i * stride];
    STD_TORCH_CHECK(std::abs(all[i]) <= 0x1p62, "steps[", i, "] must be a number of steps");
  }
  return all;
}

// Reads the infs that a gradient scaler found; false where the step is to be skipped.
inline bool next_found_inf(Arguments& arguments) {
  const AtenTensorHandle found_inf = arguments.next_optional_tensor();
  return !found_inf || read_number(found_inf, "found_inf") == 0;
}

// The same with the scale before it.
template <class Options>
bool next_scaling(Arguments& arguments, Options& options) {
  const AtenTensorHandle grad_scale = arguments.next_optional_tensor();
  if (grad_scale) options.grad_scale = read_number(grad_scale, "grad_scale");
  return next_found_inf(arguments);
}

// What the schema has after the scaler's tensors, for rules that take parts of micro-batches.
template <class Options>
constexpr size_t part_arguments = [] {
  if constexpr (requires(Options options) { options.part_weights(); }) {
    return 1 + std::tuple_size_v<decltype(Options().part_weights())>;
  }
  return size_t(0);
}();

// Whether the rules of these options may depend on the number of steps.
template <class Options>
constexpr bool has_steps = requires(Options options) { options.set_step(1.0); };

}  // namespace rootfree_fused
