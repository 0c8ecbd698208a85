// Tensors between float32 and the formats of formats.h, block after block. The last lines register
// the bodies of `pack_` and `unpack_`.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "codecs.h"
#include "lists.h"

namespace rootfree_fused {
namespace {

static_assert(chunk_size % block_size == 0);

struct Task : Chunked {
  Codec codec;
  Elements values, stored, residuals;
  Scales scales;
  Random random;
};

template <bool pack>
void run(const Task& task, int64_t begin, int64_t end) {
  alignas(64) char gathered[3][block_size * sizeof(float)];
  for (; begin < end; begin += block_size) {
    const int64_t stop = std::min(begin + block_size, end), count = stop - begin;
    char* numbers = task.values.read(begin, stop, gathered[0]);
    char* stored = task.stored.read(begin, stop, gathered[1]);
    char* residuals = task.residuals.read(begin, stop, gathered[2]);
    auto* values = reinterpret_cast<float*>(numbers);
    char* beside = residuals ? residuals : task.scales.at(begin);
    if (pack) {
      task.codec.encode(count, values, stored, beside, task.random.from(begin));
      task.stored.write(begin, stop, stored);
      task.residuals.write(begin, stop, residuals);
    } else {
      task.codec.decode(count, values, stored, beside, {});
      task.values.write(begin, stop, numbers);
    }
  }
}

struct Lists {
  TensorHandles stored, beside, values;  // beside may be empty
};

// Checks everything, so that an error leaves every tensor as it was; then with no random numbers.
std::vector<Task> plan(const Lists& lists, bool pack) {
  const auto& [stored, beside, values] = lists;
  STD_TORCH_CHECK(values.size() == stored.size() &&
                      (beside.empty() || beside.size() == stored.size()),
                  "the lists of tensors differ in length");
  std::vector<Task> tasks;
  int64_t chunks = 0;
  for (size_t i = 0; i < stored.size(); ++i) {
    const Entry entry{"stored", "its values and residual", i};
    const AtenTensorHandle other = beside.empty() ? nullptr : beside[i];
    const int32_t format = dtype(stored[i]);
    const bool in_parts = other && format == dtypes().bf16;
    const Codec codec = in_parts ? codec_of_parts(dtype(other)) : codec_of_state(format);
    STD_TORCH_CHECK(codec.decode && has_scales(format) == (other && !in_parts), "stored[", i,
                    "] must be bfloat16, alone or beside int8 or int16, or int8 or uint8 beside "
                    "scales");
    STD_TORCH_CHECK(dtype(values[i]) == dtypes().f32, "values[", i, "] must be float32");
    Task task{{get(aoti_torch_get_numel, stored[i]), chunks},
              codec,
              elements_of(values[i], stored[i], !pack, entry),
              elements_of(stored[i], stored[i], pack, entry),
              {},
              {},
              {}};
    if (in_parts) task.residuals = elements_of(other, stored[i], pack, entry);
    if (has_scales(format)) task.scales = scales_of(other, format, task.numel, entry);
    chunks += chunk_count(task.numel);
    tasks.push_back(std::move(task));
  }
  return tasks;
}

void unpack_tensors(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 3);
  Lists lists;
  lists.values = arguments.next_tensors();
  lists.stored = arguments.next_tensors();
  lists.beside = arguments.next_tensors();
  for_each_chunk(plan(lists, false), run<false>);
}

void pack_tensors(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 8);
  Lists lists;
  lists.stored = arguments.next_tensors();
  lists.beside = arguments.next_tensors();
  lists.values = arguments.next_tensors();
  const size_t count = lists.stored.size();
  const std::vector<double> steps = read_steps(arguments.next_tensor(), count);
  const std::vector<int64_t> seeds = arguments.next_integers(), firsts = arguments.next_integers();
  const auto stream = arguments.next<int64_t>();
  const bool store = next_found_inf(arguments);
  STD_TORCH_CHECK(seeds.size() == count && firsts.size() == count,
                  "seeds and firsts must have one entry for each tensor");
  std::vector<Task> tasks = plan(lists, true);
  for (size_t i = 0; i < count; ++i) {
    tasks[i].random = random_of(seeds[i], static_cast<int64_t>(steps[i]), stream, firsts[i]);
  }
  if (store) for_each_chunk(tasks, run<true>);
}

}  // namespace
}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("pack_", rootfree_fused::pack_tensors);
  m.impl("unpack_", rootfree_fused::unpack_tensors);
}
