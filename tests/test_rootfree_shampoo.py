"""RootFreeShampoo: the specification's trajectories, schedules, mixed parameters, bad input."""

from __future__ import annotations

import io
import re

import pytest
import torch
from helpers.golden import GOLDEN, load, rootfree_update_rms
from helpers.optimizers import assert_identical, parameters, run, set_grads, snapshot
from helpers.truth import start, step_

from rootfree_fused import BatchSizeCounter, RootFreeShampoo
from rootfree_fused.reference.structures import structure_of

FLOAT64 = torch.float64
CASES = sorted(path.stem for path in (GOLDEN / "rootfree_shampoo").glob("*.npz"))
SHAPES = [(6, 5), (6, 5), (7,), (5, 6), (3, 2, 4), (), (0, 4), (40, 3), (6, 5)]
NAN, INF = float("nan"), float("inf")


def golden_optimizer(params, meta):
    names = RootFreeShampoo([torch.zeros(2)]).param_groups[0].keys() - {"params"}
    groups = {}
    for p in params:
        groups.setdefault(rootfree_update_rms(p.shape, meta), []).append(p)
    return RootFreeShampoo(
        [{"params": of_shape, "update_rms": rms} for rms, of_shape in groups.items()],
        **{key: meta[key] for key in names & meta.keys()},
    )


@pytest.mark.parametrize("case", CASES)
def test_golden(case, device):
    data, meta = load(f"rootfree_shampoo/{case}")
    indices = range(len(meta["shapes"]))
    params = [torch.nn.Parameter(data[f"param0.{i}"].to(device)) for i in indices]
    optimizer = golden_optimizer(params, meta)
    assert optimizer.param_groups[0]["factor_dtype"] == FLOAT64
    for t in range(meta["steps"]):
        for i, p in enumerate(params):
            p.grad = data[f"grad.{t}.{i}"].to(device)
        optimizer.step()
        for i, p in enumerate(params):
            expected = data[f"param.{t}.{i}"]
            assert (p.detach().cpu() - expected).abs().max() <= 1e-12 * expected.abs().max()
    for i, p in enumerate(params):
        for axis in range(2 if "gram_0" in optimizer.state[p] else 0):
            for key, name in ((f"gram_{axis}", "S"), (f"factor_{axis}", "K")):
                expected = data[f"{name}.{axis}.{i}"]
                actual = optimizer.state[p][key].cpu()
                assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


class Truth:
    """The same parameters by the specification, one at a time."""

    def __init__(self, optimizer):
        self.group = optimizer.param_groups[0]
        self.twins = [p.detach().cpu().clone() for p in self.group["params"]]
        self.states = [start(RootFreeShampoo, p, self.group, FLOAT64) for p in self.twins]

    def step(self):
        """One step; what has no gradient stays."""
        for p, twin, state in zip(self.group["params"], self.twins, self.states, strict=True):
            if p.grad is not None:
                step_(RootFreeShampoo, twin, p.grad.cpu(), state, self.group)

    def check(self):
        for p, twin in zip(self.group["params"], self.twins, strict=True):
            torch.testing.assert_close(p.detach().cpu(), twin, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("vector_method", ["adam", "rootfree"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update_interval": 3},
        {"max_dense_dim": 5},
        {"structures": "diagonal"},
        {"structures": "diagonal", "update_interval": 2},
        {"row_beta": None, "maximize": True},
        {"weight_decay": 0.1, "damping": 0.01, "betas": (0.0, 0.5)},
    ],
)
def test_mixed_parameters_follow_the_specification(settings, vector_method, device):
    """Buckets, missing gradients and different counts change nothing for a parameter."""
    params = parameters(*SHAPES, dtype=FLOAT64, device=device)
    optimizer = RootFreeShampoo(params, vector_method=vector_method, **settings)
    truth = Truth(optimizer)
    for t in range(8):
        set_grads(params, seed=t)
        for i, p in enumerate(params):
            if (t, i) in {(1, 0), (2, 1), (2, 3), (4, 2), (5, 8), (6, 1)}:
                p.grad = None
        optimizer.step()
        truth.step()
        truth.check()
    counts = [int(optimizer.state[p]["step"]) for p in params]
    assert counts == [int(state["step"]) for state in truth.states]


def test_settings_may_change_between_steps(device):
    """row_beta to None and back, betas, damping, the RMS and the interval."""
    params = parameters((6, 5), (6, 5), (4,), dtype=FLOAT64, device=device)
    optimizer = RootFreeShampoo(params)
    truth = Truth(optimizer)
    changes = [
        {"row_beta": 0.5},
        {"row_beta": None},
        {"betas": (0.5, 0.9)},
        {"row_beta": 0.95, "damping": 0.3},
        {"update_rms": 0.1, "betas": (0.0, 0.99), "lr": 0.03},
        {"maximize": True},
        {"update_interval": 2},
        {"vector_beta2": 0.5, "vector_rms": 0.3, "weight_decay": 0.1},
    ]
    for t, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        set_grads(params, seed=t)
        optimizer.step()
        truth.step()
        truth.check()


def test_rows_come_with_the_setting(device):
    """Begun without balanced rows, their average starts at zero when it is first asked for."""
    params = parameters((6, 5), dtype=FLOAT64, device=device)
    optimizer = RootFreeShampoo(params, row_beta=None)
    run(optimizer, params, 2)
    optimizer.param_groups[0]["row_beta"] = 0.9
    truth = Truth(optimizer)
    truth.states[0].update({k: v.cpu().clone() for k, v in optimizer.state[params[0]].items()})
    truth.states[0].setdefault("row_square_avg", torch.zeros(6, dtype=FLOAT64))
    set_grads(params, seed=5)
    optimizer.step()
    truth.step()
    truth.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FLOAT64])
def test_a_load_makes_cached_products_anew(dtype, device):
    """In the middle of an interval, onto an optimizer whose products are of other factors."""
    settings = {"update_interval": 4, "factor_dtype": dtype}
    base = FLOAT64 if dtype == FLOAT64 else torch.float32
    params, twins = (parameters((6, 5), (9, 4), dtype=base, device=device) for _ in range(2))
    optimizer, other = (RootFreeShampoo(p, **settings) for p in (params, twins))
    run(optimizer, params, 6)
    run(other, twins, 3, first=50)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    for each, tensors in ((optimizer, params), (other, twins)):
        run(each, tensors, 5, first=6)
    assert_identical(snapshot(other, twins), snapshot(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_mixed_dtypes(dtype, device):
    """A group of three dtypes moves each as it moves in a group of its own."""
    params, twins = (
        [
            parameters((6, 5), dtype=each, device=device, seed=n)[0]
            for n, each in enumerate((dtype, torch.float32, dtype))
        ]
        for _ in range(2)
    )
    settings = {"factor_dtype": torch.float32}
    together = RootFreeShampoo(params, **settings)
    alone = [RootFreeShampoo([q], **settings) for q in twins]
    for t in range(4):
        set_grads(params, seed=t)
        for p, q, optimizer in zip(params, twins, alone, strict=True):
            q.grad = p.grad.clone()
            optimizer.step()
        together.step()
    for p, q in zip(params, twins, strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    assert together.state[params[0]]["momentum_buffer"].dtype == torch.float32


def test_the_momentum_of_channels_last_parameters(device):
    values = parameters((6, 4, 3, 3), dtype=FLOAT64, device=device)[0].detach()
    plain = torch.nn.Parameter(values.clone())
    strided = torch.nn.Parameter(values.clone(memory_format=torch.channels_last))
    optimizers = [RootFreeShampoo([p]) for p in (plain, strided)]
    for t in range(4):
        for p, optimizer in zip((plain, strided), optimizers, strict=True):
            set_grads([p], seed=t)
            p.grad = p.grad.to(memory_format=torch.preserve_format)
            optimizer.step()
    torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)
    expected = optimizers[0].state[plain]["momentum_buffer"]
    actual = optimizers[1].state[strided]["momentum_buffer"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FLOAT64])
@pytest.mark.parametrize("structures", ["dense", "diagonal"])
def test_a_zero_gradient_leaves_the_factors(dtype, structures, device):
    """Of one parameter, to the bit, while its neighbour in the bucket goes on."""
    base = FLOAT64 if dtype == FLOAT64 else torch.float32
    params = parameters((6, 5), (6, 5), dtype=base, device=device)
    optimizer = RootFreeShampoo(params, factor_dtype=dtype, structures=structures)
    for t in range(3):
        set_grads(params, seed=t)
        if t != 1:
            params[0].grad.zero_()
        before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
        moved = [p.detach().clone() for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            for key in [k for k in before[i] if k.startswith(("gram", "factor"))]:
                stays = torch.equal(optimizer.state[p][key], before[i][key])
                assert stays == (i == 0 and t != 1) or key.endswith("residual"), key
        assert torch.equal(params[0], moved[0]) == (t == 0)
        assert not torch.equal(params[1], moved[1])


def test_lr_as_a_tensor_and_a_closure(device):
    params, twins = (parameters((6, 5), (3,), dtype=FLOAT64, device=device) for _ in range(2))
    lr = torch.tensor(0.02, dtype=FLOAT64, device=device)
    by_tensor, by_number = RootFreeShampoo(params, lr=lr), RootFreeShampoo(twins, lr=0.02)
    for t in range(4):
        lr.fill_(0.02 / (t + 1))
        by_number.param_groups[0]["lr"] = 0.02 / (t + 1)

        def closure(t=t):
            assert torch.is_grad_enabled()
            set_grads(params, seed=t)
            return 7.0 + t

        assert by_tensor.step(closure) == 7.0 + t
        set_grads(twins, seed=t)
        by_number.step()
    assert lr.item() == 0.02 / 4
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_no_scale_of_the_gradients_matters(factor, device):
    """To the bit where it is a power of two; vectors but for the square's dtype."""
    params, twins = (parameters((6, 5), (9, 6), device=device) for _ in range(2))
    optimizers = [RootFreeShampoo(p, factor_dtype=torch.float32) for p in (params, twins)]
    for t in range(5):
        for tensors in (params, twins):
            set_grads(tensors, seed=t)
        for q in twins:
            q.grad.mul_(factor)
        for optimizer in optimizers:
            optimizer.step()
    assert_identical([p.detach() for p in twins], [p.detach() for p in params])


# Bad input


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"lr": -1e-3}, ValueError, "lr is -0.001; pass a number >= 0"),
        ({"lr": NAN}, ValueError, "lr is nan; pass"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas is \(0.9, 1.0\); pass two numbers"),
        ({"betas": 0.9}, (TypeError, ValueError), "betas is 0.9; pass|betas is 0.9, a float; pass"),
        ({"damping": 0}, ValueError, "damping is 0; pass a number > 0"),
        ({"damping": -1}, ValueError, "damping is -1; pass a number > 0 .*: nothing else bounds"),
        ({"weight_decay": INF}, ValueError, "weight_decay is inf; pass"),
        ({"update_rms": 0}, ValueError, "update_rms is 0; pass a number > 0"),
        ({"update_interval": 0}, ValueError, "update_interval is 0; pass a whole number >= 1"),
        ({"update_interval": 2.0}, TypeError, "update_interval is 2.0, a float; pass"),
        ({"structures": "blocks"}, ValueError, "structures is 'blocks'; supported are"),
        ({"structures": ("dense", "hierarchical")}, ValueError, "or use IFShampoo"),
        (
            {"structures": "triltoeplitz"},
            ValueError,
            "has auto, block, dense, dense_or_diagonal, diagonal alone",
        ),
        ({"structures": "block", "block_size": 0}, ValueError, "block_size is 0"),
        ({"structures": ("dense",)}, ValueError, "pass one structure an axis, or one for all"),
        (
            {"structures": "dense", "max_dense_dim": 5},
            ValueError,
            "pass 'block', 'auto' or 'diagonal'",
        ),
        ({"vector_method": "rmsprop"}, ValueError, "pass 'adam' or 'rootfree'"),
        ({"vector_beta2": 1.0}, ValueError, "vector_beta2 is 1.0; pass"),
        ({"vector_rms": 0.0}, ValueError, "vector_rms is 0.0; pass a number > 0"),
        ({"row_beta": 1.0}, ValueError, "row_beta is 1.0; pass .* or None"),
        ({"factor_dtype": torch.float16}, ValueError, "factor_dtype is torch.float16; pass"),
        ({"maximize": 1}, ValueError, "maximize is 1; pass"),
        ({"batch_size": 8}, TypeError, "no argument 'batch_size'; leave it out: it needs none"),
        ({"momentum": 0.9}, TypeError, r"no argument 'momentum'; pass betas=\(momentum, beta2\)"),
        ({"eps": 1e-8}, TypeError, "no argument 'eps'; leave it out: damping"),
        ({"merge_axes": ((0, 1), 1)}, ValueError, "merge_axes is .*; pass True, False, or a tuple"),
        ({"initial_square_avg": 1.0}, TypeError, "no argument 'initial_square_avg'; leave it out"),
        ({"alpha": 0.9}, TypeError, "no argument 'alpha'; pass betas="),
    ],
)
def test_bad_input_and_its_cure(bad, error, words):
    params = parameters((6, 5), (4,))
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=words):
        RootFreeShampoo(params, **bad)
    assert_identical([p.detach() for p in params], before)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"damping": 0}, "damping is 0; pass a number > 0"),
        ({"row_beta": 2.0}, "row_beta is 2.0"),
        ({"update_rms": -1.0}, "update_rms is -1.0"),
        ({"betas": (0.9, 1.5)}, "betas is"),
        ({"structures": "diagonal"}, "structures"),
        ({"vector_method": "rootfree"}, "vector_method"),
    ],
)
def test_a_bad_setting_between_steps_is_told_before_anything_moves(bad, words):
    params = parameters((6, 5), (4,))
    optimizer = RootFreeShampoo(params)
    run(optimizer, params, 1)
    before = snapshot(optimizer, params)
    optimizer.param_groups[0].update(bad)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
        optimizer.step()
    assert_identical(snapshot(optimizer, params), before)


def test_a_loop_that_counts_its_batches_takes_it_too():
    """A counter has nothing to write, and asks for nothing: no count, no process group."""
    model, twin = (torch.nn.Linear(5, 3, dtype=FLOAT64) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    counted, plain = (RootFreeShampoo(m.parameters()) for m in (model, twin))
    with BatchSizeCounter(model, counted) as counter:
        for _ in range(3):
            x = torch.randn(4, 5, dtype=FLOAT64)
            for m, optimizer in ((model, counted), (twin, plain)):
                optimizer.zero_grad()
                m(x).square().mean().backward()
                optimizer.step()
        counter.reset()
    assert "batch_size" not in counted.param_groups[0]
    assert_identical(
        [p.detach() for p in model.parameters()], [*map(torch.detach, twin.parameters())]
    )


@pytest.mark.parametrize("key", ["row_square_avg", "gram_0", "gram_1"])
@pytest.mark.parametrize("limit", [2048, 4])
def test_a_checkpoint_with_a_negative_square_is_refused(key, limit):
    (param,) = parameters((8, 4))
    optimizer = RootFreeShampoo([param], max_dense_dim=limit)
    run(optimizer, [param], 1)
    before = snapshot(optimizer, [param])
    damaged = optimizer.state_dict()
    value = damaged["state"][0][key]
    structure_of(value).diagonal(value)[..., 2] = -1.0
    with pytest.raises(ValueError, match=rf"{key} holds -1\.0.*load an earlier one"):
        optimizer.load_state_dict(damaged)
    assert_identical(snapshot(optimizer, [param]), before)
