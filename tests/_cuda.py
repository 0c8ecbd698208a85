"""The CUDA C++ operators: on the GPU, or on the CPU, where their threads run one by one."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _operators import for_operators
from torch.utils.cpp_extension import include_paths, library_paths

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"


@functools.cache
def emulated(folder: Path) -> SimpleNamespace:
    """rmsprop_ and adamw_ of csrc/diag_cuda.cpp for CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    unlinked, output = folder / "emulated.o", folder / "emulated.so"
    command = [compiler, "-c", "-fPIC", "-std=c++20", "-O1", "-fsanitize=alignment"]
    command += ["-Drootfree_fused=rootfree_fused_emulated"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{path}" for path in (CSRC, *include_paths(), sysconfig.get_path("include"))]
    subprocess.run([*command, TESTS / "emulated_cuda.cpp", "-o", unlinked], check=True)
    # Linked without the sanitizer's library: the source has the one function that is called.
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    subprocess.run([compiler, "-shared", unlinked, *libraries, "-o", output], check=True)
    torch.ops.load_library(output)
    return _operators(torch.ops.rootfree_fused_emulated)


def real() -> SimpleNamespace:
    """rmsprop_ and adamw_ of rootfree_fused._C_cuda."""
    pytest.importorskip("rootfree_fused._C_cuda", reason="built with ROOTFREE_FUSED_CUDA=1 only")
    return _operators(torch.ops.rootfree_fused)


def _operators(namespace) -> SimpleNamespace:
    def taking_numbers(operator):
        return lambda *tensors, **scalars: operator(*tensors, **for_operators(scalars))

    operators = {"rmsprop_": namespace._rmsprop_cuda_, "adamw_": namespace._adamw_cuda_}
    return SimpleNamespace(**{name: taking_numbers(o) for name, o in operators.items()})
