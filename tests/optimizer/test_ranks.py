"""The diagonal classes on DTensors, beside one process: every layout, failures, checkpoints."""

from __future__ import annotations

import pytest
from helpers.optimizers import DIAGONAL
from helpers.rank_cases import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
NAMES = ["rmsprop-momentum", "adamw-corrected"]
assert set(NAMES) <= set(DIAGONAL)


@pytest.mark.parametrize("start", [1.0, "auto"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_the_whole_model(ranks, name, layout, start):
    changes = {"initial_square_avg": start, "lr": 1e-3}
    errors = ranks.run("follows_the_whole_model", name, layout, changes)
    assert max(errors) < 1e-15
    assert layout == "FSDP2 of 2" or len(set(errors)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_brought_to_the_layout_of_the_parameter(ranks, name):
    assert max(ranks.run("gradients_in_another_layout", name)) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_an_inf_on_one_rank_skips_the_step_on_all(ranks, name):
    assert max(ranks.run("an_inf_on_one_rank_skips_all", name)) < 1e-5


MOVES = [
    ("FSDP2 of 4", "HSDP"),
    ("HSDP", "FSDP2 of 4"),
    ("tensor parallel and FSDP2", "FSDP2 of 4"),
]
CHECKPOINTS = [(*move, how) for move in MOVES for how in ("nested", "flat", "full")]
CHECKPOINTS.append(("FSDP2 of 4", "one process", "full"))  # whose state takes whole tensors


@pytest.mark.parametrize(("before", "after", "how"), CHECKPOINTS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_on_in_another_layout(ranks, name, before, after, how, tmp_path):
    assert all(ranks.run("goes_on_in_another_layout", name, before, after, how, str(tmp_path)))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("a plain gradient", "is a plain tensor but the parameter is a DTensor; make it one with"),
        ("a state of another layout", "redistribute it as the parameter is"),
        ("a plain state", "is a plain tensor but the parameter is a DTensor"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_spread_otherwise_is_told_before_anything_moves(ranks, name, case, words):
    for answer in ranks.run("bad_input", name, case):
        assert words in answer


FORMATS = [(8, "8bit"), (16, "bfloat16"), ("stochastic", "8bit")]


@pytest.mark.parametrize(("residual", "state"), FORMATS)
@pytest.mark.parametrize("layout", ["FSDP2 of 4", "HSDP"])
def test_formats_have_the_bits_of_the_whole_model(ranks, layout, residual, state):
    assert all(ranks.run("formats_have_the_bits_of_the_whole", layout, residual, state))


@pytest.mark.parametrize(("residual", "state"), FORMATS)
@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        ("FSDP2 of 4", "HSDP", "nested"),
        ("HSDP", "FSDP2 of 4", "flat"),
        ("FSDP2 of 4", "one process", "full"),
    ],
)
def test_checkpoints_of_formats_go_on(ranks, before, after, how, residual, state, tmp_path):
    case = "formats_go_on_in_another_layout", before, after, how, residual, state
    assert all(ranks.run(*case, str(tmp_path)))


def test_ranks_do_not_cut_blocks(ranks):
    (words,) = set(ranks.run("cut_blocks"))
    assert "state_format='bfloat16'" in words
    assert "multiple of 256" in words
