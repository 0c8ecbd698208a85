"""Micro-batches: what `accumulate` takes is what a step takes, for every class and dtype."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers.micro_batches import F32, F64, SHAPES, backward, gradients, mean_of, set_mean, take
from helpers.optimizers import DIAGONAL, SETTINGS, assert_identical, build, parameters, snapshot

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop
from rootfree_fused.optimizer import parts
from rootfree_fused.reference import SquareWeights

BF16 = torch.bfloat16
SQUARED = [name for name in DIAGONAL if name.startswith(("rmsprop", "adamw"))]
every_optimizer = pytest.mark.parametrize("name", SETTINGS)


# A step on what was accumulated ---------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("terms", [None, (64, 32, 5)])
def test_the_step_is_one_on_the_mean_gradient(name, terms, device):
    params, twins = (parameters(*SHAPES, dtype=F64, device=device) for _ in range(2))
    precise = {"factor_dtype": F64} if "shampoo" in name else {}
    one, whole = build(name, params, **precise), build(name, twins, **precise)
    for t in range(3):
        grads = [[g.to(device) for g in own] for own in gradients(3, seed=t)]
        take(one, params, grads, terms)
        assert all(p.grad is None for p in params)
        one.step()
        assert all(p.grad is None for p in params)
        set_mean(twins, mean_of(grads, terms))
        whole.step()
    for a, b in zip(snapshot(one, params), snapshot(whole, twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@every_optimizer
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_add_up_in_float32(name, dtype, device):
    """Four micro-batches, so that dividing is exact: to the bit, in bfloat16 too."""
    params, twins = (parameters(*SHAPES, dtype=dtype, device=device) for _ in range(2))
    one, whole = build(name, params), build(name, twins)
    for t in range(3):
        grads = [[g.to(device) for g in own] for own in gradients(4, dtype, seed=t)]
        take(one, params, grads)
        one.step()
        assert all(p.grad_dtype == dtype for p in params)
        added = [
            ((a.float() + b.float()) + c.float()) + d.float()
            for a, b, c, d in zip(*grads, strict=True)
        ]
        set_mean(twins, [g / 4 for g in added])
        whole.step()
    assert_identical(snapshot(one, params), snapshot(whole, twins))


def test_bfloat16_alone_would_lose_what_is_added(device):
    """256 + 0.5 is 256 in bfloat16; the mean of 257 micro-batches is not 1 either way."""
    (p,) = parameters((1,), dtype=BF16, device=device)
    optimizer = RootFreeRMSprop([p], batch_size=1)
    for _ in range(257):
        p.grad = torch.ones(1, dtype=BF16, device=device)
        optimizer.accumulate()
    assert optimizer.accumulated_grads()[0].item() == 1.0


def test_a_missing_gradient_counts_as_zero(device):
    params, twins = (parameters((4,), (3,), dtype=F64, device=device) for _ in range(2))
    one, whole = (RootFreeRMSprop(ps, batch_size=8) for ps in (params, twins))
    a, b = gradients(2, shapes=[(4,), (3,)])
    a, b = [[g.to(device) for g in own] for own in (a, b)]
    backward(params, [a[0], None])
    one.accumulate()
    backward(params, [b[0], b[1]])
    one.accumulate()
    one.step()
    set_mean(twins, [(a[0] + b[0]) / 2, b[1] / 2])
    whole.step()
    for x, y in zip(params, twins, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-15)


def test_a_parameter_without_any_gradient_is_not_stepped(device):
    params = parameters((4,), (3,), device=device)
    optimizer = RootFreeAdamW(params, batch_size=8)
    take(optimizer, params, [[torch.ones(4, device=device), torch.ones(3, device=device)]])
    optimizer.step()
    before = [t.clone() for t in (params[1], *optimizer.state[params[1]].values())]
    backward(params, [torch.ones(4, device=device), None])
    optimizer.accumulate()
    optimizer.step()
    assert_identical([params[1], *optimizer.state[params[1]].values()], before)


# Second moments of micro-batches --------------------------------------------------------------


def target_of(kind, grads, weights, batch_size):
    """The four equations, of one parameter."""
    total, k = sum(weights), len(grads)
    b = batch_size / k
    g = sum(w * x for w, x in zip(weights, grads, strict=True)) / total
    q = sum((w * x) ** 2 for w, x in zip(weights, grads, strict=True)) / total**2 * k
    if kind == "micro":
        return b * q
    if kind == "variance":
        return (b * (q - g**2) * k / (k - 1)).clamp_min(0)
    return torch.maximum(batch_size * (k * g**2 - q) / (k - 1), batch_size * g**2 / k)


@pytest.mark.parametrize("name", SQUARED)
@pytest.mark.parametrize("kind", ["micro", "variance", "mean"])
@pytest.mark.parametrize("terms", [None, (64, 32, 5)])
def test_s_follows_the_target(name, kind, terms, device):
    """With alpha or beta2 0 the second moment is the target itself."""
    decay = {"alpha": 0.0} if name.startswith("rmsprop") else {"betas": (0.9, 0.0)}
    params = parameters(*SHAPES, dtype=F64, device=device)
    optimizer = build(name, params, second_moment=kind, **decay)
    for t in range(2):  # the second on known tensors
        grads = gradients(3, seed=t)
        take(optimizer, params, [[g.to(device) for g in own] for own in grads], terms)
        optimizer.step()
        for p, own in zip(params, zip(*grads, strict=True), strict=True):
            state = optimizer.state[p]
            s = state["square_avg" if "square_avg" in state else "exp_avg_sq"]
            expected = target_of(kind, own, terms or (1, 1, 1), 8)
            torch.testing.assert_close(s.cpu(), expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", SQUARED)
def test_one_micro_batch_is_the_batch(name, device):
    params, twins = (parameters(*SHAPES, device=device) for _ in range(2))
    micro, batch = build(name, params, second_moment="micro"), build(name, twins)
    for t in range(3):
        (grads,) = gradients(1, F32, seed=t)
        take(micro, params, [[g.to(device) for g in grads]])
        micro.step()
        set_mean(twins, [g.to(device) for g in grads])
        batch.step()
    for a, b in zip(snapshot(micro, params), snapshot(batch, twins), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("formats", [{"param_residual": 8, "state_format": "8bit"}], ids=str)
@pytest.mark.parametrize("kind", ["micro", "variance", "mean"])
def test_in_fewer_bytes_too(formats, kind, device):
    """Near the float32 optimizer: s is rounded to three bits."""
    shape = [(64, 128)]
    params = parameters(*shape, dtype=BF16, device=device)
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    settings = {"batch_size": 8, "betas": (0.0, 0.0), "second_moment": kind, "lr": 1e-2}
    narrow = RootFreeAdamW(params, **settings, **formats)
    wide = RootFreeAdamW(twins, **settings)
    for t in range(2):
        grads = [[g.to(device) for g in own] for own in gradients(4, BF16, t, shape)]
        take(narrow, params, grads)
        narrow.step()
        take(wide, twins, [[g.float() for g in own] for own in grads])
        wide.step()
    moved = (twins[0] - parameters(*shape, dtype=BF16, device=device)[0].float()).norm()
    assert (params[0].float() - twins[0]).norm() < 0.1 * moved


def test_vectors_beside_matrices_take_their_kind(device):
    params, twins = (parameters((6, 5), (7,), dtype=F64, device=device) for _ in range(2))
    groups = [{"params": params[:1]}, {"params": params[1:], "second_moment": "micro"}]
    mixed = IFShampoo(groups, batch_size=8, factor_dtype=F64)
    alone = RootFreeRMSprop(twins[1:], batch_size=8, second_moment="micro")
    shared = alone.defaults.keys() & mixed.defaults.keys() - {"second_moment"}
    alone.param_groups[0].update({key: mixed.defaults[key] for key in shared})
    alone.param_groups[0]["alpha"] = mixed.defaults["alpha"]
    for t in range(3):
        grads = [[g.to(device) for g in own] for own in gradients(3, F64, t, [(6, 5), (7,)])]
        take(mixed, params, grads)
        mixed.step()
        take(alone, twins[1:], [own[1:] for own in grads])
        alone.step()
    assert torch.equal(params[1], twins[1])


# Other ways in --------------------------------------------------------------------------------


@every_optimizer
def test_hooks_take_gradients_as_they_come(name):
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))]
    models.append(copy.deepcopy(models[0]))
    one, other = (build(name, list(model.parameters())) for model in models)
    handle = one.accumulate_in_backward()
    for t in range(3):
        for micro in torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(t)):
            for model in models:
                model(micro).square().mean().backward()
            assert all(p.grad is None for p in models[0].parameters())
            other.accumulate()
        one.step()
        other.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"accumulate_in_backward\(\) takes the gradients"):
        one.accumulate()
    with pytest.raises(RuntimeError, match="was called already"):
        one.accumulate_in_backward()
    handle.remove()
    models[0](torch.ones(1, 6)).sum().backward()
    assert all(p.grad is not None for p in models[0].parameters())
    one.accumulate()
    one.step()


def test_hooks_keep_no_optimizer_alive():
    (p,) = parameters((3,))
    optimizer = RootFreeRMSprop([p], batch_size=1)
    optimizer.accumulate_in_backward()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    p.sum().backward()
    assert p.grad is not None


@pytest.mark.parametrize("name", ["rmsprop-momentum", "ifshampoo"])
def test_a_compiled_step_takes_what_was_accumulated(name):
    params, twins = (parameters((7, 5), (11,)) for _ in range(2))
    one, plain = build(name, params), build(name, twins)
    compiled = torch.compile(one.step, backend="eager")
    for t in range(3):
        grads = gradients(2, F32, t, [(7, 5), (11,)])
        take(one, params, grads)
        compiled()
        take(plain, twins, grads)
        plain.step()
    assert_identical(snapshot(one, params), snapshot(plain, twins))


@every_optimizer
def test_buffers_are_made_once_and_steps_are_known(name, monkeypatch):
    params = parameters(*SHAPES)
    optimizer = build(name, params)
    for t in range(5):
        if t == 4:  # by then each kind of step has been prepared
            monkeypatch.setattr(parts, "_like", None)
            monkeypatch.setattr(optimizer, "_build", None)
            monkeypatch.setattr(optimizer, "_checked_one", None)
        take(optimizer, params, gradients(2, F32, seed=t))
        optimizer.step()


def test_a_step_without_micro_batches_goes_on_as_before(device):
    """In turn: the plan of one kind is never taken for the other."""
    params, twins = (parameters(*SHAPES, dtype=F64, device=device) for _ in range(2))
    micro, plain = (
        RootFreeRMSprop(ps, batch_size=8, second_moment=kind, alpha=0.5)
        for ps, kind in ((params, "micro"), (twins, "batch"))
    )
    for t in range(6):
        grads = [[g.to(device) for g in own] for own in gradients(2, seed=t)]
        set_mean(twins, mean_of(grads))
        plain.step()
        if t % 2:
            take(micro, params, grads)
        else:
            set_mean(params, mean_of(grads))
        micro.step()
        micro.zero_grad()
        if t == 0:
            assert_identical(snapshot(micro, params), snapshot(plain, twins))
    assert not torch.equal(params[0], twins[0])


@pytest.mark.parametrize(
    ("name", "setting"),
    [("rmsprop", "second_moment"), ("adamw", "second_moment"), ("sign", "sign")],
)
def test_what_is_taken_of_micro_batches_may_change_between_steps(name, setting, device):
    """Buffers are then made anew, and no step that was prepared for the others is found."""
    params, twins = (parameters(*SHAPES, dtype=F64, device=device) for _ in range(2))
    one, saved = build(name, params), None
    for t, kind in enumerate(("micro", "batch", "micro", "batch", "micro")):
        one.param_groups[0][setting] = kind
        fresh = build(name, twins)
        if saved is not None:
            fresh.load_state_dict(saved)
        fresh.param_groups[0][setting] = kind
        grads = [[g.to(device) for g in own] for own in gradients(2, seed=t)]
        for optimizer, own in ((one, params), (fresh, twins)):
            take(optimizer, own, grads)
            optimizer.step()
        saved = fresh.state_dict()
        assert_identical(snapshot(one, params), snapshot(fresh, twins))


def test_channels_last_and_expanded_gradients(device):
    weight = torch.randn(4, 3, 2, 2, dtype=F64, device=device)
    params = [
        torch.nn.Parameter(weight.clone().to(memory_format=torch.channels_last)),
        torch.nn.Parameter(weight.clone()),
    ]
    optimizers = [RootFreeRMSprop([p], batch_size=8, second_moment="micro") for p in params]
    for t in range(2):
        grads = [own[0].to(device) for own in gradients(2, F64, t, [(4, 3, 2, 2)])]
        grads.append(torch.tensor(0.1, dtype=F64, device=device).expand(4, 3, 2, 2))
        for p, optimizer in zip(params, optimizers, strict=True):
            for g in grads:
                p.grad = g
                optimizer.accumulate()
            optimizer.step()
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*params, rtol=0, atol=1e-15)


def test_a_checkpoint_from_before_has_the_batch():
    params = parameters((3,))
    optimizer = RootFreeRMSprop(params, batch_size=8)
    take(optimizer, params, [[torch.ones(3)]])
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["second_moment"]
    other = RootFreeRMSprop(parameters((3,)), batch_size=8, second_moment="micro")
    other.load_state_dict(saved)
    assert other.param_groups[0]["second_moment"] == "batch"


def test_weights_are_named_in_the_order_of_the_operator():
    assert SquareWeights._fields == ("square", "signal", "floor")
