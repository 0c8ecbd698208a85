"""Matrices that ranks share, with weights and momenta in fewer bytes, beside one rank."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
NAMES = ["ifshampoo", "shampoo"]
FORMATS = [(8, "8bit"), (16, "bfloat16"), ("stochastic", "float32"), (None, "8bit")]
LAYOUTS = ["FSDP2 of 2", "FSDP2 of 4", "HSDP", "process group", "columns"]
# Parts that are not rows are rounded stochastically by numbers of their own.
EQUAL = [
    (layout, *formats)
    for layout in LAYOUTS
    for formats in FORMATS
    if (layout, formats[0]) != ("columns", "stochastic")
]


@pytest.mark.parametrize(("layout", "residual", "state"), EQUAL)
@pytest.mark.parametrize("name", NAMES)
def test_formats_have_the_bits_of_one_rank(ranks, name, layout, residual, state):
    answers = ranks.run("shared_formats_have_the_bits_of_one_rank", name, layout, residual, state)
    assert all(equal for equal, _ in answers)
    of_momentum = {"8bit": torch.int8, "bfloat16": torch.bfloat16, "float32": torch.float32}
    held = [found["momentum_buffer"] for _, found in answers if found]
    assert all(dtypes <= {of_momentum[state], torch.float32} for dtypes in held)


CHECKPOINTS = [
    ("FSDP2 of 2", "one rank", "full"),
    ("FSDP2 of 2", "FSDP2 of 4", "full"),
    ("FSDP2 of 4", "HSDP", "saved"),
    ("columns", "FSDP2 of 4", "saved"),
    ("FSDP2 of 4", "process group", "full"),
    ("process group", "HSDP", "full"),
]


@pytest.mark.parametrize(("residual", "state"), [(8, "bfloat16"), (16, "8bit")])
@pytest.mark.parametrize(("before", "after", "how"), CHECKPOINTS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_in_the_middle_go_on(
    ranks, name, before, after, how, residual, state, tmp_path
):
    case = "shared_formats_go_on", name, before, after, how, residual, state
    assert all(ranks.run(*case, str(tmp_path)))


@pytest.mark.parametrize("name", NAMES)
def test_wider_formats_take_all_and_narrower_ones_on_purpose(ranks, name):
    assert all(ranks.run("shared_formats_widen_and_narrow", name))


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_float32_model_becomes_bfloat16(ranks, name):
    assert all(ranks.run("a_shared_model_becomes_bfloat16", name))


@pytest.mark.parametrize("layout", ["FSDP2 of 4", "process group"])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_every_bit(ranks, name, layout):
    assert all(ranks.run("a_skipped_step_leaves_shared_formats", name, layout))


@pytest.mark.parametrize(("residual", "state"), FORMATS[:2])
@pytest.mark.parametrize("layout", ["FSDP2 of 4", "HSDP"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_stay_in_formats(ranks, name, layout, residual, state):
    for error, kept in ranks.run("rows_that_stay_in_formats", name, layout, residual, state):
        assert error < 2**-9
        assert kept


@pytest.mark.parametrize(("residual", "state"), [(16, "8bit"), (8, "bfloat16")])
@pytest.mark.parametrize("name", NAMES)
def test_stacks_in_formats_are_stepped_where_they_are_or_shared(ranks, name, residual, state):
    assert ranks.run("experts_in_formats", name, residual, state) == [(True, True)] * 4
