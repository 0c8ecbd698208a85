"""TokenSquares against gradients of examples and of rows that are computed one by one."""

from __future__ import annotations

import pytest
import torch
from helpers.token_squares import (
    Block,
    Recorder,
    assert_near,
    by_example,
    by_row,
    squares_of,
    token_loss,
)
from torch import nn
from torch.nn import functional as F

from rootfree_fused.micro import TokenSquares

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def mean_of_squares(calls, parts):
    """Of the parts of each row of each call, as many in all, the others 0."""
    return sum((parts * part).double().square().sum(0) for part in calls) / parts


def assert_by_row(model, run, rows, tolerance=1e-6):
    got, parts = squares_of(model, run)
    assert parts == rows
    expected = by_row(model, run)
    assert got.keys() == set(model.parameters())
    for p in model.parameters():
        assert_near(got[p], mean_of_squares(expected[p], parts), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["LayerNorm", "LayerNorm without bias", "RMSNorm"])
def test_an_mlp_has_the_squares_of_each_examples_gradient(dtype, bias, norm):
    torch.manual_seed(0)
    norms = {
        "LayerNorm": nn.LayerNorm(11, eps=1e-3),
        "LayerNorm without bias": nn.LayerNorm(11, bias=False),
        "RMSNorm": nn.RMSNorm(11),
    }
    model = nn.Sequential(
        nn.Linear(7, 11, bias=bias), nn.GELU(), norms[norm], nn.Linear(11, 5, bias=bias)
    ).to(dtype)
    for p in model.parameters():
        nn.init.normal_(p)
    x, y = torch.randn(32, 7, dtype=dtype), torch.randint(5, (32,))
    got, parts = squares_of(model, lambda: F.cross_entropy(model(x), y))
    assert parts == 32
    expected = by_example(model, F.cross_entropy, x, y)
    for name, p in model.named_parameters():
        assert got[p].dtype == dtype
        assert_near(got[p], expected[name].square().mean(0), TOLERANCE[dtype])


@pytest.mark.parametrize("padding", [None, 3])
def test_lookups_without_attention_have_the_squares_of_each_tokens_gradient(padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=padding), nn.Tanh(), nn.Linear(4, 5))
    x, y = torch.randint(6, (40,)), torch.randint(5, (40,))
    assert (x == 3).any()
    got, _ = squares_of(model, lambda: F.cross_entropy(model(x), y))
    expected = by_example(model, F.cross_entropy, x, y)
    for name, p in model.named_parameters():
        assert_near(got[p], expected[name].square().mean(0), 1e-6)
    assert (got[model[0].weight][3] == 0).all() == (padding == 3)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_transformer_block_has_the_squares_of_each_rows_part(norm, bias):
    torch.manual_seed(0)
    model = Block(norm=norm, bias=bias, padding=2)
    tokens, targets = torch.randint(11, (2, 3, 6))
    assert_by_row(model, lambda: token_loss(model(tokens), targets), rows=18)


def test_rows_of_attention_are_not_terms():
    """A row's part has what later terms send back through it; the head's rows do not mix."""
    torch.manual_seed(0)
    model = Block().double()
    tokens, targets = torch.randint(11, (2, 1, 6))
    got, parts = squares_of(model, lambda: token_loss(model(tokens), targets))
    by_term = {p: torch.zeros_like(p) for p in model.parameters()}
    for term in range(6):
        loss = F.cross_entropy(model(tokens)[:, term], targets[:, term])
        for p, g in zip(by_term, torch.autograd.grad(loss, list(by_term)), strict=True):
            by_term[p] += g.square() / parts
    assert_near(got[model.head.weight], by_term[model.head.weight], 1e-14)
    off = (got[model.qkv.weight] - by_term[model.qkv.weight]).norm()
    assert off > 0.1 * by_term[model.qkv.weight].norm()


def test_ignored_rows_add_nothing():
    """Of R rows B count: the mean over R of (R part)^2 is R / B of the mean over the B terms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, y = torch.randn(20, 3).double(), torch.randint(5, (20,))
    y[8:] = -100
    got, parts = squares_of(model, lambda: F.cross_entropy(model(x), y))
    assert parts == 20
    expected = by_example(model, F.cross_entropy, x[:8], y[:8])
    for name, p in model.named_parameters():
        assert_near(got[p], 20 / 8 * expected[name].square().mean(0), 1e-14)


def test_tied_weights_have_a_part_for_each_row_of_each_use():
    """What the products of a position's two parts would add is left out, and bounded."""
    torch.manual_seed(0)
    model = Block(tied=True).double()
    tokens, targets = torch.randint(11, (2, 3, 6))

    def run():
        return token_loss(model(tokens), targets)

    assert_by_row(model, run, rows=36, tolerance=1e-14)
    got, parts = squares_of(model, run)
    lookup, head = by_row(model, run)[model.head.weight]
    of_positions = (parts * (lookup + head)).square().sum(0) / parts
    cross = 2 * parts * (lookup * head).sum(0)
    tied = got[model.head.weight]
    assert_near(tied + cross, of_positions, 1e-14)
    assert cross.abs().max() > 1e-3 * tied.max()
    assert (tied >= of_positions / 2 * (1 - 1e-14)).all()


def test_a_module_that_is_called_twice_has_parts_of_both_calls():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    x = torch.randn(10, 4).double()
    assert_by_row(model, lambda: model(model(x)).pow(3).mean(), rows=20, tolerance=1e-14)


def test_rows_need_not_agree():
    """Tokens below, examples above: the parts of either add up to its gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 6, 4).double()

    def run():
        return model[1](model[0](x).tanh().mean(1)).square().mean()

    assert_by_row(model, run, rows=30, tolerance=1e-14)


def test_the_gradient_is_the_mean_of_the_parts_and_the_squares_no_less_than_its_own():
    torch.manual_seed(0)
    model = Block(tied=True).double()
    tokens, targets = torch.randint(11, (2, 3, 6))

    def run():
        return token_loss(model(tokens), targets)

    got, _ = squares_of(model, run)
    run().backward()
    for p, calls in by_row(model, run).items():
        g = p.grad
        assert_near(sum(part.sum(0) for part in calls), g, 1e-12)
        assert (got[p] >= g.square() * (1 - 1e-12)).all()


def test_many_rows_are_squared_in_pieces(monkeypatch):
    monkeypatch.setattr("rootfree_fused.row_squares._ROWS", 4)
    torch.manual_seed(0)
    model = Block(padding=2).double()
    tokens, targets = torch.randint(11, (2, 3, 6))
    assert_by_row(model, lambda: token_loss(model(tokens), targets), rows=18, tolerance=1e-13)


def test_inputs_without_rows_and_norms_of_several_axes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)), nn.LayerNorm((2, 3))).double()
    x = torch.randn(5, 4).double()
    assert_by_row(model, lambda: model(x).pow(3).mean(), rows=5, tolerance=1e-14)
    linear = nn.Linear(4, 6).double()
    assert_by_row(linear, lambda: linear(x[0]).square().mean(), rows=1, tolerance=1e-14)


def test_several_backwards_before_accumulate_are_one():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(12, 3).double()
    whole, parts = squares_of(model, lambda: model(x).square().sum())
    optimizer = Recorder(model.parameters())
    with TokenSquares(model, optimizer) as squares:
        for part in x.split((4, 8)):
            model(part).square().sum().backward()
        squares.accumulate(12)
    (call,) = optimizer.calls
    assert call["parts"] == parts == 12
    assert call["terms"] == 12
    for p in model.parameters():
        assert_near(call["squares"][p], whole[p], 1e-14)


def test_scales_of_losses_are_in_the_squares():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    plain, _ = squares_of(model, lambda: model(x).square().mean())
    scaled, _ = squares_of(model, lambda: 2.0**10 * model(x).square().mean())
    for p in model.parameters():
        assert torch.equal(scaled[p], 2.0**20 * plain[p])


def test_bfloat16_is_squared_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    x, y = torch.randn(64, 3).bfloat16(), torch.randn(64, 2).bfloat16()
    got, _ = squares_of(model, lambda: (model(x) * y).sum())  # delta is y
    want = 64 * y.double().square().mT @ x.double().square()
    assert got[model.weight].dtype == torch.float32
    assert_near(got[model.weight], want, 1e-6)
