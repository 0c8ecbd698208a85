"""Micro-batches of many ranks: FSDP2, tensor parallel, and DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
from helpers.rank_cases import F32, F64, LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
LAYOUT = "FSDP2 of 4"
MICRO = {"second_moment": "micro"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rmsprop-momentum", {"second_moment": "variance"}),
        ("adamw", MICRO),
        ("ifshampoo", {"factor_dtype": F64, "lr": 1e-3}),
        ("shampoo", {"factor_dtype": F64, "lr": 1e-3}),
    ],
    ids=str,
)
def test_shards_follow_the_whole_model(ranks, name, changes, layout):
    assert max(ranks.run("shards_follow_the_whole_model", name, layout, changes)) < 1e-14


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_shards_add_up_in_float32(ranks, dtype):
    """Elements are stepped alike, whole or in parts: to the bit."""
    changes = {"initial_square_avg": 1.0, **MICRO}
    assert max(ranks.run("shards_follow_the_whole_model", "adamw", LAYOUT, changes, dtype)) == 0.0


@pytest.mark.parametrize("no_sync", [True, False])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rmsprop", MICRO),
        ("adamw", {"second_moment": "mean"}),
        ("shampoo", {"factor_dtype": F64, "lr": 1e-3}),
    ],
    ids=str,
)
def test_replicas_follow_one_process(ranks, name, changes, no_sync):
    assert max(ranks.run("replicas_follow_one_process", name, changes, no_sync, False)) < 1e-12


def test_replicas_with_terms(ranks):
    assert max(ranks.run("replicas_follow_one_process", "adamw", MICRO, True, True)) < 1e-12


def test_replicas_with_hooks(ranks):
    for said, error in ranks.run("hooks_of_replicas"):
        assert "run each backward under no_sync(), and call reduce_accumulated()" in said
        assert error < 1e-12


@pytest.mark.parametrize("kind", ["micro", "variance", "mean"])
@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_two_ranks_are_two_micro_batches(ranks, name, kind):
    """But for the rounding of a square before it is added, and what "mean" cancels of it."""
    error = max(ranks.run("two_ranks_are_two_micro_batches", name, {"second_moment": kind}))
    assert error < (1e-14 if kind == "mean" else 1e-15)


def test_ranks_without_some_gradients(ranks):
    assert max(ranks.run("ranks_without_some_gradients", MICRO)) < 1e-14


@pytest.mark.parametrize("case", ["a parameter more", "squares on one", "terms on one"])
def test_every_rank_is_told_of_different_things(ranks, case):
    for error, moved in ranks.run("different_things_are_told", case):
        assert "ranks accumulated different things" in error
        assert not moved


def test_a_sum_over_ranks_is_the_last(ranks):
    """A second one would count the first micro-batches once a rank more than those since."""
    for *refused, after_zero_grad in ranks.run("what_follows_a_sum_over_ranks"):
        assert all("reduce_accumulated() has ended this accumulation" in said for said in refused)
        assert len(refused) == 3
        assert after_zero_grad == "nothing"


def test_a_fault_of_one_rank_is_told_to_all(ranks):
    for rank, (error, moved) in enumerate(
        ranks.run("different_things_are_told", "another kind on one")
    ):
        words = "changed since the last accumulate()" if rank == 1 else "rank 1 cannot sum what it"
        assert words in error
        assert not moved


def test_shards_are_not_reduced(ranks):
    for error, finite in ranks.run("shards_are_not_reduced"):
        assert "leave reduce_accumulated() out" in error
        assert all(finite)
