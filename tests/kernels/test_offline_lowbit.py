"""The low-bit kernels compiled for GPUs that are not here: registers, widths, order of loads."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

import triton
from helpers.offline import needs_compiler

from bench.machine_code import sass
from bench.machine_code.instructions import LOCAL_MEMORY, first_index, last_index, widths
from bench.machine_code.launches import (
    ARCHITECTURES,
    F32,
    LOWBIT_METHODS,
    PACKING,
    lowbit_program,
    packing_program,
)
from bench.workloads.lowbit import CASES as LOWBIT_CASES
from bench.workloads.lowbit import INT8, PACKED, UINT8
from rootfree_fused.kernels import lowbit

pytestmark = needs_compiler

FLOAT_ARITHMETIC = r"\b(FADD|FMUL|FFMA)2?\b"
# Bandwidth per multiprocessor times 0.8 us of latency, for A100 and H100, in bytes. Of the 45 KB of
# a B200 there are 28, or 24 by the ptxas of Triton 3.6.
IN_FLIGHT = {80: 15_000, 90: 20_000, 100: 24_000 if "3.6" in triton.__version__ else 28_000}
RMSPROP, ADAMW = LOWBIT_METHODS
# Widths of the scales of a state.
SCALES = {INT8: 4, UINT8: 1}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def architecture(request):
    return request.param


# Of the methods one with all formats, and the other with those that need most registers.
@pytest.fixture(
    scope="module",
    params=[*((ADAMW, case) for case in LOWBIT_CASES), (RMSPROP, "bfloat16 + 8, 8bit")],
    ids=", ".join,
)
def configuration(request):
    return request.param


@pytest.fixture
def case(configuration):
    return configuration[1]


@pytest.fixture
def program(configuration, architecture):
    method, case = configuration
    return lowbit_program(method, LOWBIT_CASES[case], architecture)


@pytest.fixture
def row(configuration, architecture):
    return sass.lowbit_entry(*configuration, architecture).row()


@pytest.fixture
def written(case):
    """Dtypes of what is read and written."""
    of = LOWBIT_CASES[case]
    found = of.param, of.residual, of.average, of.second_moment
    return [dtype for dtype in found if dtype is not None]


@pytest.fixture
def vector(written):
    """Elements of a thread."""
    wide = any(dtype.itemsize > 2 for dtype in written)
    return lowbit.VECTOR_OF_WIDE if wide else lowbit.VECTOR


def test_nothing_spills(program, row):
    assert row["spill_bytes"] == 0
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)


def test_scales_alone_go_through_shared_memory(row, written):
    """And where a block is that of two warps, their maxima."""
    blocks = lowbit.CHUNK // lowbit.BLOCK
    eight_bits = any(dtype in SCALES for dtype in written)
    assert row["shared_bytes"] <= (8 * blocks if eight_bits else 0)


def test_the_main_path_moves_vectors(program, case, written, vector):
    main = program.flow.main_path
    stored = Counter(dtype.itemsize * vector for dtype in written)
    stored += Counter(SCALES[dtype] for dtype in written[-2:] if dtype in SCALES)
    assert widths(main, "STG") == stored
    loaded = widths(main, "LDG")
    read = [dtype.itemsize * vector for dtype in (*written, LOWBIT_CASES[case].grad)]
    wide = sum(width // 16 for width in read)
    assert loaded.pop(16) + 2 * loaded.pop(32, 0) == wide
    # Beside what is in tables.
    assert all(loaded.pop(width) >= read.count(width) for width in (8, 4))
    assert sum(loaded.values()) <= 1 + (vector == lowbit.VECTOR_OF_WIDE)  # scales of one byte


def test_all_loads_of_the_main_path_are_in_flight_together(program):
    main = program.flow.main_path
    barrier = first_index(main, r"\bBAR\b")
    assert last_index(main, r"\bLDG\.E\S*\.(64|128|256)\b") < barrier
    assert barrier < first_index(main, FLOAT_ARITHMETIC)


def test_enough_programs_fit(row, case, written, architecture):
    read = [dtype.itemsize for dtype in (*written, LOWBIT_CASES[case].grad)]
    in_flight = row["ctas_per_sm"] * lowbit.CHUNK * sum(read)
    assert in_flight >= IN_FLIGHT[architecture]


def test_the_product_of_a_level_and_its_scale_is_rounded():
    """It is added to a zero that the compiler does not know: it is in none of an update's sums."""
    with_s8, without = (
        lowbit_program(ADAMW, LOWBIT_CASES[f"bfloat16 + 8, {name}"], 90).ir
        for name in ("8bit", "bfloat16")
    )
    assert "math.fma" in with_s8
    assert "math.fma" not in without


# On sums of micro-batches, which are of float32: the methods as above.
@pytest.mark.parametrize(
    ("method", "case"),
    [*((ADAMW, case) for case in LOWBIT_CASES), (RMSPROP, "bfloat16 + 8, 8bit")],
)
def test_squares_are_loads_with_the_others(method, case, architecture):
    of = LOWBIT_CASES[case]._replace(grad=F32)
    plain, program = (lowbit_program(method, of, architecture, given) for given in (False, True))
    assert program.spill_bytes == 0
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)
    main = program.flow.main_path
    written = [of.param, of.residual, of.average, of.second_moment]
    wide = any(dtype is not None and dtype.itemsize > 2 for dtype in written)
    vector = lowbit.VECTOR_OF_WIDE if wide else lowbit.VECTOR
    loads, others = (widths(p.flow.main_path, "LDG") for p in (program, plain))
    more = {width: loads[width] - others.get(width, 0) for width in (16, 32) if width in loads}
    assert sum(width * count for width, count in more.items()) == 4 * vector
    assert widths(main, "STG") == widths(plain.flow.main_path, "STG")
    barrier = first_index(main, r"\bBAR\b")
    assert last_index(main, r"\bLDG\.E\S*\.(64|128|256)\b") < barrier
    read = sum(dtype.itemsize for dtype in (*written, F32, F32) if dtype is not None)
    assert program.resident_programs * lowbit.CHUNK * read >= IN_FLIGHT[architecture]


# To float32 tensors and back ------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("formats", PACKED)
def test_what_is_packed_moves_by_vectors_and_does_not_spill(formats, name, architecture):
    of = PACKED[formats]
    assert sass.packing_entry(name, formats, architecture).row()["spill_bytes"] == 0
    program = packing_program(name, of, architecture)
    assert first_index(program.instructions, LOCAL_MEMORY) == len(program.instructions)
    packs = name == "pack"
    values, kept = (Counter(widths(program.flow.main_path, what)) for what in ("LDG", "STG"))
    if not packs:
        values, kept = kept, values
    vector = lowbit.VECTOR if packs else lowbit.VECTOR_OF_WIDE
    assert values[16] + 2 * values[32] == vector // 4
    moved = [dtype.itemsize * vector for dtype in (of.stored, of.beside) if dtype is not None]
    if of.stored in SCALES:
        moved[1] = SCALES[of.stored]
    assert kept == Counter(moved) if packs else Counter(moved) <= kept
