"""A step that raises has changed no bit, and says of what, where and with which cure."""

from __future__ import annotations

import functools
import re
from unittest import mock

import hypothesis
import pytest
import torch
from helpers.optimizers import SETTINGS, assert_identical, build, parameters, run, set_grads
from hypothesis import strategies as st

from rootfree_fused import IFShampoo, RootFreeAdamW
from rootfree_fused.ops import extensions

SHAPES = [[(6, 5), (5,), (6, 5)], [(4, 3), (), (6, 5)]]


class Case:
    """An optimizer of two groups at some stage, and where it is to be damaged."""

    def __init__(self, name, stage, group, place):
        self.name, self.stage, self.index, self.place = name, stage, group, place
        self.optimizer, self.params = self.built()
        self.group = self.optimizer.param_groups[group]
        self.param = self.group["params"][place]
        self.repair = lambda: None  # for a read, which needs settings that are right
        self.where = f"parameter {place} .*group {group}"

    def built(self):
        shapes = [shape for group in SHAPES for shape in group]
        params = parameters(*shapes)
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.01}]
        optimizer = build(self.name, groups)
        if self.is_known:
            run(optimizer, params, 3)
        elif self.stage == "read":
            assert len(optimizer.state) == len(params)
        set_grads(params, seed=9)
        return optimizer, params

    @property
    def is_known(self):
        return self.stage in ("warm", "no host")

    @property
    def allocated(self):
        return self.stage != "cold"

    @property
    def state(self):
        return self.optimizer.state[self.param]

    @property
    def key(self):
        return next(key for key in self.state if key != "step")

    def replace_data(self, data):
        self.param.grad = None
        self.param.data = data
        self.param.grad = torch.ones_like(self.param)

    def others(self):
        return [p for p in self.params if p is not self.param]


# Each damages a case and returns what the error must say, or None where it cannot be.


def float64(case):
    # Factors do not depend on the parameter's dtype.
    if not case.allocated or set(case.state) - {"step"} == {k for k in case.state if "factor" in k}:
        return None
    case.replace_data(case.param.data.double())
    return case.where, "float32", "float64"


def transposed(case):
    if not case.allocated or case.param.dim() < 2:
        return None
    case.replace_data(case.param.data.t().contiguous())
    return case.where, re.escape(str(tuple(case.param.shape)))


def flattened(case):
    if not case.allocated or case.param.dim() < 2:
        return None
    case.replace_data(case.param.data.flatten())
    return case.where, r"\(\d+,\)|lacks"


def resized(case):
    if not case.allocated:
        return None
    case.replace_data(torch.randn(7))
    return case.where, r"\(7,\)|lacks"


def expanded(case):
    if case.param.dim() < 2:
        return None
    case.replace_data(torch.randn(1, 1).expand(case.param.shape))
    return case.where, "strides", "clone"


def overlapping_itself(case):
    if case.param.dim() < 2:
        return None
    case.replace_data(torch.randn(99).as_strided(case.param.shape, (1, 1)))
    return case.where, "strides", "clone"


def overlapping_another(case):
    other = case.params[0]
    if case.param is other:
        return None
    with torch.no_grad():
        flat = torch.randn(200)
        case.replace_data(flat[29 : 29 + case.param.numel()].view(case.param.shape))
        other.grad = None
        other.data = flat[:30].view(6, 5)
        other.grad = torch.ones(6, 5)
    return case.where, "shares memory with", "parameter 0 .*group 0", "clone"


def twice(case):
    case.group["params"].append(case.param)
    case.group["param_names"].append("again")
    return case.where, "shares memory with", r"parameter 3 \(again\)"


def no_tensor(case):
    case.group["params"].append("weight")
    return rf"parameter 3 of group {case.index}", "str", "Parameter"


def on_meta(case):
    case.param.grad = None
    torch.utils.swap_tensors(case.param, torch.nn.Parameter(case.param.detach().to("meta")))
    case.param.grad = torch.empty_like(case.param)
    return case.where, "meta", "to_empty"


def flat_shard(case):
    if not isinstance(case.optimizer, IFShampoo) or case.is_known:
        return None  # it is made so before the first step
    case.param._fsdp_flattened = True
    return case.where, "flat shard", "RootFreeRMSprop"


def sparse_gradient(case):
    if not case.param.dim():
        return None
    case.param.grad = case.param.grad.to_sparse()
    return case.where, "sparse_coo", "to_dense"


def stale_gradient(case):
    case.param.data = torch.randn(3, 3, 3)
    return case.where, r"\(3, 3, 3\)", "backward"


def gradient_is_the_parameter(case):
    if case.is_known:  # where a known gradient lies is not looked at
        return None
    case.param.grad = case.param.detach()
    return case.where, "shares memory", "clone"


def key_deleted(case):
    if not case.allocated:
        return None
    key = case.key
    del case.state[key]
    return case.where, f"lacks '{key}'", "pop"


def step_deleted(case):
    if not case.allocated:
        return None
    del case.state["step"]
    return case.where, "lacks 'step'", "pop"


def value_is_none(case):
    case.state[case.key] = None
    return case.where, "None", "pop"


def step_is_a_number(case):
    case.state["step"] = 3
    return case.where, "step .*is 3, a int", "pop"


def step_of_two(case):
    case.state["step"] = torch.zeros(2)
    return case.where, r"step .*\(2,\)", "pop"


def value_of_another_shape(case):
    case.state[case.key] = torch.ones(9, 9)
    return case.where, case.key, r"\(9, 9\)"


def value_of_another_dtype(case):
    case.state[case.key] = case.state[case.key].to(torch.float16)
    return case.where, case.key, "float16", "cast"


def value_on_meta(case):
    if not case.is_known:  # taken no step: declared anew
        return None
    case.state[case.key] = case.state[case.key].to("meta")
    return case.where, case.key, "on meta"


def sparse_value(case):
    if case.state[case.key].dim() != 2:
        return None
    case.state[case.key] = case.state[case.key].to_sparse()
    return case.where, case.key, "sparse_coo"


def transposed_factor(case):
    factor = case.state.get("factor_0", torch.ones(()))
    if factor.dim() != 2 or len(factor) == 1:
        return None
    case.state["factor_0"] = factor.t().contiguous().t()
    return case.where, "factor_0", "not contiguous"


def value_shared(case):
    other = case.params[0]
    theirs = case.optimizer.state[other]
    if case.param is other or case.param.shape != other.shape:
        return None
    case.state[case.key] = theirs[case.key]
    return case.where, case.key, "shares memory with", "parameter 0"


def value_is_the_parameter(case):
    if case.state[case.key].shape != case.param.shape:
        return None
    case.state[case.key] = case.param.detach()
    return case.where, case.key, "shares memory with"


def setting(name, value, *words):
    def damage(case):
        if name not in case.group:
            return None
        case.repair = functools.partial(case.group.__setitem__, name, case.group[name])
        case.group[name] = value
        return f"group {case.index}", name, *words

    damage.__name__ = f"{name} = {value!r}"[:40]
    return damage


def setting_missing(case):
    case.repair = functools.partial(case.group.update, weight_decay=case.group.pop("weight_decay"))
    return f"group {case.index}", "weight_decay is missing"


def lr_filled(case):
    case.repair = functools.partial(case.group.__setitem__, "lr", 0.01)
    case.group["lr"] = torch.tensor(0.01)
    if case.allocated:
        case.optimizer.step()
    case.group["lr"].fill_(float("nan"))
    return f"group {case.index}", "lr is tensor.nan"


def betas_mutated(case):
    if not isinstance(case.optimizer, RootFreeAdamW):
        return None
    case.repair = functools.partial(case.group.__setitem__, "betas", (0.9, 0.99))
    case.group["betas"] = betas = [0.9, 0.99]
    if case.allocated:
        case.optimizer.step()
        assert case.group["betas"] == (0.9, 0.99)  # what becomes of the list is of no account
    betas[1] = 5.0
    case.group["betas"] = betas
    return f"group {case.index}", "betas", "5.0"


def shaping(name, value):
    def damage(case):
        if name not in case.group or not case.allocated or case.group[name] == value:
            return None
        if name == "vector_method" and value not in case.optimizer._matrix_method.vectors:
            return None
        case.group[name] = value
        return (
            f"group {case.index}",
            name,
            "build a new optimizer|does not fit|lacks|other settings",
        )

    damage.__name__ = f"{name} = {value!r}"
    return damage


def scaler(name, value, *words):
    def damage(case):
        setattr(case.optimizer, name, value)
        return name, *words

    damage.__name__ = f"{name} {value.dtype} {tuple(value.shape)} {value.device}"
    return damage


DAMAGES = [
    *(float64, transposed, flattened, resized, expanded, overlapping_itself, overlapping_another),
    *(twice, no_tensor, on_meta, flat_shard, sparse_gradient, stale_gradient),
    *(gradient_is_the_parameter, key_deleted, step_deleted, value_is_none, step_is_a_number),
    *(step_of_two, value_of_another_shape, value_of_another_dtype, value_on_meta, sparse_value),
    *(transposed_factor, value_shared, value_is_the_parameter, setting_missing, lr_filled),
    betas_mutated,
    setting("lr", float("nan"), "nan", "pass"),
    setting("lr", "0.1", "str", "pass"),
    setting("lr", torch.tensor(0.1, device="meta"), "meta"),
    setting("lr", torch.tensor(1, dtype=torch.int64), "int64"),
    setting("lr", 10**400, "pass"),
    setting("damping", -1.0, "-1.0", "pass"),
    setting("damping", 1e39, r"1e\+39", "pass"),
    setting("beta", 1.0, "1.0", "pass"),
    setting("sign", "mean", "mean", "pass"),
    setting("weight_decay", 10**400, "pass"),
    setting("batch_size", None, "missing", "pass"),
    setting("batch_size", 2**2000, "pass"),
    setting("maximize", 1, "pass"),
    setting("update_interval", 0, "0", "pass"),
    setting("structures", "round", "round", "supported"),
    shaping("structures", "diagonal"),
    shaping("max_dense_dim", 3),
    shaping("vector_method", "factor"),
    shaping("vector_method", "rootfree"),
    setting("vector_method", "sgd", "sgd", "pass"),
    setting("update_rms", 0.0, "0.0", "pass"),
    setting("row_beta", 1.0, "1.0", "None"),
    setting("vector_beta2", None, "NoneType", "pass"),
    setting("vector_rms", -1.0, "-1.0", "pass"),
    shaping("factor_dtype", torch.float64),
    scaler("grad_scale", torch.ones(1, dtype=torch.bfloat16), "bfloat16", "pass"),
    scaler("grad_scale", torch.ones(2), r"\(2,\)", "pass"),
    scaler("grad_scale", torch.ones((), device="meta"), "meta", "pass"),
    scaler("found_inf", torch.ones(2), r"\(2,\)", "pass"),
    scaler("found_inf", torch.ones((), device="meta"), "meta", "pass"),
]


def values(states):
    """Copies of the tensors of state dicts; what was damaged may be no tensor or have no values."""
    found = [v for state in states for _, v in sorted(state.items()) if torch.is_tensor(v)]
    return [v.to_dense().clone() for v in found if not v.is_meta]


def bits(case):
    """Every bit that a step may write; of a cold optimizer the state that a read gives."""
    params = [p.detach().contiguous().clone() for p in case.params if not p.is_meta]
    state = dict.get(case.optimizer.state, case.param, {})
    return params + values([case.optimizer.state[p] for p in case.others()]) + values([state])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.filter_too_much],  # of one class, or of matrices
)
@hypothesis.given(
    name=st.sampled_from(list(SETTINGS)),
    stage=st.sampled_from(["cold", "read", "warm", "no host"]),
    group=st.integers(0, 1),
    place=st.integers(0, 2),
)
def test_bad_input_changes_no_bit_and_is_named(damage, name, stage, group, place):
    host = None if stage == "no host" else extensions.known_tensors()
    with mock.patch.object(extensions, "known_tensors", return_value=host):
        case = Case(name, stage, group, place)
        words = damage(case)
        hypothesis.assume(words is not None)
        if stage == "cold":  # nothing may be read before
            params = [p.detach().contiguous().clone() for p in case.params if not p.is_meta]
            twin = Case(name, "read", group, place)
            before = params + values([twin.optimizer.state[p] for p in twin.others()])
        else:
            before = bits(case)
        with pytest.raises((TypeError, ValueError)) as error:
            case.optimizer.step()
        for word in (*words, ";"):
            assert re.search(word, str(error.value)), (word, str(error.value))
        case.repair()
        assert_identical(bits(case)[: len(before)], before)
