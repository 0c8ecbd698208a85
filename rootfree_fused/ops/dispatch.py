"""Bodies of the operators: C++ on the CPU, Triton on CUDA, the specification elsewhere."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import by_reference, cpu_matrix, extensions, install

# Operators by the stem of the file that has their Triton body.
_STEMS = {"rmsprop_": "diag", "adamw_": "diag", "ifshampoo_": "matrix"}


def register(library: torch.library.Library) -> None:
    """Give the operators of a library their bodies; C++ registers its own when imported."""
    for name in _STEMS:
        on_cuda = _matrices_on_cuda if name == "ifshampoo_" else _on_cuda(name)
        library.impl(name, _slowly(name), "CompositeExplicitAutograd")
        library.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"rootfree_fused::{name}", _trace, lib=library)
    library.impl("ifshampoo_", _matrices_on_cpu, "CPU")
    extensions.cpp()


def backends() -> dict[str, str]:
    """What runs on each device, and on the host before a step's kernels."""
    extension, kernels = extensions.cpp(), extensions.triton("diag")
    marked = install.without_extension()
    cause = marked[0] if marked else extension
    return {
        "cpu": f"reference: {cause}"
        if isinstance(extension, ImportError)
        else f"C++ ({torch.ops.rootfree_fused.cpu_isa()})",
        "cuda": f"reference: {kernels}"
        if isinstance(kernels, ImportError)
        else f"Triton {importlib.import_module('triton').__version__}",
        "host": "Python: no " + extensions.known_tensors_module(torch.__version__)
        if extensions.known_tensors() is None
        else "C++",
    }


def launcher(params: list[Tensor]) -> Any:
    """The Triton module of the diagonal updates, or None unless it serves all these parameters."""
    if not all(map(_served, params)):
        return None
    kernels = extensions.triton("diag")
    return None if isinstance(kernels, ImportError) else kernels


def matrix_kernel(params: list[Tensor], residuals: list[Tensor]) -> Any:
    """The C++ kernel of IF-Shampoo, or None unless it serves these parameters."""
    suit = params[0].is_cpu and cpu_matrix.suit_the_kernel(params, residuals)
    return torch.ops.rootfree_fused._ifshampoo_bf16_ if suit else None


def captured_tables() -> AbstractContextManager[list[Tensor]]:
    """The Triton launchers' own, or an empty list where they are missing."""
    kernels = extensions.triton("common")
    missing = isinstance(kernels, ImportError)
    return nullcontext([]) if missing else cast(Any, kernels).captured_tables()


def _served(param: Tensor) -> bool:
    return param.is_cuda and param.dtype is not torch.float64


def _slowly(name: str) -> Callable[..., None]:
    """The specification, with a warning where a faster body is missing."""

    def run(params: list[Tensor], *tensors: Any, **scalars: Any) -> None:
        _warn_if_slow(name, params)
        getattr(by_reference, name)(params, *tensors, **scalars)

    return run


def _warn_if_slow(name: str, params: list[Tensor]) -> None:
    device = params[0].device.type if params else ""
    if device in ("cpu", "cuda"):
        kernels = extensions.cpp() if device == "cpu" else extensions.triton(_STEMS[name])
        if isinstance(kernels, ImportError):
            _warn_slow(device, kernels)


@functools.cache
def _warn_slow(device: str, error: ImportError) -> None:
    if advice := install.cure(device, error):
        cause, cure = advice
        warnings.warn(
            f"rootfree_fused runs its PyTorch reference on {device}, several times slower than its "
            f"kernels ({cause}). To cure this: {cure}",
            stacklevel=1,
        )


def _on_cuda(name: str) -> Callable[..., None]:
    """The Triton body; parameters that it does not serve go where they are served."""

    def run(params: list[Tensor], *tensors: Any, **scalars: Any) -> None:
        kernels = extensions.triton(_STEMS[name])
        slow = _slowly(name)
        body = slow if isinstance(kernels, ImportError) else getattr(kernels, name)
        served = list(map(_served, params))
        if all(served):
            body(params, *tensors, **scalars)
            return
        *states, lr = tensors
        on_host = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in scalars.items()}
        on_cpu = getattr(torch.ops.rootfree_fused, name)
        for part, part_body, part_lr, part_scalars in (
            (served, body, lr, scalars),
            ([p.is_cuda and p.dtype is torch.float64 for p in params], slow, lr, scalars),
            ([not p.is_cuda for p in params], on_cpu, lr.cpu(), on_host),
        ):
            if any(part):
                picked = [_select(values, part) for values in (params, *states)]
                part_body(*picked, part_lr, **part_scalars)

    return run


def _select(values: Any, part: list[bool]) -> Any:
    """The entries of a list, or of the 1-D tensor of steps, that belong to a part of the call."""
    if isinstance(values, Tensor):
        return values[torch.tensor(part, device=values.device)]
    return (
        [value for value, chosen in zip(values, part, strict=True) if chosen] if values else values
    )


def _trace(params: list[Tensor], *_: Any, **__: Any) -> None:
    """What torch.compile records, and what runs where all parameters are on meta.

    The dispatcher takes it for every call with a tensor on meta, which must not stop the others.
    """
    for i, param in enumerate(params):
        if not (param.is_meta or isinstance(param, FakeTensor)):
            raise ValueError(
                f"params[{i}] is on {param.device} but a tensor of the call is on meta, where it "
                f"has no values; move it with .to({str(param.device)!r})"
            )


def _matrices_on_cpu(params: list[Tensor], *tensors: Any, **scalars: Any) -> None:
    _warn_if_slow("ifshampoo_", params)
    cpu_matrix.ifshampoo_(params, *tensors, **scalars)


def _matrices_on_cuda(*tensors: Any, axes: list[int], **scalars: Any) -> None:
    """IF-Shampoo in Triton; buckets that it does not serve by the specification."""
    kernels = extensions.triton("matrix")
    slow = _slowly("ifshampoo_")
    if isinstance(kernels, ImportError):
        slow(*tensors, axes=axes, **scalars)
        return
    for bucket in kernels.ifshampoo_(*tensors, axes=axes, **scalars):
        slow(*by_reference.take_bucket(bucket, *tensors, axes=axes), axes=[axes[bucket]], **scalars)
