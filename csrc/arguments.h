// The arguments of one operator call, read off the dispatcher's stack in schema order.
#pragma once

#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "update.h"

namespace rootfree_fused {

using TensorHandles = std::vector<AtenTensorHandle>;

// One property of a tensor, by its getter in the stable ABI.
template <class T>
T get(AOTITorchError (*getter)(AtenTensorHandle, T*), AtenTensorHandle tensor) {
  T value;
  TORCH_ERROR_CODE_CHECK(getter(tensor, &value));
  return value;
}

inline int32_t dtype(AtenTensorHandle tensor) { return get(aoti_torch_get_dtype, tensor); }

inline bool is_cpu(AtenTensorHandle tensor) {
  return get(aoti_torch_get_device_type, tensor) == aoti_torch_device_type_cpu();
}

inline double read_number(AtenTensorHandle number, const char* name) {
  const bool is_double = dtype(number) == aoti_torch_dtype_float64();
  STD_TORCH_CHECK(is_cpu(number) && get(aoti_torch_get_numel, number) == 1 &&
                      (is_double || dtype(number) == aoti_torch_dtype_float32()),
                  name, " must be one float32 or float64 on the CPU");
  const void* data = get(torch_get_const_data_ptr, number);
  return is_double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
}

// Owns the tensors. Returning a tensor to Python takes the GIL, and TORCH_BOX would take it once a
// tensor and allocate a shared_ptr for each: half the time of a call on 1,000 small tensors.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count, uint64_t expected) : next_(stack) {
    STD_TORCH_CHECK(count == expected, "the schema has ", count, " arguments, the kernel has ",
                    expected, "; reinstall rootfree_fused");
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    const PyGILState_STATE gil = PyGILState_Ensure();
    for (AtenTensorHandle tensor : owned_) aoti_torch_delete_tensor_object(tensor);
    PyGILState_Release(gil);
  }

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }

  AtenTensorHandle next_tensor() {
    owned_.push_back(next<AtenTensorHandle>());
    return owned_.back();
  }

  // Null for None.
  AtenTensorHandle next_optional_tensor() {
    const auto value = next<std::optional<AtenTensorHandle>>();
    if (!value) return nullptr;
    owned_.push_back(*value);
    return *value;
  }

  TensorHandles next_tensors() {
    return tensors_of(next<StableListHandle>());
  }
  TensorHandles tensors_of(StableListHandle list) {
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    TensorHandles tensors(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      tensors[i] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    owned_.insert(owned_.end(), tensors.begin(), tensors.end());
    return tensors;
  }

  // Empty for None.
  TensorHandles next_optional_tensors() {
    const auto list = next<std::optional<StableListHandle>>();
    return list ? tensors_of(*list) : TensorHandles();
  }

  std::vector<int64_t> next_integers() {
    const auto list = next<StableListHandle>();
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    std::vector<int64_t> integers(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      integers[i] = torch::stable::detail::to<int64_t>(item);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return integers;
  }

  // In the order of the schema.
  void read(double& value) { value = next<double>(); }
  void read(bool& value) { value = next<bool>(); }
  void read(BatchSize& size) { size.value = read_number(next_tensor(), "batch_size"); }
  template <class... Values>
  void read_all(Values&... values) {
    (read(values), ...);
  }

 private:
  StableIValue* next_;
  TensorHandles owned_;
};

}  // namespace rootfree_fused
