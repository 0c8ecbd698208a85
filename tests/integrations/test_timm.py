"""timm builds the optimizers by name, and is told what it would lose."""

from __future__ import annotations

import pytest
import torch
from helpers.timm_alone import import_timm

import rootfree_fused

NAMES = ("rootfreeshampoo", "rootfreermsprop", "rootfreeadamw", "ifshampoo")


@pytest.fixture
def create(monkeypatch):
    """timm's factory once they are registered, in a copy of its registry."""
    timm = import_timm()
    from rootfree_fused.integrations.timm import default_registry, register

    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    assert register() == NAMES
    return timm.optim.create_optimizer_v2


def a_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_class_with_its_own_defaults(create, name):
    (optimizer_class,) = (
        value for key, value in vars(rootfree_fused).items() if key.lower() == name
    )
    needed = {} if name == "rootfreeshampoo" else {"batch_size": 8}
    built = create(a_model(), name, weight_decay=0.1, **needed)
    assert type(built) is optimizer_class
    by_hand = optimizer_class([torch.nn.Parameter(torch.ones(2))], **needed)
    defaults = {**by_hand.defaults, "weight_decay": 0.0}
    assert built.defaults == defaults
    decays = {
        p.ndim: group["weight_decay"] for group in built.param_groups for p in group["params"]
    }
    assert decays == {2: 0.1, 1: 0.0}


def test_settings_reach_the_class(create):
    built = create(a_model(), "rootfreermsprop", lr=0.5, momentum=0.25, batch_size=8, damping=0.5)
    settings = built.param_groups[0]
    assert [settings[name] for name in ("lr", "momentum", "damping")] == [0.5, 0.25, 0.5]
    assert type(create(a_model(), "lookahead_rootfreeshampoo")).__name__ == "Lookahead"
    groups = [{"params": a_model().parameters(), "batch_size": 4}]
    assert create(groups, "ifshampoo").param_groups[0]["batch_size"] == 4


def test_our_groups_are_taken(create):
    def grouped(model):
        return rootfree_fused.param_groups(model, 0.1)

    built = create(a_model(), "rootfreeshampoo", param_group_fn=grouped)
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("name", "settings", "cure"),
    [
        ("ifshampoo", {}, r"--opt-kwargs batch_size=N"),
        ("rootfreeshampoo", {"eps": 1e-8}, r"'eps'; leave it out"),
        ("ifshampoo", {"betas": (0.9, 0.9), "batch_size": 8}, "has no argument 'betas'"),
        ("rootfreeshampoo", {"foreach": True}, "'foreach'; leave it out"),
        ("rootfreeshampoo", {"fallback_list": ["0.*"]}, r"merge_axes=\(\(0, 1\),\)"),
    ],
)
def test_what_the_class_has_not_is_refused(create, name, settings, cure):
    with pytest.raises((TypeError, ValueError), match=cure):
        create(a_model(), name, **settings)


def test_a_name_with_an_underscore_would_be_another_optimizer(create):
    """Why there is none: timm takes what stands before it for a prefix."""
    assert type(create(a_model(), "rootfree_adamw")) is torch.optim.AdamW
