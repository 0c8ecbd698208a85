"""BatchSizeCounter on models that recompute, shard, are copied, compiled or data-parallel."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.batch_size import Net, batch, batch_sizes, setup
from helpers.optimizers import build
from torch._dynamo.testing import CompileCounterWithBackend

from rootfree_fused import BatchSizeCounter

HELPERS = Path(__file__).parent / "helpers"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_does_not_count_again(reentrant):
    """The counted layer runs twice, once of it in the backward."""
    model = Net(reentrant)
    optimizer = build("adamw", model.parameters())
    with BatchSizeCounter(model, optimizer):
        model(batch(5).requires_grad_()).mean().backward()
        optimizer.step()
    assert batch_sizes(optimizer) == [5]

    with BatchSizeCounter(model.hidden, optimizer):
        model(batch(7).requires_grad_()).mean().backward()
        if reentrant:  # its first run has no gradients: that cannot be known
            with pytest.raises(RuntimeError, match="no call of Linear in training mode"):
                optimizer.step()
        else:
            optimizer.step()
            assert batch_sizes(optimizer) == [7]


def test_gradients_that_are_kept_elsewhere_still_count():
    """As with a sharded model that does not synchronize between micro-batches: .grad stays None."""
    model, optimizer, _ = setup()
    kept = [torch.zeros_like(p) for p in model.parameters()]

    def keep(p, total):
        total += p.grad
        p.grad = None

    for p, total in zip(model.parameters(), kept, strict=True):
        p.register_post_accumulate_grad_hook(lambda p, total=total: keep(p, total))
    for _ in range(3):
        model(batch(5)).mean().backward()
    for p, total in zip(model.parameters(), kept, strict=True):
        p.grad = total
    optimizer.step()
    assert batch_sizes(optimizer) == [15]


def test_copies_and_pickles_count_nothing():
    """Neither in the counter of the original, nor in a copy of its optimizer."""
    model, optimizer, _ = setup()
    copied = {}
    copy.deepcopy(model, copied)
    assert id(model.last.weight) in copied
    assert id(optimizer) not in copied
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    for twin in twins:
        twin(batch(50)).mean().backward()
    model(batch(5)).mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [5]
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.step()
        assert batch_sizes(twin) == [5]


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models(inside):
    model = Net()
    optimizer = build("adamw", model.parameters())
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    BatchSizeCounter(model if inside else compiled, optimizer)
    for samples in (5, 3, 3):
        compiled(batch(samples)).mean().backward()
        optimizer.step()
        assert batch_sizes(optimizer) == [samples]
    assert backend.frame_count == 1  # whatever was counted


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_are_summed(tmp_path):
    """Two processes with unequal micro-batches; see _batch_size_rank.py."""
    ranks = [
        subprocess.Popen(
            [sys.executable, HELPERS / "batch_size_rank.py", str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=45)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(printed)
