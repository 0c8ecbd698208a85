"""Settings that follow the batch size."""

from __future__ import annotations

import pytest
import torch

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo, rescale_

BETA1, BETA2 = 0.9, 0.95
# By class: settings, and what they are with a batch twice as large.
CASES = [
    (RootFreeAdamW, {"lr": 0.01, "betas": (BETA1, BETA2)}, {"lr": 0.02, "betas": (0.8, 0.9)}),
    (
        RootFreeRMSprop,
        {"lr": 0.01, "alpha": 0.8, "momentum": 0.9},
        {"lr": 0.02, "alpha": 0.6, "momentum": 0.9},
    ),
    (
        IFShampoo,
        {"lr": 0.01, "momentum": 0.75, "alpha": 0.9, "factor_lr": 0.4},
        {"lr": 0.02, "momentum": 0.75, "alpha": 0.8, "factor_lr": 0.4},
    ),
]


def built(cls, **settings):
    params = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))]
    return cls([{"params": params[:1]}, {"params": params[1:]}], batch_size=32, **settings)


def settings_of(optimizer):
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def assert_settings(optimizer, expected):
    """To a rounding."""
    for group, own in zip(settings_of(optimizer), expected, strict=True):
        assert group.keys() == own.keys()
        for name, value in own.items():
            number = isinstance(value, (float, tuple)) and value != (15, 15)
            assert group[name] == (pytest.approx(value, rel=1e-14) if number else value), name


@pytest.mark.parametrize(("cls", "settings", "doubled"), CASES)
def test_a_batch_twice_as_large_and_back(cls, settings, doubled):
    optimizer = built(cls, **settings)
    before = settings_of(optimizer)
    rescale_(optimizer, 64)
    assert_settings(optimizer, [{**old, "batch_size": 64, **doubled} for old in before])
    rescale_(optimizer, 32)
    assert_settings(optimizer, before)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_rules(rule, factor):
    optimizer = built(RootFreeAdamW, lr=0.01)
    rescale_(optimizer, 128, rule=rule, betas=False)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01 * factor)
    assert optimizer.param_groups[1]["betas"] == (BETA1, BETA2)


def test_averages_keep_half_of_what_they_were():
    optimizer = built(RootFreeAdamW, lr=0.01, betas=(0.9, 0.4))
    rescale_(optimizer, 32 * 20)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.4)
    none = built(RootFreeAdamW, lr=0.01, betas=(0.0, 0.9))
    rescale_(none, 16)
    assert none.param_groups[0]["betas"] == (0.0, pytest.approx(0.95))


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
@pytest.mark.parametrize("ratio", [4, 0.25])
def test_a_steady_gradient_moves_as_far_an_example(cls, ratio):
    """Once averages are what they will be, damping being small."""
    settings = {"damping": 1e-12, "initial_square_avg": 1.0, "weight_decay": 0.0}
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = cls([param], lr=0.01, batch_size=32, **settings)

    def moved(batch_size):
        # Of noise that is large beside it: B g^2 is the same for every B.
        param.grad = torch.full_like(param, batch_size**-0.5)
        for _ in range(2000):
            optimizer.step()
        before = param.item()
        optimizer.step()
        return (param.item() - before) * batch_size**0.5 / batch_size

    before = moved(32)
    rescale_(optimizer, 32 * ratio)
    assert moved(32 * ratio) == pytest.approx(before, rel=1e-6)


def test_a_tensor_lr_and_a_schedule_go_on():
    lr = torch.tensor(0.01)
    optimizer = built(RootFreeAdamW, lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    rescale_(optimizer, 64)
    for group in optimizer.param_groups:
        assert float(group["lr"]) == float(group["initial_lr"]) == pytest.approx(0.02)
    scheduler.base_lrs = [2 * base for base in scheduler.base_lrs]
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.02)


def test_the_step_takes_the_new_settings():
    rescaled, fresh = built(RootFreeAdamW, lr=0.01), built(RootFreeAdamW, lr=0.01)
    for optimizer in (rescaled, fresh):
        for batch_size in (32, 64):
            if optimizer is rescaled:
                rescale_(optimizer, batch_size)
            elif batch_size == 64:
                for group in optimizer.param_groups:
                    group.update(batch_size=64, **rescaled_settings(rescaled))
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.full_like(param, 0.5)
            optimizer.step()
    for a, b in zip(rescaled.param_groups, fresh.param_groups, strict=True):
        assert all(map(torch.equal, a["params"], b["params"]))


def rescaled_settings(optimizer):
    return {name: optimizer.param_groups[0][name] for name in ("lr", "betas")}


@pytest.mark.parametrize(
    ("error", "words", "cls", "arguments"),
    [
        (TypeError, "no batch_size", RootFreeShampoo, {"batch_size": 64}),
        (ValueError, "'linear', 'sqrt', 'none'", RootFreeAdamW, {"batch_size": 64, "rule": "lin"}),
        (ValueError, "batch_size is 0", RootFreeAdamW, {"batch_size": 0}),
        (TypeError, "batch_size", RootFreeAdamW, {"batch_size": "64"}),
        (ValueError, "group 0, lr is .*finite in float32", RootFreeAdamW, {"batch_size": 3e38}),
    ],
)
def test_bad_input_changes_nothing(error, words, cls, arguments):
    sized = {} if cls is RootFreeShampoo else {"batch_size": 1e-30}
    optimizer = cls([torch.nn.Parameter(torch.ones(4, 3))], lr=0.01, **sized)
    before = settings_of(optimizer)
    with pytest.raises(error, match=words):
        rescale_(optimizer, **arguments)
    assert settings_of(optimizer) == before


def test_a_batch_size_that_is_yet_to_be_counted_is_no_start():
    optimizer = RootFreeAdamW([torch.nn.Parameter(torch.ones(3))], batch_size="counted")
    with pytest.raises(ValueError, match="batch_size of group 0 is 'counted'"):
        rescale_(optimizer, 64)
    assert optimizer.param_groups[0]["batch_size"] == "counted"


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="Adam"):
        rescale_(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]), 4)


def test_a_change_beyond_what_was_measured_warns():
    with pytest.warns(UserWarning, match="128"):
        rescale_(built(RootFreeAdamW, lr=0.01), 32 * 128)
