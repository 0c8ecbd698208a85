"""Settings: whose numbers are taken, which are refused, and what a schedule counts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from rootfree_fused import (
    IFShampoo,
    RootFreeAdamW,
    RootFreeRMSprop,
    RootFreeShampoo,
    ops,
    reference,
)

CLASSES = [RootFreeRMSprop, RootFreeAdamW, IFShampoo, RootFreeShampoo]
KINDS = {
    "float32": np.float32,
    "float64": np.float64,
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
    "fraction": lambda x: Fraction(x) if isinstance(x, float) else x,
}


def param(value=1.0):
    p = nn.Parameter(torch.full((4, 3), value))
    p.grad = torch.linspace(-1, 1, 12).reshape(4, 3)
    return p


def accepted(cls, settings):
    """The settings without those that RootFreeShampoo has not."""
    return {k: v for k, v in settings.items() if k != "batch_size" or cls is not RootFreeShampoo}


# Whose numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", CLASSES)
def test_other_numbers_are_taken_as_pythons(cls, kind):
    """In the constructor, a group, a changed group and a load; they are saved as Python's own."""
    values = {"lr": 0.25, "damping": 0.125, "weight_decay": 0.5, "batch_size": 8.0}
    values, choices = accepted(cls, values), {"maximize": True}
    if cls in (RootFreeAdamW, RootFreeShampoo):
        values["betas"] = (0.5, 0.75)
    if cls is RootFreeShampoo:
        values |= {"update_rms": 0.5, "row_beta": 0.75, "vector_beta2": 0.5, "vector_rms": 2.0}
        choices["update_interval"] = 2
    if cls is IFShampoo:
        values |= {"factor_lr": 0.5, "momentum": 0.5, "max_update": 4.0}
        choices["update_interval"] = 2
    number = KINDS[kind]
    others = {k: number(v) if k != "betas" else [number(b) for b in v] for k, v in values.items()}
    wrapped = np.array if kind == "0-d array" else torch.tensor
    others |= {k: wrapped(v) for k, v in choices.items()}
    if kind == "0-d tensor":
        others["lr"] = values["lr"]  # a tensor lr is read where it is
    plain = {**values, **choices}

    by_hand = cls([param()], **plain)
    built, grouped, changed = (
        cls([param()], **others),
        cls([{"params": [param()], **others}]),
        cls([param()], **accepted(cls, {"batch_size": 1})),
    )
    changed.param_groups[0].update(others)
    loaded = cls([param()], **accepted(cls, {"batch_size": 1}))
    state_dict = by_hand.state_dict()
    state_dict["param_groups"][0].update(others)
    loaded.load_state_dict(state_dict)
    for optimizer in (by_hand, built, grouped, changed, loaded):
        for _ in range(3):
            optimizer.step()
        saved = optimizer.state_dict()["param_groups"][0]
        for key, value in plain.items():
            assert saved[key] == value, key
            for found in saved[key] if key == "betas" else [saved[key]]:
                assert type(found) in (bool, int, float), key
        own, expected = optimizer.param_groups[0]["params"], by_hand.param_groups[0]["params"]
        assert torch.equal(own[0], expected[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_scheduler_may_compute_in_numpy(cls):
    settings = accepted(cls, {"lr": 0.5, "batch_size": 8})
    optimizers = [cls([param()], **settings) for _ in range(2)]
    rules = lambda k: np.float32(0.5) ** np.float32(k), lambda k: 0.5**k
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, rule)
        for o, rule in zip(optimizers, rules, strict=True)
    ]
    for _ in range(3):
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in optimizers))


def test_the_functions_take_them_too():
    results = []
    for number in (float, np.float32, torch.tensor):
        p, s = param(), torch.ones(4, 3)
        settings = {"lr": 0.5, "alpha": 0.5, "damping": 0.25, "batch_size": 8.0}
        settings = {key: number(value) for key, value in settings.items()}
        ops.rmsprop_([p.data], [p.grad], [s], **settings)
        m, v = torch.zeros(4, 3), torch.ones(4, 3)
        del settings["alpha"]
        betas = (number(0.5), number(0.75))
        ops.adamw_([p.data], [p.grad], [m], [v], betas=betas, **settings)
        results.append(p.data)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [np.ones(3), torch.ones(3), torch.ones((), device="meta")])
def test_what_is_no_number_has_its_cure(value):
    with pytest.raises(TypeError, match=r"batch_size is .*\.item\(\) makes a number"):
        RootFreeAdamW([param()], batch_size=value)


# Which are refused


@pytest.mark.parametrize("value", [1e39, 10**400, float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in CLASSES
        for name in accepted(cls, dict.fromkeys(["lr", "batch_size", "weight_decay", "damping"]))
    ],
)
def test_what_float32_cannot_hold_is_refused(cls, name, value):
    with pytest.raises(ValueError, match=f"{name} is .*finite in float32"):
        cls([param()], **accepted(cls, {"batch_size": 8, name: value}))
    optimizer = cls([param()], **accepted(cls, {"batch_size": 8}))
    before = param().detach()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} is "):
        optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)


@pytest.mark.parametrize("value", [1.0, 64, -0.5])
@pytest.mark.parametrize("cls", [RootFreeRMSprop, IFShampoo])
def test_momentum_is_below_one(cls, value):
    with pytest.raises(ValueError, match=r"momentum is .*below 1"):
        cls([param()], batch_size=8, momentum=value)


@pytest.mark.parametrize("value", [0, -0.5])
@pytest.mark.parametrize("cls", [IFShampoo, RootFreeShampoo])
def test_factors_need_damping_and_every_message_says_so(cls, value):
    """In the constructor, a group, a group that is added, a changed group and a load."""
    settings, words = (
        accepted(cls, {"batch_size": 8}),
        rf"damping is {value}; pass a number > 0 .*:",
    )
    optimizer = cls([param()], **settings)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["damping"] = value
    for refused in (
        lambda: cls([param()], damping=value, **settings),
        lambda: cls([{"params": [param()], "damping": value}], **settings),
        lambda: optimizer.add_param_group({"params": [param()], "damping": value}),
        lambda: optimizer.load_state_dict(saved),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    optimizer.param_groups[0]["damping"] = value
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    if cls is IFShampoo:
        with pytest.raises(ValueError, match="max_update is 0"):
            cls([param()], max_update=0, **settings)


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_the_diagonal_classes_take_a_damping_of_zero(cls):
    """As in the paper, where s starts at a number; with "auto" s could be 0."""
    optimizer = cls([param()], batch_size=8, damping=0, initial_square_avg=1.0)
    optimizer.step()
    assert torch.isfinite(optimizer.param_groups[0]["params"][0]).all()
    with pytest.raises(ValueError, match="damping is -1; pass a number >= 0"):
        cls([param()], batch_size=8, damping=-1)
    with pytest.raises(ValueError, match=r"damping is 0 and .*pass a damping > 0, or initial_squ"):
        cls([param()], batch_size=8, damping=0)


def test_the_order_of_torch_sets_nothing_else():
    """torch's fourth is eps, its fifth weight_decay; SGD's third is momentum."""
    with pytest.raises(TypeError, match="positional"):
        RootFreeAdamW([param()], 1e-3, (0.9, 0.999), 1e-8, 1e-2, batch_size=8)
    with pytest.raises(TypeError, match="positional"):
        RootFreeRMSprop([param()], 1e-3, 0.99, 1e-8, batch_size=8)
    with pytest.raises(TypeError, match="positional"):
        IFShampoo([param()], 1e-3, 0.9, batch_size=8)
    assert RootFreeAdamW([param()], 1e-3, (0.5, 0.75), batch_size=8).defaults["betas"][0] == 0.5


@pytest.mark.parametrize(
    ("cls", "name", "cure"),
    [
        (RootFreeRMSprop, "betas", "pass alpha=, the decay of s, and momentum="),
        (IFShampoo, "betas", "pass alpha=, the decay of s, and momentum="),
        (RootFreeAdamW, "alpha", r"pass betas=\(beta1, beta2\)"),
        (RootFreeAdamW, "update_rms", r"param_groups\(\) made the group, pass it optimizer_class="),
    ],
)
def test_what_another_class_has_is_answered(cls, name, cure):
    with pytest.raises(TypeError, match=f"{cls.__name__} has no argument '{name}'; .*{cure}"):
        cls([param()], batch_size=8, **{name: 0.5})
    with pytest.raises(TypeError, match=f"has no setting '{name}', as in group 0; .*{cure}"):
        cls([{"params": [param()], name: 0.5}], batch_size=8)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("name", "cure"),
    {
        "eps": "damping replaces it|leave it out: damping",
        "fused": "leave it out",
        "foreach": "leave it out",
    }.items(),
)
def test_what_torch_has_is_answered(cls, name, cure):
    settings = accepted(cls, {"batch_size": 8})
    with pytest.raises(TypeError, match=f"{cls.__name__} has no argument '{name}'; ({cure})"):
        cls([param()], **{**settings, name: 1e-8})
    with pytest.raises(TypeError, match=r"has no argument 'beta3'; it has lr, .*amp_scaling"):
        cls([param()], beta3=0.5, **settings)


# What a schedule counts


@pytest.mark.parametrize("schedule", ["constant", "log4"])
@pytest.mark.parametrize("start", [10, 2**24 - 3, 2**25, 2**31])
def test_the_schedule_is_exact(start, schedule):
    """`step` is float32, which has no 2^24 + 1: it holds the count rounded to the nearest."""
    p = param()
    interval = 4
    settings = {"batch_size": 8, "update_interval": interval, "update_schedule": schedule}
    optimizer = IFShampoo([p], **settings)
    optimizer.step()
    optimizer.state[p]["step"].fill_(start)
    moved = []
    for _ in range(40):
        before = optimizer.state[p]["factor_0"].clone()
        optimizer.step()
        moved.append(not torch.equal(before, optimizer.state[p]["factor_0"]))
    due = [reference.is_update_step(start + k, interval, schedule) for k in range(40)]
    assert moved == due
    assert optimizer.state[p]["step"] == torch.tensor(start + 40, dtype=torch.float32)


@pytest.mark.parametrize("interval", [3, 4, 5, 17])
def test_a_resumed_count_that_was_rounded_still_counts(interval):
    """From 2^24 on none was due with an interval of 4, every step with a divisor of 2^24 - 1."""
    p = param()
    optimizer = IFShampoo([p], batch_size=8, update_interval=interval)
    optimizer.step()
    optimizer.state[p]["step"].fill_(2.0**24)
    moved = 0
    for _ in range(4 * interval):
        before = optimizer.state[p]["factor_0"].clone()
        optimizer.step()
        moved += not torch.equal(before, optimizer.state[p]["factor_0"])
    assert moved == 4
