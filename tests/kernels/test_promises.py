"""What kernels promise the compiler of addresses holds: in the interpreter, which sees them all."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels_matrix import (
    BF16,
    DENSE,
    F16,
    F32,
    LEFT,
    NEITHER,
    RIGHT,
    Model,
    _interpreter,
    _poisoned_scratch,
)
from helpers.kernels_rootfree_shampoo import Model as ShampooModel
from helpers.offline import MODULES
from triton.runtime import interpreter

__all__ = ["_interpreter", "_poisoned_scratch"]  # fixtures

KERNELS = {module.__file__ for module in MODULES}
HELPERS = ("pointer_at", "pointer_to")
# Several members each: the first starts aligned anyway. 7, 9 and 33 columns make ragged rows.
BUCKETS = [
    ((7, 9), DENSE, 3),
    ((24, 16), DENSE, 2),
    ((9, 16), LEFT, 3),
    ((16, 7), RIGHT, 3),
    ((5, 7), NEITHER, 3),
]


@pytest.fixture
def promises(device, monkeypatch):
    """A pair a promise of alignment: the function that made it, and whether it holds."""
    if device.type != "cpu":
        pytest.skip("only the interpreter sees them")
    made = set()

    def look(handle, key, values):
        if key == "tt.divisibility":
            frame = sys._getframe()
            while frame.f_code.co_filename not in KERNELS or frame.f_code.co_name in HELPERS:
                frame = frame.f_back
            made.add((frame.f_code.co_name, not (handle.data % values[0]).any()))

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", look)
    return made


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_promises_of_ifshampoo_hold(dtype, promises, device):
    model = Model(device, "momentum", dtype, BUCKETS)
    for update in (True, False):
        model.launch(model.fresh_grads(), torch.tensor(0.1), update=update)
    model.launch(model.fresh_grads(), torch.tensor(0.1), update=False, refresh=True)
    assert len(promises) > 5
    assert {name for name, holds in promises if not holds} == set()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_promises_of_root_free_shampoo_hold(dtype, promises, device):
    model = ShampooModel(device, dtype, BUCKETS)
    for update in (True, False):
        model.step(update=update)
    assert len(promises) > 5
    assert {name for name, holds in promises if not holds} == set()


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32)], ids=str)
def test_promises_of_parameters_that_start_anywhere_hold(dtypes, promises, device):
    model = Model(device, "momentum", BF16, BUCKETS[:2], *dtypes, layout="misaligned")
    model.step()
    assert {name for name, holds in promises if not holds} == set()
