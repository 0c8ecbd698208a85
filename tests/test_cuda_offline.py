"""The CUDA C++ kernels compiled by nvcc: registers, widths, order of loads; and the build."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")  # for its cuobjdump and nvdisasm

from _cuda import CSRC
from test_offline_diag import FLOAT_ARITHMETIC, IN_FLIGHT

from bench.launches import ARCHITECTURES
from bench.machine_code import first_index, last_index, widths
from bench.offline import Program, functions

ROOT = CSRC.parent
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc (the CUDA toolkit) on PATH")

CHUNK = 1024
THREADS = 128
NAME = re.compile(r"\S*diag_kernelILb([01])E(f|6__half|13__nv_bfloat16)(f|S\d_)NS_\d(\w+?)IfE")
SIZES = {"f": 4, "6__half": 2, "13__nv_bfloat16": 2}


class Kernel(NamedTuple):
    name: str
    read: list[int]  # bytes of an element in each tensor
    written: list[int]
    program: Program


def compile_kernels(architecture: int, folder: Path) -> list[Kernel]:
    output = folder / "diag.cubin"
    options = ["-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}"]
    subprocess.run([NVCC, *options, CSRC / "diag.cu", "-o", output], check=True)
    cubin = output.read_bytes()
    kernels = []
    for function in functions(cubin):
        two_states, param, grad, rule = NAME.match(function).groups()
        states = [4] * (1 + int(two_states))
        size = SIZES[param]
        kernels.append(
            Kernel(
                f"{rule} {len(states)} {param} {grad[0]}",
                [size, 4 if grad == "f" else size, *states],
                [size, *states],
                Program(architecture, cubin, 0, THREADS // 32, function=function),
            )
        )
    return kernels


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(architecture, tmp_path_factory):
    return compile_kernels(architecture, tmp_path_factory.mktemp("cubin"))


# Machine code --------------------------------------------------------------------------------


@needs_nvcc
def test_every_rule_and_dtype_pair_has_a_kernel(kernels):
    rules = ("Rmsprop 1", "Rmsprop 2", "Adamw 2")
    pairs = ("f f", "13__nv_bfloat16 S", "13__nv_bfloat16 f", "6__half S", "6__half f")
    assert {kernel.name for kernel in kernels} == {f"{r} {p}" for r in rules for p in pairs}


@needs_nvcc
def test_nothing_spills(kernels):
    for kernel in kernels:
        code = kernel.program.instructions
        assert kernel.program.spill_bytes == 0, kernel.name
        assert first_index(code, r"\b(LDL|STL)\b") == len(code), kernel.name


@needs_nvcc
def test_the_main_path_moves_16_bytes_at_a_time(kernels):
    for name, read, written, program in kernels:
        for operation, sizes in (("LDG", read), ("STG", written)):
            expected = sum(sizes) * CHUNK // THREADS // 16
            assert widths(program.instructions, operation)[16] == expected, (name, operation)


@needs_nvcc
def test_all_wide_loads_are_in_flight_together(kernels):
    for kernel in kernels:
        code = kernel.program.instructions
        last = last_index(code, r"\bLDG\.E\.128\b")
        assert last < first_index(code, FLOAT_ARITHMETIC), kernel.name


@needs_nvcc
def test_enough_blocks_fit(kernels, architecture):
    """Bandwidth times latency in flight, and half of the 64 warps of a multiprocessor."""
    for kernel in kernels:
        blocks = kernel.program.resident_programs
        assert blocks * CHUNK * sum(kernel.read) >= IN_FLIGHT[architecture], kernel.name
        assert blocks * THREADS // 32 >= 32, kernel.name


@needs_nvcc
def test_16_bit_parameters_are_rounded_to_nearest(kernels):
    for kernel in kernels:
        conversions = [
            line
            for line in kernel.program.instructions
            if re.search(r"\b(F2FP|F2F\.B?F16\.F32)", line)
        ]
        assert bool(conversions) == (kernel.written[0] == 2), kernel.name
        assert not any(re.search(r"\.R[ZMP]\b", line) for line in conversions), kernel.name


# Build ---------------------------------------------------------------------------------------


def distribution(monkeypatch):
    importlib.import_module("setuptools")  # which replaces distutils
    monkeypatch.chdir(ROOT)
    return importlib.import_module("distutils.core").run_setup(
        "setup.py", script_args=["-q"], stop_after="init"
    )


def test_nvcc_is_used_only_when_asked(monkeypatch):
    monkeypatch.delenv("ROOTFREE_FUSED_CUDA", raising=False)
    names = [ext.name for ext in distribution(monkeypatch).ext_modules]
    assert "rootfree_fused._C" in names
    assert "rootfree_fused._C_cuda" not in names


def build_cuda(monkeypatch, folder):
    """Build _C_cuda alone, for one architecture."""
    monkeypatch.setenv("ROOTFREE_FUSED_CUDA", "1")
    package = distribution(monkeypatch)
    (cuda,) = [ext for ext in package.ext_modules if ext.name == "rootfree_fused._C_cuda"]
    targets = [arg for arg in cuda.extra_compile_args if arg.startswith("-gencode")]
    assert len(targets) == 3
    cuda.extra_compile_args = [arg for arg in cuda.extra_compile_args if arg not in targets[1:]]
    package.ext_modules = [cuda]
    command = package.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder)
    command.ensure_finalized()
    command.run()
    return folder / "rootfree_fused" / "_C_cuda.abi3.so"


def test_without_nvcc_the_build_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"install the CUDA toolkit .* or unset ROOTFREE_FUSED_CUDA"
    ):
        build_cuda(monkeypatch, tmp_path)


@needs_nvcc
def test_the_extension_loads_and_its_operators_take_all_but_a_gradient_scaler(
    monkeypatch, tmp_path
):
    """Bound lazily: only a CUDA build of torch has the symbol that gives the stream."""
    path = build_cuda(monkeypatch, tmp_path)
    script = """
        import importlib.util, os, sys, torch, rootfree_fused
        sys.setdlopenflags(os.RTLD_LAZY)
        spec = importlib.util.spec_from_file_location("rootfree_fused._C_cuda", sys.argv[1])
        importlib.util.module_from_spec(spec)
        ops = torch.ops.rootfree_fused
        for ours, public in ((ops._rmsprop_cuda_, ops.rmsprop_), (ops._adamw_cuda_, ops.adamw_)):
            ours, public = (str(op.default._schema).partition("(")[2] for op in (ours, public))
            assert ours == public.replace(", Tensor? grad_scale=None, Tensor? found_inf=None", "")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    subprocess.run(command, check=True, cwd=ROOT)
