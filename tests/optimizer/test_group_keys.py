"""Keys of a group that are no settings: whose stay, and which are refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers.optimizers import SETTINGS, assert_identical, build, parameters, run, snapshot

pytestmark = pytest.mark.parametrize("name", SETTINGS)


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("wieght_decay", "spell it 'weight_decay'"),
        ("weight-decay", "spell it 'weight_decay'"),
        ("LR", "spell it 'lr'"),
        ("maximise", "spell it 'maximize'"),
        ("capturabel", "spell it 'capturable'"),
        ("param", "spell it 'params'"),
        ("eps", "damping"),
        ("fused", "leave it out"),
    ],
)
def test_a_key_of_a_group_that_would_have_no_effect_is_refused(name, key, cure, device):
    params = parameters((3,), (3,), device=device)
    groups = [{"params": params[:1]}, {"params": params[1:], key: 0.5}]
    optimizer = build(name, groups[:1])
    run(optimizer, params[:1], 1)
    before, group = snapshot(optimizer, params[:1]), dict(groups[1])
    words = f"{type(optimizer).__name__} has no setting '{key}', as in group 1; .*{cure}"
    for refused in (lambda: build(name, groups), lambda: optimizer.add_param_group(groups[1])):
        with pytest.raises(TypeError, match=words):
            refused()
    assert len(optimizer.param_groups) == 1
    assert groups[1] == group
    assert_identical(snapshot(optimizer, params[:1]), before)


OF_ALL_GROUPS = {"process_group": None, "replicas": "repeat", "update_dtype": torch.bfloat16}


@pytest.mark.parametrize("key", OF_ALL_GROUPS)
def test_what_is_for_all_groups_is_refused_in_one(name, key, device):
    params = parameters((3,), (3,), device=device)
    optimizer = build(name, params[:1])
    run(optimizer, params[:1], 1)
    before, saved = snapshot(optimizer, params[:1]), optimizer.state_dict()
    words = f"{type(optimizer).__name__} has no setting '{key}'"
    has_it = key in inspect.signature(type(optimizer)).parameters
    cure = ".*; take it out of the group and pass it to the con" if has_it else ".*; it has lr, "
    group = {"params": params[1:], key: OF_ALL_GROUPS[key]}
    for refused in (lambda: build(name, [group]), lambda: optimizer.add_param_group(group)):
        with pytest.raises(TypeError, match=f"{words}, as in group [01]{cure}"):
            refused()
    saved["param_groups"][0][key] = OF_ALL_GROUPS[key]
    with pytest.raises(TypeError, match=f"state_dict group 0: {words}{cure}"):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0][key] = OF_ALL_GROUPS[key]
    with pytest.raises(TypeError, match=f"in group 0, {words}{cure}"):
        run(optimizer, params[:1], 1)
    del optimizer.param_groups[0][key]
    assert_identical(snapshot(optimizer, params[:1]), before)
    run(optimizer, params[:1], 1)


def test_a_setting_of_another_class_is_refused_in_a_group(name, device):
    others = {key for cls, _ in SETTINGS.values() for key in inspect.signature(cls).parameters}
    own = build(name, parameters((3,), device=device))
    others -= {"params", "unknown", *own.defaults}
    assert others
    for key in others:
        with pytest.raises(TypeError, match=f"has no setting '{key}', as in group 0; "):
            build(name, [{"params": parameters((3,), device=device), key: 0.5}])


FOREIGN = {
    "torch": ["initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"],
    "timm, mmengine": ["lr_scale", "lr_mult", "decay_mult", "param_name", "group_name", "layer_id"],
    "Megatron": ["wd_mult", "pre_lr_mult", "start_wd", "end_wd", "is_expert_parallel"],
    "GaLore": ["rank", "scale", "proj_type", "update_proj_gap"],
    "a user": ["name", "use_muon", "no_weight_decay", "weight_decay_mult", "weight_decay_scale"],
}


@pytest.mark.parametrize("source", FOREIGN)
def test_keys_of_schedulers_frameworks_and_users_stay_in_groups(name, source, device):
    extra = {7: "no string", **dict.fromkeys(FOREIGN[source], 1.0)}
    optimizer = build(name, [{"params": parameters((3,), device=device), **extra}])
    optimizer.add_param_group({"params": parameters((3,), device=device), **extra})
    assert all(extra.items() <= group.items() for group in optimizer.param_groups)
