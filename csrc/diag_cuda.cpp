// The extension module rootfree_fused._C_cuda: operators with the signatures of rmsprop_ and adamw_
// in ops.py but for grad_scale and found_inf, on lists of CUDA tensors. Nothing calls them but the
// benchmarks: whether they beat the Triton kernels has not been measured.
#include <Python.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "arguments.h"
#include "diag_cuda.h"
#include "operands.h"
#include "update.h"

namespace rootfree_fused {
namespace {

using RowsOfKind = std::array<std::vector<Row>, KINDS>;

bool is_cuda(AtenTensorHandle tensor) {
  return get(aoti_torch_get_device_type, tensor) == aoti_torch_device_type_cuda();
}

bool is_on(int32_t device, AtenTensorHandle tensor) {
  return is_cuda(tensor) && get(aoti_torch_get_device_index, tensor) == device;
}

Kind select_kind(int32_t param, int32_t grad, size_t i) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  if (param == f32 && grad == f32) return F32_F32;
  if (param == bf16 && grad == bf16) return BF16_BF16;
  if (param == bf16 && grad == f32) return BF16_F32;
  if (param == f16 && grad == f16) return F16_F16;
  if (param == f16 && grad == f32) return F16_F32;
  STD_TORCH_CHECK(false, "there is no kernel for the dtypes of params[", i,
                  "] and its gradient; pass float32, bfloat16 or float16 parameters with gradients "
                  "of their dtype or float32");
}

// Checks everything, so that an error leaves every tensor as it was.
RowsOfKind plan(const PerOperand<TensorHandles>& lists, bool two_states, int32_t device) {
  const size_t count = lists[PARAM].size();
  STD_TORCH_CHECK(lists[GRAD].size() == count && lists[STATE0].size() == count &&
                      (!two_states || lists[STATE1].size() == count),
                  "the lists of tensors differ in length");
  RowsOfKind rows;
  for (size_t i = 0; i < count; ++i) {
    const AtenTensorHandle param = lists[PARAM][i];
    const int64_t dim = get(aoti_torch_get_dim, param);
    const int64_t* sizes = get(aoti_torch_get_sizes, param);
    Row row{};
    bool contiguous = true;
    PerOperand<const int64_t*> strides;
    strides.fill(get(aoti_torch_get_strides, param));
    for (int k = 0; k < (two_states ? OPERANDS : STATE1); ++k) {
      const AtenTensorHandle tensor = lists[k][i];
      STD_TORCH_CHECK(is_on(device, tensor) && get(aoti_torch_get_dim, tensor) == dim &&
                          std::equal(sizes, sizes + dim, get(aoti_torch_get_sizes, tensor)),
                      "params[", i, "], its gradient and its state must have one shape and lie on "
                      "the CUDA device of params[0]");
      STD_TORCH_CHECK(k < STATE0 || dtype(tensor) == aoti_torch_dtype_float32(),
                      "the state of params[", i, "] must be float32");
      contiguous = contiguous && get(aoti_torch_is_contiguous, tensor);
      strides[k] = get(aoti_torch_get_strides, tensor);
      // Through the const pointer a copy-on-write gradient stays shared.
      row.data[k] = static_cast<char*>(
          k == GRAD ? const_cast<void*>(get(torch_get_const_data_ptr, tensor))
                    : get(torch_get_mutable_data_ptr, tensor));
    }
    row.numel = get(aoti_torch_get_numel, param);
    row.place = static_cast<uint32_t>(i);
    const Kind kind = select_kind(dtype(param), dtype(lists[GRAD][i]), i);
    if (row.numel == 0) continue;
    STD_TORCH_CHECK(contiguous || shared_axes(dim, sizes, strides).empty(), "params[", i,
                    "], its gradient and its state must be dense in one memory order; copy them, "
                    "or call the operator without _cuda, which does");
    rows[kind].push_back(row);
  }
  return rows;
}

// A lr on the CPU goes into the options; one on the device is read there, by every replay of a
// captured graph too.
template <class Rule>
std::unique_ptr<Table<Rule>> make_table(typename Rule::Options& options, AtenTensorHandle lr,
                                        int32_t device) {
  if (!is_cuda(lr)) {
    options.lr = read_number(lr, "lr");
    return std::make_unique<Table<Rule>>(Rule(options));
  }
  options.lr = 1;
  auto table = std::make_unique<Table<Rule>>(Rule(options));
  const bool is_double = dtype(lr) == aoti_torch_dtype_float64();
  STD_TORCH_CHECK(is_on(device, lr) && get(aoti_torch_get_numel, lr) == 1 &&
                      (is_double || dtype(lr) == aoti_torch_dtype_float32()),
                  "lr must be one float32 or float64 on the CPU or the parameters' device");
  const void* data = get(torch_get_const_data_ptr, lr);
  if (is_double) {
    table->lr_double = static_cast<const double*>(data);
  } else {
    table->lr_float = static_cast<const float*>(data);
  }
  return table;
}

template <class Rule>
void run(Table<Rule>& table, const RowsOfKind& rows, bool two_states, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (int kind = 0; kind < KINDS; ++kind) {
    launch_tables(table, rows[kind], [&](const Table<Rule>& full) {
      const char* error = launch(full, static_cast<Kind>(kind), two_states, stream);
      STD_TORCH_CHECK(!error, "CUDA cannot launch the kernel: ", error);
    });
  }
}

int32_t device_of(const TensorHandles& params) {
  STD_TORCH_CHECK(!params.empty() && is_cuda(params[0]), "params must be CUDA tensors");
  return get(aoti_torch_get_device_index, params[0]);
}

}  // namespace

void rmsprop_cuda_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 12);
  PerOperand<TensorHandles> lists;
  for (auto& list : lists) list = arguments.next_tensors();
  const AtenTensorHandle lr = arguments.next_tensor();
  RmspropOptions options = next_rmsprop_options(arguments);
  const int32_t device = device_of(lists[PARAM]);
  const bool two_states = !lists[STATE1].empty();
  const RowsOfKind rows = plan(lists, two_states, device);
  run(*make_table<Rmsprop<float>>(options, lr, device), rows, two_states, device);
}

void adamw_cuda_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 12);
  PerOperand<TensorHandles> lists;
  for (auto& list : lists) list = arguments.next_tensors();
  const AtenTensorHandle steps = arguments.next_optional_tensor();
  const AtenTensorHandle lr = arguments.next_tensor();
  AdamwOptions options = next_adamw_options(arguments);
  const int32_t device = device_of(lists[PARAM]);
  const RowsOfKind rows = plan(lists, true, device);
  const auto table = make_table<Adamw<float>>(options, lr, device);
  if (steps) {
    const auto count = static_cast<int64_t>(lists[PARAM].size());
    STD_TORCH_CHECK(is_on(device, steps) && dtype(steps) == aoti_torch_dtype_float32() &&
                        get(aoti_torch_get_dim, steps) == 1 &&
                        get(aoti_torch_get_numel, steps) == count &&
                        get(aoti_torch_is_contiguous, steps),
                    "steps must be a contiguous 1-D float32 tensor on the parameters' device, with "
                    "one entry for each; an optimizer with capturable=True keeps it there");
    table->steps = static_cast<const float*>(get(torch_get_const_data_ptr, steps));
    table->log_beta1 = static_cast<float>(std::log(options.beta1));
    table->log_beta2 = static_cast<float>(std::log(options.beta2));
  }
  run(*table, rows, true, device);
}

}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_FRAGMENT(rootfree_fused, m) {
  m.def(
      "_rmsprop_cuda_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, "
      "Tensor(c!)[] momentum_buffers, Tensor lr, *, float alpha, float damping, "
      "float weight_decay, float momentum, Tensor batch_size, bool decoupled, bool maximize) -> ()");
  m.def(
      "_adamw_cuda_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor? steps, Tensor lr, *, float beta1, float beta2, "
      "float damping, float weight_decay, Tensor batch_size, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CUDA, m) {
  m.impl("_rmsprop_cuda_", rootfree_fused::rmsprop_cuda_);
  m.impl("_adamw_cuda_", rootfree_fused::adamw_cuda_);
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
