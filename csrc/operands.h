// The tensors of one update, and how to walk those that are not dense in one order.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rootfree_fused {

// The lists of tensors in the order of the schemas, the two states as update.h has them; last what
// `accumulate_` added up of micro-batches.
enum Operand { PARAM, GRAD, STATE0, STATE1, PARTS, OPERANDS };

template <class T>
using PerOperand = std::array<T, OPERANDS>;

// Of `count` tensors of one shape.
template <size_t count>
struct StridedAxis {
  int64_t size;
  std::array<int64_t, count> strides;
};
template <size_t count>
using StridedAxes = std::vector<StridedAxis<count>>;

template <size_t count>
StridedAxes<count> axes_of(int64_t dim, const int64_t* sizes,
                           const std::array<const int64_t*, count>& strides) {
  StridedAxes<count> axes;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    axes.push_back({sizes[d], {}});
    for (size_t k = 0; k < count; ++k) axes.back().strides[k] = strides[k][d];
  }
  return axes;
}

// With neighbours merged where every tensor allows it. Empty where every one is dense in this
// order.
template <size_t count>
StridedAxes<count> merged(const StridedAxes<count>& axes) {
  StridedAxes<count> merged;
  for (const auto& axis : axes) {
    bool adjacent = !merged.empty();
    for (size_t k = 0; adjacent && k < count; ++k) {
      adjacent = merged.back().strides[k] == axis.size * axis.strides[k];
    }
    if (adjacent) {
      merged.back() = {merged.back().size * axis.size, axis.strides};
    } else {
      merged.push_back(axis);
    }
  }
  std::array<int64_t, count> dense;
  dense.fill(1);
  if (merged.size() == 1 && merged[0].strides == dense) merged.clear();
  return merged;
}

enum class Copy { GATHER, SCATTER };

// Copies elements [begin, end) of a strided operand to a dense buffer, or back.
template <Copy copy, int64_t element_size, size_t count>
void copy_elements(char* strided, char* buffer, const StridedAxes<count>& axes, int operand,
                   int64_t begin, int64_t end) {
  const int64_t inner = axes.back().size, stride = axes.back().strides[operand];
  while (begin < end) {
    int64_t offset = 0, rest = begin;
    for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
      offset += rest % axis->size * axis->strides[operand];
      rest /= axis->size;
    }
    const int64_t run = std::min(end - begin, inner - begin % inner);
    for (int64_t i = 0; i < run; ++i, buffer += element_size) {
      char* element = strided + (offset + i * stride) * element_size;
      if (copy == Copy::GATHER) {
        std::memcpy(buffer, element, element_size);
      } else {
        std::memcpy(element, buffer, element_size);
      }
    }
    begin += run;
  }
}

template <Copy copy, size_t count>
void copy_elements(int64_t element_size, char* strided, char* buffer,
                   const StridedAxes<count>& axes, int operand, int64_t begin, int64_t end) {
  const auto copy_sized = element_size == 1   ? copy_elements<copy, 1, count>
                          : element_size == 2 ? copy_elements<copy, 2, count>
                          : element_size == 4 ? copy_elements<copy, 4, count>
                                              : copy_elements<copy, 8, count>;
  copy_sized(strided, buffer, axes, operand, begin, end);
}

}  // namespace rootfree_fused
