"""From one format to another: checkpoints, models, other optimizers; and what is damaged."""

from __future__ import annotations

import types

import pytest
import torch
from helpers.optimizer_formats import (
    BF16,
    CLASSES,
    EVERY,
    F32,
    FIRST,
    MATRICES,
    SECOND,
    average,
    bits,
    equal,
    optimizer_of,
    parameters,
    run,
    saved,
)

from rootfree_fused import convert, to_bfloat16_, to_float32_
from rootfree_fused.reference.formats import join_weight


@pytest.mark.parametrize("name", CLASSES)
def test_wider_formats_take_all_of_a_checkpoint(name):
    params = parameters()
    optimizer = optimizer_of(name, params, 8, "8bit")
    run(optimizer, params, 2)
    wide = optimizer_of(name, parameters(), 16, "float32")
    wide.load_state_dict(saved(optimizer))
    for param, other in zip(params, wide.param_groups[0]["params"], strict=True):
        own, their = optimizer.state[param], wide.state[other]
        for key in (FIRST[name], SECOND[name]):
            assert torch.equal(their[key], average(own, key))
        residuals = own["param_residual"], their["param_residual"]
        assert torch.equal(*(join_weight(param, residual) for residual in residuals))
    assert wide.param_groups[0]["state_format"] == "float32"


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ((None, "float32"), (None, "8bit"), "state_format"),
        ((None, "8bit"), (None, "bfloat16"), "state_format"),
        ((16, "float32"), (8, "float32"), "param_residual"),
        ((8, "float32"), (None, "float32"), "param_residual"),
        ((8, "float32"), ("stochastic", "float32"), "param_residual"),
    ],
)
def test_narrower_formats_take_a_checkpoint_on_purpose_alone(old, new, word):
    params, others = parameters(), parameters()
    optimizer, narrow = optimizer_of("adamw", params, *old), optimizer_of("adamw", others, *new)
    run(optimizer, params, 2)
    run(narrow, others, 1)
    before, checkpoint = bits(narrow, others), saved(optimizer)
    with pytest.raises(ValueError, match=rf"{word} of group 0.*convert.to_format"):
        narrow.load_state_dict(checkpoint)
    assert equal(bits(narrow, others), before)
    narrow.load_state_dict(convert.to_format(checkpoint, narrow))
    for param, other in zip(params, others, strict=True):
        own, their = optimizer.state[param], narrow.state[other]
        assert their["step"] == 2
        for key, error in (("exp_avg", 0.01), ("exp_avg_sq", 2**-4)):
            a, b = average(own, key).double(), average(their, key).double()
            largest = a.abs().amax() if key == "exp_avg" else a
            assert ((a - b).abs() <= error * largest).all()
        if "param_residual" in own and "param_residual" in their:
            a, b = (join_weight(param, s["param_residual"]).double() for s in (own, their))
            # Half a bit of the residual, or where that would carry into the weight a whole one.
            assert ((a - b).abs() <= 2**-15 * a.abs()).all()


@pytest.mark.parametrize("residual", [8, 16])
def test_a_float32_model_becomes_bfloat16_and_loses_nothing(residual):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 101), torch.nn.BatchNorm1d(101))
    params = list(model.parameters())
    optimizer = optimizer_of("adamw", params)
    run(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    averages = [average(optimizer.state[p], "exp_avg").clone() for p in params]
    to_bfloat16_(model, optimizer, residual)
    assert {p.dtype for p in (*params, *model.buffers())} == {BF16, torch.int64}
    for param, value, m in zip(params, before, averages, strict=True):
        joined = join_weight(param.detach(), optimizer.state[param]["param_residual"])
        error = (joined - value).abs().double()
        assert (error <= (2**-16 if residual == 8 else 0) * value.abs().double()).all()
        assert torch.equal(optimizer.state[param]["exp_avg"], m)
    run(optimizer, params, 2)
    assert optimizer.param_groups[0]["param_residual"] == residual
    optimizer.load_state_dict(saved(optimizer))
    optimizer.forget_residuals()
    assert not any(optimizer.state[p]["param_residual"].any() for p in params)


def test_what_cannot_become_bfloat16_is_refused():
    model = torch.nn.Linear(3, 4)
    optimizer = optimizer_of("adamw", model.parameters())
    elsewhere = optimizer_of("adamw", parameters(((3, 4),), F32))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for error, words, arguments in (
        (TypeError, "model is a list", ([model], optimizer)),
        (TypeError, "optimizer is a SGD", (model, sgd)),
        (ValueError, "pass 8 or 16", (model, optimizer, 32)),
        (ValueError, "not one of the model", (model, elsewhere)),
    ):
        with pytest.raises(error, match=words):
            to_bfloat16_(*arguments)
    assert {p.dtype for p in model.parameters()} == {F32}
    to_bfloat16_(model, optimizer)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is torch\.bfloat16"):
        to_bfloat16_(model, optimizer)


# What is taken from elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
@pytest.mark.parametrize("name", MATRICES)
def test_factors_go_into_other_formats_as_they_are(name, state):
    """With bfloat16 factors, whose other 16 bits a checkpoint has in them."""
    params, others = parameters(dtype=F32), parameters()
    source = optimizer_of(name, params, factor_dtype=BF16)
    run(source, params, 2)
    optimizer = optimizer_of(name, others, 8, state, factor_dtype=BF16)
    optimizer.load_state_dict(convert.to_format(saved(source), optimizer))
    assert optimizer.param_groups[0]["state_format"] == state
    factors = 0
    for param, other in zip(params, others, strict=True):
        own, their = source.state[param], optimizer.state[other]
        for key in own:
            if key.startswith("factor_"):
                factors += 1
                assert torch.equal(own[key], their[key])
        if "momentum_buffer" in own:
            a, b = (average(s, "momentum_buffer").double() for s in (own, their))
            assert ((a - b).abs() <= 0.01 * a.abs().amax()).all()
    assert factors
    run(optimizer, others, 1)


@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
def test_converters_write_the_formats_of_the_optimizer(state):
    params, others = parameters(dtype=F32), parameters()
    source = optimizer_of("ifshampoo", params)
    run(source, params, 2)
    optimizer = optimizer_of("shampoo", others, 8, state)
    optimizer.load_state_dict(convert.from_ifshampoo(source.state_dict(), optimizer))
    plain = optimizer_of("shampoo", parameters(dtype=F32))
    plain.load_state_dict(convert.from_ifshampoo(source.state_dict(), plain))
    for param, other in zip(plain.param_groups[0]["params"], others, strict=True):
        a = plain.state[param]
        if "momentum_buffer" in a:
            m, kept = (
                average(a, "momentum_buffer"),
                average(optimizer.state[other], "momentum_buffer"),
            )
            assert ((m - kept).abs() <= 0.01 * m.abs().amax()).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("residual", [8, 16])
def test_float32_weights_come_back(name, residual):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 101)
    params = list(model.parameters())
    optimizer = optimizer_of(name, params)
    to_bfloat16_(model, optimizer, residual)
    run(optimizer, params, 2)
    joined = [join_weight(p.detach(), optimizer.state[p]["param_residual"]) for p in params]
    to_float32_(model, optimizer)
    for param, value in zip(params, joined, strict=True):
        assert torch.equal(param, value)
        assert "param_residual" not in optimizer.state[param]
    run(optimizer, params, 1)
    optimizer.load_state_dict(saved(optimizer))
    with pytest.raises(TypeError, match="needs no conversion"):
        to_float32_(model, optimizer)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ifshampoo", {"combine": "module"}),
        ("shampoo", {"combine": "module"}),
        ("shampoo", {"batch_axes": 1, "vector_method": "rootfree"}),
    ],
)
def test_groups_that_take_no_residual_keep_their_model_float32(name, settings):
    model = torch.nn.Linear(5, 6, bias="batch_axes" not in settings)
    named = [(n, p) for n, p in model.named_parameters()]
    optimizer = optimizer_of(name, named, **settings)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"in group 0, .*param_residual"):
        to_bfloat16_(model, optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.param_groups[0]["param_residual"] is None


@pytest.mark.parametrize("state", ["bfloat16", "8bit"])
def test_a_residual_and_a_momentum_in_codes_go_along(state):
    """From an IFShampoo in fewer bytes, matrices and vectors."""
    params = parameters()
    source = optimizer_of("ifshampoo", params, 16, state)
    run(source, params, 2)
    wide = optimizer_of("ifshampoo", parameters(), 16, "float32")
    wide.load_state_dict(saved(source))
    optimizer, other = (optimizer_of("shampoo", parameters(), 16) for _ in range(2))
    optimizer.load_state_dict(convert.from_ifshampoo(source.state_dict(), optimizer))
    other.load_state_dict(convert.from_ifshampoo(wide.state_dict(), other))
    for i, param in enumerate(params):
        own, their = (o.state[o.param_groups[0]["params"][i]] for o in (optimizer, other))
        assert torch.equal(own["param_residual"], source.state[param]["param_residual"])
        assert own["param_residual"].any()
        if "momentum_buffer" in own:
            assert torch.equal(own["momentum_buffer"], their["momentum_buffer"])


def test_what_to_format_makes_has_the_form_of_a_state_dict():
    params = parameters()
    optimizer = optimizer_of("adamw", params, 16)
    run(optimizer, params, 1)
    converted = convert.to_format(optimizer, optimizer_of("adamw", parameters(), 16, "bfloat16"))
    for own, other in zip(
        converted["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(own["param_residual"], other["param_residual"])


def test_groups_that_are_added_later_are_as_the_others():
    model = torch.nn.Linear(5, 6)
    optimizer = optimizer_of("adamw", [model.weight])
    to_bfloat16_(model, optimizer, 16)
    optimizer.add_param_group({"params": [model.bias]})
    assert optimizer.param_groups[1]["param_residual"] == 16
    to_float32_(model, optimizer)
    optimizer.add_param_group({"params": parameters(((2, 3),), F32)})
    assert optimizer.param_groups[2]["param_residual"] is None


class Sharded(torch.nn.Linear):
    """What fully_shard makes of a module that has run."""

    def _get_fsdp_state(self):
        return types.SimpleNamespace(_is_root=True)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (
            "then wrap it",
            lambda m: m.setattr(torch.nn.parallel, "DistributedDataParallel", Sharded),
        ),
        ("first forward", lambda _: None),
        (
            r"set it to False",
            lambda m: m.setattr(
                torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True
            ),
        ),
    ],
)
def test_models_that_others_hold_on_to_are_refused(words, change, monkeypatch):
    model = Sharded(5, 6)
    optimizer = optimizer_of("adamw", model.parameters())
    change(monkeypatch)
    for convert_ in (to_bfloat16_, to_float32_):
        with pytest.raises(ValueError, match=words):
            convert_(model, optimizer)
    assert {p.dtype for p in model.parameters()} == {F32}


def test_a_residual_that_was_lost_is_not_taken_for_zeros():
    model = torch.nn.Linear(5, 6)
    optimizer = optimizer_of("adamw", model.parameters())
    to_bfloat16_(model, optimizer)
    run(optimizer, list(model.parameters()), 1)
    del optimizer.state[model.weight]["param_residual"]
    with pytest.raises(ValueError, match="lacks 'param_residual'"):
        to_float32_(model, optimizer)
    assert model.weight.dtype == BF16


# Checkpoints that are damaged ---------------------------------------------------------------------


def damaged(change):
    def load(name, residual, state):
        params = parameters()
        optimizer = optimizer_of(name, params, residual, state)
        run(optimizer, params, 2)
        checkpoint = saved(optimizer)
        change(checkpoint)
        before = bits(optimizer, params)
        with pytest.raises(ValueError, match=r"state_dict (of parameter|group) 0") as raised:
            optimizer.load_state_dict(checkpoint)
        assert equal(bits(optimizer, params), before)
        return str(raised.value)

    return load


@pytest.mark.parametrize("name", CLASSES)
def test_a_scale_that_no_run_has(name):
    def spoil(key, value):
        def change(checkpoint):
            checkpoint["state"][0][f"{key}_scale"].view(-1)[1] = value

        return change

    assert "damaged" in damaged(spoil(SECOND[name], 255))(name, 8, "8bit")
    assert "damaged" in damaged(spoil(FIRST[name], float("nan")))(name, 8, "8bit")
    assert "negative" in damaged(spoil(FIRST[name], -1.0))(name, 8, "8bit")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("residual", [8, 16])
def test_a_residual_that_was_lost(name, residual):
    def lose(checkpoint):
        del checkpoint["state"][0]["param_residual"]

    assert "has no param_residual" in damaged(lose)(name, residual, "float32")


@pytest.mark.parametrize(
    ("key", "value"), [("param_residual", "x"), ("param_residual", 7), ("state_format", 7)]
)
def test_settings_that_are_none(key, value):
    def change(checkpoint):
        checkpoint["param_groups"][0][key] = value

    assert f"{key} is {value!r}; pass " in damaged(change)("adamw", 16, "float32")


def as_codes_alone(checkpoint):
    """As torch.distributed.checkpoint reads it for an optimizer of float32 state."""
    for state in checkpoint["state"].values():
        for key in [key for key in state if key.endswith("_scale")]:
            del state[key]
            average = key.removesuffix("_scale")
            state[average] = state[average].float()


def without_a_scale(checkpoint):
    next(s.pop(k) for s in checkpoint["state"].values() for k in list(s) if k.endswith("_scale"))


def with_too_few_scales(checkpoint):
    for state in checkpoint["state"].values():
        for key in [key for key in state if key.endswith("_scale")]:
            state[key] = state[key].view(-1)[:1].clone()


@pytest.mark.parametrize("change", [as_codes_alone, without_a_scale, with_too_few_scales])
@pytest.mark.parametrize("name", EVERY)
def test_codes_are_not_taken_for_averages(name, change):
    params, others = parameters(), parameters()
    optimizer, wide = optimizer_of(name, params, 8, "8bit"), optimizer_of(name, others, 8)
    run(optimizer, params, 2)
    run(wide, others, 1)
    checkpoint, before = saved(optimizer), bits(wide, others)
    change(checkpoint)
    with pytest.raises(ValueError, match=r"parameter 0: .*(damaged|distributed)"):
        wide.load_state_dict(checkpoint)
    assert equal(bits(wide, others), before)
    with pytest.raises(ValueError, match=r"parameter 0: .*(damaged|distributed)"):
        convert.to_format(checkpoint, optimizer_of(name, parameters(), 8, "bfloat16"))


@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_from_before_formats_goes_into_any(name):
    params, others = parameters(), parameters()
    old, optimizer = optimizer_of(name, params), optimizer_of(name, others, 16)
    run(old, params, 2)
    checkpoint = saved(old)
    for key in ("param_residual", "state_format", "rounding_seed"):
        del checkpoint["param_groups"][0][key]
    optimizer.load_state_dict(checkpoint)
    for param, other in zip(params, others, strict=True):
        own, their = old.state[param], optimizer.state[other]
        assert not their["param_residual"].any()
        assert all(torch.equal(own[key], their[key]) for key in own)
    narrow = optimizer_of(name, parameters(), 8, "8bit")
    narrow.load_state_dict(convert.to_format(checkpoint, narrow))


def test_a_changed_format_is_not_saved():
    params = parameters()
    optimizer = optimizer_of("adamw", params, 8)
    run(optimizer, params, 1)
    optimizer.param_groups[0]["param_residual"] = None
    with pytest.raises(ValueError, match=r"param_residual of group 0 was 8.*set it back"):
        optimizer.state_dict()
