"""Matrices that ranks share, beside one process: every layout, agreement, checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers.rank_cases import F32, F64, LAYOUTS
from helpers.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
NAMES = ["ifshampoo", "shampoo"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*NAMES, "ifshampoo-interval"])
def test_every_layout_is_the_whole_model(ranks, name, layout):
    changes = {"factor_dtype": F64, "lr": 1e-3}
    errors = ranks.run("follows_the_whole_model", name, layout, changes)
    assert max(errors) < 1e-15
    assert layout == "FSDP2 of 2" or len(set(errors)) == 1


@pytest.mark.parametrize("start", [1.0, "auto"], ids=str)
def test_factors_start_at_the_gradients_that_were_gathered(ranks, start):
    changes = {"factor_dtype": F64, "lr": 1e-3, "initial_square_avg": start}
    assert max(ranks.run("follows_the_whole_model", "ifshampoo", "FSDP2 of 4", changes)) < 1e-15


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "FSDP2, one frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_equal_give_the_bits_of_one_rank(ranks, name, layout, dtype):
    assert all(ranks.run("is_one_rank", name, layout, {"factor_dtype": dtype}))


@pytest.mark.parametrize("name", NAMES)
def test_waves_change_no_bit_and_send_what_the_plan_says(ranks, name):
    """Two ranks own two matrices of the six, so that these go one after the other, or at once."""
    for limit, waves in ((1, 2), (2**26, 1)):
        counts, sent, values, held = zip(*ranks.run("sends", name, limit), strict=True)
        assert set(counts) == {waves}
        # Of each matrix three ranks send two rows of 8 float64, and are sent as much; headers.
        assert sum(sent) == 6 * 2 * 3 * 2 * 8 * 8 + waves * 4 * 3 * 16
        # Two ranks own two, and each counts six steps: float64 of a matrix, its rows, two axes.
        each = 8 * (64 + (8 if name == "shampoo" else 0) + 2 * 2 * 64)
        assert sorted(held) == [count * each + 6 * 4 for count in (1, 1, 2, 2)]
        if waves == 2:
            cut = values
    assert all(torch.equal(a, b) for a, b in zip(cut[0], values[0], strict=True))


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"replicas": "repeat"}, 1e-15), ({"update_dtype": torch.bfloat16}, 2.0**-9)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["HSDP", "replicated"])
@pytest.mark.parametrize("name", NAMES)
def test_replicas_may_repeat_the_work_and_updates_travel_in_half_the_bytes(
    ranks, name, layout, changes, error
):
    errors = ranks.run("follows_with", name, layout, changes)
    assert max(errors) < error
    assert ("update_dtype" in changes) == (max(errors) > 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_replicas_of_a_process_group_share_the_work(ranks, name):
    found = ranks.run("replicas_share", name, F64)
    assert max(error for error, _ in found) < 1e-15
    sizes = [size for _, size in found]
    assert len(set(sizes)) > 1, "some own a matrix, others none"


@pytest.mark.parametrize("name", NAMES)
def test_an_inf_on_one_rank_skips_the_step_on_all(ranks, name):
    """Nearly as in one process, as gradients are of weights that were rounded once more."""
    errors = ranks.run("an_inf_on_one_rank_skips_all", name, {"factor_dtype": F32})
    assert max(errors) < 5e-5


SAME_RANKS = [("FSDP2 of 4", "HSDP"), ("HSDP", "FSDP2 of 4")]
SAME_RANKS += [("tensor parallel and FSDP2", "FSDP2 of 4"), ("FSDP2 of 4", "tensor parallel")]
CHECKPOINTS = [(*move, how) for move in SAME_RANKS for how in ("nested", "flat", "full")]
CHECKPOINTS.append(("FSDP2 of 4", "one process", "full"))


@pytest.mark.parametrize(("before", "after", "how"), CHECKPOINTS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_on_in_another_layout(ranks, name, before, after, how, tmp_path):
    changes = {"factor_dtype": torch.bfloat16}
    case = "goes_on_in_another_layout"
    assert all(ranks.run(case, name, before, after, how, str(tmp_path), changes, 1e-12))


@pytest.mark.parametrize("how", ["saved", "async"])
@pytest.mark.parametrize(
    ("before", "after"), [("FSDP2 of 4", "FSDP2 of 2"), ("FSDP2 of 2", "FSDP2 of 4")]
)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_on_with_other_ranks(ranks, name, before, after, how, tmp_path):
    assert all(ranks.run("goes_on_with_other_ranks", name, before, after, how, str(tmp_path)))


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_state_on_the_host_is_what_all_load(ranks, name, broadcast):
    assert all(ranks.run("full_state_goes_to_one_process", name, broadcast))


@pytest.mark.parametrize(
    ("case", "on", "words"),
    [
        ("no gradient on one", (0, 1, 2, 3), "without a gradient of group 0 is [] on rank 0 and"),
        ("another lr", (0, 1, 2, 3), "lr of group 0 is 0.05 on rank 0 and 0.125 on rank 1"),
        ("a setting out of range", (0, 2, 3), "rank 1 took no step (ValueError: in group 0, damp"),
        ("a plain gradient", (0, 1, 2), "rank 3 took no step (TypeError: the gradient of param"),
        ("a lost state", (0, 1, 2), "rank 3 took no step (ValueError: the state of parameter 0"),
        ("another order", (0, 1, 2, 3), "where rank 2 of the 4 that share it has"),
        ("a tensor lr", (0, 1, 2, 3), "lr of group 0 is 0.05 on rank 0 and 0.25 on rank 1"),
        ("another type", (0, 2, 3), "rank 1 took no step (TypeError: in group 0, update_int"),
        ("state anew on one", (0, 1, 2, 3), "step of parameter 0 of group 0 is 0.0 on rank 0 and "),
        ("a matrix anew on one", (0, 1, 2, 3), "is 1.0 on rank 0 and 0.0 on rank 3"),
        ("no such structure", (0, 2, 3), "rank 1 took no step (ValueError: in group 0, structu"),
        ("one trains no more", (0, 1, 2, 3), "rank 1 of the 4 that share matrices has other par"),
        ("a group more", (0, 1, 2, 3), "rank 3 of the 4 that share matrices has other parameters"),
        ("sums of parts", (0, 1, 3), "rank 2 took no step (ValueError: in group 0, lr is -1.0"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_one_rank_does_otherwise_all_are_told(ranks, name, case, on, words):
    answers = ranks.run("disagrees", name, case)
    for rank, answer in enumerate(answers):
        assert isinstance(answer, str), f"rank {rank} stepped"
        assert (words in answer) == (rank in on), answer


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_a_gradient_on_all_ranks_stays(ranks, name):
    for stayed in ranks.run("disagrees", name, "no gradient on all"):
        assert stayed[0]
        assert not all(stayed)


@pytest.mark.parametrize("name", NAMES)
def test_state_that_starts_anew_on_all_ranks_goes_on(ranks, name):
    for stayed in ranks.run("disagrees", name, "state anew on all"):
        assert not all(stayed)


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_told_to_ranks_that_share_nothing_with_it(ranks, name):
    first, *others = ranks.run("a_fault_is_told_over_two_meshes", name)
    assert len(first) == 1
    assert "lr is -1.0" in first[0]
    (near,), (beside,), (across,) = others
    assert "rank 0 took no step" in near
    assert "rank 0 took no step" in beside
    assert "a rank that shares other matrices took no step" in across


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_may_go_to_another_group(ranks, name):
    assert max(ranks.run("moves_to_another_group", name)) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_kept(ranks, name):
    assert ranks.run("gradients_go", name) == [[]] * 4


@pytest.mark.parametrize("stepped", [False, True])
def test_a_save_on_one_rank_is_told(ranks, stepped):
    said, *others = ranks.run("saves_on_one_rank", stepped)
    assert "state_dict() was called on 1 of the 4 ranks" in said
    assert others == [""] * 3


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["by member", "by row", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_stacks_of_matrices_are_stepped_where_they_are_or_shared(ranks, name, placement, dtype):
    found = ranks.run("experts", name, placement, dtype)
    assert max(error for error, _ in found) < 1e-15
    held = {size for _, size in found}
    assert len(held) == (1 if placement == "by member" else 2), "each its members, or one all"


def test_a_killed_rank_ends_the_step_of_the_others(tmp_path):
    pool = Ranks(4, tmp_path)
    try:
        answers = pool.run("is_killed", 2, dead=(2,))
    finally:
        pool.close()
    assert all("no error" not in answer for answer in answers)
