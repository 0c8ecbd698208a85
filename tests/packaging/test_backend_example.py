"""examples/backend.py: the functions of rootfree_fused.ops, as another library calls them."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from helpers.comparison import assert_bits_equal
from helpers.optimizers import parameters, set_grads

import rootfree_fused
from rootfree_fused import ops

EXAMPLE = Path(__file__).parents[2] / "examples" / "backend.py"
RELEASED = {"initial_square_avg": 1.0}
FLOAT32 = {"factor_dtype": torch.float32}
# The class, the settings of both, and those of the class alone.
CASES = {
    "rmsprop_": (
        "RootFreeRMSprop",
        {"lr": 1e-2, "alpha": 0.9, "damping": 1e-3, "momentum": 0.9, "batch_size": 8},
        RELEASED,
    ),
    "adamw_": (
        "RootFreeAdamW",
        {"lr": 1e-2, "betas": (0.9, 0.95), "damping": 3e-4, "weight_decay": 0.1, "batch_size": 8},
        RELEASED,
    ),
    "ifshampoo_": (
        "IFShampoo",
        {"lr": 1e-2, "momentum": 0.5, "damping": 3e-3, "batch_size": 8, "weight_decay": 0.1},
        RELEASED | FLOAT32,
    ),
    "rootfree_shampoo_": (
        "RootFreeShampoo",
        {"lr": 1e-2, "damping": 0.2, "weight_decay": 0.1},
        FLOAT32,
    ),
}


SHAPES = [(24, 20), (20, 20), (24, 20)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_our_class_to_the_bit(name, device):
    """Over plain steps, steps on micro-batches, and a checkpoint."""
    fused = runpy.run_path(str(EXAMPLE))["Fused"]
    cls, settings, own = CASES[name]
    shapes = SHAPES if "shampoo" in name else [*SHAPES, (5,), ()]
    params, twins = (parameters(*shapes, device=device) for _ in range(2))
    optimizer = getattr(rootfree_fused, cls)(params, **settings, **own)
    other = fused(twins, getattr(ops, name), **settings)
    before = [p.detach().clone() for p in params]
    for t in range(6):
        for micro in range(3 if t in (2, 4) else 1):
            for tensors, one in ((params, optimizer), (twins, other)):
                set_grads(tensors, seed=10 * t + micro)
                if t in (2, 4):
                    one.accumulate()
        optimizer.step()
        other.step()
        assert_bits_equal([p.detach() for p in twins], [p.detach() for p in params])
        if t == 3:
            saved = copy.deepcopy(other.state_dict())
            other = fused(twins, getattr(ops, name), **settings)
            other.load_state_dict(saved)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_it_runs():
    losses = runpy.run_path(str(EXAMPLE))["main"]()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
