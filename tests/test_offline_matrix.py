"""The matrix kernels compiled for GPUs that are not here: tensor cores, registers, widths."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from _kernels_matrix import BF16, DENSE, F16, F32, KERNELS, Model
from _offline import Recorder, compile_call, first_index, widths
from triton.runtime.jit import JITFunction

from rootfree_fused.kernels import gemm, matrix, tiles

pytestmark = pytest.mark.skipif(
    not isinstance(gemm._product_kernel, JITFunction), reason="TRITON_INTERPRET compiles nothing"
)

ARCHITECTURES = [80, 90, 100]
# What a program may take of a multiprocessor's shared memory.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {
    80: r"^(@!?U?P\d+ )?HMMA\.16816\.F32\.BF16",
    90: r"HGMMA\.\S*F32\.BF16",
    100: r"UTCHMMA",
}
ANY_TENSOR_CORE = r"\b(HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA)\b"
TILINGS = {
    "large": matrix.LARGE,
    "large_hopper": matrix.LARGE_HOPPER,
    "large_descriptors": matrix.LARGE_DESCRIPTORS,
    "small": matrix.SMALL,
    "float32": matrix.FLOAT32,
}
ROW_DTYPES = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "mixed": (F16, F32)}


def record(tiling, dtypes=(F32, F32), case="momentum", buckets=(((256, 256), DENSE, 1),)):
    """What the launcher would call each kernel with, by name; TRANS_A makes two of a product."""
    factor_dtype = F32 if tiling == "float32" else BF16
    model = Model(torch.device("cpu"), case, factor_dtype, buckets, *dtypes)
    recorders = {name: Recorder() for name in KERNELS}
    kernels = {name: getattr(matrix, name) for name in KERNELS}
    choose = matrix._tiling
    for name, recorder in recorders.items():
        setattr(matrix, name, recorder)
    matrix._tiling = lambda *_: TILINGS[tiling]
    try:
        model.launch(model.fresh_grads(), torch.tensor(0.1), update=True)
    finally:
        matrix._tiling = choose
        for name, kernel in kernels.items():
            setattr(matrix, name, kernel)
    calls = {}
    for name, recorder in recorders.items():
        for call in recorder.calls:
            side = {True: " left", False: " right"}.get(call[2].get("TRANS_A"), "")
            calls[name.strip("_").removesuffix("_kernel") + side] = kernels[name], call
    return calls


NAMES = [
    "gather",
    "product left",
    "product right",
    "factor_momenta",
    "factors",
    "products",
    "params",
]
GEMMS = NAMES[1:]


def targets():
    """Every architecture with the tilings that it may run."""
    for architecture in ARCHITECTURES:
        large = ["large"] if architecture == 80 else ["large", "large_descriptors"]
        if architecture == 90:
            large[0] = "large_hopper"
        for tiling in (*large, "small", "float32"):
            yield pytest.param((architecture, tiling), id=f"sm_{architecture}-{tiling}")


@pytest.fixture(scope="module", params=targets())
def target(request):
    return request.param


@pytest.fixture(scope="module")
def architecture(target):
    return target[0]


@pytest.fixture(scope="module")
def tiling(target):
    return target[1]


@pytest.fixture(scope="module")
def programs(architecture, tiling):
    calls = record(tiling)
    assert sorted(calls) == sorted(NAMES)
    return {name: compile_call(*calls[name], architecture) for name in NAMES}


def assert_nothing_spills(program):
    assert program.local_bytes == 0
    assert first_index(program.instructions, r"\b(LDL|STL)\b") == len(program.instructions)


def threads(tiling):
    return 32 * TILINGS[tiling].num_warps


def copies(program):
    """The widths in bits of the asynchronous copies from global to shared memory."""
    found = [re.search(r"\bLDGSTS\.E\S*", line) for line in program.instructions]
    return {("128" if ".128" in match[0] else match[0]) for match in found if match}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills(programs, name):
    assert_nothing_spills(programs[name])


@pytest.mark.parametrize("name", NAMES)
def test_shared_memory_fits(programs, name, architecture):
    assert programs[name].shared_bytes <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("name", GEMMS)
def test_products_are_tensor_core_products(programs, name, architecture, tiling):
    """Of bfloat16 into float32; IEEE float32 has none, and TF32 must never take its place."""
    lines = programs[name].instructions
    if tiling == "float32":
        assert first_index(lines, ANY_TENSOR_CORE) == len(lines)
        return
    found = [line for line in lines if re.search(ANY_TENSOR_CORE, line)]
    assert found
    assert all(re.search(TENSOR_CORES[architecture], line) for line in found), found[:3]


@pytest.mark.parametrize("name", GEMMS)
def test_operands_are_copied_asynchronously_16_bytes_at_a_time(programs, name, tiling):
    """But float32's operands: the copy may also transpose them, an element at a time."""
    widths_found = copies(programs[name])
    if tiling == "large_descriptors":  # by the tensor memory accelerator alone
        lines = programs[name].instructions
        assert not widths_found
        assert first_index(lines, r"\bUTMALDG\.2D") < len(lines)
        return
    assert widths_found if tiling == "float32" else widths_found == {"128"}


@pytest.mark.parametrize("name", NAMES)
def test_the_main_path_moves_vectors(programs, name, tiling):
    """At least every element of an aligned tile once in 16 bytes, beside the ragged path's."""
    tile = matrix.GATHER_ROWS * matrix.GATHER_COLUMNS // (32 * matrix.GATHER_WARPS)
    if name != "gather":
        tile = TILINGS[tiling].block ** 2 // threads(tiling)
    factor_bytes = 4 if tiling == "float32" else 2
    # Float32 gradients and float32 factors are gathered by one and the same code.
    read = {
        "gather": 4 if tiling == "float32" else factor_bytes + 4,
        "factor_momenta": factor_bytes,
        "factors": 4,
        "params": 8,
    }
    written = {"gather": 2 * factor_bytes, "factors": 4, "params": 8}
    written |= {"factor_momenta": 2 * factor_bytes, "products": 2 * factor_bytes}
    loads = widths(programs[name].instructions, "LDG").get(16, 0)
    stores = widths(programs[name].instructions, "STG").get(16, 0)
    assert 16 * loads >= tile * read.get(name, 0)
    assert 16 * stores >= tile * written.get(name, factor_bytes)


@pytest.mark.parametrize("name", ["factor_momenta", "factors", "products", "params"])
def test_ragged_rows_promise_no_alignment(programs, name, tiling):
    """Every element of them is stored by itself, and mirrored by itself."""
    part = tiles.PARKED_ROWS.value * TILINGS[tiling].block // threads(tiling)
    factor_bytes = 4 if tiling == "float32" else 2
    size = 4 if name == "params" else factor_bytes
    arrays = 1 if name == "factors" and factor_bytes == 4 else 2
    assert widths(programs[name].instructions, "STG").get(size, 0) >= arrays * part


@pytest.mark.parametrize("name", GEMMS)
def test_two_large_tiles_fit_a_hopper_multiprocessor(programs, name, architecture, tiling):
    """One computes while the other begins or ends. Of the tilings that something chooses."""
    if architecture == 90 and tiling in ("large_hopper", "small"):
        assert programs[name].resident_programs >= 2
        assert 2 * (programs[name].shared_bytes + 1024) <= 228 << 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtypes", ROW_DTYPES)
@pytest.mark.parametrize("case", ["momentum", "plain"])
def test_parameters_and_gradients_of_every_dtype(architecture, dtypes, case):
    calls = record("large_hopper" if architecture == 90 else "large", ROW_DTYPES[dtypes], case)
    names = ["gather", "params"] if case == "momentum" else ["params"]
    for name in names:
        program = compile_call(*calls[name], architecture)
        assert_nothing_spills(program)
        if name == "params":
            tile = matrix.LARGE.block**2 // threads("large")
            moved = tile * (ROW_DTYPES[dtypes][0].itemsize + 4 * (case == "momentum"))
            assert 16 * widths(program.instructions, "STG").get(16, 0) >= moved


def test_models_of_other_sizes_recompile_nothing():
    """Sizes, counts and addresses are in tables; arguments are tables, aligned as they are."""
    many = [((256, 256), DENSE, 3), ((24, 7), DENSE, 5), ((7, 9), (False, False), 1)]
    few, more = record("small"), record("small", buckets=many)
    for name in NAMES:
        (_, (_, args, options)), (_, (_, others, other_options)) = few[name], more[name]
        assert options == other_options
        assert all(isinstance(arg, torch.Tensor) for arg in args)
        aligned = [arg.data_ptr() % 16 == 0 for arg in args]
        assert aligned == [arg.data_ptr() % 16 == 0 for arg in others]
