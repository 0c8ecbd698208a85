"""Steps on weights and states in fewer bytes by prepared plans: the operator's to the bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.optimizers import assert_identical, build, parameters, set_grads, snapshot

from bench.host import as_on_cuda
from rootfree_fused.ops import extensions
from rootfree_fused.optimizer import diagonal

pytestmark = pytest.mark.skipif(
    extensions.known_tensors() is None, reason="csrc/known_tensors.cpp is not built"
)
pytest.importorskip("triton")
# State of 8 bits twice, and float32 between: two updates, of which one has the outer gradients.
SHAPES = [(64, 65), (5,), (64, 64)]
FORMATS = {"param_residual": 8, "state_format": "8bit"}
DIAGONAL = ["adamw", "adamw-corrected", "rmsprop", "rmsprop-momentum"]


class Called:
    """What steps call in Triton: the operators' bodies, and launches of plans."""

    def __init__(self):
        self.operators, self.launches = 0, []  # of launches the settings

    def take(self):
        found = self.operators, len(self.launches)
        self.__init__()
        return found


@pytest.fixture
def called(monkeypatch):
    from helpers.offline import interpreted

    from rootfree_fused.kernels import lowbit

    called, update_, launch = Called(), lowbit.update_, lowbit.launch

    def operator(*args, **settings):
        called.operators += 1
        update_(*args, **settings)

    def launched(*args, **settings):
        called.launches.append(settings)
        launch(*args, **settings)

    monkeypatch.setattr(lowbit, "update_", operator)
    monkeypatch.setattr(lowbit, "launch", launched)
    with interpreted(), as_on_cuda():
        yield called


def pair(name, **overrides):
    """An optimizer, and its twin, which prepares nothing."""
    params, others = (parameters(*SHAPES, dtype=torch.bfloat16) for _ in range(2))
    settings = {**FORMATS, **overrides}
    optimizer, twin = (build(name, mine, **settings) for mine in (params, others))
    twin._prepare = lambda *_: None
    return (params, optimizer), (others, twin)


def step_both(both, called, t, *, laid="anew"):
    """A step of each, on equal gradients; what the first called: operators, and launches."""
    counts = []
    for params, optimizer in both:
        kept = [p.grad for p in params]
        set_grads(params, 100 + t)
        for p, grad in zip(params, kept, strict=True):
            if laid == "in place":
                p.grad = grad.copy_(p.grad)
            elif laid == "strided" and p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()
            elif laid == "unaligned":
                p.grad = torch.cat([p.grad.new_zeros(1), p.grad.flatten()])[1:].view(p.shape)
        called.take()
        optimizer.step()
        counts.append(called.take())
    (params, optimizer), (others, twin) = both
    assert_identical(snapshot(optimizer, params), snapshot(twin, others))
    assert counts[1][0] == 2
    return counts[0]


@pytest.mark.parametrize("name", DIAGONAL)
def test_gradients_may_lie_anywhere(name, called):
    """Of those that are not contiguous the operator makes copies."""
    both = pair(name)
    ways = ["anew", "in place", "unaligned", "anew", "strided", "in place", "anew"]
    counts = [step_both(both, called, t, laid=laid) for t, laid in enumerate(ways)]
    copied = 1, 2  # the operator launches too; of the vector there is a plan
    assert counts == [(0, 2)] * 4 + [copied] * 2 + [(0, 2)]


@pytest.mark.parametrize("name", ["ifshampoo", "shampoo"])
def test_vectors_beside_matrices_are_known_too(name, called):
    """Of one format: one launch. Matrices are float32 for the time of a step."""
    both = pair(name)
    counts = []
    for t in range(4):
        for params, optimizer in both:
            set_grads(params, 100 + t)
            called.take()
            optimizer.step()
            counts.append(called.take())
        (params, optimizer), (others, twin) = both
        assert_identical(snapshot(optimizer, params), snapshot(twin, others))
    assert counts == [(0, 1), (1, 1)] * 4


@pytest.mark.parametrize("name", ["adamw-corrected", "rmsprop-momentum"])
def test_settings_and_a_scaler_are_read_at_every_step(name, called):
    both = pair(name, amp_scaling=True)

    def set_all(key, value):
        for _, optimizer in both:
            optimizer.param_groups[0][key] = value

    def scale(**tensors):
        for _, optimizer in both:
            for key in ("grad_scale", "found_inf"):
                setattr(optimizer, key, tensors.get(key))

    changes = [
        lambda: set_all("lr", 0.01),
        lambda: (set_all("lr", torch.tensor(0.02, dtype=torch.float64)), set_all("damping", 0.3)),
        lambda: (set_all("maximize", True), set_all("batch_size", 2)),
        lambda: scale(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0)),
        lambda: scale(grad_scale=torch.tensor([2.0]), found_inf=torch.tensor([1.0])),
        lambda: (scale(), set_all("weight_decay", 0.0)),
    ]
    params, optimizer = both[0]
    for t, change in enumerate(changes):
        change()
        before = snapshot(optimizer, params)
        assert step_both(both, called, t, laid="in place" if t else "anew") == (0, 2)
        changed = not all(map(torch.equal, before, snapshot(optimizer, params)))
        assert changed == (t != 4)


def test_bias_correction_may_be_taken_up(called):
    both = pair("adamw")
    for t, corrected in enumerate((False, True, True, False)):
        for _, optimizer in both:
            optimizer.param_groups[0]["bias_correction"] = corrected
        assert step_both(both, called, t) == (0, 2)
        set_grads(both[0][0], t)
        both[0][1].step()
        assert [own["bias_correction"] for own in called.launches] == [corrected] * 2
        set_grads(both[1][0], t)
        both[1][1].step()


@pytest.mark.parametrize("residual", [None, "stochastic", 8, 16])
def test_weights_of_every_kind(residual, called):
    both = pair("adamw", param_residual=residual)
    for t in range(2):
        assert step_both(both, called, t) == (0, 2)
    both[0][1].step()
    assert {own["stochastic"] for own in called.launches} == {residual == "stochastic"}


def test_momentum_gets_its_buffers(called):
    both = pair("rmsprop")
    for t, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.0)):
        for _, optimizer in both:
            optimizer.param_groups[0]["momentum"] = momentum
        assert step_both(both, called, t) == (0, 2)


@pytest.mark.parametrize("name", ["adamw", "rmsprop-momentum"])
def test_counts_on_the_device_and_a_checkpoint(name, called):
    """Random numbers are of the step's count."""
    both = pair(name, capturable=True)
    for t in range(4):
        if t == 2:
            for _, optimizer in both:
                optimizer.load_state_dict(optimizer.state_dict())
        assert step_both(both, called, t) == (0, 2)


def test_parameters_without_gradients_are_left_out_and_taken_up_again(called):
    """Which gradient is whose changes with them."""
    both = pair("adamw")
    for t, missing in enumerate((None, 0, None, 1, 2, 0)):
        for params, optimizer in both:
            set_grads(params, 100 + t)
            if missing is not None:
                params[missing].grad = None
            called.take()
            optimizer.step()
            assert called.take()[0] == (0 if optimizer is both[0][1] else 2 - (missing == 1))
        (params, optimizer), (others, twin) = both
        assert_identical(snapshot(optimizer, params), snapshot(twin, others))


@pytest.mark.parametrize("name", ["adamw", "ifshampoo"])
def test_a_known_step_looks_at_no_tensor(name, called, monkeypatch):
    """Gradients that moved are a column of addresses; plans are not looked for."""
    from rootfree_fused.kernels import lowbit

    both = pair(name)
    params, optimizer = both[0]
    set_grads(params, 0)
    optimizer.step()
    found = []
    find_plan = lowbit._find_plan
    monkeypatch.setattr(lowbit, "_find_plan", lambda *args: found.append(args) or find_plan(*args))
    monkeypatch.setattr(diagonal.LowbitUpdate, "update", None)
    for t in (1, 2):
        set_grads(params, t)
        optimizer.step()
    assert found == []


@pytest.mark.parametrize("name", ["adamw", "shampoo"])
def test_no_gradient_and_no_optimizer_is_kept_alive(name, called):
    (params, optimizer), _ = pair(name)
    for t in range(2):
        set_grads(params, t)
        optimizer.step()
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * 3
    owner = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, _
        assert owner() is None
    finally:
        gc.enable()
