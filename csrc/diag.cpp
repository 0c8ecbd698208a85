// The diagonal updates of update.h on lists of CPU tensors: one parallel region over chunks of them
// all. The last lines register each as the body of its operator.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "isa.h"
#include "operands.h"
#include "update.h"

namespace rootfree_fused {
namespace {

// Threads split at multiples of a chunk, so that whether an element is in a vector or in a tail is
// the same for every number of them. Strided operands are gathered a chunk at a time.
constexpr int64_t chunk_size = 1024;
// Fewer elements are not worth waking a thread for; ATen's grain size.
constexpr int64_t min_elements_per_thread = 32768;

template <class Options>
using Body = void (*)(const Options&, const PerOperand<char*>& data, int64_t begin, int64_t end);

template <class Options>
struct Task {
  const Options* options;
  Body<Options> body;
  PerOperand<char*> data;  // STATE1 may be null
  int64_t numel, first_chunk;
  std::vector<StridedAxis> axes;     // see shared_axes
  PerOperand<int64_t> element_size;  // where there are axes
};

template <bool two_states, class Rule, class P, class G, class T>
ROOTFREE_INLINE void update_each(const Rule& rule, P* param, const G* grad, T* state0, T* state1,
                                 int64_t begin, int64_t end) {
  ROOTFREE_INDEPENDENT_ITERATIONS
  for (int64_t i = begin; i < end; ++i) {
    T p = static_cast<T>(param[i]), s0 = state0[i], s1 = two_states ? state1[i] : T(0);
    update(rule, p, static_cast<T>(grad[i]), s0, s1);
    param[i] = static_cast<P>(p);
    state0[i] = s0;
    if (two_states) state1[i] = s1;
  }
}

template <class Rule, class P, class G, class T>
struct Bodies {
  using Options = typename Rule::Options;
  using Data = PerOperand<char*>;

  static ROOTFREE_INLINE void body(const Options& options, const Data& data, int64_t begin,
                                   int64_t end) {
    const Rule rule(options);
    auto* param = reinterpret_cast<P*>(data[PARAM]);
    auto* grad = reinterpret_cast<const G*>(data[GRAD]);
    auto* state0 = reinterpret_cast<T*>(data[STATE0]);
    auto* state1 = reinterpret_cast<T*>(data[STATE1]);
    if (Rule::required_states == 2 || state1) {
      update_each<true>(rule, param, grad, state0, state1, begin, end);
    } else {
      update_each<false>(rule, param, grad, state0, state1, begin, end);
    }
  }
  static void baseline(const Options& options, const Data& data, int64_t begin, int64_t end) {
    body(options, data, begin, end);
  }
  ROOTFREE_AVX2
  static void avx2(const Options& options, const Data& data, int64_t begin, int64_t end) {
    body(options, data, begin, end);
  }
  ROOTFREE_AVX512
  static void avx512(const Options& options, const Data& data, int64_t begin, int64_t end) {
    body(options, data, begin, end);
  }
  static Body<Options> current() {
    constexpr Body<Options> bodies[ISA_COUNT] = {baseline, avx2, avx512, avx512};
    return bodies[isa_in_use()];
  }
};

template <template <class> class Rule>
Body<typename Rule<float>::Options> select_body(int32_t param, int32_t grad, int32_t state,
                                                size_t i) {
  using c10::BFloat16;
  using c10::Half;
  using F32 = Rule<float>;
  static const int32_t f64 = aoti_torch_dtype_float64(), f32 = aoti_torch_dtype_float32(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  if (state == f32) {
    if (param == f32 && grad == f32) return Bodies<F32, float, float, float>::current();
    if (param == bf16 && grad == bf16) return Bodies<F32, BFloat16, BFloat16, float>::current();
    if (param == bf16 && grad == f32) return Bodies<F32, BFloat16, float, float>::current();
    if (param == f16 && grad == f16) return Bodies<F32, Half, Half, float>::current();
    if (param == f16 && grad == f32) return Bodies<F32, Half, float, float>::current();
  }
  if (state == f64) {
    using F64 = Rule<double>;
    if (param == f64 && grad == f64) return Bodies<F64, double, double, double>::current();
    if (param == f64 && grad == f32) return Bodies<F64, double, float, double>::current();
  }
  STD_TORCH_CHECK(false, "there is no kernel for the dtypes of params[", i,
                  "], its gradient and its state");
}

int64_t chunk_count(int64_t numel) { return (numel + chunk_size - 1) / chunk_size; }

// Checks everything, so that an error leaves every tensor as it was. `options` are those of all
// parameters, or one for each.
template <template <class> class Rule, class Options>
std::vector<Task<Options>> plan(const PerOperand<TensorHandles>& lists,
                                const std::vector<Options>& options) {
  const size_t count = lists[PARAM].size();
  const bool has_state1 = Rule<float>::required_states == 2 || !lists[STATE1].empty();
  STD_TORCH_CHECK(lists[GRAD].size() == count && lists[STATE0].size() == count &&
                      (!has_state1 || lists[STATE1].size() == count),
                  "the lists of tensors differ in length");
  std::vector<Task<Options>> tasks;
  tasks.reserve(count);
  int64_t chunks = 0;
  for (size_t i = 0; i < count; ++i) {
    const AtenTensorHandle param = lists[PARAM][i];
    const int64_t dim = get(aoti_torch_get_dim, param);
    const int64_t* sizes = get(aoti_torch_get_sizes, param);
    Task<Options> task{};
    PerOperand<int32_t> dtypes{};
    bool contiguous = true;
    for (int k = 0; k < (has_state1 ? OPERANDS : STATE1); ++k) {
      const AtenTensorHandle tensor = lists[k][i];
      STD_TORCH_CHECK(is_cpu(tensor) && get(aoti_torch_get_dim, tensor) == dim &&
                          std::equal(sizes, sizes + dim, get(aoti_torch_get_sizes, tensor)),
                      "params[", i,
                      "], its gradient and its state must be CPU tensors of one shape");
      contiguous = contiguous && get(aoti_torch_is_contiguous, tensor);
      dtypes[k] = dtype(tensor);
      // Through the const pointer a copy-on-write gradient stays shared.
      task.data[k] =
          static_cast<char*>(k == GRAD ? const_cast<void*>(get(torch_get_const_data_ptr, tensor))
                                       : get(torch_get_mutable_data_ptr, tensor));
    }
    STD_TORCH_CHECK(!has_state1 || dtypes[STATE0] == dtypes[STATE1], "the states of params[", i,
                    "] differ in dtype");
    task.body = select_body<Rule>(dtypes[PARAM], dtypes[GRAD], dtypes[STATE0], i);
    task.options = &options[options.size() == 1 ? 0 : i];
    task.numel = get(aoti_torch_get_numel, param);
    if (!contiguous) {
      PerOperand<const int64_t*> strides;
      for (int k = 0; k < OPERANDS; ++k) {
        const bool missing = k == STATE1 && !has_state1;
        strides[k] = get(aoti_torch_get_strides, missing ? param : lists[k][i]);
        task.element_size[k] = missing ? 0 : aoti_torch_dtype_element_size(dtypes[k]);
      }
      task.axes = shared_axes(dim, sizes, strides);
      for (const StridedAxis& axis : task.axes) {
        STD_TORCH_CHECK(axis.strides[PARAM] && axis.strides[STATE0] && axis.strides[STATE1],
                        "params[", i, "] or its state is expanded: elements share their memory");
      }
    }
    task.first_chunk = chunks;
    chunks += chunk_count(task.numel);
    tasks.push_back(std::move(task));
  }
  return tasks;
}

template <class Options>
void run_strided(const Task<Options>& task, int64_t begin, int64_t end) {
  alignas(64) char buffers[OPERANDS][chunk_size * sizeof(double)];
  PerOperand<char*> dense;
  for (int k = 0; k < OPERANDS; ++k) dense[k] = task.data[k] ? buffers[k] : nullptr;
  for (; begin < end; begin += chunk_size) {
    const int64_t stop = std::min(end, begin + chunk_size);
    for (int k : {PARAM, GRAD, STATE0, STATE1}) {
      if (!dense[k]) continue;
      copy_elements<Copy::GATHER>(task.element_size[k], task.data[k], dense[k], task.axes, k, begin,
                                  stop);
    }
    task.body(*task.options, dense, 0, stop - begin);
    for (int k : {PARAM, STATE0, STATE1}) {
      if (!dense[k]) continue;
      copy_elements<Copy::SCATTER>(task.element_size[k], task.data[k], dense[k], task.axes, k,
                                   begin, stop);
    }
  }
}

template <class Options>
void run(const std::vector<Task<Options>>& tasks) {
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
      if (task->axes.empty()) {
        task->body(*task->options, task->data, first, last);
      } else {
        run_strided(*task, first, last);
      }
    }
  });
}

// Those of each parameter.
template <class Options>
std::vector<Options> at_steps(const Options& options, AtenTensorHandle steps, size_t count) {
  STD_TORCH_CHECK(is_cpu(steps) && dtype(steps) == aoti_torch_dtype_float32() &&
                      get(aoti_torch_get_dim, steps) == 1 &&
                      get(aoti_torch_get_numel, steps) == static_cast<int64_t>(count),
                  "steps must be a 1-D float32 CPU tensor with one entry for each parameter");
  const auto* data = static_cast<const float*>(get(torch_get_const_data_ptr, steps));
  const int64_t stride = *get(aoti_torch_get_strides, steps);
  std::vector<Options> all(count, options);
  for (size_t i = 0; i < count; ++i) all[i].set_step(data[i * stride]);
  return all;
}

// Reads the scale and the infs of a gradient scaler; false where the step is to be skipped.
template <class Options>
bool next_scaling(Arguments& arguments, Options& options) {
  const AtenTensorHandle grad_scale = arguments.next_optional_tensor();
  const AtenTensorHandle found_inf = arguments.next_optional_tensor();
  if (grad_scale) options.grad_scale = read_number(grad_scale, "grad_scale");
  return !found_inf || read_number(found_inf, "found_inf") == 0;
}

// The body of an operator with the schema of a DiagonalMethod in rootfree_fused/ops/methods.py.
template <template <class> class Rule>
void update_tensors(StableIValue* stack, uint64_t argument_count, uint64_t) {
  using Options = typename Rule<float>::Options;
  constexpr int operands = STATE0 + Rule<float>::states;
  constexpr bool has_steps = requires(Options o) { o.set_step(1.0); };
  constexpr size_t scalars = std::tuple_size_v<decltype(Options().scalars())>;
  Arguments arguments(stack, argument_count, operands + has_steps + 1 + scalars + 2);
  PerOperand<TensorHandles> lists;
  for (int k = 0; k < operands; ++k) lists[k] = arguments.next_tensors();
  const AtenTensorHandle steps = has_steps ? arguments.next_optional_tensor() : nullptr;
  const AtenTensorHandle lr = arguments.next_tensor();
  Options options{};
  std::apply([&](auto&... values) { arguments.read_all(values...); }, options.scalars());
  const bool take_step = next_scaling(arguments, options);
  options.lr = read_number(lr, "lr");
  std::vector<Options> all_options{options};
  if constexpr (has_steps) {
    if (steps) all_options = at_steps(options, steps, lists[PARAM].size());
  }
  const auto tasks = plan<Rule>(lists, all_options);
  if (take_step) run(tasks);
}

}  // namespace
}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("rmsprop_", rootfree_fused::update_tensors<rootfree_fused::Rmsprop>);
  m.impl("adamw_", rootfree_fused::update_tensors<rootfree_fused::Adamw>);
  m.impl("vector_adam_", rootfree_fused::update_tensors<rootfree_fused::VectorAdam>);
}
