"""Calls of kernels, from the second time on past Triton's look at every argument."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel


class KnownKernels:
    """What the launches of a plan were compiled to, on its device.

    A plan fixes all that Triton compiles for: constants, and tables, whose memory is aligned. What
    a call brings besides is its `kind`, see `kind_of`: which tensors there are, and their dtypes.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Callable[..., None], list[Any]]] = {}

    def repeat(self, launch: Hashable, args: Sequence[Any]) -> bool:
        """Call what this launch was compiled to, or return False where nothing is known of it.

        launch: which of the plan's, and its kind. args: all but constants, in the kernel's order.
        """
        known = self._known.get(launch)
        if known is None:
            return False
        run, constants = known
        run(*args, *constants)
        return True

    def call(
        self,
        launch: Hashable,
        kernel: Any,
        programs: int,
        args: Sequence[Any],
        constants: Mapping[str, Any],
    ) -> None:
        """`kernel[(programs,)](*args, **constants)`, to be repeated.

        constants: the kernel's last parameters, and options.
        """
        compiled = kernel[(programs,)](*args, **constants)
        if isinstance(compiled, CompiledKernel):  # and was not interpreted
            values = [constants[name] for name in kernel.arg_names[len(args) :]]
            grid = programs, 1, 1
            self._known[launch] = compiled[grid], values


def kind_of(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What kernels are compiled for of tensors that may be missing: not for how they start."""
    return tuple([None if tensor is None else tensor.dtype for tensor in tensors])
