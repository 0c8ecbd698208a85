// The tensors of one bucket as matrices, checked before any is written.
#pragma once

#if defined(__x86_64__)
#include "arguments.h"
#include "tasks.h"

namespace rootfree_fused {

template <class T>
T* data(AtenTensorHandle tensor, int32_t expected, int64_t numel, const char* name) {
  STD_TORCH_CHECK(is_cpu(tensor) && dtype(tensor) == expected &&
                      get(aoti_torch_get_numel, tensor) == numel &&
                      get(aoti_torch_is_contiguous, tensor),
                  name, " must be contiguous CPU tensors of ", numel, " elements and their dtype");
  return static_cast<T*>(get(torch_get_mutable_data_ptr, tensor));
}

// The one switch on a dtype: a pointer to numbers of that type.
template <class Pointer, class Void>
Pointer typed(int32_t dtype, Void* data) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  if (dtype == f32) return static_cast<std::variant_alternative_t<0, Pointer>>(data);
  if (dtype == bf16) return static_cast<std::variant_alternative_t<1, Pointer>>(data);
  if (dtype == f16) return static_cast<std::variant_alternative_t<2, Pointer>>(data);
  STD_TORCH_CHECK(false, "parameters and gradients must be float32, bfloat16 or float16");
}

// What every method has: one tensor a matrix, and stacks, one an axis.
struct FactorLists {
  TensorHandles params, grads, buffers;
  TensorHandles factors, residuals, products;
};

// Their matrices, without what only one method has; `sizes` of their axes.
template <class Matrix>
std::vector<Matrix> matrices_of(const FactorLists& lists, const std::vector<int64_t>& sizes) {
  static const int32_t bf16 = aoti_torch_dtype_bfloat16(), i16 = aoti_torch_dtype_int16();
  const int64_t count = lists.params.size();
  for (const TensorHandles* list : {&lists.factors, &lists.residuals, &lists.products}) {
    STD_TORCH_CHECK(list->size() == 2, "a matrix has two axes");
  }
  STD_TORCH_CHECK(lists.grads.size() == lists.params.size() &&
                      (lists.buffers.empty() || lists.buffers.size() == lists.params.size()),
                  "the lists of tensors differ in length");
  std::vector<Matrix> matrices(count);
  STD_TORCH_CHECK(sizes.size() == 2, "a matrix has two axes");
  for (int k : {0, 1}) {
    const int64_t dim = get(aoti_torch_get_dim, lists.factors[k]);
    STD_TORCH_CHECK(dim == 3 || dim == 4,
                    "factors must be (matrices, d, d) or (matrices, blocks, b, b)");
    const int64_t side = get(aoti_torch_get_sizes, lists.factors[k])[dim - 1];
    const int64_t blocks = dim == 3 ? 1 : get(aoti_torch_get_sizes, lists.factors[k])[1];
    STD_TORCH_CHECK(ceil_div(sizes[k], side) == blocks &&
                        (dim == 3 ? side == sizes[k] : side % strip_size == 0),
                    "the blocks of a factor must be multiples of ", strip_size,
                    " and cover their axis");
    const int64_t each = blocks * side * side;
    auto* factor = data<BFloat16>(lists.factors[k], bf16, count * each, "factors");
    auto* residual = data<int16_t>(lists.residuals[k], i16, count * each, "residuals");
    const bool cached = get(aoti_torch_get_numel, lists.products[k]) != 0;
    auto* product =
        cached ? data<BFloat16>(lists.products[k], bf16, count * each, "products") : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      FactorAxis& axis = matrices[i].axis(k);
      const int64_t first = i * each;
      axis.size = sizes[k];
      axis.side = side;
      axis.on_rows = k == 0;
      axis.cached = cached;
      axis.factor = factor + first;
      axis.product = cached ? product + first : nullptr;
      axis.residual = residual + first;
    }
  }
  const int64_t numel = sizes[0] * sizes[1];
  for (int64_t i = 0; i < count; ++i) {
    Matrix& m = matrices[i];
    const AtenTensorHandle param = lists.params[i], grad = lists.grads[i];
    m.param =
        typed<ParamPointer>(dtype(param), data<void>(param, dtype(param), numel, "parameters"));
    m.momentum_buffer =
        lists.buffers.empty()
            ? nullptr
            : data<float>(lists.buffers[i], aoti_torch_dtype_float32(), numel, "momentum buffers");
    STD_TORCH_CHECK(is_cpu(grad) && get(aoti_torch_get_numel, grad) == numel &&
                        get(aoti_torch_is_contiguous, grad),
                    "gradients must be contiguous CPU tensors of the parameters' shapes");
    m.grad = typed<GradPointer>(dtype(grad), get(torch_get_const_data_ptr, grad));
  }
  return matrices;
}

// A stack beside the factors of each axis, by its pointer in an axis: of `expected` numbers.
template <class Matrix, class Axis, class T>
void add_stacks(std::vector<Matrix>& matrices, const TensorHandles& stacks, T* Axis::*member,
                int32_t expected, const char* name) {
  STD_TORCH_CHECK(stacks.size() == 2, "a matrix has two axes");
  const int64_t count = matrices.size();
  for (int k = 0; k < 2 && count; ++k) {
    const FactorAxis& axis = matrices[0].axis(k);
    const int64_t each = ceil_div(axis.size, axis.side) * axis.side * axis.side;
    T* stack = data<T>(stacks[k], expected, count * each, name);
    for (int64_t i = 0; i < count; ++i) matrices[i].axis(k).*member = stack + i * each;
  }
}

}  // namespace rootfree_fused
#endif
