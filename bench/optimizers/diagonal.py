"""The diagonal optimizers that are timed, each with the same update as the plain PyTorch loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from rootfree_fused import RootFreeAdamW, RootFreeRMSprop
from rootfree_fused.reference import diag as reference

from ..measuring.common import Tensors, tensor_state

CHECK_STEPS = 2
LR = 0.1  # two steps then move a bfloat16 parameter of size 0.1 by many roundings
RMSPROP = {"lr": LR, "alpha": 0.99, "damping": 1e-4, "weight_decay": 0.0, "batch_size": 64}
ADAMW = {"lr": LR, "damping": 1e-4, "weight_decay": 1e-2, "batch_size": 64}
RELEASED = {"initial_square_avg": 1.0}  # the start of the specification


ALLOWED_ERROR = 2.0
# torch's kernel for GPUs makes 1 - beta2^t in float32: 1 / (1 - beta2) roundings at the first step.
BIAS_CORRECTION = 1 / (1 - 0.999)


@dataclass(frozen=True)
class Provider:
    """An optimizer to time, and its update one operation at a time on one tensor.

    Its error may be `allowed` times that of the update.
    """

    build: Callable[..., Optimizer]  # of a list of tensors
    eager: Callable[[Tensor, Tensor], Tensors]
    allowed: float = ALLOWED_ERROR


def _state_like(param: Tensor, value: float) -> Tensor:
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    return torch.full_like(param, value, dtype=dtype)


def _reference_rmsprop(param: Tensor, grad: Tensor, *, momentum: float) -> Tensors:
    state = {"square_avg": _state_like(param, 1.0)}
    if momentum:
        state["momentum_buffer"] = _state_like(param, 0.0)
    for _ in range(CHECK_STEPS):
        reference.rmsprop_(
            param,
            grad,
            state["square_avg"],
            state.get("momentum_buffer"),
            momentum=momentum,
            decoupled=True,
            maximize=False,
            **RMSPROP,
        )
    return {"param": param, **state}


def _reference_adamw(param: Tensor, grad: Tensor) -> Tensors:
    state = {"exp_avg": _state_like(param, 0.0), "exp_avg_sq": _state_like(param, 1.0)}
    for _ in range(CHECK_STEPS):
        reference.adamw_(
            param, grad, *state.values(), None, beta1=0.9, beta2=0.99, maximize=False, **ADAMW
        )
    return {"param": param, **state}


def _torch_eager(build: Callable[..., Optimizer], param: Tensor, grad: Tensor) -> Tensors:
    param.grad = grad
    optimizer = build([param], foreach=False)
    for _ in range(CHECK_STEPS):
        optimizer.step()
    return {"param": param, **tensor_state(optimizer.state[param])}


def _ours_rmsprop(momentum: float) -> Provider:
    return Provider(
        functools.partial(RootFreeRMSprop, momentum=momentum, **RMSPROP, **RELEASED),
        functools.partial(_reference_rmsprop, momentum=momentum),
    )


def _torch(
    build: Callable[..., Optimizer], allowed: float = ALLOWED_ERROR, **fastest: bool
) -> Provider:
    """A torch optimizer; `fastest` chooses its implementation, the eager one is the plain loop."""
    eager = functools.partial(_torch_eager, build)
    return Provider(functools.partial(build, **fastest), eager, allowed)


PROVIDERS = {
    "RootFreeRMSprop, momentum 0.9": _ours_rmsprop(0.9),
    "RootFreeRMSprop, momentum 0": _ours_rmsprop(0.0),
    "RootFreeAdamW": Provider(
        functools.partial(RootFreeAdamW, betas=(0.9, 0.99), **ADAMW, **RELEASED), _reference_adamw
    ),
    "torch AdamW, fused": _torch(functools.partial(AdamW, lr=LR), BIAS_CORRECTION, fused=True),
    "torch RMSprop, momentum 0.9": _torch(functools.partial(RMSprop, lr=LR, momentum=0.9)),
    "torch SGD, momentum 0.9, fused": _torch(
        functools.partial(SGD, lr=LR, momentum=0.9), fused=True
    ),
}


# On a GPU -------------------------------------------------------------------------------------


def replayed() -> dict[str, Provider]:
    """The twins of some whose step is a CUDA graph."""
    names = ("RootFreeRMSprop, momentum 0.9", "RootFreeAdamW")
    return {f"{name}, graph": capturable(name, replay=True) for name in names}


def capturable(name: str, replay: bool = False) -> Provider:
    """A provider whose step can be captured; with `replay` it is captured at once."""
    provider = PROVIDERS[name]

    def build(params: list[Tensor]) -> Optimizer:
        optimizer = provider.build(params, capturable=True)
        if replay:
            tensors = [t for p in params for t in (p, *tensor_state(optimizer.state[p]).values())]
            before = [t.detach().clone() for t in tensors]
            optimizer.step()  # compiles, and sends tables that the capture then finds
            torch._foreach_copy_(tensors, before)
            optimizer.step = captured(optimizer.step)
        return optimizer

    return replace(provider, build=build)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a step, to replay; it keeps whose step it is, and with it all tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> object:
        return step and graph.replay()

    return replay
