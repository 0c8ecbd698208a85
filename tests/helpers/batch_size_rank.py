"""One of two processes: python batch_size_rank.py RANK STORE. It fails where a check fails."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rootfree_fused import BatchSizeCounter, RootFreeAdamW


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
    model = nn.Linear(4, 2)
    parallel = DistributedDataParallel(model)
    optimizer = RootFreeAdamW(model.parameters(), batch_size=1)
    (group,) = optimizer.param_groups

    def backward(samples):
        with parallel.no_sync():
            parallel(torch.ones(samples, 4)).mean().backward()
        parallel(torch.ones(1, 4)).mean().backward()

    with BatchSizeCounter(parallel, optimizer):
        backward(samples=3 + rank)
        optimizer.step()
        assert group["batch_size"] == 4 + 5, group
    with BatchSizeCounter(model, optimizer, process_group=distributed.group.WORLD):
        backward(samples=5 - rank)
        optimizer.step()
        assert group["batch_size"] == 6 + 5, group
        if rank == 0:  # both ranks refuse, so that neither waits for the other
            with parallel.no_sync():
                parallel(torch.ones(3, 4)).mean().backward()
        with pytest.raises(RuntimeError, match="on 1 ranks"):
            optimizer.step()
    with BatchSizeCounter(model, optimizer):
        backward(samples=2)
        with pytest.raises(RuntimeError, match="which of 2 ranks its gradients are averaged over"):
            optimizer.step()
    total = sum(p.sum() for p in model.parameters()).detach()
    twice = total.clone()
    distributed.all_reduce(twice)
    assert twice == 2 * total  # the ranks have the same parameters


main(int(sys.argv[1]), sys.argv[2])
# The destructor of a gloo group that a DistributedDataParallel held can wait for its own threads
# forever; every check has passed here.
os._exit(0)
