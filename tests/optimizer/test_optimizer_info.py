"""Our classes as torch's own test machinery describes optimizers, with bodies of our own.

torch ships `OptimizerInfo` and its error inputs; the tests that use them (test/test_optim.py) it
does not ship, and some of them step with zero gradients, or never with a Tensor lr.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers.comparison import assert_no_worse_than
from helpers.optimizers import assert_identical, run, set_grads, snapshot
from helpers.truth import stepped

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop

pytest.importorskip("expecttest")  # which torch's test machinery imports
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

SHARED = (
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"capturable": True},
    {"lr": torch.tensor(0.01), "capturable": True},
    {"lr": torch.tensor(0.01), "damping": 0.1},
)
OWN = {
    RootFreeRMSprop: (
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.1, "weight_decay_mode": "momentum"},
        {"alpha": 0.5},
    ),
    RootFreeAdamW: ({"betas": (0.8, 0.95)}, {"bias_correction": True}),
    IFShampoo: (
        {"momentum": 0.0},
        {"update_interval": 3, "update_schedule": "log4"},
        {"structures": "diagonal", "vector_method": "factor"},
        {"factor_dtype": torch.float32, "max_dense_dim": 16},
    ),
}
# (settings, what the error says)
ERRORS = {
    RootFreeRMSprop: (({"alpha": 1.5}, "alpha is 1.5"),),
    RootFreeAdamW: (({"betas": (1.0, 0.9)}, r"betas is \(1.0, 0.9\)"),),
    IFShampoo: (({"factor_lr": -1.0}, "factor_lr is -1.0"),),
}
SHARED_ERRORS = (
    ({"lr": -0.1}, "lr is -0.1"),
    ({"lr": math.nan}, "lr is nan"),
    ({"damping": -1.0}, "damping is -1.0"),
    ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": None}, "batch_size is missing"),
)


def inputs(cls):
    def optim_inputs(device, dtype=None):
        return [
            OptimizerInput(params=None, kwargs={"batch_size": 8, **kwargs}, desc=str(kwargs))
            for kwargs in SHARED + OWN[cls]
        ]

    return optim_inputs


def error_inputs(cls):
    def optim_error_inputs(device, dtype):
        shared = get_error_inputs_for_all_optims(device, dtype)
        for error in shared:
            settings = error.optimizer_error_input.kwargs
            settings.setdefault("batch_size", 8)
            if error.error_regex == "Tensor lr must be 1-element":
                error.error_regex = r"lr is a torch.float32 tensor of shape \(2,\)"
        own = [
            ErrorOptimizerInput(
                OptimizerInput(params=None, kwargs={"batch_size": 8, **kwargs}, desc=words),
                error_type=ValueError,
                error_regex=words,
            )
            for kwargs, words in SHARED_ERRORS + ERRORS[cls]
        ]
        sparse = torch.nn.Parameter(torch.ones(4, 3, device=device, dtype=dtype))
        sparse.grad = torch.ones_like(sparse).to_sparse()
        at_step = ErrorOptimizerInput(
            OptimizerInput(params=[sparse], kwargs={"batch_size": 8}, desc="a sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=TypeError,
            error_regex="sparse=False",
        )
        return [*shared, *own, at_step]

    return optim_error_inputs


INFOS = [
    OptimizerInfo(
        cls,
        optim_inputs_func=inputs(cls),
        optim_error_inputs_func=error_inputs(cls),
        supported_impls=(),  # one body a device: no foreach, fused or differentiable to choose
        not_og_supported_flags=(),
        has_capturable_arg=True,
        supports_complex=False,
    )
    for cls in OWN
]


CASES = [
    pytest.param(info, config.kwargs, id=f"{info.name}-{config.desc}")
    for info in INFOS
    for config in _get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info)
]


def leaves(device, dtype=torch.float32, seed=0):
    """Larger than one vector register or tile, and with a tail."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (67, 35), (1031,), (3, 5, 3, 3), ()
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes
    ]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_error_inputs(info, device):
    for error in info.optim_error_inputs_func(device, torch.float32):
        case = error.optimizer_error_input
        params = leaves(device) if case.params is None else case.params

        def make(params=params, kwargs=case.kwargs):
            return info.optim_cls(params, **kwargs)

        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                make().step()
        elif issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                make()
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                make()


@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_a_tensor_lr_steps_as_a_float_does(info, kwargs, device):
    """In float64, where no rounding of lr can hide; the tensor is not written."""
    params, twins = (leaves(device, torch.float64) for _ in range(2))
    lr = torch.tensor(0.03, dtype=torch.float64, device=device)
    by_tensor = info.optim_cls(params, **{**kwargs, "lr": lr})
    by_float = info.optim_cls(twins, **{**kwargs, "lr": 0.03})
    before = [p.detach().clone() for p in params]
    for t in range(4):
        run(by_tensor, params, 1, first=t)
        run(by_float, twins, 1, first=t)
        assert_identical(snapshot(by_tensor, params), snapshot(by_float, twins))
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert lr.item() == 0.03
    assert by_tensor.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_a_group_steps_as_a_loop_of_the_specification(info, kwargs, dtype, device):
    """torch's fused-against-loop, with gradients that are not zero, on tensors with tails."""
    params = leaves(device, dtype)
    own = {"factor_dtype": torch.float32} if info.optim_cls is IFShampoo else {}
    optimizer = info.optim_cls(params, **{**kwargs, **own})
    group = {**optimizer.param_groups[0], "lr": float(optimizer.param_groups[0]["lr"])}
    for t in range(3):
        set_grads(params, seed=t)
        loops = [
            [stepped(info.optim_cls, p, optimizer.state[p], group, to) for p in params]
            for to in (None, torch.float64)
        ]
        optimizer.step()
        for p, eager, truth in zip(params, *loops, strict=True):
            ours = {"param": p.detach(), **optimizer.state[p]}
            assert ours.keys() == truth.keys()
            assert ours.pop("step") == t + 1
            for key, value in ours.items():  # 8: sums of up to 67 products in another order
                assert_no_worse_than(value, eager[key], truth[key], factor=8)


@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_it_goes_in_the_right_direction_under_its_schedulers(info, kwargs, device):
    """Least squares, which it must come nearer to, or with maximize, further from."""
    for build_schedulers in info.scheduler_inputs:
        torch.manual_seed(0)
        layer = torch.nn.Linear(10, 5).to(device)
        x, y = torch.randn(8, 10, device=device), torch.randn(8, 5, device=device)
        settings = {**kwargs, "lr": copy.copy(kwargs.get("lr", 0.01))}
        optimizer = info.optim_cls(layer.parameters(), **settings)
        schedulers = [build(optimizer) for build in build_schedulers]
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(x) - y).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss.item()] if plateau else []))
        assert (losses[-1] > losses[0]) is settings.get("maximize", False)


@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_public_attributes_and_state_survive_a_deepcopy_and_a_load(info, kwargs, device):
    params, twins = leaves(device), leaves(device)
    optimizer = info.optim_cls(params, **kwargs)
    run(optimizer, params, 2)

    def public(of):
        return {name for name in dir(of) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)
    resumed = info.optim_cls(twins, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    run(optimizer, params, 2, first=2)
    run(resumed, twins, 2, first=2)
    assert_identical(snapshot(resumed, twins), snapshot(optimizer, params))
