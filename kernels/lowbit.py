"""The diagonal methods on weights and states in fewer bytes: one launch for all tensors of a kind.

Per element what diag.py does, in float32 registers, between decoding and encoding; formats.py has
both, and reference/formats.py the bits. A block of 256 elements has a scale in each state of 8
bits: a program has whole blocks, so that everything is read once and written once.

Dtypes: params float32, bfloat16 or float16, rounded to nearest, and bfloat16 beside an int8 or
int16 residual, or rounded stochastically; grads as the parameter or float32, never written; state
float32, bfloat16, int8 beside float32 scales, or uint8 beside uint8 scales. Bytes a parameter in
bfloat16 with gradients in it, read and written, where there are two states: 16 with int8 residuals
and bfloat16 states, 12 with states of 8 bits, 10 without residuals; and 10/256 for the scales.

The step's count, from which random numbers are, is read on the device: a captured step counts on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import inverse_of, skips
from .diag import BLOCK as CHUNK
from .diag import run_plan
from .formats import (
    decoded,
    join_weight,
    key_of,
    load_state,
    random_bits,
    scales_at,
    split_weight,
    store_state,
    to_bfloat16,
)
from .slots import BESIDE, ROW
from .tables import (
    Kept,
    Launch,
    LaunchPlan,
    at_gradients,
    contiguous_copies,
    copy_back,
    find_plan,
)

BLOCK = 256  # elements that have a scale
# The stream of a weight's random numbers; that of a state is its place in its method's order.
WEIGHT_STREAM = 2

# Elements that a thread has, and moves at once. With 8, what has 16 bits moves by 16 bytes and what
# has 8 by 8, and a block is one warp's. What is written in 32 bits moves by 4 elements, and all
# others then too, since shared memory would have to make them agree. The SASS for sm_80, sm_90 and
# sm_100 has 8 elements at 80 to 113 registers, 4 at 40 to 72, so 24 KB and more in flight on a
# multiprocessor. With 8 of them float32 parameters spill; with 4 the others take a quarter more
# instructions an element, which are near to what bounds the step. Times are not yet measured.
VECTOR, VECTOR_OF_WIDE = 8, 4
# More than any format takes: without a limit ptxas spills 8 bytes of some to fit a program more.
MAX_REGISTERS = 128


@triton.jit
def _update_chunk(
    param_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    parts_ptr,
    residual_ptr,
    first_scale_ptr,
    second_scale_ptr,
    left,
    first_index,
    key,
    lr,
    scalars_ptr,
    step_ptr,
    unscale,
    UPDATE: tl.constexpr,
    SIGNS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WEIGHT_STREAM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """left: elements of the tensor from the chunk's first on, or None where the chunk is full."""
    blocks = tl.arange(0, CHUNK // BLOCK)[:, None]
    offs = blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, block_mask = None, None
    if left is not None:
        mask, block_mask = offs < left, blocks * BLOCK < left
    p = tl.load(param_ptr + offs, mask=mask)
    g = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    first, first_scale = load_state(first_ptr, first_scale_ptr, offs, blocks, mask, block_mask)
    if second_ptr is not None:
        second, second_scale = load_state(
            second_ptr, second_scale_ptr, offs, blocks, mask, block_mask
        )
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask)
    parts = None
    if parts_ptr is not None:
        parts = tl.load(parts_ptr + offs, mask=mask)
    # As in diag.py: all loads before the arithmetic.
    tl.debug_barrier()
    if unscale is not None:
        g *= unscale
        if parts_ptr is not None and not SIGNS:
            parts *= unscale * unscale
    if residual_ptr is not None:
        p = join_weight(p, residual)
    first = decoded(first, first_scale)
    buffer = None
    if second_ptr is not None:
        buffer = decoded(second, second_scale)
    updated = UPDATE(p.to(tl.float32), g, parts, first, buffer, lr, scalars_ptr, step_ptr)

    index = first_index + offs.to(tl.uint32)
    # The states first: the other way round some formats spill.
    store_state(
        first_ptr, first_scale_ptr, updated[1], key, 0, index, offs, blocks, mask, block_mask
    )
    if second_ptr is not None:
        store_state(
            second_ptr, second_scale_ptr, updated[2], key, 1, index, offs, blocks, mask, block_mask
        )
    if residual_ptr is not None:
        p, residual = split_weight(updated[0], residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, residual, mask=mask)
    elif STOCHASTIC:
        p = to_bfloat16(updated[0], random_bits(key, WEIGHT_STREAM, index))
    else:
        p = updated[0]
    tl.store(param_ptr + offs, p.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize_on_alignment=["lr_ptr", "steps_ptr", "grad_scale_ptr", "found_inf_ptr"]
)
def _lowbit_kernel(
    chunks_ptr,
    rows_ptr,
    beside_ptr,
    scalars_ptr,
    lr_ptr,
    steps_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    SIGNS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNTS: tl.constexpr,
    WEIGHT_STREAM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    unscale = inverse_of(grad_scale_ptr)
    pid = tl.program_id(0)
    row = tl.load(chunks_ptr + pid)
    row_ptr, more_ptr = rows_ptr + len(ROW) * row, beside_ptr + len(BESIDE) * row
    start = (pid - tl.load(row_ptr + ROW.first_program)) * CHUNK
    param_ptr = tl.load(row_ptr + ROW.param).to(tl.pointer_type(PARAM)) + start
    grad_ptr = tl.load(row_ptr + ROW.grad).to(tl.pointer_type(GRAD)) + start
    first_ptr = tl.load(row_ptr + ROW.first_state).to(tl.pointer_type(FIRST)) + start
    first_scale_ptr = scales_at(more_ptr + BESIDE.first_scales, first_ptr, start // BLOCK)
    second_ptr, second_scale_ptr, residual_ptr, parts_ptr = None, None, None, None
    if SECOND is not None:
        second_ptr = tl.load(row_ptr + ROW.second_state).to(tl.pointer_type(SECOND)) + start
        second_scale_ptr = scales_at(more_ptr + BESIDE.second_scales, second_ptr, start // BLOCK)
    if RESIDUAL is not None:
        residual_ptr = tl.load(more_ptr + BESIDE.residual).to(tl.pointer_type(RESIDUAL)) + start
    if HAS_PARTS:
        parts_ptr = tl.load(row_ptr + ROW.parts).to(tl.pointer_type(tl.float32)) + start
    steps_ptr += tl.load(row_ptr + ROW.index)
    step_ptr = None
    if COUNTS:
        step_ptr = steps_ptr
    lr = tl.load(lr_ptr).to(tl.float32)
    key = key_of(tl.load(more_ptr + BESIDE.seed), tl.load(steps_ptr))
    first_index = (tl.load(more_ptr + BESIDE.first_index) + start).to(tl.uint32)

    # As in diag.py, but for the rest of a tensor, which may end within a block.
    if start < tl.load(row_ptr + ROW.aligned):
        param_ptr = tl.multiple_of(param_ptr, VECTOR * PARAM.primitive_bitwidth // 8)
        grad_ptr = tl.multiple_of(grad_ptr, VECTOR * GRAD.primitive_bitwidth // 8)
        first_ptr = tl.multiple_of(first_ptr, VECTOR * FIRST.primitive_bitwidth // 8)
        if SECOND is not None:
            second_ptr = tl.multiple_of(second_ptr, VECTOR * SECOND.primitive_bitwidth // 8)
        if RESIDUAL is not None:
            residual_ptr = tl.multiple_of(residual_ptr, VECTOR * RESIDUAL.primitive_bitwidth // 8)
        if HAS_PARTS:
            parts_ptr = tl.multiple_of(parts_ptr, VECTOR * 4)
        _update_chunk(
            param_ptr,
            grad_ptr,
            first_ptr,
            second_ptr,
            parts_ptr,
            residual_ptr,
            first_scale_ptr,
            second_scale_ptr,
            None,
            first_index,
            key,
            lr,
            scalars_ptr,
            step_ptr,
            unscale,
            UPDATE,
            SIGNS,
            STOCHASTIC,
            WEIGHT_STREAM,
            CHUNK,
            BLOCK,
        )
    else:
        _update_chunk(
            param_ptr,
            grad_ptr,
            first_ptr,
            second_ptr,
            parts_ptr,
            residual_ptr,
            first_scale_ptr,
            second_scale_ptr,
            tl.load(row_ptr + ROW.length) - start,
            first_index,
            key,
            lr,
            scalars_ptr,
            step_ptr,
            unscale,
            UPDATE,
            SIGNS,
            STOCHASTIC,
            WEIGHT_STREAM,
            CHUNK,
            BLOCK,
        )


def prepare(
    lists: Sequence[Sequence[Tensor]],
    *,
    seeds: Sequence[int],
    firsts: Sequence[int],
    parts: Sequence[Tensor] = (),
) -> LaunchPlan | None:
    """What `launch` takes, where no tensor has to be copied; see `diag.prepare`.

    lists: params, grads, states, residuals and a list of scales a state, as the operator has them.
    """
    plan = _find_plan(lists, seeds, firsts, parts)
    return None if plan.copied else plan


move_grads = at_gradients


def launch(
    name: str,
    plan: LaunchPlan,
    steps: Tensor,
    lr: float | Tensor,
    *,
    stochastic: bool,
    bias_correction: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **settings: Any,
) -> None:
    """One step by the method of this name on every tensor of a plan; see `diag.launch`.

    stochastic: whether bfloat16 parameters without residuals are rounded so. bias_correction:
        whether the update reads steps; random numbers do always.
    """
    numbers = lr, steps, grad_scale, found_inf
    chosen = partial(_constants, plan, stochastic, bias_correction)
    kind = stochastic, bias_correction
    run_plan(_lowbit_kernel, chosen, name, plan, numbers, settings, kind)


def _constants(
    plan: LaunchPlan, stochastic: bool, bias_correction: bool, launch: Launch
) -> dict[str, Any]:
    """The kernel's last parameters, but for UPDATE, and options."""
    dtypes = launch.dtypes
    return {
        "PARAM": dtypes.param,
        "GRAD": dtypes.grad,
        "FIRST": dtypes.first_state,
        "SECOND": dtypes.second_state,
        "RESIDUAL": dtypes.residual,
        "HAS_PARTS": dtypes.parts is not None,
        "STOCHASTIC": stochastic,
        "COUNTS": bias_correction,
        "WEIGHT_STREAM": WEIGHT_STREAM,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        "VECTOR": plan.vector,
        "num_warps": CHUNK // (32 * plan.vector),
        "maxnreg": MAX_REGISTERS,
        "enable_fp_fusion": True,
    }


@torch.no_grad()
def update_(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *others: Any,
    seeds: Sequence[int],
    firsts: Sequence[int],
    parts: Sequence[Tensor] | None = None,
    **settings: Any,
) -> None:
    """The low-bit operator of the method of this name: `launch` on lists of tensors.

    others: the states, the residuals, a list of scales a state, steps and lr. Tensors that are not
    contiguous go through copies.
    """
    *tensors, steps, lr = others
    parts = parts or ()
    if not params:
        return
    lists = [params, grads, *tensors]
    plan = _find_plan(lists, seeds, firsts, parts)
    if not plan.copied:
        launch(name, plan, steps, lr, **settings)
        return
    *dense, dense_parts = contiguous_copies([*lists, parts], plan.copied)
    launch(name, _find_plan(dense, seeds, firsts, dense_parts), steps, lr, **settings)
    copy_back([params, *tensors], [dense[0], *dense[2:]], plan.copied)


def _find_plan(
    lists: Sequence[Sequence[Tensor]],
    seeds: Sequence[int],
    firsts: Sequence[int],
    parts: Sequence[Tensor],
) -> LaunchPlan:
    params, grads, *others = lists
    count = len(others) // 2
    there = [i for i in range(count) if others[i]]  # of the states
    states, scales = ([others[first + i] for i in there] for first in (0, count + 1))
    kept = Kept(others[count], scales, seeds, firsts)
    vector = vector_of([params, *states])
    return find_plan([params, grads, *states], block=CHUNK, vector=vector, kept=kept, parts=parts)


def vector_of(written: Sequence[Sequence[Tensor]]) -> int:
    """Elements of a thread where this is written."""
    wide = any(tensor.itemsize > 2 for tensors in written for tensor in tensors)
    return VECTOR_OF_WIDE if wide else VECTOR
