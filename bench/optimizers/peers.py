"""The optimizers that are timed on the same matrices, and what each one's result is checked by.

Those with the mathematics of this package are held to its specification in float64. A peer whose
steps rounding changes little is held to its own steps on float64 parameters. SOAP and PSGD, which
decompose what rounding decides (the null space of G G^T) or are random, are checked to descend: by
the cosine of their displacement with the negative gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList
from torch.optim import Optimizer

from rootfree_fused import IFShampoo, RootFreeShampoo, reference
from rootfree_fused.optimizer.layouts import layout_of
from rootfree_fused.reference.structures import Structure

from ..measuring.common import dtype_name
from .diagonal import CHECK_STEPS as DIAGONAL_STEPS
from .diagonal import PROVIDERS
from .eigh import EighShampoo

Build = Callable[[list[Parameter], int], Optimizer]

CHECK_STEPS = 3
LR, MOMENTUM, DAMPING, BATCH = 1e-3, 0.9, 1e-4, 8
FACTOR_LR, FACTOR_MOMENTUM = 0.1, 0.5
# Preconditioners are renewed at the first step or never.
NEVER = 10**9
# Allowed distance from the float64 displacement: several roundings of the products' dtype.
ROUNDINGS = {torch.bfloat16: 2.0**-5, torch.float32: 2.0**-16}
# A float32 inverse root multiplies roundings by the condition of what it is taken of, 1e6 and more
# for a square of noise. Seen: 0.0018 by eigh at 2048 x 2048, 0.014 in pytorch-optimizer at 512.
ROOTS = 2.0**-5
# On gradients of noise SOAP reaches 0.06, PSGD 0.98; chance alone gives 1 / sqrt(elements).
DESCENT = 0.01


@dataclass(frozen=True)
class Peer:
    """An optimizer of matrices that renews its preconditioner every so many steps.

    `displacement` is the float64 truth: what `steps` steps at an interval add to one parameter
    under one gradient. None means that it is checked to descend.
    """

    build: Build
    package: str = "rootfree_fused"
    displacement: Callable[[Tensor, Tensor, int], Tensor] | None = None
    allowed: float = DESCENT
    steps: int = CHECK_STEPS
    renews: bool = True  # False where no step differs from another
    dense: int = NEVER  # the longest axis with a whole factor

    def why_absent(self) -> str:
        """Why it cannot be imported, or nothing."""
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            return str(error)
        return ""


def _copy64(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True)


# Ours -----------------------------------------------------------------------------------------


def ifshampoo(
    params: list[Parameter], interval: int, *, dtype: torch.dtype, capturable: bool = False
) -> Optimizer:
    return IFShampoo(
        params,
        lr=LR,
        momentum=MOMENTUM,
        damping=DAMPING,
        batch_size=BATCH,
        factor_lr=FACTOR_LR,
        factor_momentum=FACTOR_MOMENTUM,
        initial_square_avg=1.0,
        factor_dtype=dtype,
        update_interval=interval,
        capturable=capturable,
    )


def specified(param: Tensor, grad: Tensor, interval: int, *, limit: int = 2048) -> Tensor:
    """IF-Shampoo's displacement of a matrix, an axis above `limit` having blocks, or a diagonal."""
    p, g, buffer = _copy64(param), grad.double(), torch.zeros_like(param, dtype=torch.float64)
    settings = {"merge_axes": True, "structures": "auto", "max_dense_dim": limit}
    layout = layout_of(p.shape, {**settings, "vector_method": "factor"})
    axes = zip(layout.sizes, layout.structures, strict=True)
    factors = [_identity(size, structure, p) for size, structure in axes]
    momenta = [torch.zeros_like(factor) for factor in factors]
    for step in range(CHECK_STEPS):
        if step % interval == 0:
            reference.update_factors_(
                g.view(layout.sizes),
                factors,
                momenta,
                factor_lr=FACTOR_LR,
                factor_momentum=FACTOR_MOMENTUM,
                damping=DAMPING,
                batch_size=BATCH,
            )
        update = reference.precondition(g.view(layout.sizes), factors).view_as(p)
        reference.apply_(
            p, update, buffer, lr=LR, momentum=MOMENTUM, weight_decay=0.0, decoupled=True
        )
    return p - param.double()


def _identity(size: int, structure: Structure, like: Tensor) -> Tensor:
    factor = like.new_zeros(structure.shape(size))
    structure.add_identity_(factor, 1.0, size)
    return factor


def rootfree_shampoo(
    params: list[Parameter], interval: int, *, dtype: torch.dtype, capturable: bool = False
) -> Optimizer:
    return RootFreeShampoo(
        params, lr=LR, factor_dtype=dtype, update_interval=interval, capturable=capturable
    )


def averaged(param: Tensor, grad: Tensor, interval: int, *, limit: int = 2048) -> Tensor:
    """Root-free Shampoo's displacement of a matrix, an axis above `limit` as `specified` has it."""
    p, g = _copy64(param), grad.double()
    settings = {"structures": "auto", "max_dense_dim": limit, "vector_method": "adam"}
    layout = layout_of(p.shape, settings)
    assert layout is not None
    buffer = torch.zeros(layout.sizes, dtype=torch.float64, device=p.device)
    rows = buffer.new_zeros(layout.sizes[0])
    grams, factors = [], []
    starts = reference.start_values(0.1)
    for size, structure, values in zip(layout.sizes, layout.structures, starts, strict=True):
        for tensors, value in zip((grams, factors), values, strict=True):
            tensors.append(value * _identity(size, structure, buffer))
    for step in range(CHECK_STEPS):
        reference.rootfree_shampoo_(
            *(p, g.view(layout.sizes), buffer, grams, factors, rows, step + 1),
            lr=LR,
            beta1=0.9,
            beta2=0.95,
            damping=0.1,
            weight_decay=0.0,
            update_rms=0.3,
            row_beta=0.95,
            update_factors=step % interval == 0,
        )
    return p - param.double()


def _diagonal(name: str) -> Peer:
    provider = PROVIDERS[name]
    package = "rootfree_fused" if name.startswith("RootFree") else "torch"

    def build(params: list[Parameter], interval: int) -> Optimizer:
        return provider.build(params)

    def displacement(param: Tensor, grad: Tensor, interval: int) -> Tensor:
        return provider.eager(_copy64(param), grad.double())["param"] - param.double()

    return Peer(
        build, package, displacement, ROUNDINGS[torch.float32], steps=DIAGONAL_STEPS, renews=False
    )


# Others ---------------------------------------------------------------------------------------


def own_displacement(build: Build, param: Tensor, grad: Tensor, interval: int) -> Tensor:
    """The displacement of the same optimizer on a float64 copy of the parameter."""
    p = Parameter(_copy64(param))
    p.grad = grad.double()
    optimizer = build([p], interval)
    for _ in range(CHECK_STEPS):
        optimizer.step()
    return p.detach() - param.double()


def sirfshampoo(params: list[Parameter], interval: int, *, dtype: torch.dtype) -> Optimizer:
    model = Module()  # it takes no parameters without one
    model.params = ParameterList(params)
    return importlib.import_module("sirfshampoo").SIRFShampoo(
        model,
        lr=LR,
        beta2=FACTOR_LR,
        alpha1=MOMENTUM,
        alpha2=FACTOR_MOMENTUM,
        lam=DAMPING,
        batch_size=BATCH,
        preconditioner_dtypes=dtype,
        T=interval,
    )


def _shampoo(params: list[Parameter], interval: int) -> Optimizer:
    # No momentum: with it this Shampoo overwrites p.grad, and the next step's matrices differ.
    build = importlib.import_module("pytorch_optimizer").Shampoo
    return build(params, lr=LR, preconditioning_compute_steps=interval)


def _scalable_shampoo(params: list[Parameter], interval: int) -> Optimizer:
    build = importlib.import_module("pytorch_optimizer").ScalableShampoo
    return build(
        params, lr=LR, start_preconditioning_step=1, preconditioning_compute_steps=interval
    )


def _soap(params: list[Parameter], interval: int) -> Optimizer:
    build = importlib.import_module("pytorch_optimizer").SOAP
    return build(params, lr=LR, precondition_frequency=interval)


def _heavyball(name: str, params: list[Parameter], **settings: object) -> Optimizer:
    """On a GPU compiled, as is its default; a compiler for the CPU takes 20 s a shape."""
    heavyball = importlib.import_module("heavyball")
    if params[0].device.type == "cpu":
        heavyball.utils.compile_mode = None
    optimizer = getattr(heavyball, name)(params, lr=LR, **settings)
    step, grads = optimizer.step, [p.grad for p in params]

    def step_with_gradients() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad  # its steps drop them
        step()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    optimizer.step = step_with_gradients
    return optimizer


def _heavyball_soap(params: list[Parameter], interval: int) -> Optimizer:
    return _heavyball("SOAP", params, precondition_frequency=interval, use_precond_schedule=False)


def _heavyball_psgd(params: list[Parameter], interval: int) -> Optimizer:
    return _heavyball("PSGDKron", params, preconditioner_update_probability=1 / interval)


def _muon(params: list[Parameter], interval: int) -> Optimizer:
    return torch.optim.Muon(params, lr=LR)


def _eigh_shampoo(params: list[Parameter], interval: int) -> Optimizer:
    return EighShampoo(params, lr=LR, interval=interval)


def _held_to_itself(build: Build, package: str, allowed: float, renews: bool = True) -> Peer:
    displacement = functools.partial(own_displacement, build)
    return Peer(build, package, displacement, allowed, renews=renews)


def _preconditioned(
    build: Callable[..., Optimizer], dtype: torch.dtype, package: str, limit: int
) -> Peer:
    truth = averaged if build is rootfree_shampoo else specified
    displacement = functools.partial(truth, limit=limit)
    build = functools.partial(build, dtype=dtype)
    return Peer(build, package, displacement, ROUNDINGS[dtype], dense=limit)


BASE = "sirfshampoo, bfloat16"
EIGH = "Shampoo by batched eigh"
MATRIX_PEERS = {
    f"{name}, {dtype_name(dtype)}": _preconditioned(build, dtype, package, limit)
    for name, build, package, limit in (
        ("IFShampoo", ifshampoo, "rootfree_fused", 2048),
        ("RootFreeShampoo", rootfree_shampoo, "rootfree_fused", 2048),
        ("sirfshampoo", sirfshampoo, "sirfshampoo", NEVER),
    )
    for dtype in (torch.bfloat16, torch.float32)
} | {
    "SOAP, float32": Peer(_soap, "pytorch_optimizer"),
    "Shampoo, float32": _held_to_itself(_shampoo, "pytorch_optimizer", ROOTS),
    "ScalableShampoo, float32": _held_to_itself(_scalable_shampoo, "pytorch_optimizer", ROOTS),
    EIGH: _held_to_itself(_eigh_shampoo, "torch", ROOTS),
    "HeavyBall SOAP": Peer(_heavyball_soap, "heavyball", dense=2048),
    "HeavyBall PSGD": Peer(_heavyball_psgd, "heavyball", dense=2048),
    "torch Muon": _held_to_itself(_muon, "torch", ROUNDINGS[torch.bfloat16], renews=False),
}
DIAGONAL_PEERS = {
    name: _diagonal(name)
    for name in (
        "RootFreeRMSprop, momentum 0.9",
        "RootFreeAdamW",
        "torch AdamW, fused",
        "torch RMSprop, momentum 0.9",
    )
}
PEERS = MATRIX_PEERS | DIAGONAL_PEERS


def limited(name: str, limit: int) -> Peer:
    """One of ours in bfloat16, with dense factors for axes of up to `limit`, and else blocks."""
    averages = name.startswith("RootFreeShampoo")
    build, truth = (rootfree_shampoo, averaged) if averages else (ifshampoo, specified)

    def of_limit(params: list[Parameter], interval: int) -> Optimizer:
        group: Any = {"params": params, "max_dense_dim": limit}
        return build([group], interval, dtype=torch.bfloat16)

    displacement = functools.partial(truth, limit=limit)
    return dataclasses.replace(PEERS[name], build=of_limit, displacement=displacement)


def in_blocks(limit: int) -> dict[str, Peer]:
    """Ours with blocks of at most `limit` and with dense factors, and a split into matrices.

    The split is Distributed Shampoo's: sub-matrices of at most `limit` a side, each with factors of
    its own, here by batched eigendecompositions.
    """

    def split(params: list[Parameter], interval: int) -> Optimizer:
        return _eigh_shampoo([q for p in params for q in _sub_matrices(p, limit)], interval)

    ours = {}
    for name in ("IFShampoo, bfloat16", "RootFreeShampoo, bfloat16"):
        ours |= {f"{name}, blocks": limited(name, limit), f"{name}, dense": limited(name, NEVER)}
    return ours | {f"{EIGH}, split": _held_to_itself(split, "torch", ROOTS)}


def _sub_matrices(param: Parameter, limit: int) -> list[Parameter]:
    """Views, with gradients."""
    assert param.grad is not None
    found = []
    grads = (band.split(limit, 1) for band in param.grad.split(limit))
    for band, own in zip(param.data.split(limit), grads, strict=True):
        for values, grad in zip(band.split(limit, 1), own, strict=True):
            found.append(Parameter(values))
            found[-1].grad = grad
    return found


# Check ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How far a result is from what it is held to, and whether that is right."""

    value: float
    unit: str
    right: bool


def judge(
    peer: Peer,
    before: Sequence[Tensor],
    grads: Sequence[Tensor],
    after: Sequence[Tensor],
    interval: int,
) -> Verdict:
    """Judge the displacement from `before` to `after` in `peer.steps` steps, in float64.

    The error is relative to the true one, over all tensors together; NaN anywhere is wrong. A true
    displacement of nothing (Shampoo before its first roots) must be one of nothing.
    """
    moved = [q.detach().double() - p.double() for p, q in zip(before, after, strict=True)]
    if peer.displacement is None:
        along = -sum((m * g).sum() for m, g in zip(moved, grads, strict=True))
        cosine = float(along) / (_size(moved) * _size(grads))
        return Verdict(cosine, "cosine with descent", cosine >= peer.allowed)
    truth = [peer.displacement(p, g, interval) for p, g in zip(before, grads, strict=True)]
    error = _size([m - t for m, t in zip(moved, truth, strict=True)]) / (_size(truth) or 1.0)
    return Verdict(error, "of the way", error <= peer.allowed)


def _size(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
