// The diagonal updates of update.h on lists of CPU tensors: one parallel region over chunks of them
// all. The last lines register each as the body of its operator.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "isa.h"
#include "lists.h"
#include "operands.h"
#include "update.h"

namespace rootfree_fused {
namespace {

template <class Options>
using Body = void (*)(const Options&, const PerOperand<char*>& data, int64_t begin, int64_t end);

template <class Options>
struct Task : Chunked {
  const Options* options;
  Body<Options> body;
  PerOperand<char*> data;            // STATE1 and PARTS may be null
  StridedAxes<OPERANDS> axes;        // see shared_axes
  PerOperand<int64_t> element_size;  // where there are axes
};

template <class Rule, class P, class G, class T>
ROOTFREE_INLINE void body(const typename Rule::Options& options, const PerOperand<char*>& data,
                          int64_t begin, int64_t end) {
  update_all(Rule(options), reinterpret_cast<P*>(data[PARAM]),
             reinterpret_cast<const G*>(data[GRAD]), reinterpret_cast<T*>(data[STATE0]),
             reinterpret_cast<T*>(data[STATE1]), reinterpret_cast<const T*>(data[PARTS]), begin,
             end);
}

template <class Rule, class P, class G, class T>
Body<typename Rule::Options> compiled_body() {
  return Compiled<body<Rule, P, G, T>>::current();
}

template <template <class> class Rule>
Body<typename Rule<float>::Options> select_body(int32_t param, int32_t grad, int32_t state,
                                                size_t i) {
  using c10::BFloat16;
  using c10::Half;
  using F32 = Rule<float>;
  static const int32_t f64 = aoti_torch_dtype_float64(), f32 = aoti_torch_dtype_float32(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  if (state == f32) {
    if (param == f32 && grad == f32) return compiled_body<F32, float, float, float>();
    if (param == bf16 && grad == bf16) return compiled_body<F32, BFloat16, BFloat16, float>();
    if (param == bf16 && grad == f32) return compiled_body<F32, BFloat16, float, float>();
    if (param == f16 && grad == f16) return compiled_body<F32, Half, Half, float>();
    if (param == f16 && grad == f32) return compiled_body<F32, Half, float, float>();
  }
  if (state == f64) {
    using F64 = Rule<double>;
    if (param == f64 && grad == f64) return compiled_body<F64, double, double, double>();
    if (param == f64 && grad == f32) return compiled_body<F64, double, float, double>();
  }
  STD_TORCH_CHECK(false, "there is no kernel for the dtypes of params[", i,
                  "], its gradient and its state");
}

// The axes from outer to inner in the memory order of the parameter, merged.
StridedAxes<OPERANDS> shared_axes(int64_t dim, const int64_t* sizes,
                                  const PerOperand<const int64_t*>& strides) {
  auto axes = axes_of(dim, sizes, strides);
  std::stable_sort(axes.begin(), axes.end(), [](const auto& a, const auto& b) {
    return a.strides[PARAM] > b.strides[PARAM];
  });
  return merged(axes);
}

// Checks everything, so that an error leaves every tensor as it was. `options` are those of all
// parameters, or one for each.
template <template <class> class Rule, class Options>
std::vector<Task<Options>> plan(const PerOperand<TensorHandles>& lists,
                                const std::vector<Options>& options) {
  const size_t count = lists[PARAM].size();
  PerOperand<bool> there;
  for (int k = 0; k < OPERANDS; ++k) {
    const bool optional = k == PARTS || (k == STATE1 && Rule<float>::required_states == 1);
    there[k] = !optional || !lists[k].empty();
    STD_TORCH_CHECK(!there[k] || lists[k].size() == count, "the lists of tensors differ in length");
  }
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
    for (int k = 0; k < OPERANDS; ++k) {
      if (!there[k]) continue;
      const AtenTensorHandle tensor = lists[k][i];
      STD_TORCH_CHECK(is_cpu(tensor) && get(aoti_torch_get_dim, tensor) == dim &&
                          std::equal(sizes, sizes + dim, get(aoti_torch_get_sizes, tensor)),
                      "params[", i,
                      "], its gradient and its state must be CPU tensors of one shape");
      contiguous = contiguous && get(aoti_torch_is_contiguous, tensor);
      dtypes[k] = dtype(tensor);
      // Through the const pointer a copy-on-write gradient stays shared.
      task.data[k] = static_cast<char*>(
          k == GRAD || k == PARTS ? const_cast<void*>(get(torch_get_const_data_ptr, tensor))
                                  : get(torch_get_mutable_data_ptr, tensor));
    }
    for (int k : {STATE1, PARTS}) {
      STD_TORCH_CHECK(!there[k] || dtypes[STATE0] == dtypes[k],
                      "the states and parts of params[", i, "] differ in dtype");
    }
    task.body = select_body<Rule>(dtypes[PARAM], dtypes[GRAD], dtypes[STATE0], i);
    task.options = &options[options.size() == 1 ? 0 : i];
    task.numel = get(aoti_torch_get_numel, param);
    if (!contiguous) {
      PerOperand<const int64_t*> strides;
      for (int k = 0; k < OPERANDS; ++k) {
        strides[k] = get(aoti_torch_get_strides, there[k] ? lists[k][i] : param);
        task.element_size[k] = there[k] ? aoti_torch_dtype_element_size(dtypes[k]) : 0;
      }
      task.axes = shared_axes(dim, sizes, strides);
      for (const auto& axis : task.axes) {
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
    for (int k = 0; k < OPERANDS; ++k) {
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

// Those of each parameter.
template <class Options>
std::vector<Options> at_steps(const Options& options, AtenTensorHandle steps, size_t count) {
  std::vector<Options> all;
  for (double step : read_steps(steps, count)) {
    all.push_back(options);
    all.back().set_step(step);
  }
  return all;
}

// The body of an operator with the schema of a DiagonalMethod in rootfree_fused/ops/methods.py.
template <template <class> class Rule>
void update_tensors(StableIValue* stack, uint64_t argument_count, uint64_t) {
  using Options = typename Rule<float>::Options;
  constexpr int operands = STATE0 + Rule<float>::states;
  constexpr size_t scalars = std::tuple_size_v<decltype(Options().scalars())>;
  constexpr bool takes_parts = Rule<float>::takes_parts;
  Arguments arguments(stack, argument_count,
                      operands + has_steps<Options> + 1 + scalars + 2 + part_arguments<Options>);
  PerOperand<TensorHandles> lists;
  for (int k = 0; k < operands; ++k) lists[k] = arguments.next_tensors();
  const AtenTensorHandle steps = has_steps<Options> ? arguments.next_optional_tensor() : nullptr;
  const AtenTensorHandle lr = arguments.next_tensor();
  Options options{};
  std::apply([&](auto&... values) { arguments.read_all(values...); }, options.scalars());
  const bool take_step = next_scaling(arguments, options);
  if constexpr (takes_parts) {
    lists[PARTS] = arguments.next_optional_tensors();
    std::apply([&](auto&... values) { arguments.read_all(values...); }, options.part_weights());
  }
  options.lr = read_number(lr, "lr");
  std::vector<Options> all_options{options};
  if constexpr (has_steps<Options>) {
    if (steps) all_options = at_steps(options, steps, lists[PARAM].size());
  }
  const auto tasks = plan<Rule>(lists, all_options);
  if (!take_step) return;
  for_each_chunk(tasks, [](const auto& task, int64_t first, int64_t last) {
    if (task.axes.empty()) {
      task.body(*task.options, task.data, first, last);
    } else {
      run_strided(task, first, last);
    }
  });
}

}  // namespace
}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("rmsprop_", rootfree_fused::update_tensors<rootfree_fused::Rmsprop>);
  m.impl("adamw_", rootfree_fused::update_tensors<rootfree_fused::Adamw>);
  m.impl("sign_", rootfree_fused::update_tensors<rootfree_fused::Sign>);
  m.impl("vector_adam_", rootfree_fused::update_tensors<rootfree_fused::VectorAdam>);
}
