"""Root-free Shampoo's kernels compiled for GPUs that are not here: tensor cores, no spills."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from bench.machine_code import sass
from bench.machine_code.instructions import LOCAL_MEMORY, first_index
from bench.machine_code.launches import (
    SHAMPOO_FLOPS,
    SHAMPOO_KERNELS,
    large_tiling,
    shampoo_calls,
    shampoo_program,
)
from bench.machine_code.occupancy import CHIPS
from bench.machine_code.offline import compile_call
from rootfree_fused.kernels import roots

pytestmark = pytest.mark.skipif(
    not isinstance(roots._roots_kernel, JITFunction), reason="TRITON_INTERPRET compiles nothing"
)

# What is to be mended: by Triton 3.6 or later, launches that miss what a test asks for.
OLD = triton.__version__.startswith("3.6")
SPILLED = {(90, "inverses")} if OLD else {(100, "descend")}
ALONE = {"descend"} if OLD else set()

TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
DENSE = (True, True)


# The tilings of large models on the newest chips; `python -m bench sass` compiles all others too.
TARGETS = [
    (architecture, large_tiling(architecture)) for architecture in ((90,) if OLD else (90, 100))
]


@pytest.mark.parametrize("name", SHAMPOO_KERNELS)
@pytest.mark.parametrize(("architecture", "tiling"), TARGETS)
def test_products_are_the_tensor_cores_and_nothing_spills(architecture, tiling, name, request):
    if (architecture, name) in SPILLED:
        request.applymarker(pytest.mark.xfail(strict=True, reason="a spill, to be mended"))
    program = shampoo_program(name, tiling, architecture)
    row = sass.shampoo_entry(name, tiling, architecture).row()
    assert row["spill_bytes"] == 0
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)
    assert row["shared_bytes"] <= CHIPS[architecture].shared_bytes_a_program
    assert row["ctas_per_sm"] >= 1
    if name in SHAMPOO_FLOPS:
        assert row["tensor_core"] == TENSOR_CORES[architecture]


@pytest.mark.parametrize("name", SHAMPOO_KERNELS)
def test_two_programs_fit_a_hopper_multiprocessor(name, request):
    """One computes while the other begins or ends."""
    if name in ALONE:
        request.applymarker(pytest.mark.xfail(strict=True, reason="one fits, to be mended"))
    assert shampoo_program(name, "large_hopper", 90).resident_programs >= 2


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
