"""Bodies of the operators: C++ on the CPU, Triton on CUDA, the specification elsewhere."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import chain
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..reference.structures import Structure
from . import by_reference, cpu_matrix, cpu_rootfree_shampoo, extensions, install
from .axes import bucket_sizes
from .by_reference import IFShampooTensors, RootFreeShampooTensors
from .methods import DiagonalMethod

# Those of the operators on matrices in kernels/.
_FILES = {"ifshampoo_": "matrix", "rootfree_shampoo_": "rootfree_shampoo"}


class DiagonalKernels(Protocol):
    """What kernels/diag.py and kernels/lowbit.py give to steps on known tensors."""

    def prepare(self, lists: list[list[Tensor]], **random: Any) -> Any:
        """The plan for the operator's lists, or None where tensors must be copied first.

        random: the seeds and firsts of an operator on weights and states in fewer bytes.
        """

    def move_grads(self, plan: Any, addresses: Tensor) -> Any:
        """The plan for the same tensors with gradients at other addresses."""

    def launch(
        self, name: str, plan: Any, steps: Tensor | None, lr: float | Tensor, **settings: Any
    ) -> None:
        """One step by the method of this name on the tensors of a plan."""


class MatrixKernels(Protocol):
    """What kernels/matrix.py and kernels/rootfree_shampoo.py give to steps on known tensors."""

    def prepare(self, *tensors: Any, update_factors: bool, **axes: Any) -> Any:
        """The plan for the operator's tensors, or None where the operator has to look at them."""

    def move_grads(self, plan: Any, addresses: Tensor) -> Any:
        """The plan for gradients at other addresses, or None where the operator has to look."""

    def launch(self, plan: Any, *numbers: float | Tensor, **settings: Any) -> None:
        """One step on the tensors of a plan; numbers: the operator's steps, if any, and lr."""


def give_bodies(library: torch.library.Library, method: DiagonalMethod) -> None:
    """Give the operators of a diagonal method their bodies; C++ registers its own when imported."""
    for name, (slowly, on_cuda) in diagonal_bodies(method).items():
        library.impl(name, slowly, "CompositeExplicitAutograd")
        library.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"rootfree_fused::{name}", _trace, lib=library)
    extensions.cpp()


def diagonal_bodies(
    method: DiagonalMethod,
) -> dict[str, tuple[Callable[..., None], Callable[..., None]]]:
    """Of each operator of a diagonal method, by its name: the specification, and that on CUDA."""
    files = {
        method.name: ("diag", by_reference.diagonal(method)),
        method.lowbit_name: ("lowbit", by_reference.lowbit(method)),
    }
    bodies = {}
    for name, (stem, specified) in files.items():
        slowly = _warned(stem, specified)
        bodies[name] = slowly, _on_cuda(name, stem, method, slowly)
    return bodies


def give_matrix_bodies(library: torch.library.Library) -> None:
    """Give the operators on stacks of matrices their bodies."""
    for name, specified, on_cpu, on_cuda in (
        ("ifshampoo_", by_reference.ifshampoo_, cpu_matrix.ifshampoo_, _ifshampoo_on_cuda),
        (
            "rootfree_shampoo_",
            by_reference.rootfree_shampoo_,
            cpu_rootfree_shampoo.rootfree_shampoo_,
            _rootfree_shampoo_on_cuda,
        ),
    ):
        slowly = _warned("matrix", specified)
        library.impl(name, slowly, "CompositeExplicitAutograd")
        library.impl(name, _warned("matrix", on_cpu), "CPU")
        library.impl(name, on_cuda(slowly), "CUDA")
        torch.library.register_fake(f"rootfree_fused::{name}", _trace, lib=library)
    extensions.cpp()


def give_list_bodies(library: torch.library.Library) -> None:
    """Give the operators that only move numbers between lists of tensors their bodies."""
    for name, stem, specified in (
        ("unpack_", "packing", by_reference.unpack_),
        ("pack_", "packing", by_reference.pack_),
        ("accumulate_", "accumulate", by_reference.accumulate_),
    ):
        slowly = _warned(stem, specified)
        library.impl(name, slowly, "CompositeExplicitAutograd")
        library.impl(name, _lists_on_cuda(name, stem, slowly), "CUDA")
        torch.library.register_fake(f"rootfree_fused::{name}", _trace, lib=library)


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


def diagonal_kernels(name: str, params: list[Tensor], stem: str = "diag") -> DiagonalKernels | None:
    """The Triton kernels, or None unless they serve the method and all these parameters.

    stem: of their file.
    """
    if not all(map(triton_serves, params)):
        return None
    return cast("DiagonalKernels | None", _kernels_with(stem, name))


def _kernels_with(stem: str, name: str) -> ModuleType | None:
    """The file of this stem in kernels/ where they have the diagonal method of this name."""
    bodies, kernels = extensions.triton("diag_bodies"), extensions.triton(stem)
    missing = isinstance(bodies, ImportError) or name not in cast(Any, bodies).BODIES
    return None if missing or isinstance(kernels, ImportError) else kernels


def matrix_kernel(
    name: str,
    params: list[Tensor],
    residuals: list[Tensor],
    sizes: Sequence[int],
    structures: Sequence[Structure],
) -> Callable[..., None] | None:
    """What a step on the CPU may call for a bucket instead of the operator, which would find it.

    name: of the C++ kernel. It takes contiguous tensors, no `axes` and no scaler's tensors.
    residuals, sizes, structures: one an axis. None where it does not serve these parameters.
    """
    if params[0].is_cpu and cpu_matrix.kernel_serves(name, params, residuals, structures):
        return partial(getattr(torch.ops.rootfree_fused, name), sizes=list(sizes))
    return None


def matrix_kernels(name: str, params: list[Tensor]) -> MatrixKernels | None:
    """The Triton kernels of the operator of this name, or None unless all is on their devices."""
    if not all(map(triton_serves, params)):
        return None
    kernels = extensions.triton(_FILES[name])
    return None if isinstance(kernels, ImportError) else cast(MatrixKernels, kernels)


def captured_tables() -> AbstractContextManager[list[Tensor]]:
    """A list, within, of what kernels read that are captured: the graph's owner keeps it."""
    kernels = extensions.triton("tables")
    missing = isinstance(kernels, ImportError)
    return nullcontext([]) if missing else cast(Any, kernels).captured_tables()


def triton_serves(param: Tensor) -> bool:
    return param.is_cuda and param.dtype is not torch.float64


def _warned(stem: str, body: Callable[..., None]) -> Callable[..., None]:
    """A body with a warning where the kernels that should run instead are missing.

    stem: of the file in kernels/ that has them for CUDA.
    """

    def run(params: list[Tensor], *tensors: Any, **scalars: Any) -> None:
        device = params[0].device.type if params else ""
        if device in ("cpu", "cuda"):
            kernels = extensions.cpp() if device == "cpu" else extensions.triton(stem)
            if isinstance(kernels, ImportError):
                _warn_slow(device, kernels)
        body(params, *tensors, **scalars)

    return run


@cache
def _warn_slow(device: str, error: ImportError) -> None:
    if advice := install.cure(device, error):
        cause, cure = advice
        warnings.warn(
            f"rootfree_fused runs its PyTorch reference on {device}, several times slower than its "
            f"kernels ({cause}). To cure this: {cure}",
            stacklevel=1,
        )


def _on_cuda(
    name: str, stem: str, method: DiagonalMethod, slow: Callable[..., None]
) -> Callable[..., None]:
    """The Triton body of an operator; parameters that it does not serve go where they are served.

    stem: of the file in kernels/ that has it.
    """

    def run(params: list[Tensor], *tensors: Any, **scalars: Any) -> None:
        kernels = _kernels_with(stem, method.name)
        body = slow if kernels is None else partial(kernels.update_, method.name)
        served = list(map(triton_serves, params))
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
                lists = {k: _select(v, part) for k, v in part_scalars.items() if type(v) is list}
                part_body(*picked, part_lr, **{**part_scalars, **lists})

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


def _lists_on_cuda(name: str, stem: str, slow: Callable[..., None]) -> Callable[..., None]:
    """The Triton body of an operator on three lists, or where it serves not all, the other.

    stem: of the file in kernels/ that has it.
    """

    def run(*tensors: Any, **scalars: Any) -> None:
        kernels = extensions.triton(stem)
        served = all(map(triton_serves, chain(*tensors[:3])))
        missing = isinstance(kernels, ImportError)
        (getattr(kernels, name) if served and not missing else slow)(*tensors, **scalars)

    return run


def _ifshampoo_on_cuda(slow: Callable[..., None]) -> Callable[..., None]:
    """IF-Shampoo in Triton; buckets that it does not serve by the specification."""

    def run(
        *tensors: Any, axes: list[int], joint_norms: list[bool] | None = None, **scalars: Any
    ) -> None:
        kernels = extensions.triton(_FILES["ifshampoo_"])
        if isinstance(kernels, ImportError):
            slow(*tensors, axes=axes, joint_norms=joint_norms, **scalars)
            return
        params, grads, *state, buffers, lr = tensors
        sizes = bucket_sizes(params, state[0], axes)
        layouts = {"axes": axes, "sizes": sizes, "joint_norms": joint_norms}
        buckets = kernels.buckets_of(params, grads, *state, **layouts)
        kernels.ifshampoo_(list(filter(None, buckets)), params, grads, buffers, lr, **scalars)
        for i, served in enumerate(buckets):
            if served is None:
                own = by_reference.take_bucket(i, IFShampooTensors(*tensors), axes)
                first = sum(axes[:i])
                own_norms = joint_norms and joint_norms[first : first + axes[i]]
                slow(*own, axes=[axes[i]], joint_norms=own_norms, **scalars)

    return run


def _rootfree_shampoo_on_cuda(slow: Callable[..., None]) -> Callable[..., None]:
    """Root-free Shampoo in Triton; buckets that it does not serve by the specification."""

    def run(*tensors: Any, **scalars: Any) -> None:
        kernels = extensions.triton(_FILES["rootfree_shampoo_"])
        if isinstance(kernels, ImportError):
            slow(*tensors, **scalars)
            return
        params, grads, buffers, rows, *state, steps, lr = tensors
        sizes = bucket_sizes(params, state[1], [2] * (len(state[1]) // 2))
        buckets = kernels.buckets_of(params, grads, *state, sizes=sizes)
        served = list(filter(None, buckets))
        lists = params, grads, buffers, rows, steps, lr
        kernels.rootfree_shampoo_(served, *lists, **scalars)
        for bucket, found in enumerate(buckets):
            if found is None:
                own = by_reference.take_pair(bucket, RootFreeShampooTensors(*tensors))
                slow(*own, **scalars)

    return run
