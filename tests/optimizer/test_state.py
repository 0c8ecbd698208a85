"""State follows its parameter: declared, allocated at first touch, in use as long as it is held."""

from __future__ import annotations

import collections

import pytest
import torch
from helpers.optimizers import (
    SETTINGS,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)

pytestmark = pytest.mark.parametrize("name", SETTINGS)
SHAPES = [(7, 5), (11,), (), (7, 5), (3, 4, 2)]


def state_bytes(optimizer):
    """Of what is there, without touching it."""
    states = dict.values(optimizer.state)
    return sum(t.nbytes for state in states for t in state.values())


# Allocation


def test_nothing_is_allocated_before_the_first_touch_and_frozen_parameters_cost_nothing(name):
    params = parameters(*SHAPES)
    for p in params[1:]:
        p.requires_grad_(False)
    optimizer = build(name, params)
    alone = build(name, parameters(*SHAPES[:1]))
    assert state_bytes(optimizer) == 0
    for touch in (
        lambda o: o.state_dict(),
        lambda o: len(o.state),
        lambda o: list(o.state),
        lambda o: o.state.values(),
        lambda o: o.state.get(o.param_groups[0]["params"][0]),
        lambda o: o.param_groups[0]["params"][0] in o.state,
        lambda o: o.state[o.param_groups[0]["params"][0]],
        lambda o: run(o, o.param_groups[0]["params"][:1], 1),
    ):
        fresh, other = (build(name, o.param_groups[0]["params"]) for o in (optimizer, alone))
        touch(fresh)
        touch(other)
        assert state_bytes(fresh) == state_bytes(other) > 0
    set_grads(params, seed=0)  # a gradient is enough
    run(optimizer, params, 1)
    assert [optimizer.state[p]["step"].item() for p in params] == [1] * len(params)


def test_an_unfrozen_parameter_starts_then(name):
    params, twins = parameters(*SHAPES), parameters(*SHAPES)[:1]
    params[0].requires_grad_(False)
    optimizer, alone = build(name, params), build(name, twins)
    run(optimizer, params[1:], 2)
    params[0].requires_grad_(True)
    for t in range(3):
        set_grads(params, seed=t)
        set_grads(twins, seed=t)
        optimizer.step()
        alone.step()
    assert_identical(snapshot(optimizer, params[:1]), snapshot(alone, twins))


@pytest.mark.parametrize("change", ["before", "after a read"])
def test_state_is_of_the_dtype_that_the_parameter_has_at_first_touch(name, change):
    model, twin = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4).double()
    twin.load_state_dict(model.state_dict())
    optimizer = build(name, model.parameters(), **precise(name))
    if change == "after a read" and not name.startswith("ifshampoo"):
        assert len(optimizer.state) == 2
        model.double()
        set_grads(list(model.parameters()), seed=0)
        with pytest.raises(TypeError, match=r"float32 but must be torch\.float64"):
            optimizer.step()
        optimizer.state.clear()
    model.double()
    reference = build(name, twin.parameters(), **precise(name))
    run(optimizer, list(model.parameters()), 3)
    run(reference, list(twin.parameters()), 3)
    assert_identical(
        snapshot(optimizer, list(model.parameters())), snapshot(reference, list(twin.parameters()))
    )


def precise(name):
    return {"factor_dtype": torch.float64} if name.startswith("ifshampoo") else {}


def test_lazy_modules_may_be_given_before_they_are_initialized(name):
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    optimizer = build(name, model.parameters())
    assert len(optimizer.state) == 2
    model(torch.randn(3, 6)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    assert len(optimizer.state_dict()["state"]) == 4


# Devices


@pytest.mark.parametrize("touched", [False, True])
def test_a_model_that_gets_its_memory_after_the_optimizer_trains(name, touched, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    with torch.device("meta"):
        model = torch.nn.Linear(5, 3)
    optimizer = build(name, model.parameters())
    if touched:
        assert all(v.is_meta for s in optimizer.state.values() for k, v in s.items() if k != "step")
    model.to_empty(device="cpu")
    twin = torch.nn.Linear(5, 3)
    model.load_state_dict(twin.state_dict())
    params, others = list(model.parameters()), list(twin.parameters())
    reference = build(name, others)
    run(optimizer, params, 3)
    run(reference, others, 3)
    assert_identical(snapshot(optimizer, params), snapshot(reference, others))


@pytest.mark.parametrize("first", [True, False])
def test_another_default_device_changes_no_step(name, first):
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    optimizer, plain = build(name, params), build(name, others)
    if not first:
        run(optimizer, params, 2)
        run(plain, others, 2)
    set_grads(params, seed=7)
    set_grads(others, seed=7)
    with torch.device("meta"):
        optimizer.step()
    plain.step()
    assert_identical(snapshot(optimizer, params), snapshot(plain, others))


def test_a_meta_parameter_without_a_gradient_stops_nothing(name):
    params, others = parameters((4, 4), (4, 4)), parameters((4, 4))
    params[1] = torch.nn.Parameter(params[1].detach().to("meta"))
    optimizer, alone = build(name, params), build(name, others)
    for t in range(3):
        set_grads(params[:1], seed=t)
        set_grads(others, seed=t)
        optimizer.step()
        alone.step()
    assert_identical(snapshot(optimizer, params[:1]), snapshot(alone, others))


def test_a_model_on_meta_alone_steps_as_in_torch(name):
    params = [torch.nn.Parameter(p.detach().to("meta")) for p in parameters(*SHAPES)]
    optimizer = build(name, params)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()


# Emptied, exchanged and held


def empty_all(optimizer):
    optimizer.state.clear()


def new_dict(optimizer):
    optimizer.state = collections.defaultdict(dict)


def pop_all(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state.pop(p)


def clear_each(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p].clear()


def replace_each(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] = {}


@pytest.mark.parametrize("empty", [empty_all, new_dict, pop_all, clear_each, replace_each])
def test_emptied_state_starts_anew(name, empty):
    params = parameters(*SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, 3)
    empty(optimizer)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = build(name, others)
    run(optimizer, params, 3, first=3)
    run(fresh, others, 3, first=3)
    assert_identical(snapshot(optimizer, params), snapshot(fresh, others))


def test_an_exchanged_parameter_starts_anew_and_others_go_on(name):
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    (new,) = parameters((9, 4), seed=1)
    (alone,) = parameters((9, 4), seed=1)
    optimizer, plain, fresh = build(name, params), build(name, others), build(name, [alone])
    run(optimizer, params, 2)
    run(plain, others, 2)
    optimizer.param_groups[0]["params"][0] = new
    for t in range(3):
        set_grads(others, seed=t)
        for p, q in zip([new, *params[1:]], [alone, *others[1:]], strict=True):
            q.grad = torch.full_like(q, 0.1) if q is alone else q.grad
            p.grad = q.grad.clone()
        for each in (optimizer, plain, fresh):
            each.step()
    assert_identical(snapshot(optimizer, params[1:]), snapshot(plain, others[1:]))
    assert_identical(snapshot(optimizer, [new]), snapshot(fresh, [alone]))
    assert list(optimizer.state_dict()["state"]) == list(range(len(params)))


def test_a_held_tensor_stays_in_use(name):
    """Whatever has a gradient, whatever is due, and after a load."""
    params = parameters((5, 5), (5, 5), (3,), (5, 5), (3,))
    optimizer = build(name, params)
    held = [dict(optimizer.state[p]) for p in params]
    for t, missing in enumerate(((), (0,), (1, 2), (0, 3, 4), (), (1,))):
        set_grads(params, seed=t)
        for i in missing:
            params[i].grad = None
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 1)
    for p, state in zip(params, held, strict=True):
        assert state.keys() <= optimizer.state[p].keys()
        assert all(optimizer.state[p][key] is value for key, value in state.items())


def test_shared_state_is_seen_by_another_process(name):
    params = parameters((5, 5), (5, 5), (3,))
    optimizer = build(name, params)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    for tensor in tensors:
        tensor.share_memory_()
    handles = [tensor.untyped_storage()._share_filename_cpu_() for tensor in tensors]
    views = [torch.UntypedStorage._new_shared_filename_cpu(*handle) for handle in handles]
    run(optimizer, params, 3)
    for tensor, view in zip(tensors, views, strict=True):
        seen = torch.empty(0, dtype=tensor.dtype).set_(
            view, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        assert tensor.is_shared()
        assert torch.equal(seen, tensor)


# Gradients that come and go


def test_patterns_of_gradients_take_the_steps_of_one_alone(name):
    """K K^T that one pattern's step makes is the one that the next pattern's step reads."""
    shapes = [(6, 5), (6, 5), (5,), (6, 5), (4, 3)]
    params, twins = parameters(*shapes), parameters(*shapes)
    optimizer, alone = build(name, params), [build(name, [p]) for p in twins]
    patterns = [(0, 1, 2, 3, 4), (0, 2), (1, 3), (0, 1), (3, 4), (0, 1, 2, 3, 4), (2,)]
    for t in range(28):
        for mine in (params, twins):
            set_grads(mine, seed=t)
            for i, p in enumerate(mine):
                if i not in patterns[t % 7]:
                    p.grad = None
        optimizer.step()
        for each in alone:
            each.step()
        ours = snapshot(optimizer, params)
        theirs = [snapshot(each, [p]) for each, p in zip(alone, twins, strict=True)]
        assert_identical(ours[: len(params)], [found[0] for found in theirs])
        assert_identical(ours[len(params) :], [t for found in theirs for t in found[1:]])


def test_a_gradient_of_any_floating_dtype_is_taken(name):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        params, twins = parameters(*SHAPES), parameters(*SHAPES)
        optimizer, plain = build(name, params), build(name, twins)
        for t in range(4):
            set_grads(twins, seed=t)
            for p, q in zip(params, twins, strict=True):
                p.grad = None
                p.grad_dtype = dtype
                p.grad = q.grad.to(dtype)
                q.grad = p.grad.float()
            optimizer.step()
            plain.step()
        assert_identical(snapshot(optimizer, params), snapshot(plain, twins))


@pytest.mark.parametrize("key", ["step", "average", "parameter"])
def test_state_that_nothing_may_write_or_count_is_named_before_anything_moves(name, key):
    """A tensor made in inference mode, which raises where it is written; a count of infinity."""
    params = parameters((5, 3), (5, 3))
    optimizer = build(name, [{"params": [p]} for p in params])
    run(optimizer, params, 2)
    state = optimizer.state[params[1]]
    if key == "step":
        state["step"] = torch.tensor(torch.inf)
        words = "step of parameter 0 of group 1 is inf.*pop"
    elif key == "parameter":
        with torch.inference_mode():
            params[1].data = params[1].data.clone()
        assert params[1].is_inference()
        words = r"parameter 0 of group 1 was made in torch.inference_mode\(\).*clone"
    else:
        key = next(k for k in ("square_avg", "exp_avg", "factor_0") if k in state)
        with torch.inference_mode():
            state[key] = state[key].clone()
        words = rf"{key} of parameter 0 of group 1 was made in torch.inference_mode\(\).*clone"
    before = [p.detach().clone() for p in params], optimizer.state[params[0]]["step"].clone()
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert_identical([p.detach() for p in params], before[0])
    assert optimizer.state[params[0]]["step"] == before[1]
