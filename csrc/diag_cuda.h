// What diag.cu, which nvcc compiles without torch, gives to diag_cuda.cpp.
#pragma once

#include "table.h"

namespace rootfree_fused {

// Dtypes of parameter and gradient.
enum Kind { F32_F32, BF16_BF16, BF16_F32, F16_F16, F16_F32, KINDS };

// Returns what went wrong, or null.
template <class Rule>
const char* launch(const Table<Rule>& table, Kind kind, bool two_states, void* stream);

}  // namespace rootfree_fused
