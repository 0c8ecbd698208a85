"""The diagonal kernels compiled for GPUs that are not here: registers, widths, order of loads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from _offline import Recorder, compile_call, first_index, last_index, widths
from test_kernels_diag import CASES, DTYPES
from triton.runtime.jit import JITFunction

from rootfree_fused.kernels import diag

pytestmark = pytest.mark.skipif(
    not isinstance(diag._diag_kernel, JITFunction), reason="TRITON_INTERPRET compiles nothing"
)

ARCHITECTURES = [80, 90, 100]
# What differs in the compiled code: buffers or none, step counts or none, lr on the device or not.
CONFIGURATIONS = ["rmsprop", "rmsprop momentum", "adamw", "adamw bias correction"]
FLOAT_ARITHMETIC = r"\b(FADD|FMUL|FFMA)2?\b"
# Bandwidth per multiprocessor times 0.8 us of latency, for H100 and B200, in bytes.
IN_FLIGHT = {80: 15_000, 90: 20_000, 100: 45_000}


def record(case, dtypes, lr=None, elements=diag.BLOCK):
    """What the launcher would call the kernel with, for one tensor of one full chunk."""
    scalars, extra = CASES[case]
    param, grad = (torch.zeros(elements, dtype=dtype) for dtype in dtypes)
    state, other = torch.ones(elements), torch.zeros(elements)
    lr = torch.tensor(0.1) if lr is None else lr
    recorder, kernel = Recorder(), diag._diag_kernel
    diag._diag_kernel = recorder
    try:
        if case.startswith("adamw"):
            steps = torch.ones(1) if extra else None
            diag.adamw_([param], [grad], [other], [state], steps, lr, **scalars)
        else:
            diag.rmsprop_([param], [grad], [state], [other] if extra else [], lr, **scalars)
    finally:
        diag._diag_kernel = kernel
    (call,) = recorder.calls
    return call


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def configuration(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtypes(request):
    return request.param


@pytest.fixture(scope="module")
def program(architecture, configuration, dtypes):
    return compile_call(diag._diag_kernel, record(configuration, dtypes), architecture)


@pytest.fixture
def accesses(configuration, dtypes):
    """Bytes of an element in each tensor that is read, and in each that is written."""
    states = [4] if configuration == "rmsprop" else [4, 4]
    read = [dtypes[0].itemsize, dtypes[1].itemsize, *states]
    return {"LDG": read, "STG": [read[0], *states]}


def expected_widths(sizes, vector):
    """Accesses a thread for its share of a chunk, `vector` elements at a time."""
    per_thread = diag.BLOCK // (32 * diag.NUM_WARPS)
    counts = {}
    for size in sizes:
        counts[size * vector] = counts.get(size * vector, 0) + per_thread // vector
    return counts


def test_nothing_spills(program):
    assert program.local_bytes == 0
    assert first_index(program.instructions, r"\b(LDL|STL)\b") == len(program.instructions)


def test_nothing_goes_through_shared_memory(program):
    assert program.shared_bytes == 0
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


def test_enough_programs_fit(program, accesses, architecture):
    in_flight = program.resident_programs * diag.BLOCK * sum(accesses["LDG"])
    assert in_flight >= IN_FLIGHT[architecture]
    assert program.resident_programs * diag.NUM_WARPS >= 24


def test_16_bit_parameters_are_rounded_to_nearest(program, dtypes):
    conversions = [
        line for line in program.instructions if "F2FP" in line or line.startswith("F2F.")
    ]
    assert bool(conversions) == (dtypes[0].itemsize == 2)
    assert not any(".RZ" in line or ".RM" in line or ".RP" in line for line in conversions)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
def test_lr_on_the_device_costs_one_load(architecture, lr_dtype):
    grid, args, kwargs = record("rmsprop momentum", DTYPES[0])
    lr = torch.zeros(3, dtype=lr_dtype)[1]  # a view: no alignment beyond its own
    args = [*args[:3], lr, *args[4:]]
    program = compile_call(diag._diag_kernel, (grid, args, kwargs), architecture)
    assert program.local_bytes == 0
    assert widths(program.paths[0], "LDG")[16] == 8


def test_a_scheduled_lr_is_no_argument():
    first, second = (record("rmsprop", DTYPES[0], torch.tensor(lr)) for lr in (0.1, 0.05))
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert all(arg is None or isinstance(arg, torch.Tensor) for arg in first[1])
    assert not torch.equal(first[1][2], second[1][2])
