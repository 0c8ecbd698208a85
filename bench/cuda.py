"""Providers that only a GPU has: the update in CUDA C++, and steps replayed from a CUDA graph."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from .common import tensor_state
from .providers import PROVIDERS, Provider

Build = Callable[[list[Tensor]], Optimizer]

COMPARED = ("RootFreeRMSprop, momentum 0.9", "RootFreeAdamW")


def cuda_providers() -> dict[str, Provider]:
    """Triton replayed; CUDA C++ eager and replayed, where it was built (ROOTFREE_FUSED_CUDA=1)."""
    found = {}
    for name in COMPARED:
        eager = PROVIDERS[name]
        capturable = functools.partial(eager.build, capturable=True)
        builds = {"graph": replayed(capturable)}
        if _extension_loads():
            builds["CUDA C++"] = in_cuda_cpp(eager.build)
            builds["CUDA C++, graph"] = replayed(in_cuda_cpp(capturable))
        found |= {f"{name}, {how}": replace(eager, build=build) for how, build in builds.items()}
    return found


def _extension_loads() -> bool:
    try:
        importlib.import_module("rootfree_fused._C_cuda")
    except ImportError:
        return False
    return True


def in_cuda_cpp(build: Build) -> Build:
    """The same optimizer, its step calling the operators of CUDA C++."""

    def build_other(params: list[Tensor]) -> Optimizer:
        optimizer = build(params)
        optimizer._prepare = lambda *_: None  # it would launch Triton's kernel
        optimizer.step = functools.partial(_step_in_cuda_cpp, optimizer.step)
        return optimizer

    return build_other


def _step_in_cuda_cpp(step: Callable[[], object]) -> None:
    namespace = torch.ops.rootfree_fused
    public = namespace.rmsprop_, namespace.adamw_
    namespace.rmsprop_, namespace.adamw_ = namespace._rmsprop_cuda_, namespace._adamw_cuda_
    try:
        step()
    finally:
        namespace.rmsprop_, namespace.adamw_ = public


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
