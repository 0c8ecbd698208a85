"""torchtitan's container takes the classes by name: of torchtitan itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.torchtitan_interface import import_container
from torch import nn

import rootfree_fused

RANK = Path(__file__).parents[1] / "helpers" / "torchtitan_rank.py"
IS_INSTALLED = importlib.util.find_spec("torchtitan") is not None


@pytest.fixture(scope="module")
def titan():
    return import_container()


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 10))


def config_of(titan, *groups, **settings):
    groups = [
        titan.ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=kwargs)
        for pattern, name, kwargs in groups
    ]
    return titan.RootFreeOptimizersContainer.Config(param_groups=groups, **settings)


def trained(container, model, steps=8):
    """The weights after some steps on made-up tokens."""
    for i in range(steps):
        tokens = (torch.arange(12) + i) % 10
        nn.functional.cross_entropy(model(tokens), (tokens + 1) % 10).backward()
        container.step()
        container.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_a_mix_steps_as_its_optimizers_do(titan):
    model = a_model()
    config = config_of(
        titan,
        (r"^0\.", "AdamW", {"lr": 1e-3, "fused": False}),
        (r"bias|^2\.", "RootFreeShampoo", {"lr": 5e-3}),
        (r".*", "RootFreeShampoo", {"lr": 5e-3, "weight_decay": 0.1}),
    )
    container = config.build(model_parts=[model])
    assert type(container) is titan.RootFreeOptimizersContainer
    adamw, ours = container.optimizers
    assert type(adamw) is torch.optim.AdamW
    assert type(ours) is rootfree_fused.RootFreeShampoo
    assert [group["weight_decay"] for group in ours.param_groups] == [0.0, 0.1]
    assert not {"fused", "foreach"} & ours.param_groups[0].keys()
    found = trained(container, model)

    model = a_model()
    names = dict(model.named_parameters())
    by_hand = rootfree_fused.RootFreeShampoo(
        [
            {"params": [p for n, p in names.items() if n == "2.weight" or "bias" in n]},
            {"params": [names["1.weight"], names["3.weight"]], "weight_decay": 0.1},
        ],
        lr=5e-3,
    )
    adamw = torch.optim.AdamW([names["0.weight"]], lr=1e-3, fused=False, foreach=False)

    class Both:
        def step(self):
            adamw.step()
            by_hand.step()

        def zero_grad(self):
            adamw.zero_grad()
            by_hand.zero_grad()

    assert all(map(torch.equal, found, trained(Both(), model)))


@pytest.mark.parametrize("name", ["RootFreeShampoo", "RootFreeRMSprop", "RootFreeAdamW"])
def test_every_class_has_its_name(titan, name):
    kwargs = {"lr": 1e-3} if name == "RootFreeShampoo" else {"lr": 1e-3, "batch_size": 12}
    container = config_of(titan, (".*", name, kwargs)).build(model_parts=[a_model()])
    assert type(container.optimizers[0]) is getattr(rootfree_fused, name)


def test_the_batch_size_is_the_configs_after_a_load(titan):
    def build(size):
        groups = (
            ("^0", "AdamW", {"lr": 1e-3, "fused": False}),
            (
                ".*",
                "RootFreeAdamW",
                {"lr": size / 1000, "batch_size": size},
            ),
        )
        model = a_model()
        return config_of(titan, *groups).build(model_parts=[model]), model

    saved, model = build(12)
    trained(saved, model, steps=2)
    loaded, _ = build(24)
    loaded.load_state_dict(saved.state_dict())
    group = loaded.optimizers[1].param_groups[0]
    assert group["batch_size"] == 24
    assert group["lr"] == 0.012  # as any setting: the schedule, or the user, changes it
    assert {int(state["step"]) for state in loaded.optimizers[1].state.values()} == {2}


@pytest.mark.parametrize(
    ("name", "kwargs", "settings", "cure"),
    [
        ("rootfreeshampoo", {}, {}, "name one of torchtitan's, or of RootFreeShampoo, "),
        ("IFShampoo", {"lr": 1e-2}, {}, r"global_batch_size \* seq_len"),
        (
            "RootFreeAdamW",
            {"lr": 1e-2, "batch_size": 12, "second_moment": "micro"},
            {},
            "torchtitan adds them up",
        ),
        (
            "RootFreeShampoo",
            {"lr": 1e-2},
            {"implementation": "fused_opt_states_bf16"},
            "'state_format': 'bfloat16'",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_built(
    titan, monkeypatch, name, kwargs, settings, cure
):
    built = []
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *_, **__: built.append(1))
    config = config_of(titan, ("^0", "AdamW", {"lr": 1e-3}), (".*", name, kwargs), **settings)
    with pytest.raises(ValueError, match=cure):
        config.build(model_parts=[a_model()])
    assert built == []


@pytest.mark.skipif(not IS_INSTALLED, reason="needs torchtitan")
@pytest.mark.parametrize(("ranks", "name"), [(1, "RootFreeAdamW"), (2, "RootFreeShampoo")])
def test_its_trainer_goes_on_from_its_checkpoint(tmp_path, ranks, name):
    """torchtitan's own Trainer, with two optimizers, its schedule, clipping and micro-batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(RANK), str(tmp_path), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["optimizers"] == ["AdamW", name]
    assert found["losses"][-1] < found["losses"][0]
    assert found["later"] == found["losses"][2:]
    assert found["resumed"] == [True] * ranks
