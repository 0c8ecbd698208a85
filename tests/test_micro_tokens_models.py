"""TokenSquares on models that recompute, cast, are compiled, copied or data-parallel."""

from __future__ import annotations

import contextlib
import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers.token_squares import (
    Recorder,
    assert_near,
    assert_squares,
    loss,
    plain_squares,
    setup,
    squares_of,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from rootfree_fused.micro import TokenSquares

HELPERS = Path(__file__).parent / "helpers"


@pytest.fixture
def plain():
    return plain_squares()


def memory_of_outputs(module):
    """Of each call of a module: whether the memory of its output has gone."""
    seen = []
    module.register_forward_hook(
        lambda module, args, output: seen.append(StorageWeakRef(output.untyped_storage()))
    )
    return seen


# Autograd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_counted_once_and_keeps_no_activation(plain, reentrant):
    model, optimizer, x = setup()
    seen = memory_of_outputs(model[1])
    with TokenSquares(model, optimizer) as squares:
        value = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).pow(3).mean()
        assert seen[0].expired()
        value.backward()
        squares.accumulate()
    assert_squares(optimizer, plain)


def test_activations_go_with_the_backward():
    """While the loss is still held; and without one, with the output."""
    model, optimizer, x = setup()
    seen = memory_of_outputs(model[2])
    with TokenSquares(model, optimizer) as squares:
        value = loss(model, x)
        assert not seen[-1].expired()
        value.backward()
        assert seen[-1].expired()
        squares.accumulate()
        value = loss(model, x)
        del value
        assert seen[-1].expired()
        with torch.no_grad():
            loss(model, x)
        assert seen[-1].expired()


def test_a_graph_that_is_kept_can_be_run_again(plain):
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        value = loss(model, x)
        value.backward(retain_graph=True)
        squares.accumulate()
        value.backward()
        squares.accumulate()
        assert_squares(optimizer, plain, 0)
        assert_squares(optimizer, plain, 1)
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


def test_activations_are_written_to_where_autograd_allows_it(plain):
    """An output may be; an input that the backward needs may not."""
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        model[3](model[2](model[0](x).tanh_())).pow(3).mean().backward()
        squares.accumulate()
        assert_squares(optimizer, plain)
        hidden = model[0](x).tanh()
        output = model[3](hidden)
        hidden.data.zero_()  # which no version counter tells of
        hidden.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.mean().backward()


def test_only_what_is_added_to_grad_counts(plain):
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        leaf = x.clone().requires_grad_()
        loss(model, x).backward()
        torch.autograd.grad(loss(model, leaf), leaf)
        torch.autograd.grad(loss(model, x), list(model.parameters()))
        loss(model, leaf).backward(inputs=[leaf])
        squares.accumulate()
    assert_squares(optimizer, plain)
    assert optimizer.calls[0]["parts"] == 8


def test_gradients_of_gradients_are_refused():
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer), pytest.raises(RuntimeError, match="create_graph=True"):
        loss(model, x).backward(create_graph=True)


def test_squares_go_with_gradients_that_are_dropped(plain):
    """As after a backward that ran out of memory on the way."""
    model, optimizer, x = setup()

    def fail(grad):
        raise MemoryError

    with TokenSquares(model, optimizer) as squares:
        hidden = model[0](x)
        handle = hidden.register_hook(fail)
        with pytest.raises(MemoryError):
            model[1:](hidden).pow(3).mean().backward()
        handle.remove()
        optimizer.zero_grad()
        loss(model, x).backward()
        squares.accumulate()
    assert_squares(optimizer, plain)
    assert optimizer.calls[0]["parts"] == 8


def test_nothing_is_left_outside_the_with():
    model, optimizer, x = setup()
    squares = TokenSquares(model, optimizer)
    with contextlib.suppress(RuntimeError), squares:
        value = loss(model, x)
        loss(model, x).backward()
        model(x.T)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    value.backward()
    assert not squares._sums
    kept = weakref.ref(squares)
    del squares, value
    gc.collect()
    assert kept() is None


def test_it_can_be_entered_again_and_not_twice(plain):
    model, optimizer, x = setup()
    squares = TokenSquares(model, optimizer)
    for call in range(2):
        with squares:
            with pytest.raises(RuntimeError, match="entered already"):
                squares.__enter__()
            loss(model, x).backward()
            squares.accumulate()
        assert_squares(optimizer, plain, call)


# Models -----------------------------------------------------------------------------------------


def test_copies_of_a_model_count_nothing(plain):
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        twin = copy.deepcopy(model)
        loss(twin, x).backward()
        torch.func.functional_call(model, dict(twin.named_parameters()), (x,)).mean().backward()
        loss(model, x).backward()
        squares.accumulate()
    assert_squares(optimizer, plain)


def test_frozen_parameters_have_no_squares():
    model, optimizer, x = setup()
    got, _ = squares_of(model, lambda: loss(model, x))
    model[3].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    optimizer = Recorder(model.parameters())
    with TokenSquares(model, optimizer) as squares:
        loss(model, x).backward()
        squares.accumulate()
    found = optimizer.calls[0]["squares"]
    assert found.keys() == {p for p in model.parameters() if p.requires_grad}
    assert all(torch.equal(value, got[p]) for p, value in found.items())


def test_autocast_casts_an_input_once():
    """Its squares are those of what the product read, and one copy of it is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x, sizes = torch.randn(8, 3), []

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float().pow(3).mean()

    def pack(saved):
        sizes.append((saved.dtype, tuple(saved.shape), saved.data_ptr()))
        return saved

    expected = run()
    expected.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    optimizer = Recorder(model.parameters())
    with TokenSquares(model, optimizer) as squares:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            value = run()
        assert torch.equal(value, expected)
        inputs = [size for size in sizes if size[1] == (8, 3)]
        assert len(inputs) == 2
        assert inputs[0] == inputs[1]
        assert inputs[0][0] == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value.backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        delta = []
        squares.accumulate()
        hooked = model[0].register_forward_hook(
            lambda _, args, y: y.register_hook(lambda d: delta.append((args[0], d))) and None
        )
        run().backward()
        hooked.remove()
    (seen, d) = delta[0]
    want = 8 * d.double().square().mT @ seen.double().square()
    assert seen.dtype == torch.bfloat16
    assert_near(optimizer.calls[0]["squares"][model[0].weight], want, 1e-6)


def test_keyword_inputs(plain):
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        model[3](input=model[2](input=model[0](input=x).tanh())).pow(3).mean().backward()
        squares.accumulate()
    assert_squares(optimizer, plain)


def test_a_compiled_function_around_the_model(plain):
    """Compiled inside the with, it breaks at the hooks and is right."""
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        compiled = torch.compile(lambda x: loss(model, x), backend="aot_eager")
        for _ in range(2):
            compiled(x).backward()
            squares.accumulate()
    assert_squares(optimizer, plain, 1)


def test_float16_needs_a_scaler():
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        for scaled in (False, True):
            optimizer.param_groups[0]["amp_scaling"] = scaled
            with torch.autocast("cpu", dtype=torch.float16):
                value = loss(model, x)
            value.backward()
            if not scaled:
                with pytest.raises(TypeError, match="float16 in a group with amp_scaling=False"):
                    squares.accumulate()
                assert not optimizer.calls
                optimizer.zero_grad()
        squares.accumulate()
    assert len(optimizer.calls) == 1


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ranks_of_ddp(tmp_path):
    """Two processes; see helpers/token_squares_rank.py."""
    ranks = [
        subprocess.Popen(
            [sys.executable, HELPERS / "token_squares_rank.py", str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(printed)
