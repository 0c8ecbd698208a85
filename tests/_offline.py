"""Triton without a GPU: kernels interpreted on the CPU, or compiled for a GPU and disassembled.

The compiler, its options and the specialization of every argument are those of a real launch: the
launcher runs as it is, only its call of the kernel is recorded and then compiled for another
architecture. cuobjdump and nvdisasm come with the Triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import triton
import triton.experimental.gluon  # the interpreter imports it: it must not see rebound functions
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

needs_cuda = pytest.mark.gpu  # skipped by conftest.py where there is none
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_REGISTERS = 65536
_SASS_HEADING = r"^\.text\.(\S+):$"
_USAGE_HEADING = r"^ *Function (\S+):$"
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@contextmanager
def interpreted(*modules: ModuleType):
    """Run the kernels of these modules in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 does the same for a whole process, which then cannot compile anything. Here
    bfloat16 is also rounded to nearest and multiplied as numbers, as a GPU does; the interpreter
    alone truncates, and multiplies the bit patterns.
    """
    changed = [
        (module, name, value, interpreter.InterpretedFunction(value.fn))
        for module in [triton.language, triton.language.standard, *modules]
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    convert = interpreter._convert_float
    changed.append((interpreter, convert.__name__, convert, _rounding_to_nearest(convert)))
    dot = interpreter.InterpreterBuilder.create_dot
    changed.append((interpreter.InterpreterBuilder, dot.__name__, dot, _multiplying_numbers(dot)))
    patch, scopes = interpreter._patch_lang, []
    changed.append((interpreter, patch.__name__, patch, _patching_once(patch, scopes)))
    for module, name, _, replacement in changed:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()
        for module, name, value, _ in changed:
            setattr(module, name, value)


def _rounding_to_nearest(convert_float):
    def convert(array, source, target, rounding_mode):
        if (source, target) != (triton.language.float32, triton.language.bfloat16):
            return convert_float(array, source, target, rounding_mode)
        rounded = torch.from_numpy(array.copy()).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()

    return convert


def _patching_once(patch_lang, scopes):
    """The interpreter rebinds all of triton.language at every call of a function, half its time."""
    seen = set()

    def patch(fn):
        modules = (triton.language, triton.language.core)
        found = {m.__name__ for m in modules if any(m is v for v in fn.__globals__.values())}
        if not found <= seen:
            seen.update(found)
            scopes.append(patch_lang(fn))
            # Triton 3.6 asks for int() of an array of one element, which NumPy 2.4 refuses.
            triton.language.tensor.__index__ = lambda self: self.handle.data.item()
        return interpreter._LangPatchScope()

    return patch


def _multiplying_numbers(create_dot):
    def widened(operand):
        if operand.dtype.scalar != triton.language.bfloat16:
            return operand
        data = (operand.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(data, triton.language.float32)

    def dot(self, a, b, *args):
        return create_dot(self, widened(a), widened(b), *args)

    return dot


class Recorder:
    """Stands in for a kernel: keeps what it was called with, and runs nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs))


def compile_call(kernel: JITFunction, call, architecture: int) -> Program:
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
    return Program(compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps)


@dataclass
class Program:
    cubin: bytes
    shared_bytes: int
    num_warps: int
    function: str = ""  # where the cubin has several

    @cached_property
    def instructions(self) -> list[str]:
        """SASS without addresses and encodings; a label is a line that ends in a colon."""
        text = self._own_part(disassemble(self.cubin, "nvdisasm", "-c"), _SASS_HEADING)
        lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line.endswith(";") or re.fullmatch(r"\.L_\w+:", line)]

    @cached_property
    def _resources(self) -> dict[str, int]:
        text = self._own_part(disassemble(self.cubin, "cuobjdump", "-res-usage"), _USAGE_HEADING)
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}

    def _own_part(self, text: str, heading: str) -> str:
        if not self.function:
            return text
        parts = re.split(heading, text, flags=re.MULTILINE)
        return parts[parts.index(self.function) + 1]

    @property
    def registers(self) -> int:
        return self._resources["REG"]

    @property
    def local_bytes(self) -> int:
        """Spills and arrays that the compiler could not keep in registers."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @property
    def resident_programs(self) -> int:
        """How many programs the register file of a multiprocessor holds."""
        return _REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.num_warps)

    @property
    def paths(self) -> list[list[str]]:
        """The code between returns: the first path starts at the entry."""
        paths: list[list[str]] = [[]]
        for line in self.instructions:
            paths[-1].append(line)
            if line.startswith("EXIT"):
                paths.append([])
        return [path for path in paths if any("STG" in line for line in path)]


def functions(cubin: bytes) -> list[str]:
    """The mangled names of the kernels in a cubin."""
    return re.findall(_SASS_HEADING, disassemble(cubin, "nvdisasm", "-c"), re.MULTILINE)


@cache
def disassemble(cubin: bytes, tool: str, flag: str) -> str:
    """What cuobjdump or nvdisasm says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / tool, flag, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def widths(path: list[str], operation: str) -> dict[int, int]:
    """How many global accesses ("LDG" or "STG") of each width in bytes a path has."""
    counts: dict[int, int] = {}
    for line in path:
        if match := re.search(rf"\b{operation}\.E\S*", line):
            width = _WIDTH.search(match[0])
            size = _BYTES[width[1]] if width else 4
            counts[size] = counts.get(size, 0) + 1
    return counts


def first_index(path: list[str], pattern: str) -> int:
    return next((i for i, line in enumerate(path) if re.search(pattern, line)), len(path))


def last_index(path: list[str], pattern: str) -> int:
    return max((i for i, line in enumerate(path) if re.search(pattern, line)), default=-1)
