"""Steps on squares of tokens, against steps on micro-batches of one token each."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.token_squares import assert_near
from torch import nn
from torch.nn import functional as F

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, Sign
from rootfree_fused.micro import TokenSquares

KINDS = ["batch", "micro", "variance", "mean"]
CLASSES = {"adamw": RootFreeAdamW, "rmsprop": RootFreeRMSprop}


def setup():
    """A model on tokens whose rows do not mix, and tokens with their targets."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.RMSNorm(5), nn.Linear(5, 3)
    ).double()
    return model, torch.randint(6, (24,)), torch.randint(3, (24,))


def steps(model, optimizer, micro_batches, accumulate):
    """What two steps change, by position."""
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for x, y in micro_batches:
            F.cross_entropy(model(x), y).backward()
            accumulate(x, y)
        optimizer.step()
    return [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]


def assert_equal_steps(settings, x, y, split, *, by_terms, cls=RootFreeAdamW, tolerance=1e-9):
    model, *_ = setup()
    twin = copy.deepcopy(model)
    by_one = cls(twin.parameters(), **settings)
    counted = [(a[None], b[None]) for a, b in zip(x, y, strict=True) if b >= 0]
    want = steps(twin, by_one, counted, lambda x, y: by_one.accumulate())
    optimizer = cls(model.parameters(), **settings)
    with TokenSquares(model, optimizer) as squares:
        pairs = list(zip(x.split(split), y.split(split), strict=True))
        got = steps(
            model,
            optimizer,
            pairs,
            lambda x, y: squares.accumulate((y >= 0).sum() if by_terms else None),
        )
    for change, expected in zip(got, want, strict=True):
        assert_near(change, expected, tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("by_terms", [False, True])
def test_tokens_are_micro_batches_of_one(kind, name, by_terms):
    """In micro-batches of unequal sizes, with terms= and by rows, which only squares tell."""
    _, x, y = setup()
    settings = {"lr": 0.01, "batch_size": 24, "second_moment": kind}
    split = (4, 12, 8) if by_terms or kind != "batch" else 8
    assert_equal_steps(settings, x, y, split, by_terms=by_terms, cls=CLASSES[name])


def test_ignored_tokens_are_none():
    """With terms= the mean is over those that count, and "micro" does not depend on the others."""
    _, x, y = setup()
    y[:3] = y[10:12] = y[20] = -100
    settings = {"lr": 0.01, "batch_size": 18, "second_moment": "micro"}
    assert_equal_steps(settings, x, y, (4, 12, 8), by_terms=True)


def test_groups_with_batch_beside_others():
    """A step on the mean for the one, on squares for the others."""
    model, x, y = setup()
    changes = {}
    for kind in ("batch", "micro", "mixed"):
        twin = copy.deepcopy(model)
        groups = [
            {"params": twin[0].parameters(), "second_moment": "batch"},
            {"params": twin[1:].parameters()},
        ]
        if kind != "mixed":
            groups[0]["second_moment"] = kind
        rest = "batch" if kind == "batch" else "micro"
        optimizer = RootFreeAdamW(groups, lr=0.01, batch_size=24, second_moment=rest)
        with TokenSquares(twin, optimizer) as squares:
            F.cross_entropy(twin(x), y).backward()
            squares.accumulate()
        optimizer.step()
        pairs = zip(twin.parameters(), model.parameters(), strict=True)
        changes[kind] = [p.detach() - old for p, old in pairs]
    mixed, micro, batch = (changes[kind] for kind in ("mixed", "micro", "batch"))
    assert torch.equal(mixed[0], batch[0])
    for own, by_squares, by_mean in zip(mixed[1:], micro[1:], batch[1:], strict=True):
        assert torch.equal(own, by_squares)
        assert not torch.equal(own, by_mean)


def test_vectors_of_ifshampoo_take_squares():
    model, x, y = setup()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": vectors, "second_moment": "micro"}, {"params": matrices}]
    optimizer = IFShampoo(groups, lr=0.01, batch_size=24)
    with TokenSquares(model, optimizer) as squares:
        F.cross_entropy(model(x), y).backward()
        assert squares._sums.keys() == set(vectors)
        squares.accumulate()
    optimizer.step()


def test_signs_of_micro_batches_take_no_squares():
    model, x, y = setup()
    optimizer = Sign(model.parameters(), lr=0.01, sign="micro")
    with TokenSquares(model, optimizer) as squares:
        F.cross_entropy(model(x), y).backward()
        assert not squares._sums
        squares.accumulate()
    optimizer.step()


@pytest.mark.parametrize("infinite", [False, True])
def test_a_gradient_scaler(infinite):
    """Squares have its scale twice; an inf in one micro-batch leaves every bit."""
    model, x, y = setup()
    model.float()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    settings = {"lr": 0.01, "batch_size": 24, "second_moment": "micro"}
    optimizer = RootFreeAdamW(model.parameters(), amp_scaling=True, **settings)
    plain = RootFreeAdamW(twin.parameters(), **settings)
    with TokenSquares(model, optimizer) as squares, TokenSquares(twin, plain) as own:
        for i, (a, b) in enumerate(zip(x.split(8), y.split(8), strict=True)):
            loss = F.cross_entropy(model(a), b)
            scaler.scale(loss * torch.inf if infinite and i == 1 else loss).backward()
            squares.accumulate()
            F.cross_entropy(twin(a), b).backward()
            own.accumulate()
        optimizer.accumulated_grads()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    for p, q, old in zip(model.parameters(), twin.parameters(), before, strict=True):
        if infinite:
            assert torch.equal(p, old)
        else:
            assert_near(p.detach() - old, q.detach() - old, 1e-5)


def test_many_backwards_end_in_the_bits_of_the_same_run():
    """Nothing of one step is in the next: as a run in which each step has its own TokenSquares."""
    results = []
    for again in (False, True):
        model, x, y = setup()
        optimizer = RootFreeAdamW(model.parameters(), batch_size=24, second_moment="variance")
        squares = TokenSquares(model, optimizer)
        for _ in range(4):
            squares = TokenSquares(model, optimizer) if again else squares
            with squares:
                F.cross_entropy(model(x), y).backward()
                squares.accumulate()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
