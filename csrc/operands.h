// The tensors of one update, and how to walk those that are not dense in one order.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rootfree_fused {

// The lists of tensors in the order of the schemas, the two states as update.h has them.
enum Operand { PARAM, GRAD, STATE0, STATE1, OPERANDS };

template <class T>
using PerOperand = std::array<T, OPERANDS>;

struct StridedAxis {
  int64_t size;
  PerOperand<int64_t> strides;
};

// The axes from outer to inner in the memory order of the parameter, neighbours merged where every
// operand allows it. Empty where every operand is dense in that order.
inline std::vector<StridedAxis> shared_axes(int64_t dim, const int64_t* sizes,
                                            const PerOperand<const int64_t*>& strides) {
  std::vector<StridedAxis> axes;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    axes.push_back(
        {sizes[d], {strides[PARAM][d], strides[GRAD][d], strides[STATE0][d], strides[STATE1][d]}});
  }
  std::stable_sort(axes.begin(), axes.end(), [](const StridedAxis& a, const StridedAxis& b) {
    return a.strides[PARAM] > b.strides[PARAM];
  });
  std::vector<StridedAxis> merged;
  for (const StridedAxis& axis : axes) {
    bool adjacent = !merged.empty();
    for (int k = 0; adjacent && k < OPERANDS; ++k) {
      adjacent = merged.back().strides[k] == axis.size * axis.strides[k];
    }
    if (adjacent) {
      merged.back() = {merged.back().size * axis.size, axis.strides};
    } else {
      merged.push_back(axis);
    }
  }
  if (merged.size() == 1 && merged[0].strides == PerOperand<int64_t>{1, 1, 1, 1}) merged.clear();
  return merged;
}

enum class Copy { GATHER, SCATTER };

// Copies elements [begin, end) of a strided operand to a dense buffer, or back.
template <Copy copy, int64_t element_size>
void copy_elements(char* strided, char* buffer, const std::vector<StridedAxis>& axes, int operand,
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

template <Copy copy>
void copy_elements(int64_t element_size, char* strided, char* buffer,
                   const std::vector<StridedAxis>& axes, int operand, int64_t begin, int64_t end) {
  const auto copy_sized = element_size == 2   ? copy_elements<copy, 2>
                          : element_size == 4 ? copy_elements<copy, 4>
                                              : copy_elements<copy, 8>;
  copy_sized(strided, buffer, axes, operand, begin, end);
}

}  // namespace rootfree_fused
