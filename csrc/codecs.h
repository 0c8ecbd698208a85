// How one tensor in a format of formats.h is walked: block after block, each by the code for the
// instruction set in use.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arguments.h"
#include "formats.h"
#include "isa.h"
#include "operands.h"

namespace rootfree_fused {

// What is run of a block, for the instruction set in use: without tails where the block is whole.
template <auto function>
struct OfBlock;

template <class... Arguments, void (*function)(int64_t count, Arguments...)>
struct OfBlock<function> {
  static ROOTFREE_INLINE void run(int64_t count, Arguments... arguments) {
    if (count == block_size) {
      function(block_size, arguments...);
    } else {
      function(count, arguments...);
    }
  }
  static auto current() { return Compiled<run>::current(); }
};

// Of one block; in registers, since a struct would be read before it is written.
using Code = void (*)(int64_t count, float* values, char* stored, char* beside, Random random);

// Nulls: of float32, which stays where it is.
struct Codec {
  Code decode = nullptr, encode = nullptr;
};

template <void (*function)(int64_t count, Block)>
ROOTFREE_INLINE void code(int64_t count, float* values, char* stored, char* beside, Random random) {
  function(count, {values, stored, beside, random});
}

template <class Format>
Codec codec_of() {
  return {OfBlock<code<Format::decode>>::current(), OfBlock<code<Format::encode>>::current()};
}

struct Dtypes {
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
          f16 = aoti_torch_dtype_float16(), i8 = aoti_torch_dtype_int8(),
          i16 = aoti_torch_dtype_int16(), u8 = aoti_torch_dtype_uint8();
};

inline const Dtypes& dtypes() {
  static const Dtypes all;
  return all;
}

// Of what has no residual beside it; nulls for a dtype that is no format of state.
inline Codec codec_of_state(int32_t state) {
  if (state == dtypes().bf16) return codec_of<Stochastic>();
  if (state == dtypes().i8) return codec_of<S8>();
  if (state == dtypes().u8) return codec_of<E5M3>();
  return {};
}

// Of bfloat16 beside a residual of this dtype, or nulls.
inline Codec codec_of_parts(int32_t residual) {
  if (residual == dtypes().i8) return codec_of<TwoParts<int8_t>>();
  if (residual == dtypes().i16) return codec_of<TwoParts<int16_t>>();
  return {};
}

// A tensor's elements, of which a block is gathered where they are not dense in the order of axes.
struct Elements {
  char* data = nullptr;
  int64_t element_size;
  StridedAxes<1> axes;

  char* read(int64_t begin, int64_t end, char* buffer) const {
    if (axes.empty()) return data ? data + begin * element_size : nullptr;
    copy_elements<Copy::GATHER>(element_size, data, buffer, axes, 0, begin, end);
    return buffer;
  }
  void write(int64_t begin, int64_t end, char* buffer) const {
    if (axes.empty()) return;
    copy_elements<Copy::SCATTER>(element_size, data, buffer, axes, 0, begin, end);
  }
};

// One a block.
struct Scales {
  char* data = nullptr;
  int64_t size;

  char* at(int64_t element) const { return data ? data + element / block_size * size : nullptr; }
};

// Whose tensors are looked at, for errors: entry i of this list, and what lies beside it.
struct Entry {
  const char *list, *beside;
  size_t i;
};

// Of a tensor that has the shape of `like`, and is written or only read.
inline Elements elements_of(AtenTensorHandle tensor, AtenTensorHandle like, bool written,
                            Entry entry) {
  const int64_t dim = get(aoti_torch_get_dim, like);
  const int64_t* sizes = get(aoti_torch_get_sizes, like);
  STD_TORCH_CHECK(is_cpu(tensor) && get(aoti_torch_get_dim, tensor) == dim &&
                      std::equal(sizes, sizes + dim, get(aoti_torch_get_sizes, tensor)),
                  entry.list, "[", entry.i, "], ", entry.beside,
                  " must be CPU tensors of one shape");
  Elements elements;
  elements.element_size = aoti_torch_dtype_element_size(dtype(tensor));
  if (!get(aoti_torch_is_contiguous, tensor)) {
    elements.axes = merged(axes_of<1>(dim, sizes, {get(aoti_torch_get_strides, tensor)}));
  }
  for (const auto& axis : elements.axes) {
    STD_TORCH_CHECK(!written || axis.strides[0], entry.list, "[", entry.i,
                    "] or what is written beside it is expanded: elements share their memory");
  }
  // Through the const pointer what is copy-on-write stays shared.
  elements.data =
      static_cast<char*>(written ? get(torch_get_mutable_data_ptr, tensor)
                                 : const_cast<void*>(get(torch_get_const_data_ptr, tensor)));
  return elements;
}

// Whether codes of this dtype have scales beside them, and those.
inline bool has_scales(int32_t codes) { return codes == dtypes().i8 || codes == dtypes().u8; }

inline Scales scales_of(AtenTensorHandle tensor, int32_t codes, int64_t numel, Entry entry) {
  const int32_t expected = codes == dtypes().i8 ? dtypes().f32 : dtypes().u8;
  STD_TORCH_CHECK(is_cpu(tensor) && dtype(tensor) == expected &&
                      get(aoti_torch_get_numel, tensor) == (numel + block_size - 1) / block_size &&
                      get(aoti_torch_is_contiguous, tensor),
                  "the scales of ", entry.list, "[", entry.i,
                  "] must be contiguous CPU tensors of one ",
                  expected == dtypes().f32 ? "float32" : "uint8", " a block of ", block_size);
  return {static_cast<char*>(get(torch_get_mutable_data_ptr, tensor)),
          static_cast<int64_t>(aoti_torch_dtype_element_size(expected))};
}

}  // namespace rootfree_fused
