// Root-free RMSProp and AdamW on lists of CUDA tensors: the update of update.h, the tensors in the
// kernel's arguments.
//
// Dtypes: params float32, bfloat16 or float16, rounded once, at the write; grads as the parameter
// or float32, never written; state float32. Bytes a parameter in float32: 28, without momentum
// buffers 20; in bfloat16 22 and 14.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "diag_cuda.h"

namespace rootfree_fused {
namespace {

template <bool two_states, class P, class G, class Rule>
__global__ void __launch_bounds__(threads_per_chunk)
    diag_kernel(const __grid_constant__ Table<Rule> table) {
  update_chunk<two_states, P, G>(table, blockIdx.x, threadIdx.x);
}

template <bool two_states, class Rule>
const void* select_kernel(Kind kind) {
  const void* kernels[KINDS] = {
      reinterpret_cast<const void*>(diag_kernel<two_states, float, float, Rule>),
      reinterpret_cast<const void*>(diag_kernel<two_states, __nv_bfloat16, __nv_bfloat16, Rule>),
      reinterpret_cast<const void*>(diag_kernel<two_states, __nv_bfloat16, float, Rule>),
      reinterpret_cast<const void*>(diag_kernel<two_states, __half, __half, Rule>),
      reinterpret_cast<const void*>(diag_kernel<two_states, __half, float, Rule>),
  };
  return kernels[kind];
}

}  // namespace

template <class Rule>
const char* launch(const Table<Rule>& table, Kind kind, bool two_states, void* stream) {
  const void* kernel = select_kernel<true, Rule>(kind);
  if constexpr (!Rule::needs_state1) {
    if (!two_states) kernel = select_kernel<false, Rule>(kind);
  }
  void* arguments[] = {const_cast<Table<Rule>*>(&table)};
  const cudaError_t error = cudaLaunchKernel(kernel, table.chunk_count, threads_per_chunk,
                                             arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* launch(const Table<Rmsprop<float>>&, Kind, bool, void*);
template const char* launch(const Table<Adamw<float>>&, Kind, bool, void*);

}  // namespace rootfree_fused
