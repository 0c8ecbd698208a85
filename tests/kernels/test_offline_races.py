"""Updates in place by threads of which several hold an entry, in Triton's own representation."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from helpers.offline import needs_compiler

from bench.machine_code.launches import (
    MATRIX_KERNELS,
    SHAMPOO_KERNELS,
    matrix_program,
    shampoo_program,
)

pytestmark = needs_compiler

# Vectors have as many entries as a tile has rows: fewer than a program has threads.
VECTOR = r"tensor<\d+x!tt\.ptr"


def updates(ir):
    """Of each vector that is loaded and then stored: whether a barrier is between."""
    loaded, found = {}, []
    for position, line in enumerate(ir.splitlines()):
        load = re.search(rf"= tt\.load (%\w+).*: {VECTOR}", line)
        store = re.search(rf"\btt\.store (%\w+),.*: {VECTOR}", line)
        if load:
            loaded[load[1]] = position
        elif store and store[1] in loaded:
            between = ir.splitlines()[loaded[store[1]] : position]
            found.append(any(re.search(r"\b(gpu|ttg)\.(local_)?barrier", each) for each in between))
    return found


@pytest.mark.parametrize("name", ["factor_momenta", "factors"])
def test_diagonal_factors_are_read_by_all_threads_before_one_writes(name):
    found = updates(matrix_program(name, "large_hopper", 90).ir)
    assert found == [True]


@pytest.mark.parametrize("program", [matrix_program, shampoo_program])
def test_no_update_of_a_vector_is_without_a_barrier(program):
    names = MATRIX_KERNELS if program is matrix_program else SHAMPOO_KERNELS
    found = [seen for name in names for seen in updates(program(name, "large_hopper", 90).ir)]
    assert found
    assert all(found)
