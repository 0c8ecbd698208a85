"""Steps on known tensors: found only while nothing moved, and then the same to the bit."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from helpers.optimizers import (
    DIAGONAL,
    SETTINGS,
    assert_identical,
    build,
    parameters,
    set_grads,
    snapshot,
)

from rootfree_fused.ops import dispatch, extensions
from rootfree_fused.optimizer import known_tensors, known_tensors_in_python

pytestmark = pytest.mark.skipif(
    extensions.known_tensors() is None, reason="csrc/known_tensors.cpp is not built"
)
SHAPES = [(3, 5), (), (1500,), (0,), (2, 3, 4, 5)]


# What C++ compares, and Python in its place ----------------------------------------------------


@pytest.fixture(params=["C++", "Python"])
def host(request):
    return extensions.known_tensors() if request.param == "C++" else known_tensors_in_python


def tensors():
    params = parameters((3, 4), (2, 3, 4, 4), (5,))
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    return params, [{"step": torch.zeros(()), "square_avg": torch.ones_like(p)} for p in params]


def set_data(tensor, value):
    tensor.data = value


CHANGES = {
    "a parameter's memory": lambda params, _: set_data(params[0], params[0].detach().clone()),
    "a parameter": lambda params, _: params.__setitem__(2, torch.nn.Parameter(params[2].detach())),
    "a gradient's strides": lambda params, _: set_data(
        params[1].grad, params[1].grad.as_strided((2, 3, 4, 4), (48, 1, 12, 3))
    ),
    "a parameter's shape": lambda params, _: set_data(params[0], params[0].data.view(4, 3)),
    "a gradient's shape": lambda params, _: set_data(params[0].grad, params[0].grad.view(12)),
    "a state's shape": lambda _, states: set_data(
        states[0]["square_avg"], states[0]["square_avg"].view(2, 6)
    ),
    "a gradient's dtype": lambda params, _: set_data(
        params[0].grad, params[0].grad.view(torch.int32)
    ),
    "no gradient": lambda params, _: setattr(params[0], "grad", None),
    "one gradient more": lambda params, _: setattr(params[2], "grad", torch.ones(5)),
    "a state": lambda _, states: states[1].__setitem__("square_avg", torch.ones(2, 3, 4, 4)),
    "a state's memory": lambda _, states: set_data(states[0]["step"], torch.zeros(())),
    "one state more": lambda _, states: states[0].__setitem__("exp_avg", torch.ones(3, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(host, change):
    params, states = tensors()
    before = host.fingerprint(params, states)
    kept = [p.detach() for p in params], [p.grad for p in params], [dict(s) for s in states]
    kept = (kept, [t.detach() for s in states for t in s.values()])  # no address is used again
    assert before is not None
    what, grads = before
    assert host.fingerprint(params, states) == before
    assert host.unchanged(params, states, what) == grads
    CHANGES[change](params, states)
    assert host.fingerprint(params, states)[0] != what
    assert host.unchanged(params, states, what) is None
    del kept


def test_new_places_of_gradients_show_apart(host):
    params, states = tensors()
    what, grads = host.fingerprint(params, states)
    old = params[0].grad, params[1].grad.detach()
    params[0].grad = torch.ones(3, 4)
    params[1].grad.data = torch.ones(2, 3, 4, 4)
    new_what, new_grads = host.fingerprint(params, states)
    assert new_what == what
    addresses = torch.frombuffer(bytearray(new_grads), dtype=torch.int64).tolist()
    assert addresses == [p.grad.data_ptr() for p in params[:2]]
    former = torch.frombuffer(bytearray(grads), dtype=torch.int64).tolist()
    assert former == [g.data_ptr() for g in old]
    assert host.unchanged(params, states, what) == new_grads


def test_new_values_do_not_show(host):
    params, states = tensors()
    before = host.fingerprint(params, states)
    with torch.no_grad():
        params[0].add_(1)
        params[1].grad.mul_(2)
        states[0]["step"].add_(1)
    assert host.fingerprint(params, states) == before


def test_shapes_of_one_size_show(host):
    base = torch.zeros(3600)
    axes = [a for a in range(1, 3601) if not 3600 % a]
    shapes = [(a, b, 3600 // a // b) for a in axes for b in axes if not 3600 // a % b]
    shapes += [shape[:2] for shape in shapes if shape[2] == 1] + [(3600,)]
    prints = {host.fingerprint([base.view(shape)], [{}])[0] for shape in shapes}
    assert len(prints) == len(shapes) == len(set(shapes))


def test_views_of_other_strides_show(host):
    base = torch.zeros(64)
    prints = {
        host.fingerprint([base.as_strided((4, 4), strides)], [{}])[0]
        for strides in ((4, 1), (1, 4), (8, 2), (8, 1))
    }
    assert len(prints) == 4


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "strange",
    [
        lambda p: torch.Tensor._make_wrapper_subclass(Subclass, p.shape),
        lambda p: p.detach().to_sparse(),
        lambda p: torch.ones(3, 4, dtype=torch.complex64).conj(),
    ],
)
def test_what_is_no_plain_tensor_is_not_compared(host, strange):
    params, states = tensors()
    states[0]["square_avg"] = strange(params[0])
    assert host.fingerprint(params, states) is None
    params, states = tensors()
    params[2] = strange(params[2])
    assert host.fingerprint(params, states) is None


def test_of_a_state_tensors_alone_are_compared(host):
    params, states = tensors()
    before = host.fingerprint(params, states)
    states[0]["calls"] = 7
    assert host.fingerprint(params, states) == before
    kept = states[0].pop("square_avg")
    states[0]["square_avg"] = None
    assert host.fingerprint(params, states) != before
    del kept
    params[2] = [1.0]
    assert host.fingerprint(params, states) is None


def test_values_of_a_dict_are_compared_by_identity_and_order(host):
    a, b = {}, {}
    for known, same in (([a, b], True), ([b, a], False), ([a], False), ([a, b, b], False)):
        assert host.has_values({1: a, 2: b}, known) is same
    assert host.has_values({1: a, 2: b}, [a, {}]) is False


def test_misuse_is_an_error():
    host = extensions.known_tensors()
    params, states = tensors()
    with pytest.raises(TypeError, match="expected a dict and a list"):
        host.has_values(states, states)
    for arguments in ((), (params,), (params, states, 1), (tuple(params), states)):
        with pytest.raises(TypeError, match="expected 2 lists"):
            host.fingerprint(*arguments)
        with pytest.raises(TypeError, match="expected"):
            host.unchanged(*arguments)
    assert host.fingerprint(params, states[:2]) is None
    what, _ = host.fingerprint(params, states)
    assert host.unchanged(params, states[:2], what) is None
    assert host.unchanged(params, states, what[:56]) is None
    assert host.unchanged(params, states, what + what[:56]) is None
    with pytest.raises(TypeError, match="expected tensors"):
        host.mark_changed([1])


def test_autograd_sees_the_change(host):
    (p,) = parameters((3,))
    loss = (p * p).sum()
    host.mark_changed([p])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The optimizers, on the CPU with the kernels interpreted ----------------------------------------


@pytest.fixture
def found(monkeypatch):
    """Says for each group's step whether it was prepared."""
    seen = []
    find = known_tensors.PreparedSteps.find

    def note(self, index, params, made):
        prepared = find(self, index, params, made)
        seen.append(prepared is not None)
        return prepared

    monkeypatch.setattr(known_tensors.PreparedSteps, "find", note)
    return seen


@pytest.fixture
def launches(monkeypatch, found):
    """Launch directly on CPU tensors; the list is `found`."""
    pytest.importorskip("triton")
    from helpers.offline import interpreted

    from rootfree_fused.kernels import diag

    monkeypatch.setattr(dispatch, "triton_serves", lambda param: param.dtype != torch.float64)
    with interpreted():
        assert dispatch.diagonal_kernels("rmsprop_", parameters((3,))) is diag
        yield found


def plain_twin(name, params, monkeypatch, **overrides):
    """The same optimizer, which prepares nothing and calls the operator on the Triton body."""
    from rootfree_fused.kernels import diag

    twin = build(name, params, **overrides)
    twin._prepare = lambda *_: None
    for op in diag.BODIES:
        body = functools.partial(diag.update_, op)
        monkeypatch.setattr(torch.ops.rootfree_fused, op, body, raising=False)
    return twin


@pytest.mark.parametrize("name", DIAGONAL)
def test_prepared_steps_are_the_same_to_the_bit(name, launches, monkeypatch):
    params, others = parameters(*SHAPES), parameters(*SHAPES)
    optimizer, twin = build(name, params), plain_twin(name, others, monkeypatch)
    for t in range(8):
        for mine in (params, others):
            for i, p in enumerate(mine):
                if p.grad is None or t == 5:
                    p.grad = torch.zeros_like(p)
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
                p.grad.copy_(0.1 * grad)
        if t == 3:  # a schedule
            for other in (optimizer, twin):
                other.param_groups[0]["lr"] *= 0.5
        if t == 6:
            params[0].grad = others[0].grad = None
        optimizer.step()
        twin.step()
        assert_identical(snapshot(optimizer, params), snapshot(twin, others))
    assert launches[::2] == [t not in (0, 6) for t in range(8)]
    assert not any(launches[1::2])


def test_a_changed_setting_is_read_at_a_prepared_step(launches):
    (p,) = params = parameters((4,))
    optimizer = build("rmsprop", params, lr=0.0, weight_decay=0.0)
    set_grads(params, 0)
    grad = p.grad
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert launches == [False, True]
    assert p.grad is grad
    assert not torch.equal(p, before)


def test_a_replaced_state_dict_or_tensor_is_used(launches):
    params = parameters((4,), (5,))
    optimizer = build("rmsprop-momentum", params)
    set_grads(params, 0)
    for change in (
        lambda: None,
        lambda: None,
        lambda: optimizer.state.__setitem__(params[0], dict(optimizer.state[params[0]])),
        lambda: optimizer.state[params[1]].__setitem__("square_avg", torch.full((5,), 2.0)),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ):
        change()
        before = optimizer.state[params[1]]["square_avg"].clone()
        optimizer.step()
        assert not torch.equal(optimizer.state[params[1]]["square_avg"], before)
    assert launches == [False, True, False, False, True]
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 5]


def test_groups_are_prepared_apart(launches):
    params = parameters((4,), (5,), (6,))
    optimizer = build("adamw", [{"params": params[:2]}, {"params": params[2:], "lr": 0.0}])
    set_grads(params, 0)
    for _ in range(3):
        optimizer.step()
    params[2].grad = None
    optimizer.step()
    assert launches == [False] * 2 + [True] * 4 + [True, False]


@pytest.mark.parametrize("name", DIAGONAL)
def test_no_gradient_is_kept_alive(name, launches):
    (p,) = params = parameters((4,))
    optimizer = build(name, params)
    set_grads(params, 0)
    optimizer.step()
    grad = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert grad() is None


def test_without_the_extension_python_compares(launches, monkeypatch):
    monkeypatch.setattr(extensions, "known_tensors", lambda: None)
    params = parameters((4,))
    optimizer = build("rmsprop", params)
    for t in range(3):
        set_grads(params, t)
        optimizer.step()
    assert launches == [False, True, True]


# The optimizers on the CPU, as they are ---------------------------------------------------------


def set_some_grads(params, t):
    """Gradients in place, but new ones at step 4, one less at 6, and of other strides from 8 on."""
    grads = [p.grad for p in params]
    set_grads(params, 100 + t)
    for i, (p, old) in enumerate(zip(params, grads, strict=True)):
        if t >= 8 and p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()
        elif old is not None and t != 4 and not (i == 0 and t == 6):
            p.grad = old.copy_(p.grad)
    if t == 6:
        params[0].grad = None


def change_something(optimizer, params, t):
    group, state = optimizer.param_groups[0], optimizer.state[params[0]]
    if t == 2:
        group["lr"] *= 0.5
    if t == 3 and "momentum" in group:
        group["momentum"] = 0.4
    if t == 5:
        state[next(key for key in state if key != "step")].mul_(0.75)
    if t == 10:
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("compared", ["C++", "Python"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_known_tensors_take_the_same_steps_to_the_bit(name, dtype, compared, found, monkeypatch):
    if compared == "Python":
        monkeypatch.setattr(extensions, "known_tensors", lambda: None)
    shapes = [(7, 5), (70, 33), (11,), (), (7, 5), (3, 4, 2)]
    params, others = (parameters(*shapes, dtype=dtype) for _ in range(2))
    optimizer, twin = build(name, params), build(name, others)
    twin._prepare = lambda *_: None
    for t in range(14):
        for mine, stepped in ((params, optimizer), (others, twin)):
            set_some_grads(mine, t)
            change_something(stepped, mine, t)
            stepped.step()
        assert_identical(snapshot(optimizer, params), snapshot(twin, others))
    moved = {0, 6, 8}
    if name in ("rmsprop", "ifshampoo-interval"):
        moved.add(3)  # momentum gets its buffers
    assert {t for t, was in enumerate(found[::2]) if not was} == moved
    assert not any(found[1::2])


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_that_are_known_keep_no_gradient_and_no_optimizer_alive(name, found):
    params = parameters((7, 5), (4,))
    optimizer = build(name, params)
    for t in range(3):
        set_grads(params, t)
        optimizer.step()
    assert found == [False, True, True]
    grads = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None, None]
    owner = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert owner() is None
    finally:
        gc.enable()
