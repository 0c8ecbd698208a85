"""What TokenSquares refuses or leaves out, and uses of parameters that no hook sees."""

from __future__ import annotations

import pytest
import torch
from helpers.token_squares import (
    Block,
    Recorder,
    assert_near,
    assert_squares,
    by_row,
    loss,
    plain_squares,
    setup,
    squares_of,
    token_loss,
)
from torch import nn
from torch.nn import functional as F

from rootfree_fused.micro import TokenSquares


@pytest.fixture
def plain():
    return plain_squares()


def test_parameters_of_other_modules_are_named():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"0\.weight is in a Conv1d, which is no Linear, Embedding"):
        TokenSquares(model, Recorder(model.parameters()))
    model[0].requires_grad_(False)
    TokenSquares(model, Recorder(model.parameters()))
    model[0].requires_grad_(True)
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


def test_without_second_moments_gradients_are_accumulated_alone():
    model, optimizer, x = setup()
    optimizer.param_groups[0]["second_moment"] = "batch"
    with TokenSquares(model, optimizer) as squares:
        assert not any(m._forward_hooks for m in model.modules())
        loss(model, x).backward()
        squares.accumulate(terms=torch.tensor(5))
    assert optimizer.calls == [{"terms": 5.0}]


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
    torch.manual_seed(0)
    model = Block(dim=32).to(dtype)
    tokens, targets = torch.randint(11, (2, 4, 64))
    got, _ = squares_of(model, lambda: token_loss(model(tokens), targets))
    want = by_row(model.double(), lambda: token_loss(model(tokens), targets))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for p in model.parameters():
        assert_near(got[p], 256 * want[p][0].square().sum(0), tolerance)


def test_a_gradient_of_rounding_alone_is_not_taken_for_another(monkeypatch):
    """As that of a bias whose effect is subtracted: its parts cancel, in any order but one."""
    monkeypatch.setattr("rootfree_fused.row_squares._ROWS", 7)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))

    def run():
        y = model(torch.randn(500, 3))
        return (y - y.mean(0)).pow(3).mean()

    got, _ = squares_of(model, run)
    run().backward()
    assert model[1].bias.grad.norm() < 1e-5 * got[model[1].bias].sum().sqrt()


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
