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

Shapes: lists of tensors, entry by entry of one shape. Dtypes: params float32, bfloat16 or float16,
rounded once, at the write; grads as the parameter or float32, never written; state float32. Bytes a
parameter in float32: 28 (p, s and buf or m read and written, g read), 20 without momentum buffers;
in bfloat16 22 and 14.

A program updates one chunk of one tensor, found through the device tables of tables.py. Scalars
come from a device vector, so a scheduled lr recompiles nothing; lr itself may live on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import skips
from .tables import Plan, at_gradients, at_scaling, find_plan, readable, scalar_table

# One row serves every dtype and device; not yet measured on a GPU. The SASS for sm_80, sm_90 and
# sm_100 has 8 loads of 16 bytes in flight a thread (16-bit dtypes: of 8) at 48 to 72 registers, so
# 7 to 10 programs and 64 to 130 KB in flight on a multiprocessor, where bandwidth times 0.8 us of
# latency is 20 KB (H100) or 45 KB (B200). 16 elements a thread, not 8, take 96 to 168 registers for
# no more bytes in flight; 2048 elements on 8 warps are the same code with a coarser tail.
BLOCK = 1024
NUM_WARPS = 4

# Elements that a thread moves at once. With 4 the loads of float32 are 16 bytes wide and those of
# 16-bit types 8; 8 would make the two disagree and send the 16-bit ones through shared memory.
VECTOR = 4

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _rmsprop_update(p, g, s, buf, lr, scalars_ptr, step_ptr):
    sign = tl.load(scalars_ptr + 1)
    batch_size = tl.load(scalars_ptr + 2)
    damping = tl.load(scalars_ptr + 3)
    decoupled = tl.load(scalars_ptr + 4)
    coupled = tl.load(scalars_ptr + 5)

    g *= sign
    s = _decay(s, _square(batch_size, g), scalars_ptr + 6)
    u = g / (s + damping) + coupled * p
    p -= lr * decoupled * p
    if buf is not None:
        u += tl.load(scalars_ptr + 8) * buf
    return p - lr * u, s, u


@triton.jit
def _adamw_update(p, g, m, s, lr, scalars_ptr, step_ptr):
    sign = tl.load(scalars_ptr + 1)
    batch_size = tl.load(scalars_ptr + 2)
    damping = tl.load(scalars_ptr + 3)
    weight_decay = tl.load(scalars_ptr + 4)

    g *= sign
    p -= lr * weight_decay * p
    # By halves where g - m of finite g is beyond the largest number.
    beyond = (tl.abs(g - m) > _LARGEST) & (tl.abs(g) <= _LARGEST)
    scale = tl.where(beyond, 0.5, 1.0)
    m = _decay(scale * m, scale * g, scalars_ptr + 5) * tl.where(beyond, 2.0, 1.0)
    s = _decay(s, _square(batch_size, g), scalars_ptr + 7)
    denominator = s + damping
    if step_ptr is not None:
        step = tl.load(step_ptr)
        lr /= _bias_correction(tl.load(scalars_ptr + 9), step)
        denominator = s / _bias_correction(tl.load(scalars_ptr + 10), step) + damping
    return p - lr * (m / denominator), m, s


@triton.jit
def _square(batch_size, g):
    # At most the largest finite number: an infinite s would be NaN at the next step.
    return tl.minimum(batch_size * g * g, _LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _decay(average, value, rates_ptr):
    # As torch.lerp does it: one formula for all decays would be inexact near 0 or drift near 1.
    decay = tl.load(rates_ptr)
    one_minus_decay = tl.load(rates_ptr + 1)
    change = value - average
    return tl.where(decay > 0.5, average + one_minus_decay * change, value - decay * change)


@triton.jit
def _bias_correction(log_decay, step):
    # 1 - e^-y to 2 ulp; below y = 1 its Taylor series, which does not cancel. Float64 would be
    # shorter, but some chips have so little of it that it, not memory, would bound the kernel.
    y = -log_decay * step
    series = 1.0
    for n in tl.static_range(10, 1, -1):
        series = 1.0 - y * (1.0 / n) * series
    return tl.where(y < 1.0, y * series, 1.0 - tl.exp(-y))


@triton.jit
def _update_chunk(
    param_ptr,
    grad_ptr,
    s_ptr,
    m_ptr,
    mask,
    lr,
    scalars_ptr,
    step_ptr,
    unscale,
    UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    p = tl.load(param_ptr + offs, mask=mask).to(tl.float32)
    g = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    s = tl.load(s_ptr + offs, mask=mask)
    m = None
    if m_ptr is not None:
        m = tl.load(m_ptr + offs, mask=mask)
    # Without the barrier ptxas sinks half of the loads below the arithmetic on the others, which
    # makes two memory round trips of one.
    tl.debug_barrier()
    if unscale is not None:
        g *= unscale
    p, s, m = UPDATE(p, g, s, m, lr, scalars_ptr, step_ptr)
    tl.store(param_ptr + offs, p.to(param_ptr.dtype.element_ty), mask=mask)
    tl.store(s_ptr + offs, s, mask=mask)
    if m_ptr is not None:
        tl.store(m_ptr + offs, m, mask=mask)


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
    HAS_M: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if skips(found_inf_ptr):
        return
    unscale = None
    if grad_scale_ptr is not None:
        unscale = 1.0 / tl.load(grad_scale_ptr).to(tl.float32)
    pid = tl.program_id(0)
    row_ptr = rows_ptr + 8 * tl.load(chunks_ptr + pid)
    start = (pid - tl.load(row_ptr + 5)) * BLOCK
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(PARAM)) + start
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(GRAD)) + start
    s_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32)) + start
    m_ptr = None
    if HAS_M:
        m_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + start
    step_ptr = None
    if steps_ptr is not None:
        step_ptr = steps_ptr + tl.load(row_ptr + 7)
    lr = tl.load(lr_ptr).to(tl.float32)

    # A row's aligned full chunks, if it has any, come first. Only they may promise alignment: one
    # path with a mask would be 4-byte accesses everywhere.
    if start < tl.load(row_ptr + 6):
        param_ptr = tl.multiple_of(param_ptr, VECTOR * PARAM.primitive_bitwidth // 8)
        grad_ptr = tl.multiple_of(grad_ptr, VECTOR * GRAD.primitive_bitwidth // 8)
        s_ptr = tl.multiple_of(s_ptr, VECTOR * 4)
        if HAS_M:
            m_ptr = tl.multiple_of(m_ptr, VECTOR * 4)
        _update_chunk(
            param_ptr,
            grad_ptr,
            s_ptr,
            m_ptr,
            None,
            lr,
            scalars_ptr,
            step_ptr,
            unscale,
            UPDATE,
            BLOCK,
        )
    else:
        mask = tl.arange(0, BLOCK) < tl.load(row_ptr + 4) - start
        _update_chunk(
            param_ptr,
            grad_ptr,
            s_ptr,
            m_ptr,
            mask,
            lr,
            scalars_ptr,
            step_ptr,
            unscale,
            UPDATE,
            BLOCK,
        )


def _launch(
    plan: Plan,
    update: Any,
    lr: float | Tensor,
    steps: Tensor | None,
    scaling: Mapping[str, Tensor | None],
    *scalars: float,
) -> None:
    # Scalar 0 is lr, unless lr is read where it is.
    on_device_lr = lr if isinstance(lr, Tensor) and not lr.is_cpu else None
    values = (float(lr) if on_device_lr is None else 0.0, *scalars)
    for device, param_dtype, grad_dtype, chunks, rows, programs in plan.launches:
        if programs == 0:
            continue
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            table = scalar_table(device, values).on_device()
            _diag_kernel[(programs,)](
                chunks.on_device(),
                rows.on_device(),
                table,
                table if on_device_lr is None else readable(on_device_lr, device),
                None if steps is None else readable(steps.contiguous(), device),
                *at_scaling(scaling, device),
                UPDATE=update,
                PARAM=param_dtype,
                GRAD=grad_dtype,
                HAS_M=plan.states == 2,
                BLOCK=BLOCK,
                VECTOR=VECTOR,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


@torch.no_grad()
def _run(launch: Any, lists: list[Sequence[Tensor]], *args: Any, **settings: Any) -> None:
    """Launch on tensors; those that are no dense blocks in one order go through copies."""
    if not lists[0]:
        return
    plan = find_plan(lists, block=BLOCK, vector=VECTOR)
    if not plan.copied:
        launch(plan, *args, **settings)
        return
    dense = [list(tensors) for tensors in lists]
    for tensors in dense:
        for i in plan.copied:
            tensors[i] = tensors[i].contiguous()
    _run(launch, dense, *args, **settings)
    for tensors, results in zip((lists[0], *lists[2:]), (dense[0], *dense[2:]), strict=True):
        for i in plan.copied:
            if results[i] is not tensors[i]:
                tensors[i].copy_(results[i])


def prepare(lists: list[Sequence[Tensor]]) -> Plan | None:
    """What the `launch_` functions take, where no tensor has to be copied.

    lists: params, grads, s, and momentum buffers or m where there are any. The plan holds
    addresses, not tensors: it is right while each of them stays where and what it is.
    """
    plan = find_plan(lists, block=BLOCK, vector=VECTOR)
    return None if plan.copied else plan


def move_grads(plan: Plan, addresses: Tensor) -> Plan:
    """The plan for the same tensors with gradients at other addresses; int64, one a tensor."""
    return at_gradients(plan, addresses, block=BLOCK, vector=VECTOR)


def launch_rmsprop(
    plan: Plan,
    lr: float | Tensor,
    *,
    alpha: float,
    damping: float,
    weight_decay: float,
    momentum: float,
    batch_size: float | Tensor,
    decoupled: bool,
    maximize: bool,
    **scaling: Tensor | None,
) -> None:
    """One root-free RMSProp step on every tensor.

    lr is a number, or a 0-d float32 or float64 tensor, on the CPU or on the parameters' device;
    there a captured graph reads it at every replay. batch_size is a number, or a 0-d tensor on the
    CPU. scaling: grad_scale, by which the gradients were multiplied, and found_inf, which is 0
    unless the step is to be skipped; as lr, or None.
    """
    _launch(
        plan,
        _rmsprop_update,
        lr,
        None,
        scaling,
        -1.0 if maximize else 1.0,
        float(batch_size),
        damping,
        weight_decay if decoupled else 0.0,
        0.0 if decoupled else weight_decay,
        alpha,
        1 - alpha,
        momentum,
    )


def launch_adamw(
    plan: Plan,
    steps: Tensor | None,
    lr: float | Tensor,
    *,
    beta1: float,
    beta2: float,
    damping: float,
    weight_decay: float,
    batch_size: float | Tensor,
    maximize: bool,
    **scaling: Tensor | None,
) -> None:
    """One root-free AdamW step on every tensor.

    steps has a float32 entry per tensor that counts this step already, on the CPU or on the device
    of the parameters; None means no bias correction. lr and scaling are as in `launch_rmsprop`.
    """
    _launch(
        plan,
        _adamw_update,
        lr,
        steps,
        scaling,
        -1.0 if maximize else 1.0,
        float(batch_size),
        damping,
        weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        math.log(beta1) if beta1 > 0 else -math.inf,
        math.log(beta2) if beta2 > 0 else -math.inf,
    )


def rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: Tensor,
    **settings: Any,
) -> None:
    """`launch_rmsprop` on lists; momentum_buffers is empty where there are none."""
    buffers = [momentum_buffers] if momentum_buffers else []
    _run(launch_rmsprop, [params, grads, square_avgs, *buffers], lr, **settings)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor | None,
    lr: Tensor,
    **settings: Any,
) -> None:
    """`launch_adamw` on lists."""
    _run(launch_adamw, [params, grads, exp_avgs, exp_avg_sqs], steps, lr, **settings)


def launch(name: str, plan: Plan, steps: Tensor | None, lr: float | Tensor, **rest: Any) -> None:
    """One step by the method of this name on the tensors of a plan."""
    own = (plan, steps) if name == "adamw_" else (plan,)
    {"rmsprop_": launch_rmsprop, "adamw_": launch_adamw}[name](*own, lr, **rest)
