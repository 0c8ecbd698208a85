"""TokenSquares on models that recompute, cast, are compiled, copied, shared or wrong."""

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
from helpers.token_squares import Block, Recorder, assert_near, by_row, token_loss
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rootfree_fused import IFShampoo, RootFreeShampoo
from rootfree_fused.micro import TokenSquares

HELPERS = Path(__file__).parent / "helpers"


def setup(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    return model, Recorder(model.parameters()), torch.randn(8, 3)


def loss(model, x):
    return model(x).pow(3).mean()


def squares_of(model, run):
    optimizer = Recorder(model.parameters())
    with TokenSquares(model, optimizer) as squares:
        run().backward()
        squares.accumulate()
    return optimizer.calls[0]["squares"]


@pytest.fixture
def plain():
    """What is right for `setup`, by position."""
    model, _, x = setup()
    got = squares_of(model, lambda: loss(model, x))
    return [got[p] for p in model.parameters()]


def assert_squares(optimizer, plain, call=0, factor=1):
    params = optimizer.param_groups[0]["params"]
    assert len(params) == len(plain)
    for p, want in zip(params, plain, strict=True):
        assert_near(optimizer.calls[call]["squares"][p], factor * want, 1e-6)


# Autograd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_counted_once_and_keeps_no_activation(plain, reentrant):
    model, optimizer, x = setup()
    seen = []
    model[1].register_forward_hook(lambda *args: seen.append(weakref.ref(args[2])))
    with TokenSquares(model, optimizer) as squares:
        value = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).pow(3).mean()
        assert seen[0]() is None
        value.backward()
        squares.accumulate()
    assert_squares(optimizer, plain)


def test_activations_go_with_the_backward():
    """While the loss is still held; and without one, with the output."""
    model, optimizer, x = setup()
    seen = []
    model[2].register_forward_hook(lambda *args: seen.append(weakref.ref(args[2])))
    with TokenSquares(model, optimizer) as squares:
        value = loss(model, x)
        assert seen[-1]() is not None
        value.backward()
        assert seen[-1]() is None
        squares.accumulate()
        value = loss(model, x)
        del value
        assert seen[-1]() is None
        with torch.no_grad():
            loss(model, x)
        assert seen[-1]() is None


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
        torch.autograd.grad(loss(model, leaf), leaf)
        torch.autograd.grad(loss(model, x), list(model.parameters()))
        loss(model, leaf).backward(inputs=[leaf])
        loss(model, x).backward()
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
    got = squares_of(model, lambda: loss(model, x))
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


# What has no squares ----------------------------------------------------------------------------


def test_parameters_of_other_modules_are_named():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"0\.weight is in a Conv1d, which is no Linear, Embedding"):
        TokenSquares(model, Recorder(model.parameters()))
    conv, rest = {"params": model[0].parameters(), "second_moment": "batch"}, model[2].parameters()
    optimizer = Recorder([conv, {"params": rest}])
    with TokenSquares(model, optimizer) as squares:
        model(torch.ones(5, 3, 1)).mean().backward()
        squares.accumulate()
    assert optimizer.calls[0]["squares"].keys() == set(model[2].parameters())


def test_a_subclass_with_a_forward_of_its_own_is_another_module():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="weight is in a Scaled"):
        TokenSquares(model := Scaled(3, 2), Recorder(model.parameters()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.compile(nn.Linear(3, 2)), TypeError, "the model is compiled"),
        (lambda: nn.DataParallel(nn.Linear(3, 2)), TypeError, "the model is a DataParallel"),
        (lambda: nn.Embedding(3, 2, sparse=True), ValueError, "weight is in an Embedding with"),
        (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), ValueError, "scale_grad_by_freq"),
    ],
)
def test_models_that_are_refused(make, error, message):
    model = make()
    with pytest.raises(error, match=message):
        TokenSquares(model, Recorder(model.parameters()))


def test_parameters_of_another_model_are_refused():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0, of shape \(2, 3\), is in no"):
        TokenSquares(model, Recorder(other.parameters()))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(nn.Linear(3, 2), mesh=mesh)
        with pytest.raises(TypeError, match="weight is a DTensor"):
            TokenSquares(model, Recorder(model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [IFShampoo, RootFreeShampoo])
def test_matrices_of_shampoos_have_no_squares(name):
    model, _, x = setup()
    settings = {"batch_size": 8} if name is IFShampoo else {}
    optimizer = name(model.parameters(), lr=0.1, **settings)
    optimizer.param_groups[0]["second_moment"] = "micro"
    calls = []
    optimizer.accumulate = lambda **given: calls.append(given)
    with TokenSquares(model, optimizer) as squares:
        loss(model, x).backward()
        squares.accumulate()
    assert calls[0]["squares"].keys() == {p for p in model.parameters() if p.ndim == 1}


def test_without_second_moments_gradients_are_accumulated_alone():
    model, optimizer, x = setup()
    optimizer.param_groups[0]["second_moment"] = "batch"
    with TokenSquares(model, optimizer) as squares:
        assert not any(m._forward_hooks for m in model.modules())
        loss(model, x).backward()
        squares.accumulate(terms=torch.tensor(5))
    assert optimizer.calls == [{"terms": 5.0}]


# Uses that no hook sees -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_head_that_is_a_function_of_the_lookup_is_noticed(seed):
    torch.manual_seed(seed)
    model = nn.Embedding(6, 4)
    tokens, targets = torch.randint(6, (2, 30))
    optimizer = Recorder(model.parameters())
    with TokenSquares(model, optimizer) as squares:
        F.cross_entropy(F.linear(model(tokens), model.weight), targets).backward()
        with pytest.raises(RuntimeError, match="another gradient than the calls of its module"):
            squares.accumulate()
    assert not optimizer.calls


def test_a_gradient_without_squares_is_named():
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        F.linear(model[2](model[0](x)), model[3].weight).mean().backward()
        with pytest.raises(RuntimeError, match=r"3\.weight has a gradient but no squares"):
            squares.accumulate()
    assert not optimizer.calls


def test_gradients_that_were_there_before_are_noticed(plain):
    model, optimizer, x = setup()
    loss(model, x).backward()
    with TokenSquares(model, optimizer) as squares:
        loss(model, x).backward()
        with pytest.raises(RuntimeError, match="was not zeroed"):
            squares.accumulate()
        optimizer.zero_grad()
        loss(model, x).backward()
        squares.accumulate()
    assert_squares(optimizer, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_another_gradient(dtype):
    """Nor a gradient that is 0 but for rounding, as of a bias before a softmax over tokens."""
    torch.manual_seed(0)
    model = Block(dim=32).to(dtype)
    tokens, targets = torch.randint(11, (2, 4, 64))
    got = squares_of(model, lambda: token_loss(model(tokens), targets))
    want = by_row(model.double(), lambda: token_loss(model(tokens), targets))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for p in model.parameters():
        assert_near(got[p], 256 * want[p][0].square().sum(0), tolerance)


def test_infinite_gradients_are_not_taken_for_others(plain):
    model, optimizer, x = setup()
    with TokenSquares(model, optimizer) as squares:
        (loss(model, x) * torch.inf).backward()
        squares.accumulate()
        assert not squares._checked
        loss(model, x).backward()
        squares.accumulate()
        assert len(squares._checked) == 6
    assert_squares(optimizer, plain, 1)


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
