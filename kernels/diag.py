"""Root-free RMSProp and AdamW in Triton: one launch for tensors of any number and any sizes.

Per element, in float32 registers (reference/diag.py is the specification; B is batch_size):

    rmsprop_    s   <- s + (1 - alpha) (B g^2 - s)
                u    = g / (s + damping) + coupled p
                p   <- p - lr decoupled p
                buf <- momentum buf + u                   (buf = u where there are no buffers)
                p   <- p - lr buf      (coupled or decoupled is weight_decay, the other 0)

    adamw_      p <- p - lr weight_decay p
                m <- m + (1 - beta1) (g - m)
                s <- s + (1 - beta2) (B g^2 - s)
                p <- p - (lr / bc1) m / (s / bc2 + damping)        (bc = 1 - beta^t, or 1)

where micro-batches were accumulated, B g^2 may be what reference.second_moment makes of their
squares.

Shapes: lists of tensors, entry by entry of one shape. Dtypes: params float32, bfloat16 or float16,
rounded once, at the write; grads as the parameter or float32, never written; state float32, and
squares of micro-batches. Bytes a parameter in float32: 28 (p, s and buf or m read and written, g
read), 20 without momentum buffers; in bfloat16 22 and 14; 4 more with squares.

A program updates one chunk of one tensor, found through the device tables of tables.py. Scalars
come from a device vector, so a scheduled lr recompiles nothing; lr itself may live on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import inverse_of, skips
from .calls import kind_of
from .diag_bodies import BODIES
from .slots import ROW
from .tables import (
    Launch,
    LaunchPlan,
    at_gradients,
    contiguous_copies,
    copy_back,
    find_plan,
    readable,
    scalar_table,
)

# One row serves every dtype and device: on an H200 10^9 elements at 98.7 to 99.2 % of the bandwidth
# of a copy (torch 2.11, Triton 3.6), other GPUs not measured. The SASS for sm_80, sm_90 and
# sm_100 has 8 loads of 16 bytes in flight a thread (16-bit dtypes: of 8) at 48 to 72 registers, so
# 7 to 10 programs and 64 to 130 KB in flight on a multiprocessor, where bandwidth times 0.8 us of
# latency is 20 KB (H100) or 45 KB (B200). 16 elements a thread, not 8, take 96 to 168 registers for
# no more bytes in flight; 2048 elements on 8 warps are the same code with a coarser tail. With
# squares there are 2 loads more, at 64 to 86 registers: 5 to 8 programs, 90 to 140 KB in flight.
BLOCK = 1024
NUM_WARPS = 4

# Elements that a thread moves at once. With 4 the loads of float32 are 16 bytes wide and those of
# 16-bit types 8; 8 would make the two disagree and send the 16-bit ones through shared memory.
VECTOR = 4


@triton.jit
def _update_chunk(
    param_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    parts_ptr,
    mask,
    lr,
    scalars_ptr,
    step_ptr,
    unscale,
    UPDATE: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    p = tl.load(param_ptr + offs, mask=mask).to(tl.float32)
    g = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    first = tl.load(first_ptr + offs, mask=mask)
    second = None
    if second_ptr is not None:
        second = tl.load(second_ptr + offs, mask=mask)
    parts = None
    if parts_ptr is not None:
        parts = tl.load(parts_ptr + offs, mask=mask)
    # Without the barrier ptxas sinks half of the loads below the arithmetic on the others, which
    # makes two memory round trips of one.
    tl.debug_barrier()
    if unscale is not None:
        g *= unscale
        if parts_ptr is not None and not SIGNS:
            parts *= unscale * unscale
    updated = UPDATE(p, g, parts, first, second, lr, scalars_ptr, step_ptr)
    tl.store(param_ptr + offs, updated[0].to(param_ptr.dtype.element_ty), mask=mask)
    tl.store(first_ptr + offs, updated[1], mask=mask)
    if second_ptr is not None:
        tl.store(second_ptr + offs, updated[2], mask=mask)


@triton.jit(
    do_not_specialize_on_alignment=["lr_ptr", "steps_ptr", "grad_scale_ptr", "found_inf_ptr"]
)
def _diag_kernel(
    chunks_ptr,
    rows_ptr,
    scalars_ptr,
    lr_ptr,
    steps_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    unscale = inverse_of(grad_scale_ptr)
    pid = tl.program_id(0)
    row_ptr = rows_ptr + len(ROW) * tl.load(chunks_ptr + pid)
    start = (pid - tl.load(row_ptr + ROW.first_program)) * BLOCK
    param_ptr = tl.load(row_ptr + ROW.param).to(tl.pointer_type(PARAM)) + start
    grad_ptr = tl.load(row_ptr + ROW.grad).to(tl.pointer_type(GRAD)) + start
    first_ptr = tl.load(row_ptr + ROW.first_state).to(tl.pointer_type(tl.float32)) + start
    second_ptr = None
    if HAS_SECOND:
        second_ptr = tl.load(row_ptr + ROW.second_state).to(tl.pointer_type(tl.float32)) + start
    parts_ptr = None
    if HAS_PARTS:
        parts_ptr = tl.load(row_ptr + ROW.parts).to(tl.pointer_type(tl.float32)) + start
    step_ptr = None
    if steps_ptr is not None:
        step_ptr = steps_ptr + tl.load(row_ptr + ROW.index)
    lr = tl.load(lr_ptr).to(tl.float32)

    # A row's aligned full chunks, if it has any, come first. Only they may promise alignment: one
    # path with a mask would be 4-byte accesses everywhere.
    if start < tl.load(row_ptr + ROW.aligned):
        param_ptr = tl.multiple_of(param_ptr, VECTOR * PARAM.primitive_bitwidth // 8)
        grad_ptr = tl.multiple_of(grad_ptr, VECTOR * GRAD.primitive_bitwidth // 8)
        first_ptr = tl.multiple_of(first_ptr, VECTOR * 4)
        if HAS_SECOND:
            second_ptr = tl.multiple_of(second_ptr, VECTOR * 4)
        if HAS_PARTS:
            parts_ptr = tl.multiple_of(parts_ptr, VECTOR * 4)
        _update_chunk(
            param_ptr,
            grad_ptr,
            first_ptr,
            second_ptr,
            parts_ptr,
            None,
            lr,
            scalars_ptr,
            step_ptr,
            unscale,
            UPDATE,
            SIGNS,
            BLOCK,
        )
    else:
        mask = tl.arange(0, BLOCK) < tl.load(row_ptr + ROW.length) - start
        _update_chunk(
            param_ptr,
            grad_ptr,
            first_ptr,
            second_ptr,
            parts_ptr,
            mask,
            lr,
            scalars_ptr,
            step_ptr,
            unscale,
            UPDATE,
            SIGNS,
            BLOCK,
        )


def prepare(
    lists: Sequence[Sequence[Tensor]], *, parts: Sequence[Tensor] = ()
) -> LaunchPlan | None:
    """What `launch` takes, where no tensor has to be copied.

    lists: params, grads, and states in the schema's order; that of a state that is not there is
    empty. parts: what is summed over micro-batches. The plan holds addresses, not tensors: it is
    right while each of them stays where and what it is.
    """
    plan = find_plan(list(filter(None, lists)), block=BLOCK, vector=VECTOR, parts=parts)
    return None if plan.copied else plan


def move_grads(plan: LaunchPlan, addresses: Tensor) -> LaunchPlan:
    """The plan for the same tensors with gradients at other addresses; int64, one a tensor."""
    return at_gradients(plan, addresses)


def launch(
    name: str,
    plan: LaunchPlan,
    steps: Tensor | None,
    lr: float | Tensor,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **settings: Any,
) -> None:
    """One step by the operator of this name on every tensor of a plan.

    steps has a float32 entry per tensor that counts this step already, on the CPU or on the device
    of the parameters; None means no bias correction. lr is a number, or a 0-d float32 or float64
    tensor, on the CPU or on the parameters' device; there a captured graph reads it at every
    replay. grad_scale, by which the gradients were multiplied, and found_inf, which is 0 unless the
    step is to be skipped, are such tensors or None. settings: the operator's others; batch_size is
    a number, or a 0-d tensor on the CPU.
    """
    numbers = lr, steps, grad_scale, found_inf
    run_plan(_diag_kernel, _constants, name, plan, numbers, settings)


def _constants(launch: Launch) -> dict[str, Any]:
    """The kernel's last parameters, but for UPDATE, and options."""
    return {
        "PARAM": launch.dtypes.param,
        "GRAD": launch.dtypes.grad,
        "HAS_SECOND": launch.dtypes.second_state is not None,
        "HAS_PARTS": launch.dtypes.parts is not None,
        "BLOCK": BLOCK,
        "VECTOR": VECTOR,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }


def run_plan(
    kernel: Any,
    constants: Callable[[Launch], dict[str, Any]],
    name: str,
    plan: LaunchPlan,
    numbers: tuple[float | Tensor, Tensor | None, Tensor | None, Tensor | None],
    settings: dict[str, Any],
    kind: Hashable = None,
) -> None:
    """The launches of a plan by the method of this name.

    kernel: of the plan's tables, the scalars of `settings`, and lr, steps, grad_scale and found_inf
        as pointers; then of constants.
    constants: of a launch; those of the same `kind` are equal.
    """
    body = BODIES[name]
    lr, steps, grad_scale, found_inf = numbers
    on_device_lr = lr if isinstance(lr, Tensor) and not lr.is_cpu else None
    scalars = body.scalars(float(lr) if on_device_lr is None else 0.0, **settings)

    def pointers(device: torch.device) -> tuple[Tensor | None, ...]:
        table = scalar_table(device, scalars).on_device()
        return (
            table,
            table if on_device_lr is None else readable(on_device_lr, device),
            readable(None if steps is None else steps.contiguous(), device),
            readable(grad_scale, device),
            readable(found_inf, device),
        )

    def chosen(launch: Launch) -> dict[str, Any]:
        return {"UPDATE": body.update, "SIGNS": body.signs, **constants(launch)}

    call_launches(kernel, plan, pointers, chosen, (name, kind))


def call_launches(
    kernel: Any,
    plan: LaunchPlan,
    pointers: Callable[[torch.device], tuple[Tensor | None, ...]],
    constants: Callable[[Launch], dict[str, Any]],
    kind: Hashable,
) -> None:
    """The launches of a plan, each on its device.

    kernel: of the plan's tables, and of pointers; then of constants.
    pointers: on a device. constants: of a launch; those of the same `kind` are equal.
    """
    for i, launch in enumerate(plan.launches):
        device = launch.device
        if launch.programs == 0:
            continue
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            tables = launch.chunks.on_device(), launch.rows.on_device()
            if launch.beside is not None:
                tables += (launch.beside.on_device(),)
            more = pointers(device)
            args = *tables, *more
            known = i, kind, kind_of(*more)
            if not plan.known.repeat(known, args):
                plan.known.call(known, kernel, launch.programs, args, constants(launch))


@torch.no_grad()
def update_(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *others: Any,
    parts: Sequence[Tensor] | None = None,
    **settings: Any,
) -> None:
    """The operator of this name: `launch` on lists of tensors, of states in the schema's order.

    others: the states, then steps where the operator has them, then lr. Tensors that are no dense
    blocks in one order go through copies.
    """
    *states, lr = others
    steps = states.pop() if BODIES[name].counts else None
    parts = parts or ()
    if not params:
        return
    lists = [params, grads, *filter(None, states)]
    plan = find_plan(lists, block=BLOCK, vector=VECTOR, parts=parts)
    if not plan.copied:
        launch(name, plan, steps, lr, **settings)
        return
    *dense, dense_parts = contiguous_copies([*lists, parts], plan.copied)
    plan_of_copies = find_plan(dense, block=BLOCK, vector=VECTOR, parts=dense_parts)
    launch(name, plan_of_copies, steps, lr, **settings)
    copy_back([lists[0], *lists[2:]], [dense[0], *dense[2:]], plan.copied)
