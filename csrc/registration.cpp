// The extension module rootfree_fused._C: importing it gives the operators their CPU bodies. Their
// schemas are defined in rootfree_fused/ops.py.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "isa.h"

namespace rootfree_fused {

void rmsprop_(StableIValue* stack, uint64_t argument_count, uint64_t);
void adamw_(StableIValue* stack, uint64_t argument_count, uint64_t);
void ifshampoo_bf16_(StableIValue* stack, uint64_t argument_count, uint64_t);
bool bf16_kernel_runs();

namespace {

std::string cpu_isa() { return isa_names[isa_in_use()]; }

void use_cpu_isa(const std::string& name) {
  for (Isa isa : {BASELINE, AVX2, AVX512, AMX}) {
    if (name == isa_names[isa] && isa_supported(isa)) {
      isa_in_use() = isa;
      return;
    }
  }
  STD_TORCH_CHECK(false, "this machine cannot run ", name);
}

}  // namespace
}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("rmsprop_", rootfree_fused::rmsprop_);
  m.impl("adamw_", rootfree_fused::adamw_);
  m.impl("_ifshampoo_bf16_", rootfree_fused::ifshampoo_bf16_);
}

STABLE_TORCH_LIBRARY_FRAGMENT(rootfree_fused, m) {
  m.def("cpu_isa() -> str");
  m.def("_use_cpu_isa(str isa) -> ()");  // for tests
  m.def("_bf16_kernel_runs() -> bool");
  m.def(
      "_ifshampoo_bf16_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] factors, "
      "Tensor(c!)[] residuals, Tensor(d!)[] factor_momenta, Tensor(e!)[] products, "
      "Tensor(f!)[] momentum_buffers, Tensor lr, *, bool update_factors, bool refresh_products, "
      "float factor_lr, float factor_momentum, float damping, float batch_size, float momentum, "
      "float weight_decay, bool decoupled, bool maximize, float? bound=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rootfree_fused::cpu_isa));
  m.impl("_use_cpu_isa", TORCH_BOX(&rootfree_fused::use_cpu_isa));
  m.impl("_bf16_kernel_runs", TORCH_BOX(&rootfree_fused::bf16_kernel_runs));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
