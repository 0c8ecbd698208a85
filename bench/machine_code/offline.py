"""Triton kernels compiled for a GPU that is not here, and disassembled.

The compiler, its options and the specialization of every argument are those of a real launch: the
launcher runs as it is, only its call of the kernel is recorded and then compiled for another
architecture. cuobjdump and nvdisasm come with the Triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from .control_flow import ControlFlow
from .occupancy import resident_programs

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Call = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a kernel: keeps what it was called with, and runs nothing."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs))


def compile_call(kernel: JITFunction, call: Call, architecture: int) -> Program:
    """Compile a recorded call for sm_<architecture>."""
    grid, args, kwargs = call
    driver = triton.runtime.driver
    real = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: architecture,
            get_current_stream=lambda device: 0,
        )
    )
    try:
        compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
    finally:
        driver._active = real
    metadata = compiled.metadata
    return Program(
        architecture,
        compiled.asm["cubin"],
        metadata.shared,
        metadata.num_warps,
        getattr(metadata, "tmem_size", None) or 0,
        compiled.asm["ttir"],
    )


@dataclass
class Program:
    """A kernel's machine code and what a program of it takes."""

    architecture: int
    cubin: bytes
    shared_bytes: int
    num_warps: int
    tensor_columns: int = 0
    ir: str = ""  # Triton's, with every call inlined

    @cached_property
    def instructions(self) -> list[str]:
        """SASS without addresses and encodings; a label is a line that ends in a colon."""
        text = disassemble(self.cubin, "nvdisasm", "-c")
        lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line.endswith(";") or re.fullmatch(r"\.L_\w+:", line)]

    @cached_property
    def flow(self) -> ControlFlow:
        return ControlFlow(self.instructions)

    @cached_property
    def _resources(self) -> dict[str, int]:
        text = disassemble(self.cubin, "cuobjdump", "-res-usage")
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}

    @property
    def registers(self) -> int:
        return self._resources["REG"]

    @property
    def spill_bytes(self) -> int:
        """Spills and arrays that the compiler could not keep in registers."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @property
    def resident_programs(self) -> int:
        """How many programs a multiprocessor holds."""
        return resident_programs(
            self.architecture,
            self.registers,
            self.shared_bytes,
            self.num_warps,
            self.tensor_columns,
        )

    @property
    def paths(self) -> list[list[str]]:
        """The code between returns: the first path starts at the entry."""
        paths: list[list[str]] = [[]]
        for line in self.instructions:
            paths[-1].append(line)
            if line.startswith("EXIT"):
                paths.append([])
        return [path for path in paths if any("STG" in line for line in path)]


@cache
def disassemble(cubin: bytes, tool: str, flag: str) -> str:
    """What cuobjdump or nvdisasm says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, flag, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
