"""Training that sirfshampoo or the released code began, continued by ours."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import golden
from helpers.foreign import Released, as_released_diagonal, as_released_shampoo, as_sirfshampoo
from helpers.golden import TOLERANCE, load
from helpers.optimizers import assert_identical, parameters, run, set_grads, snapshot

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop
from rootfree_fused.convert import from_released_code, from_sirfshampoo

FLOAT64 = torch.float64
DENSE = [case for case in golden.MATRIX if load(case)[1]["structure"] == "dense"]
CONSTANT = [case for case in golden.MATRIX if case != "ifshampoo_log4_schedule"]
LOG4 = [case for case in DENSE if case != "ifshampoo_interval3"]


# Trajectories


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def follow(optimizer, params, data, steps, tolerance):
    """Take the trajectory's steps; after each, the parameters must be the trajectory's."""
    for t in steps:
        for i, p in enumerate(params):
            p.grad = data[f"grad.{t}.{i}"].to(p.device)
        optimizer.step()
        for i, p in enumerate(params):
            expected = data[f"param.{t}.{i}"]
            assert (p.detach().cpu() - expected).abs().max() <= tolerance * expected.abs().max()


def begun(case, build, device, steps):
    """A trajectory's first steps, by ours, which other tests hold to the released numbers."""
    data, meta = load(case)
    first = [data[f"param0.{i}"].to(device) for i in range(len(meta["shapes"]))]
    params = [torch.nn.Parameter(p) for p in first]
    optimizer = build(params, meta)
    tolerance = TOLERANCE[meta["dtype"]]
    follow(optimizer, params, data, range(steps), tolerance)
    return (
        optimizer,
        params,
        lambda o, p: follow(o, p, data, range(steps, meta["steps"]), tolerance),
    )


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("case", golden.DIAGONAL)
def test_a_released_diagonal_trajectory_goes_on(case, steps, device):
    before, params, go_on = begun(case, golden.diagonal_optimizer, device, steps)
    (group,) = before.param_groups
    own = {"batch_size": group["batch_size"]}
    if isinstance(before, RootFreeAdamW):
        own["bias_correction"] = group["bias_correction"]
    params = copies(params)
    optimizer = type(before)(params, **own)
    source = as_released_diagonal(before)
    if steps == 0:
        source["state"] = {}  # as it is before the first step
    else:
        counted = type(before)(params, **own | {"batch_size": "counted"})
        with pytest.raises(ValueError, match="batch_size is 'counted', by which v cannot"):
            from_released_code(source, counted)
    optimizer.load_state_dict(from_released_code(source, optimizer))
    go_on(optimizer, params)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("case", LOG4)
def test_a_released_if_shampoo_trajectory_goes_on(case, steps, device):
    before, params, go_on = begun(case, golden.matrix_optimizer, device, steps)
    optimizer = IFShampoo(params, batch_size=1)
    optimizer.load_state_dict(from_released_code(as_released_shampoo(before), optimizer))
    go_on(optimizer, params)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("case", CONSTANT)
def test_a_sirfshampoo_trajectory_goes_on(case, steps, device):
    before, params, go_on = begun(case, golden.matrix_optimizer, device, steps)
    params = copies(params)
    optimizer = IFShampoo(params, batch_size=1)
    optimizer.load_state_dict(from_sirfshampoo(as_sirfshampoo(before), optimizer))
    go_on(optimizer, params)


@pytest.mark.parametrize("source", ["optimizer", "file"])
@pytest.mark.parametrize("settings", [{}, {"T": 3, "alpha1": 0.0}, {"T": 2, "kappa": 0.1}])
def test_what_sirfshampoo_itself_began_goes_on(settings, source):
    """In the middle of an interval, from the optimizer and from a file."""
    sirfshampoo = pytest.importorskip("sirfshampoo")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            shapes = [(6, 5), (7,), (), (3, 2, 4), (5, 1, 4)]
            self.params = torch.nn.ParameterList(parameters(*shapes, dtype=FLOAT64))

    model = Model()
    params = list(model.parameters())
    theirs = sirfshampoo.SIRFShampoo(model, lr=0.02, beta2=0.1, batch_size=8, **settings)
    run(theirs, params, 4)
    others = copies(params)
    if source == "file":
        file = io.BytesIO()
        torch.save(theirs.state_dict(), file)
        file.seek(0)
        optimizer = IFShampoo(others, batch_size=1)
        state_dict = from_sirfshampoo(torch.load(file, weights_only=False), optimizer)
    else:
        optimizer = IFShampoo(params, batch_size=1)
        state_dict = from_sirfshampoo(theirs, optimizer)
        optimizer = IFShampoo(others, batch_size=1)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["batch_size"] == 8
    for t in range(5):
        run(theirs, params, 1, first=4 + t)
        run(optimizer, others, 1, first=4 + t)
        for p, q in zip(others, params, strict=True):
            assert ((p - q).abs() <= 1e-12 * q.abs().max()).all()


# What comes along


def released(steps=3, **settings):
    """A float64 IFShampoo with the released settings after some steps."""
    params = parameters((4, 3), (5,), (3, 2, 2), dtype=FLOAT64)
    optimizer = IFShampoo(
        params,
        batch_size=8,
        structures="dense",
        merge_axes=False,
        vector_method="factor",
        weight_decay_mode="momentum",
        factor_lr=0.4,
        **settings,
    )
    run(optimizer, params, steps)
    return optimizer, params


def test_names_that_the_released_code_slows_down_have_a_group_of_their_own():
    """lr_cov is a quarter for names with norm, proj or bias; the order of parameters is free."""
    before, params = released(update_schedule="log4", update_interval=3)
    source = as_released_shampoo(before, names=["head", "head.bias", "conv"])
    with pytest.raises(
        ValueError, match=r"parameters 0 and 1 of group 0 had factor_lr 0.4 and 0.1"
    ):
        from_released_code(source, IFShampoo(params, batch_size=1))
    groups = [{"params": [params[2], params[0]]}, {"params": [params[1]]}]
    optimizer = IFShampoo(groups, batch_size=1)
    optimizer.load_state_dict(from_released_code(source, optimizer))
    assert [group["factor_lr"] for group in optimizer.param_groups] == [0.4, 0.1]
    assert [group["update_schedule"] for group in optimizer.param_groups] == ["log4"] * 2
    assert_identical(snapshot(optimizer, params), snapshot(before, params))


@pytest.mark.parametrize(
    ("attributes", "batch_size"),
    [
        ({"batch_averaged": True}, 32),
        ({"batch_averaged": False}, 1),
        ({"batch_averaged": True, "dummy_scaling": True}, 1),
    ],
)
def test_a_released_optimizer_says_what_its_state_dict_does_not(attributes, batch_size):
    (param,) = parameters((3,))
    v = torch.tensor([1.0, 2.0, 3.0])
    state = {"step": 2, "exp_avg": v, "exp_avg_sq": v}
    group = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.0, "params": [param]}
    attributes = {"batch_size": 32, "bias_correction": True, **attributes}
    optimizer = RootFreeAdamW([param], batch_size=5)
    source = Released([group], {param: state}, **attributes)
    optimizer.load_state_dict(from_released_code(source, optimizer))
    assert optimizer.param_groups[0]["batch_size"] == batch_size
    assert optimizer.param_groups[0]["bias_correction"] is True
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], v * batch_size)
    assert optimizer.state[param]["step"] == 2


def test_a_bfloat16_second_moment_is_scaled_in_float32():
    (param,) = parameters((3,))
    v = torch.tensor([1.0078125, 2.0, 3.0], dtype=torch.bfloat16)  # 8 bits, and 3 more with 5
    group = {"lr": 0.1, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.0, "momentum": 0.0}
    source = {
        "state": {0: {"step": 1, "square_avg": v}},
        "param_groups": [{**group, "params": [0]}],
    }
    optimizer = RootFreeRMSprop([param], batch_size=5)
    optimizer.load_state_dict(from_released_code(source, optimizer))
    assert torch.equal(optimizer.state[param]["square_avg"], 5 * v.float())


def test_batches_that_sirfshampoo_counted_are_left_to_the_optimizer():
    before, params = released()
    source = {**as_sirfshampoo(before), "batch_size": 3, "batch_size_valid": 3}
    optimizer = IFShampoo(params, batch_size=100)
    optimizer.load_state_dict(from_sirfshampoo(source, optimizer))
    assert optimizer.param_groups[0]["batch_size"] == 100


def test_a_conversion_is_a_checkpoint_and_schedulers_go_on():
    """It passes through a file; its lr and that of the schedule's start are the source's."""
    before, params = released(lr=0.02)
    source = as_sirfshampoo(before)
    for group in source["param_groups"]:
        group["initial_lr"] = 0.08
    optimizer = IFShampoo(params, batch_size=1, capturable=True)
    fresh = snapshot(optimizer, params)
    file = io.BytesIO()
    torch.save(from_sirfshampoo(source, optimizer), file)
    assert_identical(snapshot(optimizer, params), fresh)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["capturable"] is True
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, last_epoch=2)
    assert scheduler.base_lrs == [0.08]
    assert_identical(snapshot(optimizer, params), snapshot(before, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_of_fewer_bits_are_taken_as_they_are(dtype):
    """bfloat16 into bfloat16 and float32; what would lose bits is refused, with the cure."""
    before, params = released()
    source = as_sirfshampoo(before)
    for matrix in (
        m for key in ("", "_momenta") for ms in source[f"preconditioner{key}"] for m in ms
    ):
        matrix.dense = matrix.dense.to(dtype)
    params = [torch.nn.Parameter(p.detach().float()) for p in params]
    for state in source["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    for factor_dtype in (torch.bfloat16, torch.float32):
        optimizer = IFShampoo(params, batch_size=1, factor_dtype=factor_dtype)
        if torch.promote_types(dtype, factor_dtype) != factor_dtype:
            with pytest.raises(ValueError, match=r"with factor_dtype=torch\.float32"):
                from_sirfshampoo(source, optimizer)
            continue
        optimizer.load_state_dict(from_sirfshampoo(source, optimizer))
        kept = optimizer.state[params[0]]
        assert kept["factor_1"].dtype == factor_dtype
        assert torch.equal(kept["factor_1"], source["preconditioner"][0][1].dense.to(factor_dtype))
        set_grads(params, seed=0)
        optimizer.step()


# What cannot be converted


def test_what_sirfshampoo_has_and_ours_does_not_is_refused():
    before, params = released()
    source = as_sirfshampoo(before)
    optimizer = IFShampoo(params, batch_size=1)
    fresh = snapshot(optimizer, params)

    def with_group(**changes):
        first, *rest = source["param_groups"]
        return {**source, "param_groups": [{**first, **changes}, *rest]}

    def without(key):
        return {k: v for k, v in source.items() if k != key}

    broken = {
        "T of group 0 is a function": with_group(T=lambda step: True),
        "has the structures .'trilsparse'.": with_group(structures=("dense", "trilsparse")),
        "share factors": with_group(params=[0, 1]),
        "no T, alpha1, .*; pass an optimizer of the class": {
            **source,
            "param_groups": [{"params": [i]} for i in range(3)],
        },
        "no 'preconditioner'": without("preconditioner"),
        "no 'global_step'": without("global_step"),
        "without state; pass what": without("state"),
        "has 2 parameters but the optimizer has 3": {
            **source,
            "param_groups": source["param_groups"][:2],
        },
        "has 1 factors, but one of shape .4, 3. has 2": {
            **source,
            "preconditioner": [fs[:1] for fs in source["preconditioner"]],
            "preconditioner_momenta": [fs[:1] for fs in source["preconditioner_momenta"]],
        },
        "parameters 0 and 1 of group 0 had lr 0.5": with_group(lr=0.5),
    }
    for words, state_dict in broken.items():
        with pytest.raises(ValueError, match=words):
            from_sirfshampoo(state_dict, optimizer)
    swapped = {**source, "preconditioner": [fs[::-1] for fs in source["preconditioner"]]}
    with pytest.raises(ValueError, match=r"factor_0 has shape \(3, 3\)"):
        optimizer.load_state_dict(from_sirfshampoo(swapped, optimizer))
    with pytest.raises(TypeError, match="pass an IFShampoo"):
        from_sirfshampoo(source, RootFreeAdamW(params, batch_size=1))
    assert_identical(snapshot(optimizer, params), fresh)


def test_what_the_released_if_shampoo_cannot_hand_over_is_refused():
    before, params = released(steps=20, update_schedule="log4", update_interval=3)
    optimizer = IFShampoo(params, batch_size=1)
    source = as_released_shampoo(before)
    from_released_code(source, optimizer)
    with pytest.raises(ValueError, match=r"next at step 99, but .* that is step 21"):
        from_released_code(as_released_shampoo(before, next_step=99), optimizer)
    with pytest.raises(TypeError, match="pass the LocalOptimizer_GGT itself"):
        from_released_code(source.state_dict(), optimizer)
    others = parameters((4, 3), (5,), (3, 2, 2), dtype=FLOAT64)
    with pytest.raises(ValueError, match="has other parameters than the optimizer"):
        from_released_code(source, IFShampoo(others, batch_size=1))
    with pytest.raises(ValueError, match="is a SGD, without params_list"):
        from_released_code(torch.optim.SGD(params), optimizer)


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_what_is_not_of_the_released_class_is_refused(cls):
    params = parameters((3,))
    optimizer = cls(params, batch_size=8)
    run(optimizer, params, 1)
    source = as_released_diagonal(optimizer)
    other = {RootFreeRMSprop: RootFreeAdamW, RootFreeAdamW: RootFreeRMSprop}[cls]
    with pytest.raises(ValueError, match=r"no (alpha|betas)"):
        from_released_code(source, other(params, batch_size=8))
    lost = copy.deepcopy(source)
    del lost["state"][0]["exp_avg_sq" if cls is RootFreeAdamW else "square_avg"]
    with pytest.raises(ValueError, match=r"without (exp_avg_sq|square_avg)"):
        from_released_code(lost, optimizer)
    rooted = {RootFreeRMSprop: torch.optim.RMSprop, RootFreeAdamW: torch.optim.AdamW}[cls](params)
    run(rooted, params, 1)
    with pytest.raises(ValueError, match="divides by a root"):
        from_released_code(rooted.state_dict(), optimizer)
    with pytest.raises(ValueError, match=f"is a {type(rooted).__name__}, without batch_averaged"):
        from_released_code(rooted, optimizer)
    with pytest.raises(TypeError, match="pass one of rootfree_fused"):
        from_released_code(source, rooted)
