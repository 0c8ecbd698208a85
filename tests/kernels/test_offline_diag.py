"""The diagonal kernels compiled for GPUs that are not here: registers, widths, order of loads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from helpers import adagrad_kernel
from helpers.offline import needs_compiler

from bench.machine_code import sass
from bench.machine_code.instructions import LOCAL_MEMORY, first_index, last_index, widths
from bench.machine_code.launches import (
    ARCHITECTURES,
    DIAG_LAUNCHES,
    F32,
    SUMS,
    accumulate_program,
    diag_call,
    diag_program,
)
from bench.machine_code.offline import Recorder, compile_call
from rootfree_fused.kernels import diag

pytestmark = needs_compiler

FLOAT_ARITHMETIC = r"\b(FADD|FMUL|FFMA)2?\b"
# Bandwidth per multiprocessor times 0.8 us of latency, for H100 and B200, in bytes.
IN_FLIGHT = {80: 15_000, 90: 20_000, 100: 45_000}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def architecture(request):
    return request.param


def shown(launch):
    return ", ".join(map(str, (launch[0], *launch[1])))


@pytest.fixture(scope="module", params=DIAG_LAUNCHES, ids=shown)
def launch(request):
    return request.param


@pytest.fixture(scope="module")
def configuration(launch):
    return launch[0]


@pytest.fixture(scope="module")
def dtypes(launch):
    return launch[1]


@pytest.fixture(scope="module")
def program(architecture, configuration, dtypes):
    return diag_program(configuration, dtypes, architecture)


@pytest.fixture(scope="module")
def row(architecture, configuration, dtypes):
    return sass.diag_entry(configuration, dtypes, architecture).row()


@pytest.fixture
def accesses(configuration, dtypes):
    """Bytes of an element in each tensor that is read, and in each that is written."""
    update, _, squares = configuration.partition(", ")
    states = [4] if update == "rmsprop" else [4, 4]
    read = [dtypes[0].itemsize, dtypes[1].itemsize, *states, *([4] if squares else [])]
    return {"LDG": read, "STG": [read[0], *states]}


def expected_widths(sizes, vector):
    """Accesses a thread for its share of a chunk, `vector` elements at a time."""
    per_thread = diag.BLOCK // (32 * diag.NUM_WARPS)
    counts = {}
    for size in sizes:
        counts[size * vector] = counts.get(size * vector, 0) + per_thread // vector
    return counts


def test_nothing_spills(program, row):
    assert row["spill_bytes"] == 0
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)


def test_nothing_goes_through_shared_memory(program, row):
    assert row["shared_bytes"] == 0
    assert first_index(program.instructions, r"\b(LDS|STS|LDSM|STSM)\b") == len(
        program.instructions
    )


def test_the_main_path_moves_vectors(program, accesses):
    main, _ = program.paths
    start = first_index(main, r"\bBRA\b")  # the table entries are read before the branch
    for operation, sizes in accesses.items():
        found = widths(main[start:], operation)
        wide = {width: n for width, n in found.items() if width > 4}
        assert wide == expected_widths(sizes, diag.VECTOR), operation
    assert widths(main, "STG").keys() <= {size * diag.VECTOR for size in accesses["STG"]}


def test_the_row_counts_the_vectors_of_the_main_path(program, row, accesses):
    """All its accesses but those of 16-bit parameters and gradients are of 16 bytes."""
    sizes = accesses["LDG"] + accesses["STG"]
    assert row["wide_share"] == round(sizes.count(4) / len(sizes), 3)
    main, _ = program.paths
    assert program.flow.main_path == [line for line in main if not line.endswith(":")]


def test_all_loads_of_the_main_path_are_in_flight_together(program, accesses):
    main, _ = program.paths
    narrowest = 8 * diag.VECTOR * min(accesses["LDG"])
    pattern = r"\bLDG\.E\S*\.(64|128)\b" if narrowest == 64 else r"\bLDG\.E\S*\.128\b"
    start = first_index(main, r"\bBRA\b")
    assert last_index(main, pattern) < start + first_index(main[start:], FLOAT_ARITHMETIC)


def test_the_ragged_path_promises_no_alignment(program, accesses):
    _, ragged = program.paths
    for operation, sizes in accesses.items():
        found = widths(ragged, operation)
        scalars = found.pop(4, 0)
        found.pop(8, None)  # a table entry, the length of the row
        expected = expected_widths(sizes, 1)
        assert scalars >= expected.pop(4, 0)
        assert found == expected, operation


def test_enough_programs_fit(row, accesses, architecture):
    in_flight = row["ctas_per_sm"] * diag.BLOCK * sum(accesses["LDG"])
    assert in_flight >= IN_FLIGHT[architecture]
    least = 20 if architecture == 100 else 24
    assert row["warps_per_sm"] == row["ctas_per_sm"] * diag.NUM_WARPS >= least


def test_the_kernel_multiplies_no_matrices(row):
    assert row["tensor_core"] == "none"
    assert row["loop_instructions"] == 0


def test_16_bit_parameters_are_rounded_to_nearest(program, dtypes):
    conversions = [
        line for line in program.instructions if "F2FP" in line or line.startswith("F2F.")
    ]
    assert bool(conversions) == (dtypes[0].itemsize == 2)
    assert not any(".RZ" in line or ".RM" in line or ".RP" in line for line in conversions)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
def test_lr_on_the_device_costs_one_load(architecture, lr_dtype):
    grid, args, kwargs = diag_call("rmsprop momentum", (F32, F32))
    lr = torch.zeros(3, dtype=lr_dtype)[1]  # a view: no alignment beyond its own
    args = [*args[:3], lr, *args[4:]]
    program = compile_call(diag._diag_kernel, (grid, args, kwargs), architecture)
    assert program.spill_bytes == 0
    assert widths(program.paths[0], "LDG")[16] == 8


def test_a_gradient_scaler_costs_two_loads():
    grid, args, kwargs = diag_call("adamw", (F32, F32))
    number = torch.zeros(3)[1]
    args = [*args[:5], number, number]
    program = compile_call(diag._diag_kernel, (grid, args, kwargs), 90)
    assert program.spill_bytes == 0
    assert widths(program.instructions, "LDG")[16] == 8


def test_a_scheduled_lr_is_no_argument():
    first, second = (diag_call("rmsprop", (F32, F32), lr) for lr in (0.1, 0.05))
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert all(arg is None or isinstance(arg, torch.Tensor) for arg in first[1])
    assert not torch.equal(first[1][2], second[1][2])


def test_a_method_of_one_state_compiles(architecture, monkeypatch):
    """As tests/optimizer/test_new_method.py launches it."""
    recorder, kernel = Recorder(), diag._diag_kernel
    monkeypatch.setattr(diag, "_diag_kernel", recorder)
    monkeypatch.setitem(diag.BODIES, "adagrad_", adagrad_kernel.BODY)
    settings = {"damping": 0.1, "weight_decay": 0.1, "batch_size": 4.0, "maximize": False}
    params, grads, sums = ([torch.zeros(diag.BLOCK)] for _ in range(3))
    diag.update_("adagrad_", params, grads, sums, torch.tensor(0.1), **settings)
    (call,) = recorder.calls
    program = compile_call(kernel, call, architecture)
    assert program.spill_bytes == 0
    main, _ = program.paths
    start = first_index(main, r"\bBRA\b")
    assert widths(main[start:], "STG") == expected_widths([4, 4], diag.VECTOR)


# Sums of micro-batches -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=SUMS, ids=lambda sums: ", ".join(map(str, sums)))
def sums(request):
    return request.param


@pytest.fixture
def of_sums(sums, architecture):
    """The program, the path of its aligned chunks, and bytes that are read and written."""
    grad, part, first = sums
    program = accumulate_program(*sums, architecture)
    lines = program.instructions
    main = lines[: first_index(lines, r"\bEXIT\b") + 1]
    written = [4] if part == "no parts" else [4, 4]
    read = [grad.itemsize, *([] if first else written)]
    return program, main, {"LDG": read, "STG": written}


def test_sums_neither_spill_nor_go_through_shared_memory(of_sums, sums, architecture):
    program, _, accesses = of_sums
    row = sass.accumulate_entry(*sums, architecture).row()
    assert row["spill_bytes"] == row["shared_bytes"] == 0
    assert first_index(program.instructions, rf"{LOCAL_MEMORY}|\b(LDS|STS|LDSM|STSM)\b") == len(
        program.instructions
    )
    assert row["registers"] <= 40
    moved = sum(map(sum, accesses.values()))
    assert row["modelled"] == f"{moved} bytes an element"
    sizes = accesses["LDG"] + accesses["STG"]
    assert row["wide_share"] == round(sizes.count(4) / len(sizes), 3)


def test_sums_move_vectors_that_are_in_flight_together(of_sums, sums):
    _, main, accesses = of_sums
    assert widths(main, "STG") == expected_widths(accesses["STG"], diag.VECTOR)
    entries = Counter({4: 2, 8: 4 + (sums[1] != "no parts")})  # of tables
    assert widths(main, "LDG") == entries + Counter(expected_widths(accesses["LDG"], diag.VECTOR))
    assert last_index(main, r"\bLDG\b") < first_index(main, FLOAT_ARITHMETIC) < len(main)


def test_enough_programs_of_sums_fit(of_sums, architecture):
    """Of what goes through the memory, this is the part that is read."""
    program, _, accesses = of_sums
    moved = sum(map(sum, accesses.values()))
    assert program.resident_programs * diag.BLOCK * moved >= IN_FLIGHT[architecture]
