"""One of two processes: python token_squares_rank.py RANK STORE. It fails where a check fails."""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.token_squares import Recorder, assert_near

from rootfree_fused import RootFreeAdamW
from rootfree_fused.micro import TokenSquares


def main(rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=40),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(12, 4).double()
    parallel, optimizer = DistributedDataParallel(model), Recorder(model.parameters())
    alone = Recorder(model.parameters())
    own, _ = distributed.new_subgroups(1)
    with pytest.raises(RuntimeError, match="which of 2 ranks"):
        TokenSquares(model, alone)

    with TokenSquares(parallel, optimizer) as squares:
        parallel(x[6 * rank :][:6]).pow(3).mean().backward()
        squares.accumulate(terms=6)
    with TokenSquares(model, alone, process_group=own) as squares:
        model(x).pow(3).mean().backward()
        squares.accumulate(terms=12)
    ours, whole = optimizer.calls[0], alone.calls[0]
    assert ours["parts"] == whole["parts"] == 12
    assert ours["terms"] == whole["terms"] == 12
    for p in model.parameters():
        assert_near(ours["squares"][p], whole["squares"][p], 1e-14)

    # Unequal ranks: each averages its own loss, and both are weighed alike.
    with TokenSquares(parallel, optimizer) as squares:
        parallel(x[:4] if rank else x[4:]).pow(3).mean().backward()
        squares.accumulate()
    with TokenSquares(model, alone, process_group=own) as squares:
        ((model(x[:4]).pow(3).mean() + model(x[4:]).pow(3).mean()) / 2).backward()
        squares.accumulate()
    ours, whole = optimizer.calls[1], alone.calls[1]
    assert ours["parts"] == whole["parts"] == 12
    assert ours["terms"] is None
    for p in model.parameters():
        assert_near(ours["squares"][p], whole["squares"][p], 1e-14)

    # Gradients that stay the rank's own until the optimizer sums them.
    twins = [copy.deepcopy(model) for _ in range(2)]
    optimizers = [
        RootFreeAdamW(twin.parameters(), batch_size=12, second_moment="variance") for twin in twins
    ]
    parallel = DistributedDataParallel(twins[0])
    with TokenSquares(parallel, optimizers[0]) as squares:
        for part in x[6 * rank :][:6].split((2, 4)):
            with parallel.no_sync():
                parallel(part).pow(3).mean().backward()
            squares.accumulate()
        optimizers[0].reduce_accumulated()
    with TokenSquares(twins[1], optimizers[1], process_group=own) as squares:
        twins[1](x).pow(3).mean().backward()
        squares.accumulate()
    for optimizer in optimizers:
        optimizer.step()
    for before, p, q in zip(*(twin.parameters() for twin in (model, *twins)), strict=True):
        assert_near(p.detach() - before, q.detach() - before, 1e-12)


main(int(sys.argv[1]), sys.argv[2])
os._exit(0)  # past gloo's threads: see batch_size_rank.py
