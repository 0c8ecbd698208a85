"""What the launchers call the kernels with, in every shipped configuration, and its machine code.

Nothing runs and no GPU is needed: the launchers get CPU tensors, and recorders for kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rootfree_fused.kernels import (
    accumulate,
    diag,
    lowbit,
    matrix,
    matrix_launches,
    packing,
    rootfree_shampoo,
)
from rootfree_fused.kernels.matrix_plan import Tiling
from rootfree_fused.ops.axes import bucket_sizes

from ..workloads.lowbit import INT8, UINT8, LowbitCase, Packed, PackedCase
from .offline import Call, Program, Recorder, compile_call

ARCHITECTURES = (80, 90, 100)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Dtypes = tuple[torch.dtype, torch.dtype]
Bucket = tuple[tuple[int, int], tuple[bool, bool], int]  # sizes, which axes are dense, how many

# Diagonal -------------------------------------------------------------------------------------

# Dtypes of parameters and of gradients.
DIAG_DTYPES: tuple[Dtypes, ...] = ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))
# What differs in the compiled code: buffers or none, step counts or none. Scalars do not.
DIAG_CASES = ("rmsprop", "rmsprop momentum", "adamw", "adamw bias correction")
# On sums of micro-batches, which are of float32.
DIAG_CASES_OF_SQUARES = ("rmsprop, squares", "rmsprop momentum, squares", "adamw, squares")
DIAG_LAUNCHES: tuple[tuple[str, Dtypes], ...] = (
    *product(DIAG_CASES, DIAG_DTYPES),
    *product(DIAG_CASES_OF_SQUARES, ((F32, F32), (BF16, F32))),
)
_RMSPROP = {
    "alpha": 0.9,
    "damping": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "batch_size": 4.0,
    "decoupled": True,
    "maximize": False,
}
_ADAMW = {
    "beta1": 0.9,
    "beta2": 0.99,
    "damping": 0.1,
    "weight_decay": 0.1,
    "batch_size": 4.0,
    "maximize": False,
}


def diag_call(case: str, dtypes: Dtypes, lr: float = 0.1) -> Call:
    """The call for one tensor of one full chunk."""
    params, grads = ([torch.zeros(diag.BLOCK, dtype=dtype)] for dtype in dtypes)
    state, other = ([torch.zeros(diag.BLOCK)] for _ in range(2))
    update, _, squares = case.partition(", ")
    given = _of_squares(diag.BLOCK) if squares else {}
    recorder = Recorder()
    with patch.object(diag, "_diag_kernel", recorder):
        if update.startswith("adamw"):
            steps = torch.ones(1) if update == "adamw bias correction" else None
            tensors = params, grads, other, state, steps, torch.tensor(lr)
            diag.update_("adamw_", *tensors, **_ADAMW, **given)
        else:
            buffers = other if update == "rmsprop momentum" else []
            tensors = params, grads, state, buffers, torch.tensor(lr)
            diag.update_("rmsprop_", *tensors, **_RMSPROP, **given)
    (call,) = recorder.calls
    return call


def _of_squares(elements: int) -> dict[str, Any]:
    """What a step on sums of micro-batches is given of a tensor of so many elements."""
    return {"parts": [torch.zeros(elements)], "grad_scale": torch.tensor(4.0)}


@cache
def diag_program(case: str, dtypes: Dtypes, architecture: int) -> Program:
    return compile_call(diag._diag_kernel, diag_call(case, dtypes), architecture)


# Sums of micro-batches: dtype of the gradients, what there is of parts, and whether the first.
SUMS: tuple[tuple[torch.dtype, str, bool], ...] = (
    *product((F32, BF16, F16), ("no parts", "squares"), (False, True)),
    *product((F32, BF16), ("signs",), (False,)),
)


def accumulate_call(grad: torch.dtype, part: str, first: bool) -> Call:
    """The call for one tensor of one full chunk."""
    sums, parts = ([torch.zeros(diag.BLOCK)] for _ in range(2))
    recorder, grads = Recorder(), [torch.zeros(diag.BLOCK, dtype=grad)]
    settings = {"weight": 2.0, "signs": part == "signs", "first": first}
    with patch.object(accumulate, "_accumulate_kernel", recorder):
        accumulate.accumulate_(sums, [] if part == "no parts" else parts, grads, **settings)
    (call,) = recorder.calls
    return call


@cache
def accumulate_program(grad: torch.dtype, part: str, first: bool, architecture: int) -> Program:
    call = accumulate_call(grad, part, first)
    return compile_call(accumulate._accumulate_kernel, call, architecture)


# In fewer bytes -------------------------------------------------------------------------------

LOWBIT_METHODS = ("rmsprop momentum", "adamw bias correction")


def lowbit_call(method: str, case: LowbitCase, squares: bool = False) -> Call:
    """The call for one tensor of one full chunk."""

    def tensors(dtype: torch.dtype | None) -> list[Tensor]:
        return [] if dtype is None else [torch.zeros(lowbit.CHUNK, dtype=dtype)]

    def scales(dtype: torch.dtype) -> list[Tensor]:
        return tensors({INT8: F32, UINT8: UINT8}.get(dtype))

    formats = [case.average, case.second_moment]
    name, settings = "adamw_", _ADAMW | {"bias_correction": True}
    if method == "rmsprop momentum":
        name, settings = "rmsprop_", _RMSPROP
        formats.reverse()
    lists = [*map(tensors, formats), tensors(case.residual), *map(scales, formats)]
    random = {"seeds": [0], "firsts": [0], "stochastic": case.stochastic}
    given = _of_squares(lowbit.CHUNK) if squares else {}
    recorder = Recorder()
    with patch.object(lowbit, "_lowbit_kernel", recorder):
        params, grads = tensors(case.param), tensors(case.grad)
        others = *lists, torch.ones(1), torch.tensor(0.1)
        lowbit.update_(name, params, grads, *others, **random, **settings, **given)
    (call,) = recorder.calls
    return call


@cache
def lowbit_program(
    method: str, case: LowbitCase, architecture: int, squares: bool = False
) -> Program:
    return compile_call(lowbit._lowbit_kernel, lowbit_call(method, case, squares), architecture)


PACKING = ("unpack", "pack")


def packing_call(name: str, case: PackedCase) -> Call:
    """The call for one tensor of one full chunk."""
    recorder, tensor = Recorder(), Packed(case, torch.zeros(lowbit.CHUNK))
    with patch.object(packing, "_convert_kernel", recorder):
        getattr(tensor, name)(getattr(packing, f"{name}_"))
    (call,) = recorder.calls
    return call


@cache
def packing_program(name: str, case: PackedCase, architecture: int) -> Program:
    return compile_call(packing._convert_kernel, packing_call(name, case), architecture)


# Matrices -------------------------------------------------------------------------------------

TILINGS: dict[str, Tiling] = {
    "large": matrix.LARGE,
    "large_hopper": matrix.LARGE_HOPPER,
    "stacked": matrix.LARGE_HOPPER,
    "small": matrix.SMALL,
    "float32": matrix.FLOAT32,
}
# FLOPs an element of an n x n weight, over n: 18 in one update, which has "product right" twice.
FLOPS = {
    "product left": 2,
    "product right": 2,
    "factor_momenta": 4,
    "factors": 4,
    "products": 2,
    "params": 2,
}
MATRIX_KERNELS = ("gather", *FLOPS)
MATRIX_DTYPES: tuple[Dtypes, ...] = ((F32, F32), (BF16, BF16), (F16, F32))
ONE_SQUARE: tuple[Bucket, ...] = (((256, 256), (True, True), 1),)
_IFSHAMPOO = {
    "factor_lr": 0.3,
    "factor_momentum": 0.5,
    "damping": 0.1,
    "batch_size": 4.0,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
}


def large_tiling(architecture: int) -> str:
    return "large_hopper" if architecture == 90 else "large"


def tilings(architecture: int) -> list[str]:
    """Those that the launcher chooses from on this architecture."""
    stacked = ["stacked"] if architecture == 90 else []
    return [large_tiling(architecture), "small", "float32", *stacked]


def matrix_kernels(tiling: str) -> tuple[str, ...]:
    """Names of its launches; beside stacked ones, others are large_hopper's or cuBLAS's."""
    return ("factors", "products") if tiling == "stacked" else MATRIX_KERNELS


def matrix_calls(
    tiling: str, dtypes: Dtypes = (F32, F32), momentum: bool = True, buckets: Any = ONE_SQUARE
) -> dict[str, tuple[JITFunction, Call]]:
    """Kernel and call of every launch of an update, by name; TRANS_A makes two of a product."""

    def run() -> None:
        _ifshampoo(F32 if tiling == "float32" else BF16, dtypes, momentum, buckets)

    calls = {}
    for name, (kernel, made) in _recorded(matrix, tiling, run).items():
        for call in made:
            side = {True: " left", False: " right"}.get(call[2].get("TRANS_A"), "")
            calls[name + side] = kernel, call
    return calls


def _recorded(
    module: ModuleType, tiling: str, run: Callable[[], None]
) -> dict[str, tuple[JITFunction, list[Call]]]:
    """A launcher's kernels by name, without `_kernel`, and what `run` calls each with."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    recorders = {name: Recorder() for name in names}
    of_stacks = Recorder()
    kernels = {name: getattr(module, name) for name in names}
    with ExitStack() as changes:
        for name, recorder in recorders.items():
            changes.enter_context(patch.object(module, name, recorder))
        changes.enter_context(patch.object(matrix_launches, "_stacked_kernel", of_stacks))
        changes.enter_context(patch.object(module, "tiling_of", lambda *_: TILINGS[tiling]))
        if tiling == "stacked":
            changes.enter_context(patch.object(matrix, "ENOUGH_LARGE_TILES", 0))
        run()
    found = {
        name.strip("_").removesuffix("_kernel"): (kernel, recorders[name].calls)
        for name, kernel in kernels.items()
    }
    for call in of_stacks.calls:
        name = call[2]["FINISH"].__name__.removeprefix("finish_") + "s"
        kernel, made = found[name]
        again = made if kernel is matrix_launches._stacked_kernel else []
        found[name] = matrix_launches._stacked_kernel, [*again, call]
    return found


def matrix_tensors(
    buckets: Sequence[Bucket], factor_dtype: torch.dtype
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Factor state of buckets as `matrix.ifshampoo_` takes it, no buffers, and the settings."""
    empty = torch.empty(0)
    factors: list[Tensor] = []
    residuals: list[Tensor] = []
    products: list[Tensor] = []
    for sizes, dense, count in buckets:
        for size, is_dense in zip(sizes, dense, strict=True):
            shape = (count, size, size) if is_dense else (count, size)
            factors.append(torch.zeros(shape, dtype=factor_dtype if is_dense else F32))
            is_split = is_dense and factor_dtype == BF16
            residuals.append(torch.zeros(shape, dtype=torch.int16) if is_split else empty)
            products.append(torch.zeros_like(factors[-1]) if is_dense else empty)
    momenta = [torch.zeros_like(factor) for factor in factors]
    settings = {**_IFSHAMPOO, "axes": [2] * len(buckets), "momentum": 0.0}
    settings |= {"update_factors": True, "refresh_products": False}
    return [factors, residuals, momenta, products, []], settings


def _ifshampoo(
    factor_dtype: torch.dtype, dtypes: Dtypes, momentum: bool, buckets: Sequence[Bucket]
) -> None:
    shapes = [shape for shape, _, count in buckets for _ in range(count)]
    params, grads, buffers = (
        [torch.zeros(shape, dtype=dtype) for shape in shapes] for dtype in (*dtypes, F32)
    )
    (*state, _), settings = matrix_tensors(buckets, factor_dtype)
    if momentum:
        settings["momentum"] = 0.9
    lr = torch.tensor(0.1)
    axes = settings.pop("axes")
    sizes = bucket_sizes(params, state[0], axes)
    found = matrix.buckets_of(params, grads, *state, axes=axes, sizes=sizes)
    matrix.ifshampoo_(found, params, grads, buffers if momentum else [], lr, **settings)


@cache
def matrix_program(
    name: str, tiling: str, architecture: int, dtypes: Dtypes = (F32, F32), momentum: bool = True
) -> Program:
    kernel, call = matrix_calls(tiling, dtypes, momentum)[name]
    return compile_call(kernel, call, architecture)


# Root-free Shampoo ----------------------------------------------------------------------------

# FLOPs an element of an n x n weight, over n: 24 in one step.
SHAMPOO_FLOPS = {
    "transform": 4,
    "grams": 2,
    "damped": 4,
    "residuals": 2,
    "squares": 2,
    "roots": 4,
    "inverses": 2,
    "directions": 4,
}
SHAMPOO_KERNELS = ("scale", "momentum", *SHAMPOO_FLOPS, "rows", "descend")
# Bytes an element of float32 parameters and gradients, beside those of GEMM operands that it
# writes or reads.
SHAMPOO_BYTES = {"scale": (4, 0), "momentum": (12, 2), "descend": (8, 1)}
# Of stacks, those with an epilogue; the vendor's library has the others.
SHAMPOO_STACKED = ("squares", "roots", "inverses", "directions")


def shampoo_kernels(tiling: str) -> tuple[str, ...]:
    """Names of its launches; beside stacked ones, others are large_hopper's or cuBLAS's."""
    return SHAMPOO_STACKED if tiling == "stacked" else SHAMPOO_KERNELS


SHAMPOO = {
    "beta1": 0.9,
    "beta2": 0.95,
    "damping": 0.1,
    "weight_decay": 0.1,
    "update_rms": 0.4,
    "row_beta": 0.95,
    "maximize": False,
    "update_factors": True,
    "refresh_products": False,
}


def shampoo_calls(
    tiling: str, dtypes: Dtypes = (F32, F32), buckets: Any = ONE_SQUARE
) -> dict[str, tuple[JITFunction, list[Call]]]:
    """Kernel and calls of every launch of a step, by name; directions has two."""

    def run() -> None:
        state, _ = matrix_tensors(buckets, F32 if tiling == "float32" else BF16)
        factors, residuals, _, products, _ = state
        shapes = [shape for shape, _, count in buckets for _ in range(count)]
        params, grads, buffers = (
            [torch.zeros(shape, dtype=dtype) for shape in shapes] for dtype in (*dtypes, F32)
        )
        averages = [torch.zeros(shape[0]) for shape in shapes]
        stacks = [factor.float() for factor in factors], factors, residuals, products
        sizes = bucket_sizes(params, factors, [2] * len(buckets))
        found = rootfree_shampoo.buckets_of(params, grads, *stacks, sizes=sizes)
        served = [bucket for bucket in found if bucket is not None]
        lists = params, grads, buffers, averages, torch.ones(len(params)), torch.tensor(0.1)
        rootfree_shampoo.rootfree_shampoo_(served, *lists, **SHAMPOO)

    return _recorded(rootfree_shampoo, tiling, run)


@cache
def shampoo_program(name: str, tiling: str, architecture: int) -> Program:
    kernel, calls = shampoo_calls(tiling)[name]
    return compile_call(kernel, calls[-1], architecture)
