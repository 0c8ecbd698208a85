"""How weights and state are kept in fewer bytes, by the dtype of what is stored: on registers, and
at the end a state's way there and back.

rootfree_fused/reference/formats.py is the specification of the bits. What is encoded from equal
numbers is equal to the bit: the largest of a block, a quotient and a root rounded to nearest, a
product that nothing is added to, and integers, all of 32 bits.

Shapes: values and codes (blocks, 256), a block of elements a row; scales (blocks, 1). A mask says
which elements there are, None that all are.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NAN = tl.constexpr(0x7FC00000)
_INFINITY = tl.constexpr(0x7F800000)
_LARGEST_BFLOAT16 = tl.constexpr((2 - 2.0**-7) * 2.0**127)
# S8: levels squared, and the least scale.
_LEVELS = tl.constexpr(127.0 * 127.0)
_UNIT = tl.constexpr(1 / (127.0 * 127.0))
_LEAST_SCALE = tl.constexpr(2.0**-100)
# E5M3: exponents below that of the largest, the least scale and that of a block that is not finite,
# the largest finite upper 12 bits.
_DEPTH = tl.constexpr(30)
_LEAST_EXPONENT = tl.constexpr(31)
_NOT_FINITE = tl.constexpr(255)
_LARGEST_TOP = tl.constexpr(0x7F7)


# Random numbers -----------------------------------------------------------------------------------


@triton.jit
def mix(x):
    """A hash of 32 bits to 32 bits, in uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def key_of(seed, step):
    """What the random numbers of a parameter's step have in common; the step's count is float32."""
    return mix(seed.to(tl.uint32) ^ (step.to(tl.int64).to(tl.uint32) * 0x9E3779B9))


@triton.jit
def random_bits(key, STREAM: tl.constexpr, index):
    """A random number of 32 bits for each index of an element in its whole, in uint32."""
    salt = mix(tl.full([], (STREAM * 0x85EBCA6B + 1) & 0xFFFFFFFF, tl.uint32))
    return mix((index * 0x9E3779B1) ^ (key ^ salt))


# Weights ------------------------------------------------------------------------------------------


@triton.jit
def join_weight(high, residual):
    """The float32 weight of a bfloat16 one and its int8 or int16 residual."""
    bits = high.to(tl.uint16, bitcast=True).to(tl.int32)
    rest = residual.to(tl.int32)
    if residual.dtype == tl.int8:
        rest <<= 8
    # Below a zero that someone else has written a residual does not count.
    rest = tl.where(bits & 0x7FFF == 0, tl.maximum(rest, 0), rest)
    return ((bits << 16) + rest).to(tl.float32, bitcast=True)


@triton.jit
def split_weight(value, RESIDUAL: tl.constexpr):
    """A float32 weight as bfloat16, and a residual of this dtype.

    Both are bits of one sum: where those of the residual are more than half, as a signed number
    they are what is left below the next bfloat16.
    """
    bits = tl.where(value == value, value.to(tl.uint32, bitcast=True), _NAN)
    if RESIDUAL.primitive_bitwidth == 8:
        bits += 0x80
        residual = (bits >> 8).to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        residual = bits.to(tl.uint16).to(tl.int16, bitcast=True)
    return ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), residual


@triton.jit
def to_bfloat16(value, random):
    """bfloat16 by the upper 16 of the random bits; no finite number becomes infinite."""
    added = tl.where(tl.abs(value) < _LARGEST_BFLOAT16, random >> 16, 0)
    high = (value.to(tl.uint32, bitcast=True) + added) >> 16
    high = tl.where(value == value, high, _NAN >> 16)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)


# State --------------------------------------------------------------------------------------------


@triton.jit
def decoded(stored, scale):
    """State in float32; scale is None where its format has none."""
    if stored.dtype == tl.int8:
        value = decode_s8(stored, scale)
    elif stored.dtype == tl.uint8:
        value = decode_e5m3(stored, scale)
    elif stored.dtype == tl.bfloat16:
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = stored
    return value


@triton.jit
def encode_s8(value, random, mask):
    """Codes -127 to 127 by the upper 16 of the random bits, and the largest |x| of each block.

    The scale is NaN where one is not finite.
    """
    largest = _largest(value, mask)
    scale = largest.to(tl.float32, bitcast=True)
    scale = tl.where(scale < _LEAST_SCALE, 0.0, scale)
    unit = tl.div_rn(_LEVELS, tl.maximum(scale, _LEAST_SCALE))
    level = tl.abs(value) * unit
    k = tl.sqrt_rn(level).to(tl.int32)
    between = (k * k << 16) + (random >> 16).to(tl.int32) * (2 * k + 1)  # k^2 and (k + 1)^2
    k = tl.minimum(k + (between < (level * 2.0**16).to(tl.int32)).to(tl.int32), 127)
    code = tl.where(value < 0, -k, k)
    filled = (scale > 0) & (largest < _INFINITY)
    scale = tl.where(largest < _INFINITY, scale, float("nan"))
    return tl.where(filled, code, 0).to(tl.int8), scale


@triton.jit
def decode_s8(codes, scale):
    """sign(k) (k / 127)^2 of the scale of each block."""
    level = codes.to(tl.float32)
    # The zero is added that the product is no part of a sum in the update: fused it would not be
    # rounded. It depends on the scale, or the compiler would see that it is one.
    zero = tl.minimum(scale, -0.0)
    return tl.fma(level * tl.abs(level) * _UNIT, scale, zero)


@triton.jit
def encode_e5m3(value, random, mask):
    """Codes by the upper 20 of the random bits, and the exponent of each block's largest."""
    largest = _largest(value, mask)
    filled = (largest > 0) & (largest < _INFINITY)
    scale = tl.maximum(largest >> 23, _LEAST_EXPONENT)
    least = tl.where(filled, (scale - _DEPTH) << 3, _LARGEST_TOP)
    magnitude = value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    top = tl.minimum((magnitude + (random >> 12)) >> 20, _LARGEST_TOP).to(tl.int32)
    code = tl.maximum(top - least, 0)
    scale = tl.where(filled, scale, tl.where(largest == 0, 0, _NOT_FINITE))
    return code.to(tl.uint8), scale.to(tl.uint8)


@triton.jit
def decode_e5m3(codes, scale):
    """(1 + f/8) 2^e of the power of two of each block, for codes 8 (e + 30) + f."""
    exponent = scale.to(tl.int32)
    filled = (exponent != 0) & (exponent != _NOT_FINITE)
    least = tl.where(filled, (exponent - _DEPTH) << 23, tl.where(exponent == 0, 0, _NAN))
    return (tl.where(filled, codes.to(tl.int32) << 20, 0) + least).to(tl.float32, bitcast=True)


@triton.jit
def _largest(value, mask):
    """The bits of the largest |x| of each block; a NaN is larger than any number."""
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if mask is not None:
        magnitude = tl.where(mask, magnitude, 0)
    return tl.max(magnitude, axis=1, keep_dims=True)


# States in memory --------------------------------------------------------------------------------


@triton.jit
def load_state(ptr, scale_ptr, offs, blocks, mask, block_mask):
    """What is stored of a state, and its scales, or another thing that is not None."""
    stored = tl.load(ptr + offs, mask=mask)
    scale = 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + blocks, mask=block_mask)
    return stored, scale


@triton.jit
def store_state(
    ptr, scale_ptr, value, key, STREAM: tl.constexpr, index, offs, blocks, mask, block_mask
):
    if ptr.dtype.element_ty == tl.int8:
        stored, scale = encode_s8(value, random_bits(key, STREAM, index), mask)
        tl.store(scale_ptr + blocks, scale, mask=block_mask)
    elif ptr.dtype.element_ty == tl.uint8:
        stored, scale = encode_e5m3(value, random_bits(key, STREAM, index), mask)
        tl.store(scale_ptr + blocks, scale, mask=block_mask)
    elif ptr.dtype.element_ty == tl.bfloat16:
        stored = to_bfloat16(value, random_bits(key, STREAM, index))
    else:
        stored = value
    tl.store(ptr + offs, stored, mask=mask)


@triton.jit
def scales_at(address_ptr, state_ptr, block):
    """Where the scales of a chunk are; None where the format of the state has none."""
    scale_ptr = None
    if state_ptr.dtype.element_ty == tl.int8:
        scale_ptr = tl.load(address_ptr).to(tl.pointer_type(tl.float32)) + block
    elif state_ptr.dtype.element_ty == tl.uint8:
        scale_ptr = tl.load(address_ptr).to(tl.pointer_type(tl.uint8)) + block
    return scale_ptr
