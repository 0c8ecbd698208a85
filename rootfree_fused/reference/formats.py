"""How weights and state are kept in fewer bytes: the specification of the bits, by dtype.

    float32, float64, float16   as it is
    bfloat16                    rounded stochastically
    int8 (S8)                   averages: the sign, and the root of |x| over the largest of its
                                block, rounded stochastically
    uint8 (E5M3)                second moments: 5 bits of exponent and 3 of mantissa under the
                                power of two of its block, rounded stochastically; never zero

A block is 256 elements that follow each other in the order of the tensor's axes, the last one what
is left. Its scale is of S8 the largest |x| (float32), of E5M3 the exponent of the largest x as
float32 has it (uint8). A bfloat16 weight has an int8 or int16 residual beside it, or is rounded
stochastically.

Averages move by steps below a rounding: to nearest they would stay where they are. Random numbers
are a hash of seed, step, stream and index of the element, the same on every device and for
every part of a tensor: with the step kept, a run that resumes rounds as one that goes on.

Only the largest of a block, a quotient, a product, a root and integers: what is encoded from equal
numbers is equal to the bit everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .matrix import join, split

BLOCK = 256
# A random number that rounds to nearest, and the formats that are not rounded so.
HALF = 1 << 31
STOCHASTIC = (torch.bfloat16, torch.int8, torch.uint8)

_WORD = 0xFFFFFFFF
_NAN, _INFINITY = 0x7FC00000, 0x7F800000
_LARGEST_BFLOAT16 = 0x7F7F
# S8: levels squared, and the least scale: below it a block is zero.
_LEVELS = 127 * 127
_LEAST_SCALE = 2.0**-100
# E5M3: exponents below that of the largest, the least scale, whose code 0 is the least normal
# number, and the largest finite upper 12 bits; the scale of a block that is not finite.
_DEPTH, _LEAST_EXPONENT, _LARGEST_TOP = 30, 31, 0x7F7
NOT_FINITE = 255


def mix(x: Tensor) -> Tensor:
    """A hash of 32 bits to 32 bits, in int64."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def random_bits(seed: int, step: Tensor, stream: int, first: int, like: Tensor) -> Tensor:
    """A random number of 32 bits, in int64, for each element of a tensor.

    seed: of the parameter, 32 bits. step: the step's count, one number. stream: which of the
        parameter's tensors is rounded. first: the index of the tensor's first element in the whole
        of which it is a part; indices count modulo 2^32.
    """
    count = step.to(like.device, torch.int64).reshape(())
    salt = mix(torch.tensor(stream * 0x85EBCA6B + 1, device=like.device))
    key = mix(seed ^ (count * 0x9E3779B9)) ^ salt
    index = torch.arange(like.numel(), device=like.device) + first
    return mix((index * 0x9E3779B1) ^ key).view(like.shape)


# Weights ------------------------------------------------------------------------------------------


def split_weight(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16, rounded to nearest, and a residual of this dtype.

    int16 keeps every bit, as `split` does; int8 those of the value rounded to 16 significant bits.
    Ties round away from zero.
    """
    if dtype == torch.int16:
        return split(value)
    bits = value.view(torch.int32).masked_fill(value.isnan(), _NAN)
    high, residual = split(((bits + 0x80) & ~0xFF).view(torch.float32))
    return high, (residual >> 8).to(torch.int8)


def join_weight(high: Tensor, residual: Tensor) -> Tensor:
    """The float32 tensor that `split_weight` took apart.

    Where someone else has written a zero the residual that is left does not count below it.
    """
    rest = residual.to(torch.int16) << (8 if residual.dtype == torch.int8 else 0)
    return join(high, torch.where(high == 0, rest.clamp_min(0), rest))


# The update ---------------------------------------------------------------------------------------

# The stream of the weight's random numbers; that of a state is its place in its method's order.
WEIGHT_STREAM = 2


def update_in_formats_(
    update: Callable[..., None],
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor | None],
    *,
    residual: Tensor | None,
    scales: Sequence[Tensor | None],
    random: Callable[[int], Tensor],
    stochastic: bool,
) -> None:
    """An update of one parameter, of (param, grad, *states), on what is stored in fewer bytes.

    Everything is decoded to float32, updated, and encoded again, in place. residual: of the weight,
    if it has one. scales: of each state, if its format has them. random: the numbers of a stream.
    stochastic: whether a bfloat16 weight without a residual is rounded by them, or to nearest.
    """
    values = [None if s is None else unpacked(s, c) for s, c in zip(states, scales, strict=True)]
    weight = param.float() if residual is None else unpacked(param, residual)
    update(weight, grad, *values)
    for stream, (value, stored, scale) in enumerate(zip(values, states, scales, strict=True)):
        if value is not None and stored is not None:
            pack_(stored, scale, value, random, stream)
    if residual is not None or stochastic:
        pack_(param, residual, weight, random, WEIGHT_STREAM)
    else:
        param.copy_(weight)


def unpacked(stored: Tensor, beside: Tensor | None) -> Tensor:
    """A weight with its residual, or a state with its scales, in float32."""
    if stored.dtype == torch.bfloat16 and beside is not None:
        return join_weight(stored, beside)
    return decoded(stored, beside)


def pack_(
    stored: Tensor,
    beside: Tensor | None,
    value: Tensor,
    random: Callable[[int], Tensor],
    stream: int,
) -> None:
    """Store a float32 tensor as `unpacked` finds it, by a stream of random numbers if by any."""
    rounded: Tensor
    other: Tensor | None
    if beside is not None and stored.dtype == torch.bfloat16:
        rounded, other = split_weight(value, beside.dtype)
    else:
        drawn = random(stream) if stored.dtype in STOCHASTIC else HALF
        rounded, other = encoded(value, stored.dtype, drawn)
    stored.copy_(rounded)
    if beside is not None and other is not None:
        beside.copy_(other.view(beside.shape))


# State --------------------------------------------------------------------------------------------


def decoded(stored: Tensor, scale: Tensor | None) -> Tensor:
    """State as an update computes it: in float32, or float64 state itself."""
    if stored.dtype == torch.int8:
        assert scale is not None
        return decode_s8(stored, scale)
    if stored.dtype == torch.uint8:
        assert scale is not None
        return decode_e5m3(stored, scale)
    return stored.to(torch.promote_types(stored.dtype, torch.float32))


def encoded(
    value: Tensor, dtype: torch.dtype, random: Tensor | int = HALF
) -> tuple[Tensor, Tensor | None]:
    """A state in the format that has this dtype, and its scales, one a block, if it has any.

    random: as of `random_bits`, or HALF to round to nearest.
    """
    if dtype == torch.int8:
        return encode_s8(value, random)
    if dtype == torch.uint8:
        return encode_e5m3(value, random)
    return (to_bfloat16(value, random) if dtype == torch.bfloat16 else value.to(dtype)), None


def to_bfloat16(value: Tensor, random: Tensor | int) -> Tensor:
    """bfloat16 by the upper 16 of the random bits; no finite number becomes infinite."""
    magnitude, sign = _magnitude(value), _sign(value)
    rounded = ((magnitude + (random >> 16)) >> 16).clamp_max(_LARGEST_BFLOAT16) | sign
    high = torch.where(magnitude < _INFINITY, rounded, (magnitude >> 16) | sign)
    high = high.masked_fill(value.isnan(), _NAN >> 16)
    return high.to(torch.int16).view(torch.bfloat16)


def encode_s8(value: Tensor, random: Tensor | int) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127 by the upper 16 of the random bits, and the largest |x| of each block.

    Of the levels k^2 and (k + 1)^2 around |x| each is taken as often as the mean asks for. A block
    with a number that is not finite has the scale NaN; one below 2^-100 is zero.
    """
    blocks = _blocks(value)
    largest = _magnitude(blocks).amax(1)
    scale = largest.to(torch.int32).view(torch.float32)
    scale = scale.masked_fill(scale < _LEAST_SCALE, 0.0).masked_fill(
        largest >= _INFINITY, torch.nan
    )
    unit = _LEVELS / scale.clamp_min(_LEAST_SCALE)
    level = blocks.abs() * unit[:, None]
    filled = (scale > 0)[:, None]
    k = torch.where(filled, level.sqrt(), 0.0).long()
    bits = _blocks(random) if isinstance(random, Tensor) else random
    between = (k * k << 16) + (bits >> 16) * (2 * k + 1)
    k = (k + (between < torch.where(filled, level * 2.0**16, 0.0).long())).clamp_max(127)
    return _unblocked(torch.where(blocks < 0, -k, k).to(torch.int8), value), scale


def decode_s8(codes: Tensor, scale: Tensor) -> Tensor:
    """sign(k) (k / 127)^2 of the scale of each block."""
    level = _blocks(codes).to(torch.float32)
    unit = torch.tensor(1 / _LEVELS, dtype=torch.float32, device=codes.device)
    return _unblocked((level * level.abs()) * unit * scale.reshape(-1, 1), codes)


def encode_e5m3(value: Tensor, random: Tensor | int) -> tuple[Tensor, Tensor]:
    """Codes by the upper 20 of the random bits, and the exponent of the largest x of each block.

    The scale is 255 where a number of the block is not finite, 0 where all are zero. Nothing else
    is zero: the least level is 2^-30 of the block's power of two, and at least 2^-126.
    """
    blocks = _magnitude(_blocks(value))
    largest = blocks.amax(1)
    scale = (largest >> 23).clamp_min(_LEAST_EXPONENT).masked_fill(largest == 0, 0)
    scale = scale.masked_fill(largest >= _INFINITY, NOT_FINITE)
    bits = _blocks(random) if isinstance(random, Tensor) else random
    top = ((blocks + (bits >> 12)) >> 20).clamp_max(_LARGEST_TOP)
    code = (top - ((scale - _DEPTH) << 3)[:, None]).clamp_min(0)
    code = code.masked_fill(((scale == 0) | (scale == NOT_FINITE))[:, None], 0)
    return _unblocked(code.to(torch.uint8), value), scale.to(torch.uint8)


def decode_e5m3(codes: Tensor, scale: Tensor) -> Tensor:
    """(1 + f/8) 2^e of the power of two of each block, for codes 8 (e + 30) + f."""
    exponent = scale.reshape(-1, 1).to(torch.int32)
    top = _blocks(codes).to(torch.int32) + ((exponent - _DEPTH) << 3)
    value = (top << 20).masked_fill(exponent == 0, 0).masked_fill(exponent == NOT_FINITE, _NAN)
    return _unblocked(value.view(torch.float32), codes)


def _magnitude(value: Tensor) -> Tensor:
    """The bits of float32 but for the sign, in int64."""
    return value.contiguous().view(torch.int32).long() & 0x7FFFFFFF


def _sign(value: Tensor) -> Tensor:
    """The sign as the upper bit of 16."""
    return (value.contiguous().view(torch.int32).long() >> 16) & 0x8000


def _blocks(tensor: Tensor) -> Tensor:
    """The elements by blocks, as rows, filled up with zeros."""
    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """Rows of blocks as the tensor of which they are."""
    return blocks.reshape(-1)[: like.numel()].view(like.shape)
