"""Matrices whose rows stay where they are, beside one process: layouts, checkpoints, bytes."""

from __future__ import annotations

import pytest
import torch
from helpers.rank_cases import F32, F64
from helpers.row_cases import LAYOUTS, STAYING

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
NAMES = ["ifshampoo", "shampoo"]
BF16 = torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_the_whole_matrix(ranks, name, layout):
    found = [f for f in ranks.run("rows_follow_the_whole", name, layout, {"lr": 1e-3}) if f]
    stay = [layout in STAYING] * 2 + [False] * 2
    assert all(which == stay for _, which in found)
    assert max(error for error, _ in found) < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_steps_leave_a_mesh_as_it_was(ranks, name):
    assert ranks.run("gathered_by_torch", name) == [[True] * 3] * 4


@pytest.mark.parametrize("name", NAMES)
def test_ranks_of_two_axes_without_names_step_without_the_others(ranks, name):
    found = ranks.run("two_of_four", name)
    assert max(error for error, _ in found) < 1e-15
    assert all(count == 4 for _, count in found)


SETTINGS = [
    ({"structures": ("diagonal", "block"), "block_size": 2}, 1e-15),
    ({"structures": "diagonal"}, 1e-15),
    ({"maximize": True, "weight_decay": 0.1, "momentum": 0.0, "row_beta": None}, 1e-15),
    ({"initial_square_avg": 1.0, "update_interval": 3}, 1e-15),
    ({"replicas": "repeat"}, 1e-15),
    # Equal ones, whose other factors are stacked; no update of them travels.
    ({"shapes": ((61, 4), (61, 4), (9, 2), (9, 2)), "update_dtype": BF16}, 1e-15),
    ({"factor_dtype": F32}, 1e-6),
    # At most a few of 244 elements are rounded otherwise, by 2^-8 of themselves.
    ({"dtype": BF16, "factor_dtype": F32, "lr": 0.05, "shapes": ((61, 4), (9, 2))}, 2.0**-11),
]


@pytest.mark.parametrize(("changes", "error"), SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_the_whole_matrix(ranks, name, changes, error):
    if name == "ifshampoo":
        changes = {key: value for key, value in changes.items() if key != "row_beta"}
    found = ranks.run("rows_follow_the_whole", name, "HSDP", {"lr": 1e-3, **changes})
    assert all(any(which) for _, which in found)
    assert max(far for far, _ in found) < error


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_axes": False, "shapes": ((61, 2, 3), (9, 2))},
        {"structures": ("diagonal", "lower_toeplitz"), "shapes": ((61, 4), (9, 2))},
    ],
    ids=str,
)
def test_columns_of_more_axes_or_of_other_structures(ranks, changes):
    changes = {"lr": 1e-3, **changes}
    found = ranks.run("rows_follow_the_whole", "ifshampoo", "FSDP2 of 4", changes)
    assert all(which == [True, True] for _, which in found)
    assert max(error for error, _ in found) < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_is_what_rows_need_and_no_more(ranks, name):
    """Grams of 4 x 4 and 2 x 2, float64, and one number or two; scales of the update."""
    numbers = 1 if name == "shampoo" else 2
    grams = [("all_reduce", 8 * (side * side + numbers)) for side in (4, 2)]
    scales = [("all_gather_into_tensor", 2 * 8)] * (2 if name == "shampoo" else 0)
    for interval in (1, 2):
        answers = ranks.run("rows_send", name, interval)
        for rank, (found, held, (planned, gradients)) in enumerate(answers):
            # The dense matrix of 2 x 3 has an owner, to which two ranks send 24 bytes, padded.
            message = 3 * (16 + 2 * 16) + (32 if rank in (0, 1) and held[2] <= 4 else 0)
            assert gradients == message
            for seed, calls in enumerate(found, 1):
                update = seed % interval == 0
                expected = [call for gram in grams for call in (*[gram] * update, *scales)]
                own = [call for call in calls if call[0] != "all_to_all_single"]
                assert own == expected
                assert sum(call[0] == "all_to_all_single" for call in calls) == 2
            rows = (16, 16, 16, 13)[rank], (3, 3, 3, 0)[rank]
            per_row = 3 if name == "shampoo" else 2  # v, S and K, or K and m
            for has, columns, bytes_ in zip(rows, (4, 2), held, strict=False):
                assert bytes_ == 4 + 8 * (has * (columns + per_row) + 2 * columns * columns)
            assert planned >= gradients


def test_rows_alone_have_one_message(ranks):
    for found, *_ in ranks.run("rows_send", "ifshampoo", 1, ((61, 4), (9, 2))):
        assert [kind for kind, _ in found[0]] == ["all_to_all_single", *["all_reduce"] * 2]


OTHER_RANKS = [
    ("FSDP2 of 4", "FSDP2 of 2", "sharded"),
    ("FSDP2 of 2", "FSDP2 of 4", "sharded"),
    ("FSDP2 of 4", "one process", "full"),
    ("one process", "FSDP2 of 4", "full"),
]
OTHER_LAYOUTS = [
    ("FSDP2 of 4", "HSDP", "sharded"),
    ("FSDP2 of 4", "columns", "sharded"),
    ("columns", "FSDP2 of 4", "sharded"),
    ("FSDP2 of 4", "FSDP2 of 4", "full"),
]
CHECKPOINTS = [("ifshampoo", F64, *move) for move in OTHER_RANKS + OTHER_LAYOUTS]
CHECKPOINTS += [("shampoo", BF16, *move) for move in OTHER_RANKS]


@pytest.mark.parametrize(("name", "dtype", "before", "after", "how"), CHECKPOINTS)
def test_checkpoints_go_on_elsewhere(ranks, name, before, after, how, dtype, tmp_path):
    """To the bit in what is loaded; sums of other parts then round otherwise."""
    changes = {"factor_dtype": dtype}
    found = ranks.run("rows_go_on", name, before, after, how, str(tmp_path), changes)
    assert all(loaded for loaded, _ in found)
    in_products = dtype == BF16 and "one process" in (before, after)  # which it rounds
    near = 1e-12 if dtype == F64 else 0.02 if in_products else 1e-6
    assert max(error for _, error in found) < near


@pytest.mark.parametrize(
    ("case", "on", "words"),
    [
        ("no gradient on one", (0, 1, 2, 3), "without a gradient of group 0 is [] on rank 0 and"),
        ("another lr", (0, 1, 2, 3), "lr of group 0 is 0.05 on rank 0 and 0.125 on rank 1"),
        ("a setting out of range", (0, 2, 3), "rank 1 took no step (ValueError: in group 0, damp"),
        ("another count", (0, 1, 2, 3), "of parameter 0 of group 0 is 1.0 on rank 0 and 3.0 on"),
        ("a matrix anew on one", (0, 1, 2, 3), "is 1.0 on rank 0 and 0.0 on rank 1 of those that"),
        ("a lost state", (0, 1, 2), "rank 3 took no step (ValueError: the state of parameter 0"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_one_rank_does_otherwise_all_are_told(ranks, name, case, on, words):
    for rank, answer in enumerate(ranks.run("rows_disagree", name, case)):
        assert isinstance(answer, str), f"rank {rank} stepped"
        assert (words in answer) == (rank in on), answer


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_gradient_on_all_ranks_stay(ranks, name):
    answers = ranks.run("rows_disagree", name, "no gradient on all")
    assert all(stayed[0] for stayed in answers)
    assert [stayed[1] for stayed in answers] == [False, False, False, True], "the last has no row"


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_start_anew_on_all_ranks_go_on(ranks, name):
    for stayed in ranks.run("rows_disagree", name, "a matrix anew on all"):
        assert not all(stayed)


@pytest.mark.parametrize("name", NAMES)
def test_an_inf_on_one_rank_skips_the_step_on_all(ranks, name):
    assert max(ranks.run("rows_are_skipped_at_an_inf", name)) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"shapes": ((8, 5, 3),), "batch_axes": 1}], ids=str)
def test_what_has_not_started_starts_after_a_load(ranks, changes):
    assert max(ranks.run("rows_start_again", "ifshampoo", changes)) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_rows_get_an_owner_where_a_load_makes_their_factors_dense(ranks, name):
    assert max(ranks.run("rows_get_an_owner", name)) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_a_load_of_what_does_not_fit_is_refused(ranks, name):
    wrong = ["shape () but", "shape (7,) but", "must be a tensor", "device meta, without data"]
    wrong += ["shape (3, 3) but", "shape (61, 3) but"]
    for said in ranks.run("rows_refuse_what_does_not_fit", name):
        for error, words in zip(said, wrong, strict=True):
            assert words in error
