"""`python -m bench distributed`: owners, bytes and loads by hand, times of the slowest rank."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.bench import CPU, needs_extras, row
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import distributed
from bench.__main__ import main
from bench.layouts import GIVEN, Stack, state_bytes, update_flops
from bench.measuring.common import Timing
from bench.measuring.rows import Rows, read_rows, select
from bench.report import figures, plots, tables
from bench.workloads.networks import llama_1b, llama_8b, llama_70b
from rootfree_fused import IFShampoo, RootFreeShampoo
from rootfree_fused.optimizer import exchange
from rootfree_fused.optimizer.ranks import rows_of
from rootfree_fused.optimizer.shards import local
from rootfree_fused.optimizer.sharing import _box

SIX = [(8, 8)] * 6


# From shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire", "bytes_"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_sent_by_hand(wire, bytes_, monkeypatch):
    """Six of 8 x 8 on four ranks: two own two; each rank has two rows of all."""
    part, headers = 2 * 8, 3 * 16
    grads_of_others = 4 * part * 4
    most = grads_of_others + headers + 2 * 3 * part * bytes_
    assert distributed.traffic(SIX, [0, 1, 2, 3, 0, 1], 4, wire) == (most, 1)
    monkeypatch.setattr(exchange, "WAVE_BYTES", 8 * 8 * 4)  # a matrix
    assert distributed.traffic(SIX, [0, 1, 2, 3, 0, 1], 4, wire) == (most + headers, 2)
    assert distributed.traffic(SIX, [0] * 6, 1, wire)[0] == 0


def test_uneven_rows_and_padding_by_hand():
    """Of 5 x 3 ranks have 2, 2, 1 and 0 rows: 24, 24 and 12 bytes, padded to 32, 32 and 16."""
    headers = 3 * 16
    owner, others = headers + 32 + 16, [headers + 32, headers + 16, headers]
    assert distributed.traffic([(5, 3)], [0], 4, torch.float32)[0] == max(owner, *others)
    last = headers + 32 + 32 + 16  # which has none of it, and sends all
    assert distributed.traffic([(5, 3)], [3], 4, torch.float32)[0] == last


def test_ranks_that_are_passed_over_send_no_more(monkeypatch):
    """One of each kind stands for all: the most is that over every rank."""
    shapes = [(8, 8), (5, 3), (16, 8), (8, 8), (3, 40), (16, 8), (8, 8)]
    owners = [0, 1, 2, 3, 1, 4, 0]
    expected = distributed.traffic(shapes, owners, 6, torch.float32)
    monkeypatch.setattr(distributed, "unlike", lambda shapes, owners, cuts, ranks: range(ranks))
    assert distributed.traffic(shapes, owners, 6, torch.float32) == expected


@pytest.mark.parametrize(("cls", "cubes"), [(RootFreeShampoo, 24), (IFShampoo, 18)])
def test_a_world_by_hand(cls, cubes):
    world = distributed.by_rows(SIX)(cls, 4)
    assert sorted(load.flops for load in world.loads) == [n * cubes * 8**3 for n in (1, 1, 2, 2)]
    _, one = state_bytes(cls, [Stack((8, 8))], 2048)
    owned = one - 4  # all but the count of steps, which every rank has
    assert sorted(load.bytes for load in world.loads) == [n * owned for n in (1, 1, 2, 2)]
    assert (world.sent, world.halved) == (4 * 64 + 48 + 6 * 64, 4 * 64 + 48 + 6 * 32)
    assert (world.waves, world.messages) == (1, 2)
    alone = distributed.by_rows(SIX)(cls, 1)
    assert (alone.sent, alone.messages, len(alone.loads)) == (0, 0, 1)


@pytest.mark.parametrize(("cls", "cubes"), [(RootFreeShampoo, 7), (IFShampoo, 4)])
def test_rows_that_stay_by_hand(cls, cubes):
    """Of a lookup each of four ranks does its rows, and sums 8 x 8; in a ring 3/4 of it twice."""
    world, without = (distributed.by_rows(shapes)(cls, 4) for shapes in ([*SIX, (40000, 8)], SIX))
    sums, header = 2 * 8 * 8 * 4 * 3 // 4, 3 * 16
    assert world.sent == without.sent + sums + header
    assert (world.waves, world.halved) == (1, without.halved + sums + header)
    assert [a.flops - b.flops for a, b in zip(world.loads, without.loads, strict=True)] == [
        5 * 10000 * 8 * 8 + cubes * 8**3
    ] * 4
    alone = distributed.by_rows([(40000, 8)])(cls, 4)
    assert (alone.sent, alone.waves) == (sums + 2 * header, 1)


@pytest.mark.parametrize("cls", GIVEN)
def test_members_of_stacks_stay_where_they_are(cls):
    """Of stacks of five members three ranks have 2, 2 and 1, as six 1, 1, 1, 1, 1 and 0."""
    simulation = distributed.by_members([(5, 8, 16), (5, 8, 16), (5, 4, 4)])
    member = 2 * update_flops(cls, Stack((8, 16)), 2048) + update_flops(cls, Stack((4, 4)), 2048)
    for ranks, members in ((3, [2, 2, 1]), (6, [1, 1, 1, 1, 1, 0])):
        world = simulation(cls, ranks)
        assert [load.flops for load in world.loads] == [n * member for n in members]
        assert (world.sent, world.halved, world.waves, world.messages) == (0, 0, 0, 0)


@pytest.mark.parametrize("cls", GIVEN)
def test_costs_owners_and_parts_are_those_of_the_optimizer(cls):
    """On a process group of four that sends nothing, of which this process is a rank."""
    shapes = [(16, 8), (8, 8), (24, 40), (8, 8), (5, 3), (16, 8), (40, 8), (40000, 8)]
    each = [distributed.cost_of(cls, Stack(shape)) for shape in shapes]
    owners = distributed.owners_of(each[:-1], [distributed.Cost(0, 0)] * 4)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        params = [
            torch.nn.Parameter(
                DTensor.from_local(
                    torch.zeros(rows_of(shape[0], 4)[1], shape[1]),
                    mesh,
                    [Shard(0)],
                    run_check=False,
                    shape=torch.Size(shape),
                    stride=(shape[1], 1),
                )
            )
            for shape in shapes
        ]
        optimizer = cls(params, factor_dtype=torch.bfloat16, **GIVEN[cls])
        assert distributed.costs(optimizer) == each
        held = [optimizer._sharing.held(p, optimizer.param_groups) for p in params]
        assert [of.owner for of in held[:-1]] == owners
        assert [of.stays for of in held] == [False] * 7 + [True]
        of_rows = [local(value).nbytes for value in optimizer.state[params[-1]].values()]
        (alone,) = {load.bytes for load in distributed.by_rows(shapes[-1:])(cls, 4).loads}
        assert alone == sum(of_rows)
        assert [distributed.boxes(shape, 4)[1] for shape in shapes] == list(map(_box, params))
    finally:
        dist.destroy_process_group()


def test_models_are_their_matrices():
    for layers, count, left in (
        (llama_1b(), 7 * 16, [(128256, 2048)]),
        (llama_8b(), 7 * 32, [(128256, 4096)] * 2),
        (llama_70b(), 7 * 80, [(128256, 8192)] * 2),
        (llama_1b(256, 4), 28, [(128256, 256)]),
    ):
        every = list(layers)
        found = distributed.matrices(iter(every))
        two_axes = [layer.shape for layer in every if len(layer.shape) == 2]
        assert len(found) == count
        assert sorted(found) + left == sorted(two_axes)


# By time --------------------------------------------------------------------------------------


def test_a_world_takes_as_long_as_its_slowest_rank(tmp_path, monkeypatch):
    """Six equal matrices on four ranks; rank 2, which owns one, is made the slowest."""

    def interleave(runs, timer, *, seconds):
        assert list(runs) == [(1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
        times = dict(zip(runs, (12.0, 4.0, 4.0, 5.0, 2.0), strict=True))
        return {key: Timing(t, t, t, 3) for key, t in times.items()}

    monkeypatch.setattr(distributed, "interleave", interleave)
    rows = Rows(tmp_path / "distributed.jsonl", "distributed", CPU)
    distributed.measure("six", SIX, rows, [4], 0.1)
    for name in ("RootFreeShampoo", "IFShampoo"):
        own = select(read_rows(rows.path), provider=name)
        slowest = select(own, metric=tables.SLOWEST)[1]
        assert (slowest["value"], slowest["detail"]["rank"]) == (5000.0, 2)
        one, four = select(own, metric=tables.SPEEDUP)
        assert (one["value"], four["value"]) == (1.0, 2.4)
        assert four["detail"] == {"ranks": 4, "predicted": 3.0, "together": 1.25}


def test_cpu_time_is_not_that_of_waiting():
    assert distributed.cpu_seconds(lambda: time.sleep(0.2)) < 0.1
    assert distributed.cpu_seconds(lambda: sum(range(5_000_000))) > 0.01


# Table and plot -------------------------------------------------------------------------------


def test_the_tables_show_ratios_and_percentages():
    sent = {"bfloat16": 0.375, "waves": 3, "messages": 6}
    computed = [
        row("IFShampoo", tables.WORK, 2.0, ranks=4, mean=1.6),
        row("IFShampoo", tables.STATE, 30.0, ranks=4, mean=25.0),
        row("IFShampoo", tables.SENT, 0.5, ranks=4, **sent),
    ]
    text = tables.distributed(computed)
    assert "| c | IFShampoo | 4 | 2 | 1.25 | 0.5 | 0.375 | 30 | 1.20 | 6 | 3 |" in text
    assert "## Timed" not in text
    measured = [
        row("IFShampoo", tables.SLOWEST, 5.0, case="few", ranks=4, rank=2, p20=4.9, p80=5.1),
        row("IFShampoo", tables.SPEEDUP, 2.4, case="few", ranks=4, predicted=3.0, together=1.25),
    ]
    text = tables.distributed([*computed, *measured])
    shown = "| few | IFShampoo | 4 | 5 (4.9 to 5.1) | 2.40 | 3.00 | 60.0% | 75.0% | 0.800 | 1.250 |"
    assert shown in text


@needs_extras
def test_distributed_end_to_end(tmp_path, capsys):
    command = ["distributed", "--quick", "--simulate", "2", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    written = read_rows(tmp_path / "distributed.jsonl")
    assert {r["commit"] for r in written} == {"abc"}
    for cls in GIVEN:
        own = select(written, provider=cls.__name__)
        for case in ("Llama-1B", "experts of Qwen3-30B-A3B"):
            for metric in (tables.WORK, tables.STATE, tables.SENT):
                found = select(own, case=case, metric=metric)
                assert [r["detail"]["ranks"] for r in found] == [1, 2, 4, 8]
        ranks = [r["detail"]["ranks"] for r in select(own, metric=tables.SPEEDUP)]
        assert ranks == [1, 2]
        assert select(own, metric=tables.SPEEDUP)[0]["value"] == 1
        assert all(r["value"] > 0 for r in select(own, metric=tables.SLOWEST))
    assert (tmp_path / "distributed.md").read_text() == tables.distributed(written) + "\n"
    picture = tmp_path / "distributed_worlds.png"
    assert figures.shows(picture, plots.worlds_rows(written))
    assert f"plot   {picture}" in capsys.readouterr().out
    assert main(["report", "--rows", str(tmp_path)]) == 0
    assert "(distributed_worlds.png)" in (tmp_path / "report.md").read_text()
