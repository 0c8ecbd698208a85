"""IFShampoo: the released trajectories, schedules, structures, mixed shapes, frozen factors."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.foreign import matrices_of
from helpers.golden import MATRIX, load, matrix_optimizer
from helpers.golden import factor as golden_factor
from helpers.optimizers import assert_identical, parameters, run, set_grads, snapshot

from rootfree_fused import IFShampoo, RootFreeRMSprop, reference

FLOAT64 = torch.float64


@pytest.mark.parametrize("case", MATRIX)
def test_golden(case, device):
    data, meta = load(case)
    indices = range(len(meta["shapes"]))
    params = [torch.nn.Parameter(data[f"param0.{i}"].to(device)) for i in indices]
    optimizer = matrix_optimizer(params, meta)
    assert optimizer.param_groups[0]["factor_dtype"] == FLOAT64
    for t in range(meta["steps"]):
        for i, p in enumerate(params):
            p.grad = data[f"grad.{t}.{i}"].to(device)
        optimizer.step()
        for i, p in enumerate(params):
            expected = data[f"param.{t}.{i}"]
            assert (p.detach().cpu() - expected).abs().max() <= 1e-12 * expected.abs().max()
    for i, p in enumerate(params):
        matrices = matrices_of(optimizer, p)
        for axis, matrix in enumerate(matrices):
            expected = golden_factor(data, i, axis, len(matrices))
            if expected is not None:
                assert (matrix.cpu() - expected).abs().max() <= 1e-12 * expected.abs().max()


def reference_run(shape, grads, start, *, axes, interval=1, **settings):
    """A float64 trajectory of one dense parameter by the specification."""
    factors = [torch.eye(d, dtype=FLOAT64) for d in axes]
    momenta = [torch.zeros(d, d, dtype=FLOAT64) for d in axes]
    p, buffer = start.clone(), torch.zeros_like(start)
    own = {k: settings[k] for k in ("factor_lr", "factor_momentum", "damping", "batch_size")}
    step = {k: settings[k] for k in ("lr", "momentum", "weight_decay")}
    for t, g in enumerate(grads):
        if t % interval == 0:
            reference.update_factors_(g.reshape(axes), factors, momenta, **own)
        update = reference.precondition(g.reshape(axes), factors).reshape(shape)
        reference.apply_(p, update, buffer, **step, decoupled=True)
    return p, factors


SETTINGS = {
    "lr": 0.02,
    "momentum": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.1,
    "batch_size": 8,
    "factor_lr": 0.1,
    "factor_momentum": 0.5,
    "initial_square_avg": 1.0,
}


@pytest.mark.parametrize("interval", [1, 3])
def test_merged_axes_are_a_matrix(device, interval):
    (p,) = parameters((4, 3, 2, 2), dtype=FLOAT64, device=device)
    start = p.detach().cpu().clone()
    grads = [0.3 * torch.randn(4, 3, 2, 2, dtype=FLOAT64) for _ in range(8)]
    optimizer = IFShampoo([p], update_interval=interval, **SETTINGS)
    for g in grads:
        p.grad = g.to(device)
        optimizer.step()
    expected, factors = reference_run(
        p.shape, grads, start, axes=(4, 12), interval=interval, **SETTINGS
    )
    torch.testing.assert_close(p.detach().cpu(), expected, rtol=1e-11, atol=1e-13)
    for axis, factor in enumerate(factors):
        kept = optimizer.state[p][f"factor_{axis}"].cpu()
        torch.testing.assert_close(kept, factor, rtol=1e-11, atol=1e-13)


def test_vectors_are_root_free_rmsprops(device):
    params, twins = (parameters((5,), (), dtype=FLOAT64, device=device) for _ in range(2))
    common = {
        "lr": 0.05,
        "damping": 1e-3,
        "momentum": 0.8,
        "weight_decay": 0.1,
        "batch_size": 4,
        "alpha": 0.9,
    }
    run(IFShampoo(params, **common), params, 5)
    run(RootFreeRMSprop(twins, **common), twins, 5)
    assert_identical([p.detach() for p in params], [p.detach() for p in twins])


SHAPES = [(6, 5), (6, 5), (7,), (5, 6), (3, 2, 4), (), (0, 4), (300, 3), (6, 5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FLOAT64])
def test_each_parameter_moves_as_it_does_alone(device, dtype):
    """Buckets, missing gradients and different counts change nothing for a parameter."""
    settings = {**SETTINGS, "max_dense_dim": 100, "update_interval": 2, "factor_dtype": dtype}
    base = FLOAT64 if dtype == FLOAT64 else torch.float32
    params, twins = (parameters(*SHAPES, dtype=base, device=device) for _ in range(2))
    together = IFShampoo(params, **settings)
    alone = [IFShampoo([p], **settings) for p in twins]
    for t in range(7):
        set_grads(params, seed=t)
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            if (t, i) in {(1, 0), (2, 3), (2, 0), (4, 2), (5, 8)}:
                p.grad = None
            q.grad = None if p.grad is None else p.grad.clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
    # Stacked products may round differently from single ones.
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-4, FLOAT64: 1e-11}[dtype]
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert [together.state[p]["step"].item() for p in params] == [
        optimizer.state[q]["step"].item() for optimizer, q in zip(alone, twins, strict=True)
    ]


def test_gradients_of_a_vector_and_of_a_matrix_take_turns(device):
    """As many gradients as before do not mean that they are of the same parameters."""
    params, alone = (parameters((4, 3), (5,), dtype=FLOAT64, device=device) for _ in range(2))
    optimizer = IFShampoo(params, **SETTINGS)
    singles = [IFShampoo([p], **SETTINGS) for p in alone]
    for t in range(6):
        set_grads([params[t % 2]], seed=t)
        params[1 - t % 2].grad = None
        alone[t % 2].grad = params[t % 2].grad.clone()
        optimizer.step()
        singles[t % 2].step()
        assert_identical([p.detach() for p in params], [p.detach() for p in alone])


@pytest.mark.parametrize("size", [64, 256])
def test_factors_do_not_freeze_in_bfloat16(device, size):
    """factor_lr = 0.01 moves diag(K) as in float64, where bfloat16 alone stays exactly 1."""
    (p,) = parameters((size, 32), device=device)
    optimizer = IFShampoo(
        [p],
        lr=0.0,
        batch_size=1,
        factor_lr=0.01,
        factor_dtype=torch.bfloat16,
        damping=1e-9,
        initial_square_avg=1.0,
    )
    factors = [torch.eye(d, dtype=FLOAT64) for d in (size, 32)]
    momenta = [torch.zeros(d, d, dtype=FLOAT64) for d in (size, 32)]
    frozen = torch.eye(size, dtype=torch.bfloat16)
    for t in range(100):
        g = 1e-3 * torch.randn(size, 32, generator=torch.Generator().manual_seed(t))
        p.grad = g.to(device)
        optimizer.step()
        reference.update_factors_(
            g.double(),
            factors,
            momenta,
            factor_lr=0.01,
            factor_momentum=0.5,
            damping=1e-9,
            batch_size=1,
        )
        step = 0.01 / momenta[0].norm().clamp_min(1)
        frozen -= (step * frozen.double() @ momenta[0]).bfloat16()
    state = optimizer.state[p]
    kept = reference.join(state["factor_0"], state["factor_0_residual"]).double().cpu().diag()
    truth = factors[0].diag()
    assert (frozen.diag() == 1).all()
    assert (truth > 1.02).all()
    assert ((kept - truth).abs() < 0.02 * (truth - 1)).all()


def test_training_in_bfloat16_follows_float32(device):
    """A least-squares problem: the same descent, to the precision of the products."""
    x = torch.randn(128, 24, device=device)
    y = x @ torch.randn(24, 12, device=device)

    def losses(dtype):
        (weight,) = parameters((24, 12), device=device)
        settings = {"lr": 0.05, "momentum": 0.9, "factor_lr": 0.1, "batch_size": 128}
        settings |= {"damping": 1e-3, "initial_square_avg": 1.0}
        optimizer = IFShampoo([weight], factor_dtype=dtype, **settings)
        history = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (x @ weight - y).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.detach().cpu())
        return torch.stack(history)

    low, full = losses(torch.bfloat16), losses(torch.float32)
    assert full[-1] < 0.2 * full[0]
    assert ((low - full).abs() <= 0.05 * full[0]).all()


def test_products_follow_factors_that_a_load_replaced(device):
    """Between updates K K^T is a cache: a load in the middle of an interval must renew it."""
    settings = {**SETTINGS, "update_interval": 4}
    params, twins = (parameters((12, 4), (5, 5), device=device) for _ in range(2))
    optimizer, other = IFShampoo(params, **settings), IFShampoo(twins, **settings)
    run(optimizer, params, 6)
    run(other, twins, 3)
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    run(optimizer, params, 5, first=6)
    run(other, twins, 5, first=6)
    assert_identical(snapshot(other, twins), snapshot(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("schedule", ["constant", "log4"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
def test_resume_in_the_middle_of_an_interval_is_bit_exact(device, dtype, schedule, steps):
    """Through a file, into a new optimizer: the factors in use are those of the last update."""
    settings = {**SETTINGS, "update_interval": 4, "factor_dtype": dtype}
    settings["update_schedule"] = schedule
    params = parameters((12, 4), (5, 5), (12, 4), (3, 2, 2), (7,), device=device)
    optimizer = IFShampoo(params, **settings)
    run(optimizer, params, steps)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = IFShampoo(twins, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for t in range(steps, steps + 6):
        run(optimizer, params, 1, first=t)
        run(resumed, twins, 1, first=t)
        assert_identical(snapshot(resumed, twins), snapshot(optimizer, params))


def test_factor_dtype_is_resolved_and_shown(device):
    (p,) = parameters((4, 3), device=device)
    optimizer = IFShampoo([p], batch_size=1)
    assert optimizer.param_groups[0]["factor_dtype"] in (torch.bfloat16, torch.float32)
    assert optimizer.defaults["factor_dtype"] is None


BAD = [
    ("factor_lr", -0.1, ValueError),
    ("factor_momentum", 1.0, ValueError),
    ("update_interval", 0, ValueError),
    ("update_interval", 1.5, TypeError),
    ("update_schedule", "log2", ValueError),
    ("structures", "toeplitz", ValueError),
    ("structures", (), ValueError),
    ("structures", ("dense", "toeplitz"), ValueError),
    ("structures", ("dense", "dense", "dense"), ValueError),
    ("max_dense_dim", 0, ValueError),
    ("merge_axes", 1, ValueError),
    ("merge_axes", (0, 1), ValueError),
    ("merge_axes", ((0, 1), ()), ValueError),
    ("merge_axes", ((0, True),), ValueError),
    ("batch_axes", -1, ValueError),
    ("vector_method", "adam", ValueError),
    ("factor_dtype", torch.float16, ValueError),
    ("factor_dtype", "bfloat16", ValueError),
    ("alpha", 2.0, ValueError),
    ("batch_size", None, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_a_bad_setting_is_named_and_nothing_is_added(name, value, error):
    first, second = parameters((4, 3), (4, 3))
    with pytest.raises(error, match=f"^{name} is .*; "):
        IFShampoo([first], **{"batch_size": 8, name: value})
    if value is None:
        return
    optimizer = IFShampoo([first], batch_size=8)
    with pytest.raises(error, match=f"^{name} is .*; "):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == {first}


def test_an_unsupported_structure_lists_what_is_supported():
    for structure in ("blocks", "block0diagonal", "hierarchical0_0", None, ("dense", 3)):
        with pytest.raises(
            ValueError,
            match=r"'auto', 'dense', 'diagonal', 'dense_or_diagonal', 'block', .* triltoeplitz",
        ):
            IFShampoo(parameters((4, 3)), batch_size=8, structures=structure)


def test_a_changed_factor_dtype_on_load_changes_nothing(device):
    params = parameters((4, 3), device=device)
    optimizer = IFShampoo(params, batch_size=8, factor_dtype=torch.bfloat16)
    run(optimizer, params, 2)
    before = snapshot(optimizer, params)
    other = IFShampoo(parameters((4, 3), device=device), batch_size=8, factor_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"factor_dtype .*bfloat16 but .*float32; build"):
        optimizer.load_state_dict(other.state_dict())
    assert_identical(snapshot(optimizer, params), before)
    assert optimizer.param_groups[0]["factor_dtype"] == torch.bfloat16


def test_factor_dtype_is_saved_by_name_and_loads_by_either():
    """torch.distributed gathers no group that has a dtype in it."""
    params = parameters((4, 3))
    optimizer = IFShampoo(params, batch_size=8, factor_dtype=torch.bfloat16)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["factor_dtype"] == "bfloat16"
    for dtype in ("bfloat16", torch.bfloat16):
        saved["param_groups"][0]["factor_dtype"] = dtype
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["factor_dtype"] == torch.bfloat16
    for wrong in ("float32", "float7", ["bfloat16"]):
        saved["param_groups"][0]["factor_dtype"] = wrong
        with pytest.raises(ValueError, match="factor_dtype"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ({"merge_axes": False, "vector_method": "factor"}, {}),
        ({}, {"merge_axes": False, "vector_method": "factor"}),
        ({"structures": "diagonal"}, {}),
        ({"max_dense_dim": 4}, {"structures": "diagonal"}),
    ],
)
def test_a_checkpoint_brings_the_settings_that_its_shapes_come_from(saved, loading, device):
    """Whatever the optimizer was built with, it has run and it goes on as the saved one."""
    shapes = (6, 5), (7,), (3, 4, 2), (6, 5)
    params = parameters(*shapes, device=device)
    settings = {"batch_size": 8, "factor_dtype": torch.bfloat16}
    optimizer = IFShampoo(params, **settings, **saved)
    run(optimizer, params, 3)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = IFShampoo(twins, **settings, **loading)
    run(resumed, twins, 2)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    resumed.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 2, first=3)
    run(resumed, twins, 2, first=3)
    assert_identical(snapshot(resumed, twins), snapshot(optimizer, params))
    assert resumed.param_groups[0]["merge_axes"] is optimizer.param_groups[0]["merge_axes"]


def test_a_long_step_of_a_large_factor_is_cut_to_factor_lr(device):
    """K - I is factor_lr m / ||m||; a norm that adds a million squares in a row is 1e-5 off."""
    (param,) = parameters((1024, 8), device=device)
    settings = {"batch_size": 1e4, "factor_lr": 0.4, "factor_dtype": torch.float32}
    optimizer = IFShampoo([param], initial_square_avg=1.0, **settings)
    run(optimizer, [param], 1)
    factor = optimizer.state[param]["factor_0"].double()
    way = (factor - torch.eye(1024, device=device)).norm().item()
    assert way == pytest.approx(0.4, rel=2e-6)
