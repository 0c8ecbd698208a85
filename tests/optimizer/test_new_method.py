"""A diagonal method is added as docs/architecture.md says: one declaration, one class, one kernel.

Root-free Adagrad (helpers/adagrad.py) is on no list of the package: what works of it works because
of its declaration.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path

import pytest
import torch
from helpers.adagrad import ADAGRAD, RootFreeAdagrad
from helpers.comparison import assert_bits_equal

from rootfree_fused import convert
from rootfree_fused.ops import dispatch, schemas
from rootfree_fused.ops.methods import METHODS

SETTINGS = {"lr": 0.03, "damping": 1e-2, "weight_decay": 0.1, "batch_size": 4, "maximize": True}


@pytest.fixture(autouse=True, scope="module")
def operator():
    schemas.register(ADAGRAD)
    yield
    del METHODS[ADAGRAD.name]


def test_a_name_is_taken_once():
    before = dict(METHODS)
    with pytest.raises(ValueError, match="there is a method rmsprop_ already"):
        schemas.register(dataclasses.replace(ADAGRAD, name="rmsprop_"))
    assert before == METHODS


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "adagrad"}, "'adagrad' must end in _"),
        ({"name": "ada grad_"}, "'ada grad_' must end in _"),
        ({"states": {"square sum": 0.0}}, "the state 'square sum' of 0.0; name it"),
        ({"states": {"step": 0.0}}, "the state 'step' of 0.0; name it otherwise than step"),
        ({"states": {"square_sum": "one"}}, "of 'one'; .* fill it with a float or SECOND_MOMENT"),
        ({"states": {"square_sum": 0.0, "other": 0.0}}, "takes other .*: too many positional"),
        ({"states": {}}, "takes other .*: missing .*'square_sum'"),
        ({"counts": True}, "takes other .*: too many positional"),
        ({"numbers": ("damping", "damping", "weight_decay")}, "twice"),
        ({"numbers": ("damping", "wieght_decay")}, r"\['wieght_decay'\] as numbers; give them"),
        ({"numbers": ("damping", "weight_decay", "capturable")}, r"\['capturable'\] as numbers"),
        ({"numbers": ("damping", "weight_decay", "betas")}, r"\['betas'\] as numbers"),
        ({"numbers": ("damping",)}, "takes other .*: missing .*'weight_decay'"),
        ({"numbers": ("damping", "weight_decay", "alpha")}, "takes other .*unexpected .*'alpha'"),
        ({"switches": ("maximize", "alpha")}, r"\['alpha'\] as switches"),
    ],
)
def test_a_declaration_that_no_step_could_follow_is_refused_where_it_is_made(entry, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ADAGRAD, **entry)


def test_it_takes_fewer_than_60_lines():
    lines = (Path(__file__).parents[1] / "helpers" / "adagrad.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 60


def parameters(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    shapes = [(7, 3), (5,), (), (1500,)]
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]


def train(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for _ in range(steps):
        grads.append([torch.randn(p.shape, generator=generator).to(p) for p in params])
        for p, g in zip(params, grads[-1], strict=True):
            p.grad = g.clone()
        optimizer.step()
    return grads


def specified(params, grads, sums):
    """The equations by hand, in float64."""
    for step in grads:
        for p, g, s in zip(params, step, sums, strict=True):
            s += SETTINGS["batch_size"] * g.double() ** 2
            p *= 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
            p += SETTINGS["lr"] * g.double() / (s + SETTINGS["damping"])


def test_it_trains_saves_loads_and_copies():
    params = parameters()
    expected = [p.detach().clone() for p in params]
    optimizer = RootFreeAdagrad(params, initial_square_avg=0.5, **SETTINGS)
    specified(expected, train(optimizer, params, 4), [torch.full_like(p, 0.5) for p in params])
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-13, atol=1e-13)
    assert set(optimizer.state[params[0]]) == {"step", "square_sum"}

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = RootFreeAdagrad(twins, initial_square_avg=0.5, **SETTINGS)
    twin.load_state_dict(torch.load(file, weights_only=True))
    both = copy.deepcopy((optimizer, params))
    for each, own in ((optimizer, params), (twin, twins), both):
        train(each, own, 2, seed=2)
    assert_bits_equal([p.detach() for p in twins], [p.detach() for p in params])
    assert_bits_equal([p.detach() for p in both[1]], [p.detach() for p in params])


def test_it_starts_from_its_first_gradient():
    params = parameters()
    optimizer = RootFreeAdagrad(params, **SETTINGS)
    assert not any(optimizer.state[p]["square_sum"].any() for p in params)
    ((first, *_),) = train(optimizer, params, 1)
    expected = SETTINGS["batch_size"] * (first**2 + (first**2).mean())
    torch.testing.assert_close(optimizer.state[params[0]]["square_sum"], expected)


def test_bad_input_is_refused_as_for_the_others():
    params = parameters()
    with pytest.raises(TypeError, match=r"RootFreeAdagrad has no argument 'eps'; damping replaces"):
        RootFreeAdagrad(params, eps=1e-8, **SETTINGS)
    optimizer = RootFreeAdagrad(params, initial_square_avg=1.0, **SETTINGS)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["square_sum"][0, 0] = -1.0
    with pytest.raises(ValueError, match=r"square_sum holds -1\.0, where no square can be negat"):
        optimizer.load_state_dict(saved)
    with pytest.raises(TypeError, match="RootFreeAdagrad"):
        convert.from_released_code(optimizer.state_dict(), optimizer)


def test_its_kernel_in_triton(device, request, monkeypatch):
    pytest.importorskip("triton")
    from helpers.adagrad_kernel import BODY
    from helpers.offline import on_its_device

    from rootfree_fused.kernels import diag

    monkeypatch.setattr(dispatch, "triton_serves", lambda param: True)
    monkeypatch.setitem(diag.BODIES, ADAGRAD.name, BODY)
    with on_its_device(request):
        launched, launch = [], diag.launch
        monkeypatch.setattr(diag, "launch", lambda *a, **k: launched.append(launch(*a, **k)))
        params = parameters(torch.float32, device)
        expected = [p.detach().double() for p in params]
        optimizer = RootFreeAdagrad(params, initial_square_avg=0.5, **SETTINGS)
        grads = train(optimizer, params, 3)
    assert len(launched) == 3
    specified(expected, grads, [torch.full_like(p, 0.5) for p in expected])
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-6, atol=1e-6)
