// The extension module rootfree_fused._C: importing it gives the operators their CPU bodies, which
// diag.cpp, lowbit.cpp, packing.cpp, matrix.cpp and rootfree_shampoo.cpp register.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "isa.h"

namespace rootfree_fused {
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

STABLE_TORCH_LIBRARY_FRAGMENT(rootfree_fused, m) {
  m.def("cpu_isa() -> str");
  m.def("_use_cpu_isa(str isa) -> ()");  // for tests
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rootfree_fused::cpu_isa));
  m.impl("_use_cpu_isa", TORCH_BOX(&rootfree_fused::use_cpu_isa));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
