"""Formats of fewer bytes on registers against the specification: on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from helpers.formats import HASHED
from helpers.kernels_lowbit import (
    BF16,
    E5M3,
    F32,
    INT16,
    S8,
    hash_kernel,
    join_kernel,
    run,
    same,
    state_kernel,
    weight_kernel,
)
from helpers.offline import on_its_device
from triton.runtime import interpreter

from rootfree_fused.reference.formats import (
    BLOCK,
    decoded,
    encoded,
    join_weight,
    random_bits,
    split_weight,
)

# The interpreter is numpy, which reports the infinities that some of the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


def all_numbers(device):
    """Every upper half of float32 beside lower halves at which roundings turn, as blocks."""
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    low = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0x807F, 0x8080]
    low += [0xFF7F, 0xFF80, 0xFFFF]
    numbers = torch.stack([high | bits for bits in low]).view(F32)
    return numbers.view(-1, BLOCK).to(device)


@pytest.mark.parametrize("of", HASHED, ids=str)
def test_the_hash_is_that_of_the_specification(of, device):
    seed, step, stream, first = of
    numbers = torch.zeros(8, dtype=torch.int64, device=device)
    chosen = hash_kernel
    if device.type == "cpu":
        chosen = interpreter.InterpretedFunction(hash_kernel.fn)
    args = (torch.tensor(x, device=device) for x in (seed, step, first & 0xFFFFFFFF))
    chosen[(1,)](numbers, *args, STREAM=stream)
    assert " ".join(f"{n & 0xFFFFFFFF:08x}" for n in numbers.tolist()) == HASHED[of]


def encoded_in_a_kernel(values, random, dtype, left=None):
    """Codes and scales, and what they are decoded to."""
    code = torch.zeros(values.shape, dtype=dtype, device=values.device)
    scale = torch.zeros(len(values), dtype=E5M3 if dtype == E5M3 else F32, device=values.device)
    back = torch.zeros_like(values)
    tensors = values, random, code, scale, back
    run(state_kernel, values.device, *tensors, LEFT=left)
    return code, scale, back


@pytest.mark.parametrize("dtype", [S8, E5M3], ids=str)
def test_what_lies_behind_the_end_is_no_part_of_a_block(dtype, device):
    values = torch.rand(4, BLOCK, device=device)
    values.view(-1)[600:] = torch.tensor([1e30, torch.nan], device=device).repeat(212)
    random = random_bits(7, torch.tensor(3.0), 0, 0, values)
    wanted, wanted_scale = encoded(values.view(-1)[:600], dtype, random.view(-1)[:600])
    code, scale, _ = encoded_in_a_kernel(values, random, dtype, left=600)
    assert same(code.view(-1)[:600], wanted)
    assert same(scale[:3], wanted_scale)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [S8, E5M3, BF16], ids=str)
def test_every_number_is_encoded_as_specified(dtype, mixed, device):
    """In blocks of equals, and in such that have other numbers beside."""
    values = all_numbers(device)
    if mixed:
        finite = values.flatten()[values.flatten().isfinite()]
        order = torch.randperm(len(finite), device=device)[: 2048 * BLOCK]
        size = torch.logspace(-38, 0, 2048, device=device)
        values = finite[order].view(-1, BLOCK) * size[:, None]
    random = random_bits(7, torch.tensor(3.0), 0, 5, values)
    wanted, wanted_scale = encoded(values, dtype, random)
    code, scale, back = encoded_in_a_kernel(values, random, dtype)
    assert same(code, wanted)
    assert same(back, decoded(wanted, wanted_scale))
    assert wanted_scale is None or same(scale, wanted_scale)


@pytest.mark.parametrize("residual", [S8, INT16], ids=str)
def test_every_weight_is_split_and_joined_as_specified(residual, device):
    values = all_numbers(device)
    high = torch.zeros(values.shape, dtype=BF16, device=device)
    rest = torch.zeros(values.shape, dtype=residual, device=device)
    back = torch.zeros_like(values)
    chosen = tl.int8 if residual == S8 else tl.int16
    run(weight_kernel, device, values, high, rest, back, RESIDUAL=chosen)
    wanted = split_weight(values, residual)
    assert same(high, wanted[0])
    assert same(rest, wanted[1])
    assert same(back, join_weight(*wanted))
    # And where someone else wrote the weight.
    for written in (0.0, -0.0, 1.0, -3.0):
        high.fill_(written)
        run(join_kernel, device, high, rest, back)
        assert same(back, join_weight(high, rest))
