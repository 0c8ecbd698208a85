"""The matrix kernels compiled for GPUs that are not here: tensor cores, registers, widths."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from helpers.offline import needs_compiler
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.machine_code import sass
from bench.machine_code.instructions import LOCAL_MEMORY, TENSOR_CORE, first_index, widths
from bench.machine_code.launches import (
    ARCHITECTURES,
    MATRIX_DTYPES,
    MATRIX_KERNELS,
    TILINGS,
    large_tiling,
    matrix_calls,
    matrix_kernels,
    matrix_program,
    tilings,
)
from bench.machine_code.occupancy import CHIPS
from bench.machine_code.offline import compile_call
from rootfree_fused.kernels import matrix, matrix_launches
from rootfree_fused.kernels.matrix_jobs import GATHER_COLUMNS, GATHER_ROWS
from rootfree_fused.kernels.slots import LAYOUT

pytestmark = needs_compiler

TENSOR_CORES = {
    80: r"^(@!?U?P\d+ )?HMMA\.16816\.F32\.BF16",
    90: r"HGMMA\.\S*F32\.BF16",
    100: r"UTCHMMA",
}
TENSOR_CORE_NAMES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
GEMMS = MATRIX_KERNELS[1:]
STACKED = matrix_kernels("stacked")
DENSE = (True, True)


def targets():
    """Every architecture with the tilings of the kernels that read by addresses."""
    for architecture in ARCHITECTURES:
        for tiling in tilings(architecture)[:3]:
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
    return {name: matrix_program(name, tiling, architecture) for name in MATRIX_KERNELS}


@pytest.fixture(scope="module")
def rows(architecture, tiling):
    return {name: sass.matrix_entry(name, tiling, architecture).row() for name in MATRIX_KERNELS}


def assert_nothing_spills(program, row):
    assert row["spill_bytes"] == 0
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)


def threads(tiling):
    return 32 * TILINGS[tiling].num_warps


def copies(program):
    """The widths in bits of the asynchronous copies from global to shared memory."""
    found = [re.search(r"\bLDGSTS\.E\S*", line) for line in program.instructions]
    return {("128" if ".128" in match[0] else match[0]) for match in found if match}


@pytest.mark.parametrize("name", MATRIX_KERNELS)
def test_nothing_spills(programs, rows, name):
    assert_nothing_spills(programs[name], rows[name])


@pytest.mark.parametrize("name", MATRIX_KERNELS)
def test_the_main_path_goes_through_the_products_to_the_end(programs, rows, name):
    path = programs[name].flow.main_path
    assert re.match(r"(@!?P\d+ )?EXIT", path[-1])  # what follows is of chunks that are not full
    assert name == "gather" or set(programs[name].flow.main_loop) <= set(path)
    assert (rows[name]["loop_instructions"] > 0) == (name != "gather")


@pytest.mark.parametrize("name", MATRIX_KERNELS)
def test_shared_memory_fits(rows, name, architecture):
    assert rows[name]["shared_bytes"] <= CHIPS[architecture].shared_bytes_a_program
    assert rows[name]["ctas_per_sm"] >= 1


@pytest.mark.parametrize("name", GEMMS)
def test_products_are_tensor_core_products(programs, rows, name, architecture, tiling):
    """Of bfloat16 into float32; float32 as three TF32 products, and never as one."""
    lines = programs[name].instructions
    assert rows[name]["tensor_core"] == TENSOR_CORE_NAMES[architecture]
    if tiling == "float32":
        loop = programs[name].flow.main_loop
        found = [line for line in loop if TENSOR_CORE.search(line)]
        assert found
        assert len(found) % 3 == 0
        return
    found = [line for line in lines if TENSOR_CORE.search(line)]
    assert all(re.search(TENSOR_CORES[architecture], line) for line in found), found[:3]


@pytest.mark.parametrize("name", GEMMS)
def test_operands_are_copied_asynchronously_16_bytes_at_a_time(programs, name, tiling):
    """But float32's operands: the copy may also transpose them, an element at a time."""
    widths_found = copies(programs[name])
    assert widths_found if tiling == "float32" else widths_found == {"128"}


@pytest.mark.parametrize("name", MATRIX_KERNELS)
def test_the_main_path_moves_vectors(programs, rows, name, tiling):
    """Nothing else, and at least every element of an aligned tile once."""
    assert rows[name]["wide_share"] == 1
    tile = GATHER_ROWS * GATHER_COLUMNS // (32 * matrix_launches.GATHER_WARPS)
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
    part = LAYOUT.spilled_rows * TILINGS[tiling].block // threads(tiling)
    factor_bytes = 4 if tiling == "float32" else 2
    size = 4 if name == "params" else factor_bytes
    arrays = 1 if name == "factors" and factor_bytes == 4 else 2
    assert widths(programs[name].instructions, "STG").get(size, 0) >= arrays * part


@pytest.mark.parametrize("name", GEMMS)
def test_two_large_tiles_fit_a_hopper_multiprocessor(rows, name, architecture, tiling):
    """One computes while the other begins or ends. Of the tilings that something chooses."""
    if architecture == 90 and tiling in ("large_hopper", "small"):
        assert rows[name]["ctas_per_sm"] >= 2


# Stacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKED)
def test_stacks_are_read_by_the_tensor_memory_accelerator(name):
    program = matrix_program(name, "stacked", 90)
    row = sass.matrix_entry(name, "stacked", 90).row()
    assert_nothing_spills(program, row)
    assert row["tensor_core"] == "HGMMA"
    assert set(widths(program.instructions, "STG")) == {16}
    assert row["ctas_per_sm"] == matrix_launches.STACKED_PROGRAMS
    assert not copies(program)
    assert first_index(program.instructions, r"\bUTMALDG\.3D") < len(program.instructions)
    assert first_index(program.flow.main_loop, r"\bUTMALDG\.3D") < len(program.flow.main_loop)


@pytest.mark.parametrize("name", STACKED)
def test_a_gradient_scaler_costs_stacks_no_spill(name):
    kernel, (grid, args, options) = matrix_calls("stacked")[name]
    number = torch.zeros(3)[1]  # a view: no alignment beyond its own
    scaled = [number if arg is None else arg for arg in args]
    assert compile_call(kernel, (grid, scaled, options), 90).spill_bytes == 0


def test_stacks_of_other_sizes_recompile_nothing():
    """Sizes are in tables and in descriptors; the one number is not specialized."""
    few = matrix_calls("stacked")
    more = matrix_calls("stacked", buckets=[((384, 1000), DENSE, 3)])
    left_to_cublas = {"product left", "product right"}
    assert set(few) == set(more) == set(MATRIX_KERNELS) - left_to_cublas
    for name in STACKED:
        (_, (_, args, options)), (_, (_, others, other_options)) = few[name], more[name]
        assert options == other_options
        for arg, other in zip(args, others, strict=True):
            assert type(arg) is type(other)
            if isinstance(arg, TensorDescriptor):
                assert arg.block_shape == other.block_shape


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("dtypes", MATRIX_DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])
def test_parameters_and_gradients_of_every_dtype(architecture, dtypes, momentum):
    for name in ("gather", "params") if momentum else ("params",):
        case = name, large_tiling(architecture), architecture, dtypes, momentum
        program = matrix_program(*case)
        assert_nothing_spills(program, sass.matrix_entry(*case).row())
        if name == "params":
            tile = matrix.LARGE.block**2 // threads("large")
            moved = tile * (dtypes[0].itemsize + 4 * momentum)
            assert 16 * widths(program.instructions, "STG").get(16, 0) >= moved


@pytest.mark.parametrize("name", ["gather", "factor_momenta", "factors", "params"])
def test_a_gradient_scaler_costs_no_spill_and_no_width(name):
    kernel, (grid, args, options) = matrix_calls("large_hopper")[name]
    number = torch.zeros(3)[1]  # a view: no alignment beyond its own
    assert args.count(None) == 1
    scaled = [number if arg is None else arg for arg in args]
    program = compile_call(kernel, (grid, scaled, options), 90)
    assert program.spill_bytes == 0
    plain = matrix_program(name, "large_hopper", 90)
    for operation in ("LDG", "STG"):
        wide, expected = (widths(p.instructions, operation).get(16) for p in (program, plain))
        assert wide == expected, operation


def test_models_of_other_sizes_recompile_nothing():
    """Sizes, counts and addresses are in tables; arguments are tables, aligned as they are."""
    many = [((256, 256), DENSE, 3), ((24, 7), DENSE, 5), ((7, 9), (False, False), 1)]
    few, more = matrix_calls("small"), matrix_calls("small", buckets=many)
    assert sorted(few) == sorted(MATRIX_KERNELS)
    for name in MATRIX_KERNELS:
        (_, (_, args, options)), (_, (_, others, other_options)) = few[name], more[name]
        assert options == other_options
        tensors, other_tensors = ([t for t in ts if t is not None] for ts in (args, others))
        assert all(isinstance(t, torch.Tensor) for t in tensors)
        aligned = [t.data_ptr() % 16 == 0 for t in tensors]
        assert aligned == [t.data_ptr() % 16 == 0 for t in other_tensors]
