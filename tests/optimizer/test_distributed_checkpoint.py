"""torch.distributed.checkpoint: what it reads and writes resumes, and no call changes training."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.optimizers import SETTINGS, assert_identical, build, run, snapshot
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

pytestmark = [
    pytest.mark.parametrize("name", SETTINGS),
    # torch warns of its own that nothing is distributed here, and of its own deprecations.
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch"),
]


def model_and_optimizer(name, device, named=False, seed=0, **overrides):
    """A convolution and a linear layer in one group, a normalisation in another."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2), torch.nn.LayerNorm(4), torch.nn.Linear(4, 5)
    ).to(device)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n[0] != "1"]},
        {"params": [p for n, p in model.named_parameters() if n[0] == "1"], "lr": 0.01},
    ]
    if named:
        names = {p: n for n, p in model.named_parameters()}
        groups = [{**g, "params": [(names[p], p) for p in g["params"]]} for g in groups]
    return model, build(name, groups, **overrides)


def trained(name, device, steps, **settings):
    model, optimizer = model_and_optimizer(name, device, **settings)
    params = list(model.parameters())
    run(optimizer, params, steps)
    return model, optimizer, params


OPTIONS = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [0, 4])
def test_reading_changes_nothing_and_loading_resumes(name, device, options, steps):
    options = StateDictOptions(**OPTIONS[options])
    model, optimizer, params = trained(name, device, steps)
    _, twin, twins = trained(name, device, steps)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert_identical(snapshot(optimizer, params), snapshot(twin, twins))
    assert all(p.grad is None for p in params) is (steps == 0)

    other, resumed, others = trained(name, device, 2, seed=1)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_identical(snapshot(resumed, others), snapshot(twin, twins))
    for o, p in ((optimizer, params), (resumed, others), (twin, twins)):
        run(o, p, 3, first=steps)
    assert_identical(snapshot(optimizer, params), snapshot(twin, twins))
    assert_identical(snapshot(resumed, others), snapshot(twin, twins))
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in twin.param_groups]


@pytest.mark.parametrize("flat", [False, True])
def test_keys_are_the_same_before_and_after_the_first_step(name, device, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    keys = []
    for steps in (0, 2):
        model, optimizer, _ = trained(name, device, steps)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        keys.append({k: set(v) for k, v in saved["state"].items()} if not flat else set(saved))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_parameter_keeps_the_state_that_torch_does_not_pass_on(name, device, options):
    options = StateDictOptions(**OPTIONS[options])
    model, optimizer, params = trained(name, device, 4, named=True)
    other, resumed, others = trained(name, device, 2, named=True, seed=1)
    for p in (params[0], others[0]):
        p.requires_grad_(False)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_identical(snapshot(resumed, others[1:]), snapshot(optimizer, params[1:]))
    counts = [resumed.state[p]["step"].item() for p in others]
    assert counts[0] in (2, 4)  # 4 where torch does pass it on
    run(resumed, others, 1, first=4)
    assert [resumed.state[p]["step"].item() for p in others] == [c + 1 for c in counts]


@pytest.mark.parametrize("options", OPTIONS)
def test_settings_that_are_tensors_and_tuples_are_passed_on(name, device, options):
    options = StateDictOptions(**OPTIONS[options])
    tuples = {"structures": ("dense", "diagonal")} if name.startswith("ifshampoo") else {}
    tuples |= {"merge_axes": True, "vector_method": "rmsprop"} if tuples else {}
    tuples |= {"betas": (0.8, 0.95)} if name.startswith("adamw") else {}
    model, optimizer, params = trained(name, device, 4, lr=torch.tensor(0.0625), **tuples)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed, others = trained(name, device, 1, seed=1, lr=0.5, **tuples)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert resumed.param_groups[0]["lr"] == 0.0625
    run(optimizer, params, 3, first=4)
    run(resumed, others, 3, first=4)
    assert_identical(snapshot(resumed, others), snapshot(optimizer, params))


def test_a_folder_holds_the_state_once_and_resumes(name, device, tmp_path):
    def build_model(seed, steps):
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(16, 16, bias=False, device=device) for _ in range(20)]
        model = torch.nn.Sequential(*layers)
        optimizer = build(name, model.parameters())
        run(optimizer, list(model.parameters()), steps)
        return model, optimizer, list(model.parameters())

    model, optimizer, params = build_model(seed=0, steps=4)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    tensors = [v for state in optimizer.state.values() for v in state.values()] + params
    nbytes = sum(v.numel() * v.element_size() for v in tensors)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    # 4000: what a file says of a tensor. A stacked storage written for each view has 20480 bytes.
    assert written < nbytes + 4000 * len(tensors)

    other, resumed, others = build_model(seed=1, steps=1)
    loaded = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, resumed, loaded["optimizer"])
    run(optimizer, params, 3, first=4)
    run(resumed, others, 3, first=4)
    assert_identical(snapshot(resumed, others), snapshot(optimizer, params))
