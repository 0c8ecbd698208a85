"""Providers that only a GPU has: steps replayed from a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from .measuring.common import tensor_state
from .optimizers.diagonal import PROVIDERS, Provider

Build = Callable[[list[Tensor]], Optimizer]

REPLAYED = ("RootFreeRMSprop, momentum 0.9", "RootFreeAdamW")


def cuda_providers() -> dict[str, Provider]:
    """The replayed twins of some that step eagerly."""
    found = {}
    for name in REPLAYED:
        eager = PROVIDERS[name]
        build = replayed(functools.partial(eager.build, capturable=True))
        found[f"{name}, graph"] = replace(eager, build=build)
    return found


def replayed(build: Build) -> Build:
    """The same optimizer, its step captured in a CUDA graph."""

    def build_other(params: list[Tensor]) -> Optimizer:
        optimizer = build(params)
        tensors = [t for p in params for t in (p, *tensor_state(optimizer.state[p]).values())]
        before = [t.detach().clone() for t in tensors]
        optimizer.step()  # compiles, and sends tables that the capture then finds
        torch._foreach_copy_(tensors, before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        optimizer.step = graph.replay
        return optimizer

    return build_other
