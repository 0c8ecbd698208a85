"""Which factors large models have: none above the limit, bytes and FLOPs by their formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import layouts
from bench.workloads.networks import llama_8b, llama_70b, vit_l16
from rootfree_fused import IFShampoo, RootFreeShampoo

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("cls", layouts.GIVEN)
@pytest.mark.parametrize("name", layouts.MODELS)
def test_bytes_of_state_are_those_of_the_formula(name, cls):
    for stack in layouts.MODELS[name]():
        factors, _ = layouts.state_bytes(cls, [stack], 2048)
        assert factors == layouts.factor_bytes(cls, stack, 2048)
        for key, value in layouts._state(cls, stack, 2048).items():
            if key.startswith(("factor_", "gram_")) and value.dim() > 1 + stack.batch_axes:
                assert max(value.shape[-2:]) <= 2048


def test_the_models_are_whole():
    assert sum(math.prod(layer.shape) for layer in llama_8b()) == 8_030_261_248
    assert sum(math.prod(layer.shape) for layer in llama_70b()) == 70_553_706_496
    assert sum(math.prod(layer.shape) for layer in vit_l16()) == 304_326_632


@pytest.mark.parametrize(("cls", "cubes"), [(RootFreeShampoo, 24), (IFShampoo, 18)])
def test_flops_of_a_square_are_the_methods(cls, cubes):
    assert layouts.update_flops(cls, layouts.Stack((512, 512), 3), 2048) == 3 * cubes * 512**3
    in_blocks = layouts.update_flops(cls, layouts.Stack((512, 512)), 256)
    assert in_blocks == 512 * 512 * 256 * 10 + (cubes - 10) * 2 * 256**3
    assert layouts.update_flops(cls, layouts.Stack((40000, 64), 1), 2048) == (
        5 * 40000 * 64 * 64 + (cubes - 10) // 2 * 64**3
    )


def test_the_page_has_the_tables_as_they_are_now():
    page = (DOCS / "interface.md").read_text()
    assert layouts.axes_table(2048) in page
    assert layouts.table(2048) in page
