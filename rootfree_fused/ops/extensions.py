"""What is compiled, and may be missing: kernels in C++, kernels in Triton, known tensors in C++."""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType
from typing import Any

import torch


def known_tensors_module(torch_version: str) -> str:
    """The C++ reads torch's own structs, so it serves the version that it was built with, alone."""
    return "_known_tensors_" + re.sub(r"\W", "_", torch_version)


@functools.cache
def known_tensors() -> Any:
    """The C++ that compares the tensors of a step with those of the last one, or None."""
    module = _import(f"rootfree_fused.{known_tensors_module(torch.__version__)}")
    return None if isinstance(module, ImportError) else module


@functools.cache
def cpp() -> ModuleType | ImportError:
    """The C++ kernels, which register themselves for CPU when imported, or why there are none."""
    return _import("rootfree_fused._C")


@functools.cache
def triton(stem: str) -> ModuleType | ImportError:
    """The Triton kernels, or why there are none. Imported on first use: Triton takes a while."""
    return _import(f"rootfree_fused.kernels.{stem}")


def _import(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return error
