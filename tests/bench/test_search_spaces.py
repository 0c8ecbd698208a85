"""The spaces of `python -m bench search`: wide, published and given ones, and how they narrow."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from helpers.bench import needs_extras

from bench.optimizers import spaces
from bench.optimizers.spaces import Range, check_space, method_of, narrowed, settings_of

pytestmark = needs_extras
ENTRIES = json.loads(spaces.PUBLISHED.read_text())["entries"]


def test_the_published_spaces_hold_their_best_or_say_so():
    assert len(ENTRIES) == 30
    outside = {}
    for entry in ENTRIES:
        assert entry["space"].keys() == entry["best"].keys()
        for name, best in entry["best"].items():
            if not min(entry["space"][name]) <= best <= max(entry["space"][name]):
                outside.setdefault((entry["model"], entry["optimizer"]), []).append(name)
        assert entry["out_of_range"] == outside.get((entry["model"], entry["optimizer"]), [])
    assert outside == {
        ("SwinT", "rfrmsprop"): ["lr"],
        ("SwinT", "ifshampoo"): ["weight_decay"],
        ("GCViT", "ifshampoo"): ["weight_decay"],
    }


def test_the_loader_turns_and_extends_what_is_wrong_and_says_so():
    found = spaces.published()
    faults = {(m, n): of.faults for m, by in found.items() for n, of in by.items() if of.faults}
    assert list(faults) == [
        ("SwinT", "RootFreeRMSprop"),
        ("SwinT", "IFShampoo"),
        ("FocalNet", "IFShampoo"),
        ("GCViT", "IFShampoo"),
    ]
    assert found["FocalNet"]["IFShampoo"].space["damping"] == Range(1e-4, 1e-3)
    assert "turned" in faults["FocalNet", "IFShampoo"][0]
    assert found["SwinT"]["RootFreeRMSprop"].space["lr"].low == 6.516e-5
    assert "best is 6.516e-05; extended" in faults["SwinT", "RootFreeRMSprop"][0]
    for of in (of for by in found.values() for of in by.values()):
        assert all(
            of.space[name].low <= best <= of.space[name].high for name, best in of.best.items()
        )


@pytest.mark.parametrize("model", dict.fromkeys(entry["model"] for entry in ENTRIES))
def test_every_published_best_builds_its_optimizer(model):
    """By our names; a rate of theirs is 1 - alpha, 1 - beta2, or factor_lr."""
    for name, of in spaces.published()[model].items():
        method = method_of(name, 128, spaces.RELEASED.get(name, {}))
        settings = settings_of(of.best)
        optimizer = method.build(
            [torch.nn.Parameter(torch.zeros(3, 2))], **settings, **method.given
        )
        (group,) = optimizer.param_groups
        known = {**group, "matrix_eps": getattr(optimizer, "matrix_eps", None)}
        assert {key: known[key] for key in settings} == settings
        check_space(name, of.space, method)
    assert set(spaces.published()[model]) >= {"SGD", "AdamW", "RootFreeRMSprop"}


def test_names_of_the_released_code_become_ours():
    best = spaces.published()["GCViT"]
    assert settings_of(best["RootFreeRMSprop"].best)["alpha"] == pytest.approx(1 - 0.01549)
    assert settings_of(best["AdamW"].best)["betas"] == pytest.approx((0.7363, 1 - 0.001619))
    assert settings_of(best["IFShampoo"].best) == {
        "lr": 2.208e-4,
        "momentum": 0.1682,
        "weight_decay": 2.402e-3,
        "damping": 4.968e-5,
        "factor_lr": 0.1683,
        "factor_momentum": 0.5534,
    }
    for name in ("RootFreeRMSprop", "IFShampoo"):
        assert method_of(name, 8, spaces.RELEASED[name]).given["weight_decay_mode"] == "momentum"


@pytest.mark.parametrize(("name", "settings"), [("SGD", 3), ("AdamW", 5), ("IFShampoo", 6)])
def test_the_wide_spaces_have_as_many_settings_as_they_say(name, settings):
    assert len(spaces.WIDE[name]) == settings


@pytest.mark.parametrize("name", spaces.METHODS)
def test_the_wide_spaces_are_within_the_domains(name):
    check_space(name, spaces.WIDE[name], method_of(name, 64, {}))


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("IFShampoo", {"momentum": Range(0.1, 1.0)}, "momentum is 1.0; pass a number of at least"),
        ("SGD", {"momentum": Range(0.1, 2.0)}, "momentum is 2.0; pass a number of at least 0"),
        ("AdamW", {"1 - beta1": Range(0.1, 1.5), "beta2": Range(0.1, 0.9)}, r"betas is \(-0.5"),
        ("RootFreeAdamW", {"beta1": Range(0.1, 0.9)}, "beta1"),
        ("RootFreeRMSprop", {"eps": Range(1e-9, 1e-8)}, "damping replaces it"),
        ("SGD", {"lr": Range(1.0, 0.1)}, "lr of SGD is from 1 to 0.1; the first must be the lower"),
        ("SGD", {"lr": Range(0.0, 0.1)}, "logarithmic axis, which needs numbers above 0"),
    ],
)
def test_a_space_outside_a_domain_is_refused(name, space, message):
    with pytest.raises(ValueError, match=message):
        check_space(name, space, method_of(name, 64, {}))


def test_settings_are_those_that_tables_show():
    point = {"lr": 0.012345678, "1 - momentum": 0.0123456}
    assert settings_of(point) == {"lr": 0.01235, "momentum": 0.98765}


def test_a_file_of_spaces(tmp_path):
    path = tmp_path / "spaces.json"
    path.write_text('{"SGD": {"lr": [1e-3, 1], "momentum": [0, 0.9, "linear"]}}')
    expected = {"lr": Range(1e-3, 1.0), "momentum": Range(0.0, 0.9, log=False)}
    assert spaces.read_spaces(path) == {"SGD": expected}
    assert Range.read("momentum", expected["momentum"].written()) == expected["momentum"]
    for text, message in {
        "{": "no file of spaces",
        "[1]": "no file of spaces; write",
        '{"SDG": {"lr": [1e-3, 1]}}': "has SDG; methods: SGD",
        "{}": "no file of spaces; write",
        '{"SGD": {}}': "no file of spaces; write",
        '{"AdamW": {"1 - beta1": [0.01, 1]}}': "one of '1 - beta1' and '1 - beta2'",
        '{"SGD": {"lr": [1]}}': r"lr of SGD is \[1\]; write \[low, high\]",
        '{"SGD": {"lr": [1, "2"]}}': "write",
        '{"SGD": {"lr": [1, 2, "log2"]}}': "write",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            spaces.read_spaces(path)


def test_stage_2_spans_the_best_tenth_and_a_half_more():
    space = {"lr": Range(1e-5, 1.0), "momentum": Range(0.1, 0.99), "x": Range(0.0, 0.9, log=False)}
    drawn = random.Random(0)
    points = [
        {"lr": 10 ** drawn.uniform(-5, 0), "momentum": drawn.uniform(0.1, 0.99), "x": 0.5}
        for _ in range(100)
    ]

    def value(point):
        return abs(math.log10(point["lr"]) + 2.3)

    ended = [(p, None if p["lr"] > 0.3 else value(p)) for p in points]
    best = sorted((p for p, found in ended if found is not None), key=value)
    lrs = [p["lr"] for p in best[:10]]
    rests = [1 - p["momentum"] for p in best[:10]]
    found = narrowed(space, ended)
    assert found["lr"] == Range(min(lrs) / 1.5, max(lrs) * 1.5)
    assert found["momentum"].low == pytest.approx(max(0.1, 1 - max(rests) * 1.5))
    assert found["momentum"].high == pytest.approx(min(0.99, 1 - min(rests) / 1.5))
    assert found["x"] == Range(0.5 / 1.5, 0.75, log=False)
    # Three of few runs; never beyond stage 1.
    few = narrowed(space, [({**points[0], "lr": lr}, lr) for lr in (1.0, 0.9, 1e-5, 0.8)])
    assert few["lr"] == Range(1e-5, 1.0)
    with pytest.raises(ValueError, match="every run diverged"):
        narrowed(space, [(points[0], None)])
