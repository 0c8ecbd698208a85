"""Root-free Shampoo's kernels compiled for GPUs that are not here: tensor cores, no spills."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
from helpers.offline import needs_compiler

from bench.machine_code import sass
from bench.machine_code.instructions import LOCAL_MEMORY, first_index, widths
from bench.machine_code.launches import (
    SHAMPOO_FLOPS,
    SHAMPOO_KERNELS,
    SHAMPOO_STACKED,
    large_tiling,
    shampoo_calls,
    shampoo_program,
)
from bench.machine_code.occupancy import CHIPS
from bench.machine_code.offline import compile_call
from rootfree_fused.kernels import matrix_launches
from rootfree_fused.kernels.gradients import PART_ROWS
from rootfree_fused.kernels.matrix_jobs import GATHER_COLUMNS

pytestmark = needs_compiler

OLD = triton.__version__.startswith("3.6")

TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
DENSE = (True, True)


# The tilings of large models; `python -m bench sass` compiles all others too. Triton 3.6 fails on
# products of sm_100.
TARGETS = [
    (architecture, large_tiling(architecture))
    for architecture in ((80, 90) if OLD else (80, 90, 100))
]


@pytest.mark.parametrize("name", SHAMPOO_KERNELS)
@pytest.mark.parametrize(
    ("architecture", "tiling"), TARGETS, ids=[f"sm_{one}-{tiling}" for one, tiling in TARGETS]
)
def test_products_are_the_tensor_cores_and_nothing_spills(architecture, tiling, name):
    program = shampoo_program(name, tiling, architecture)
    row = sass.shampoo_entry(name, tiling, architecture).row()
    assert row["spill_bytes"] == 0
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)
    assert row["shared_bytes"] <= CHIPS[architecture].shared_bytes_a_program
    assert row["ctas_per_sm"] >= 1
    if name in SHAMPOO_FLOPS:
        assert row["tensor_core"] == TENSOR_CORES[architecture]


@pytest.mark.parametrize("name", SHAMPOO_KERNELS)
def test_two_programs_fit_a_hopper_multiprocessor(name):
    """One computes while the other begins or ends."""
    assert shampoo_program(name, "large_hopper", 90).resident_programs >= 2


@pytest.mark.parametrize("name", SHAMPOO_STACKED)
def test_stacks_are_read_by_the_tensor_memory_accelerator(name):
    program = shampoo_program(name, "stacked", 90)
    row = sass.shampoo_entry(name, "stacked", 90).row()
    assert row["spill_bytes"] == 0
    assert row["tensor_core"] == "HGMMA"
    assert row["ctas_per_sm"] == matrix_launches.STACKED_PROGRAMS
    assert first_index(program.flow.main_loop, r"\bUTMALDG\.3D") < len(program.flow.main_loop)


# Bytes of an element that each kernel stores by itself where rows are ragged, and how many arrays
# there are of them.
RAGGED = {
    "momentum": (4, 1),  # M
    "grams": (4, 2),  # S and its mirror image
    "roots": (2, 2),  # K and its residual
    "inverses": (2, 2),  # X and its mirror image
    "descend": (4, 1),  # p
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_rows_promise_no_alignment(name):
    """Every element of them is stored by itself."""
    size, arrays = RAGGED[name]
    elements = PART_ROWS * GATHER_COLUMNS // (32 * matrix_launches.GATHER_WARPS)
    stores = widths(shampoo_program(name, "large_hopper", 90).instructions, "STG")
    assert stores.get(size, 0) >= arrays * elements


def test_the_loop_of_the_momentum_looks_up_no_address():
    """It reads 8 bytes at once where four 16-bit numbers of a gradient lie, of either dtype."""
    loops = shampoo_program("momentum", "large_hopper", 90).flow.loops
    read = [widths(loop, "LDG") for loop in loops]
    assert {16: 2, 8: 2} in read
    assert all(found.get(8, 0) <= 2 for found in read)


def test_a_step_is_thirteen_launches():
    calls = shampoo_calls("small")
    assert sorted(calls) == sorted(SHAMPOO_KERNELS)
    assert sum(len(made) for _, made in calls.values()) == 13


@pytest.mark.parametrize("name", ["scale", "transform", "grams", "roots", "descend"])
def test_a_gradient_scaler_costs_no_spill(name):
    kernel, calls = shampoo_calls("large_hopper")[name]
    number = torch.zeros(3)[1]  # a view: no alignment beyond its own
    grid, args, options = calls[0]
    assert args.count(None) == 1
    scaled = [number if arg is None else arg for arg in args]
    assert compile_call(kernel, (grid, scaled, options), 90).spill_bytes == 0


def test_models_of_other_sizes_recompile_nothing():
    """Sizes, dtypes, counts and addresses are in tables; arguments are tables, aligned alike."""
    many = [((256, 256), DENSE, 3), ((24, 7), DENSE, 5), ((7, 9), (False, False), 1)]
    few = shampoo_calls("small")
    more = shampoo_calls("small", (torch.bfloat16, torch.float16), many)
    for name in SHAMPOO_KERNELS:
        for (_, args, options), (_, others, other_options) in zip(
            few[name][1], more[name][1], strict=True
        ):
            assert options == other_options
            tensors, other_tensors = ([t for t in ts if t is not None] for ts in (args, others))
            aligned = [t.data_ptr() % 16 == 0 for t in tensors]
            assert aligned == [t.data_ptr() % 16 == 0 for t in other_tensors]
