// csrc/diag_cuda.cpp on CPU tensors: a launch runs every thread of every block in turn. Compiled
// with -Drootfree_fused=rootfree_fused_emulated, so that the real operators can stand beside it.
#include <Python.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "arguments.h"
#include "diag_cuda.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define CUDA CPU
#define DeviceGuard NoGuard
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, 0)
#include "diag_cuda.cpp"

// -fsanitize=alignment calls it: a GPU faults where this CPU does not.
static bool misaligned = false;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { misaligned = true; }

namespace rootfree_fused {

template <bool two_states, class P, class G, class Rule>
void run_grid(const Table<Rule>& table) {
  for (uint32_t chunk = 0; chunk < table.chunk_count; ++chunk) {
    for (int thread = 0; thread < threads_per_chunk; ++thread) {
      update_chunk<two_states, P, G>(table, chunk, thread);
    }
  }
}

template <bool two_states, class Rule>
void run_grid(const Table<Rule>& table, Kind kind) {
  using c10::BFloat16;
  using c10::Half;
  if (kind == F32_F32) run_grid<two_states, float, float>(table);
  if (kind == BF16_BF16) run_grid<two_states, BFloat16, BFloat16>(table);
  if (kind == BF16_F32) run_grid<two_states, BFloat16, float>(table);
  if (kind == F16_F16) run_grid<two_states, Half, Half>(table);
  if (kind == F16_F32) run_grid<two_states, Half, float>(table);
}

template <class Rule>
const char* launch(const Table<Rule>& table, Kind kind, bool two_states, void*) {
  misaligned = false;
  two_states ? run_grid<true>(table, kind) : run_grid<false>(table, kind);
  return misaligned ? "misaligned access" : nullptr;
}

}  // namespace rootfree_fused
