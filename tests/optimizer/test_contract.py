"""What torch.optim's users do with an optimizer besides stepping it, for every optimizer."""

from __future__ import annotations

import copy
import inspect
import weakref

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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR

pytestmark = pytest.mark.parametrize("name", SETTINGS)
SHAPES = [(7, 5), (11,), (), (3, 4, 2)]

# Schedulers

SCHEDULERS = {
    schedulers.LambdaLR: lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    schedulers.MultiplicativeLR: lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.8),
    schedulers.StepLR: lambda o: schedulers.StepLR(o, step_size=2),
    schedulers.MultiStepLR: lambda o: schedulers.MultiStepLR(o, [1, 3]),
    schedulers.ConstantLR: lambda o: schedulers.ConstantLR(o, total_iters=3),
    schedulers.LinearLR: lambda o: schedulers.LinearLR(o, total_iters=4),
    schedulers.ExponentialLR: lambda o: schedulers.ExponentialLR(o, gamma=0.7),
    schedulers.SequentialLR: lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.ExponentialLR(o, gamma=0.7)], milestones=[3]
    ),
    schedulers.PolynomialLR: lambda o: schedulers.PolynomialLR(o, total_iters=4),
    schedulers.CosineAnnealingLR: lambda o: schedulers.CosineAnnealingLR(o, T_max=4),
    schedulers.ChainedScheduler: lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, gamma=0.9)], o
    ),
    schedulers.ReduceLROnPlateau: lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    schedulers.CyclicLR: lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    schedulers.CosineAnnealingWarmRestarts: lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    schedulers.OneCycleLR: lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=8),
    SWALR: lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


def test_no_scheduler_of_torch_is_forgotten(name):
    found = {
        cls
        for cls in vars(schedulers).values()
        if inspect.isclass(cls) and issubclass(cls, schedulers.LRScheduler)
    }
    assert found - set(SCHEDULERS) == {schedulers.LRScheduler, schedulers._LRScheduler}


def advance(scheduler):
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


@pytest.mark.parametrize("lr", ["float", "tensor"])
@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_every_scheduler_sets_what_the_step_reads(name, cls, lr, device):
    """As torch's own optimizer under it, and as one whose settings are written by hand."""
    lr = torch.tensor(0.05, dtype=torch.float64, device=device) if lr == "tensor" else 0.05
    params, twins, others = (parameters(*SHAPES, device=device) for _ in range(3))
    scheduled = build(name, params, lr=copy.copy(lr))
    by_hand = build(name, twins)
    if "betas" in scheduled.defaults:
        theirs = torch.optim.AdamW(others, lr=0.05, betas=scheduled.defaults["betas"])
    else:
        momentum = scheduled.defaults.get("momentum", 0.9)
        theirs = torch.optim.SGD(others, lr=0.05, momentum=momentum)
    cycles = {"momentum", "betas"} & scheduled.defaults.keys()
    if not cycles and cls in (schedulers.CyclicLR, schedulers.OneCycleLR):
        with pytest.raises(ValueError, match="cycle_momentum"):
            SCHEDULERS[cls](scheduled)
        return
    ours, reference = SCHEDULERS[cls](scheduled), SCHEDULERS[cls](theirs)
    for t in range(7):
        for key in cycles:
            if key in theirs.param_groups[0]:
                by_hand.param_groups[0][key] = theirs.param_groups[0][key]
        by_hand.param_groups[0]["lr"] = theirs.param_groups[0]["lr"]
        for optimizer, own in ((scheduled, params), (by_hand, twins), (theirs, others)):
            run(optimizer, own, 1, first=t)
        assert_identical([p.detach() for p in params], [p.detach() for p in twins])
        advance(ours)
        advance(reference)
    ended = float(scheduled.param_groups[0]["lr"])
    assert ended == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


# Hooks


def test_hooks_run_in_order_and_may_replace_arguments_and_results(name, device):
    params = parameters((3,), device=device)
    optimizer = build(name, params)
    calls = []

    def note(call, result=None):
        return lambda *_: calls.append(call) or result

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre", ((optimizer,), {"closure": lambda: 7.0}))),
        optimizer.register_step_post_hook(note("post")),
    ]
    set_grads(params, seed=0)
    try:
        assert optimizer.step() == 7.0
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"]


def test_state_dict_hooks_run_in_order_and_see_what_is_saved(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)
    run(optimizer, params, 2)
    calls = []

    def saving(o):
        calls.append("saving")
        o.param_groups[0]["momentum"] = 0.5  # needs state that not all have

    def first(o, state_dict):
        calls.append("first")
        if name.startswith(("rmsprop", "ifshampoo")):
            assert all("momentum_buffer" in state for state in state_dict["state"].values())
        for state in state_dict["state"].values():
            for value in state.values():
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()

    def wrap(o, state_dict):
        calls.append("wrap")
        return {"optimizer": state_dict}

    def unwrap(o, state_dict):
        calls.append("unwrap")
        return state_dict["optimizer"]

    optimizer.register_state_dict_pre_hook(saving)
    optimizer.register_state_dict_post_hook(wrap)
    optimizer.register_state_dict_post_hook(first, prepend=True)
    optimizer.register_load_state_dict_pre_hook(unwrap)
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("loading"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    saved = copy.deepcopy(optimizer.state_dict())
    assert list(saved) == ["optimizer"]
    before = snapshot(optimizer, params)
    run(optimizer, params, 1, first=2)
    optimizer.load_state_dict(saved)
    assert calls == ["saving", "first", "wrap", "loading", "unwrap", "loaded"]
    assert_identical(snapshot(optimizer, params)[len(params) :], before[len(params) :])


# Gradients


def test_zero_gradients_move_no_parameter(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params, weight_decay=0.0)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        optimizer.step()
    assert_identical([p.detach() for p in params], before)
    assert [optimizer.state[p]["step"].item() for p in params] == [3] * len(params)
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.isfinite(value).all() for value in tensors)


def test_no_gradient_is_kept_alive_by_a_step(name, device):
    """Nor its memory, which a view would hold."""
    params = parameters(*SHAPES, (7, 5), device=device)
    optimizer = build(name, params)
    for t in range(3):  # the first step plans, later ones use the plan
        set_grads(params, seed=t)
        grads = [weakref.ref(p.grad) for p in params]
        storages = [StorageWeakRef(p.grad.untyped_storage()) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        assert [grad() for grad in grads] == [None] * len(params)
        assert all(storage.expired() for storage in storages)


def test_one_optimizer_a_parameter_may_step_inside_backward(name, device):
    """As in torch's tutorial: no gradient outlives its parameter's accumulation."""

    def build_model():
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        model = torch.nn.Sequential(*layers).to(device)
        return model, {p: build(name, [p]) for p in model.parameters()}

    def step_and_free(param):
        inside[param].step()
        inside[param].zero_grad()

    (model, inside), (twin, after) = build_model(), build_model()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_and_free)
    x = torch.randn(8, 6, device=device)
    for _ in range(4):
        model(x).square().mean().backward()
        twin(x).square().mean().backward()
        for optimizer in after.values():
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert_identical(
        [p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()]
    )


# Copies and checkpoints


def test_a_copy_with_its_model_steps_the_copied_model(name, device):
    model = torch.nn.Linear(5, 4, device=device)
    optimizer = build(name, model.parameters())
    run(optimizer, list(model.parameters()), 2)
    twin, other = copy.deepcopy((model, optimizer))
    run(optimizer, list(model.parameters()), 2, first=2)
    run(other, list(twin.parameters()), 2, first=2)
    assert_identical(
        snapshot(other, list(twin.parameters())), snapshot(optimizer, list(model.parameters()))
    )


@pytest.mark.parametrize("names", ["saved", "loaded"])
def test_named_and_unnamed_checkpoints_are_interchangeable(name, names, device):
    def make(seed, named):
        params = parameters(*SHAPES, device=device, seed=seed)
        given = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
        return build(name, given), params

    optimizer, params = make(0, names == "saved")
    resumed, others = make(1, names == "loaded")
    run(optimizer, params, 3)
    run(resumed, others, 1)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    run(optimizer, params, 2, first=3)
    run(resumed, others, 2, first=3)
    assert_identical(snapshot(resumed, others), snapshot(optimizer, params))
    assert resumed.param_groups[0]["param_names"] == [f"p{i}" for i in range(len(params))]


def test_keys_of_a_checkpoint_do_not_depend_on_steps_and_gradients(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)

    def keys():
        saved = optimizer.state_dict()
        return [list(saved["state"][i]) for i in range(len(params))], list(saved["param_groups"][0])

    before = keys()
    for missing in ((), (0, 2), range(len(params))):
        set_grads(params, seed=0)
        for i in missing:
            params[i].grad = None
        optimizer.step()
        assert keys() == before


def test_a_checkpoint_of_another_class_here_is_refused(name, device):
    params = parameters(*SHAPES, device=device)
    optimizer = build(name, params)
    run(optimizer, params, 1)
    before = snapshot(optimizer, params)
    for other, (cls, _) in SETTINGS.items():
        if cls is not type(optimizer):
            saved = build(other, parameters(*SHAPES, device=device)).state_dict()
            with pytest.raises(
                ValueError, match=f"load a checkpoint of {type(optimizer).__name__}"
            ):
                optimizer.load_state_dict(saved)
            assert_identical(snapshot(optimizer, params), before)
