"""The operators: schemas, dispatch, torch.compile, and what bad input is told."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.operators import ADAMW, RMSPROP, SIGN, VECTOR_ADAM, VECTOR_ROOTFREE, for_operators
from helpers.optimizers import (
    DIAGONAL,
    accepted,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)

from rootfree_fused import RootFreeAdamW, RootFreeRMSprop, ops
from rootfree_fused.ops import dispatch
from rootfree_fused.ops.methods import METHODS

NAN, INF = float("nan"), float("inf")
LR = torch.tensor(0.1, dtype=torch.float64)


def tensors(device, *shapes, dtype=torch.float32):
    return [torch.rand(shape, device=device, dtype=dtype) for shape in shapes]


def lists(device, count=4):
    return [tensors(device, (5,), (2, 3)) for _ in range(count)]


def operator_calls(device):
    steps = torch.tensor([1.0, 3.0], device=device)
    rmsprop, adamw = for_operators(RMSPROP), for_operators(ADAMW)
    sums = {"parts": tensors(device, (5,), (2, 3)), "grad_scale": torch.tensor(4.0, device=device)}
    squares = sums | {"square_weight": 1.0, "signal_weight": -1.0, "floor_weight": 0.0}
    return {
        "rmsprop_": ((*lists(device), LR), rmsprop),
        "rmsprop_ without momentum": ((*lists(device, 3), [], LR), {**rmsprop, "momentum": 0.0}),
        "adamw_": ((*lists(device), None, LR), adamw),
        "adamw_ with steps": ((*lists(device), steps, LR), adamw),
        "rmsprop_ with squares": ((*lists(device), LR), rmsprop | squares),
        "adamw_ with squares": ((*lists(device), steps, LR), adamw | squares),
        "sign_": ((*lists(device, 3), LR), for_operators(SIGN)),
        "sign_ with signs": ((*lists(device, 3), LR), for_operators(SIGN) | sums),
        "vector_adam_": ((*lists(device), steps, LR), for_operators(VECTOR_ADAM)),
        "vector_rootfree_": ((*lists(device), steps, LR), for_operators(VECTOR_ROOTFREE)),
    }


@pytest.mark.parametrize("call", operator_calls("cpu"))
def test_opcheck(call, device):
    operator = getattr(torch.ops.rootfree_fused, call.split()[0]).default
    args, kwargs = operator_calls(device)[call]
    torch.library.opcheck(operator, args, kwargs)


def test_backends_say_what_runs():
    backends = ops.backends()
    assert set(backends) == {"cpu", "cuda", "host"}
    assert backends["cpu"].startswith("C++ (")
    assert backends["host"] == "C++"


@pytest.mark.parametrize("call", operator_calls("cpu"))
def test_meta_tensors_cost_nothing(call):
    operator = getattr(torch.ops.rootfree_fused, call.split()[0]).default
    args, kwargs = operator_calls("meta")[call]
    assert operator(*args, **kwargs) is None


@pytest.mark.parametrize("name", DIAGONAL)
def test_compiled_step_is_the_eager_step(name, device):
    """Whole step in one graph, the same bits, and a scheduled Tensor lr without a recompile.

    A number that changes for the first time recompiles once, and is read from then on.
    """
    params, twins = (parameters((6, 4), (3,), (), device=device) for _ in range(2))
    lr = torch.tensor(0.05, device=device)
    eager, compiled = build(name, params, lr=lr), build(name, twins, lr=lr)
    step = torch.compile(compiled.step, fullgraph=True)
    for t in range(6):
        set_grads(params, seed=t)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
        lr.fill_(0.05 / (t + 1))
        for optimizer in (eager, compiled):
            optimizer.param_groups[0]["batch_size"] = max(t, 1) * 8
        with torch.compiler.set_stance("default" if t in (0, 2) else "fail_on_recompile"):
            step()
        eager.step()
        assert_identical(snapshot(compiled, twins), snapshot(eager, params))


@pytest.mark.parametrize("name", ["rmsprop-released", "adamw", "sign", "ifshampoo", "shampoo"])
def test_emptied_state_starts_anew_in_a_compiled_step(name):
    params, others = parameters((4, 3), (3,)), parameters((4, 3), (3,))
    optimizer, plain = build(name, params), build(name, others)
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(6):
        set_grads(params, seed=t)
        set_grads(others, seed=t)
        step()
        plain.step()
        if t == 2:
            optimizer.state.clear()
            plain.state.clear()
    assert_identical(snapshot(optimizer, params), snapshot(plain, others))


@pytest.mark.parametrize("name", ["ifshampoo", "ifshampoo-interval", "shampoo", "shampoo-interval"])
def test_a_compiled_step_of_matrices_leaves_the_graph_and_never_recompiles(name, device):
    params, twins = (parameters((6, 4), (3,), device=device) for _ in range(2))
    eager, compiled = build(name, params), build(name, twins)
    step = torch.compile(compiled.step, backend="eager")
    for t in range(5):
        for optimizer, tensors_ in ((eager, params), (compiled, twins)):
            set_grads(tensors_, seed=t)
            changes = {"lr": 0.05 / (t + 1), "batch_size": 8 * (t + 1)}
            optimizer.param_groups[0] |= accepted(name, changes)
        with torch.compiler.set_stance("fail_on_recompile" if t else "default"):
            step()
        eager.step()
        assert_identical(snapshot(compiled, twins), snapshot(eager, params))


def test_functions_do_what_the_optimizers_do(device):
    params, twins = (parameters((6, 4), (3,), device=device) for _ in range(2))
    optimizer = build("rmsprop-released", params, damping=1e-4, initial_square_avg=1.0)
    s, buf = ([torch.full_like(p, x) for p in twins] for x in (1.0, 0.0))
    for t in range(3):
        run(optimizer, params, 1, first=t)
        ops.rmsprop_(
            twins,
            [p.grad for p in params],
            s,
            buf,
            lr=0.05,
            alpha=0.9,
            weight_decay=0.1,
            momentum=0.9,
            batch_size=8,
            weight_decay_mode="momentum",
        )
    assert_identical([p.detach() for p in twins], [p.detach() for p in params])

    params, twins = (parameters((6, 4), (3,), device=device) for _ in range(2))
    settings = {"betas": (0.9, 0.99), "damping": 1e-4, "initial_square_avg": 1.0}
    optimizer = build("adamw-corrected", params, **settings)
    m, s = ([torch.full_like(p, x) for p in twins] for x in (0.0, 1.0))
    for t in range(3):
        run(optimizer, params, 1, first=t)
        steps = torch.full((2,), t + 1.0)
        ops.adamw_(twins, [p.grad for p in params], m, s, steps, lr=0.05, batch_size=8)
    assert_identical([p.detach() for p in twins], [p.detach() for p in params])


def test_empty_lists_are_nothing_to_do():
    ops.rmsprop_([], [], [], lr=0.1, batch_size=1)
    ops.adamw_([], [], [], [], lr=0.1, batch_size=1)


@pytest.mark.parametrize("call", operator_calls("cpu"))
def test_the_cuda_body_sends_cpu_parameters_to_the_cpu_body(call):
    name = call.split()[0]
    (expected, kwargs), (args, _) = (operator_calls("cpu")[call] for _ in range(2))
    for group, values in zip(args, expected, strict=True):
        for tensor, value in zip(group, values, strict=True) if isinstance(group, list) else ():
            tensor.copy_(value)
    getattr(torch.ops.rootfree_fused, name)(*expected, **kwargs)
    method = METHODS[name]
    _, on_cuda = dispatch.diagonal_bodies(method)[method.name]
    on_cuda(*args, **kwargs)
    for group, values in zip(args, expected, strict=True):
        if isinstance(group, list):
            assert_identical(group, values)


# Bad input

BAD_VALUES = [
    ("lr", -1e-3, ValueError),
    ("lr", NAN, ValueError),
    ("lr", "0.1", TypeError),
    ("lr", None, TypeError),
    ("lr", torch.tensor([0.1, 0.2]), ValueError),
    ("lr", torch.tensor(1), ValueError),
    ("lr", torch.tensor(-1.0), ValueError),
    ("damping", -1e-8, ValueError),
    ("damping", INF, ValueError),
    ("weight_decay", -0.1, ValueError),
    ("weight_decay", NAN, ValueError),
    ("batch_size", 0, ValueError),
    ("batch_size", -8, ValueError),
    ("batch_size", INF, ValueError),
    ("batch_size", "8", TypeError),
    ("batch_size", True, TypeError),
    ("maximize", "yes", ValueError),
]
BAD_RMSPROP = [
    ("alpha", -0.1, ValueError),
    ("alpha", 1.1, ValueError),
    ("alpha", NAN, ValueError),
    ("momentum", -0.9, ValueError),
    ("momentum", INF, ValueError),
    ("weight_decay_mode", "coupled", ValueError),
]
BAD_ADAMW = [
    ("betas", (0.9, 1.0), ValueError),
    ("betas", (-0.1, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", (0.9,), ValueError),
    ("betas", 0.9, ValueError),
    ("betas", ("a", 0.9), TypeError),
]
BAD_CLASS = [("bias_correction", 1, ValueError), ("capturable", "no", ValueError)]


@pytest.mark.parametrize(
    ("cls", "name", "value", "error"),
    [
        *[(RootFreeRMSprop, *bad) for bad in [*BAD_VALUES, *BAD_RMSPROP, BAD_CLASS[1]]],
        *[(RootFreeAdamW, *bad) for bad in [*BAD_VALUES, *BAD_ADAMW, *BAD_CLASS]],
    ],
)
def test_a_bad_hyperparameter_is_named_and_nothing_is_added(cls, name, value, error):
    first, second = parameters((3,), (3,))
    with pytest.raises(error, match=rf"^{name} is .*; pass"):
        cls([first], **{"batch_size": 8, name: value})
    optimizer = cls([first], batch_size=8)
    with pytest.raises(error, match=rf"^{name} is .*; pass"):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1
    assert set(optimizer.state) == {first}


@pytest.mark.parametrize("function", [ops.rmsprop_, ops.adamw_])
@pytest.mark.parametrize(("name", "value", "error"), BAD_VALUES)
def test_functions_check_the_same_values(function, name, value, error):
    args = lists("cpu")
    before = [t.clone() for group in args for t in group]
    with pytest.raises(error, match=rf"^{name} is .*; pass"):
        function(*args, **{"lr": 0.1, "batch_size": 8, name: value})
    assert_identical([t for group in args for t in group], before)


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_batch_size_is_required_and_explained(cls):
    params = parameters((3,), (3,))
    with pytest.raises(ValueError, match=r"batch_size is missing.*averaged over examples"):
        cls(params)
    with pytest.raises(ValueError, match="batch_size is missing"):
        cls([{"params": params[:1], "batch_size": 8}, {"params": params[1:]}])
    groups = [{"params": [p], "batch_size": b} for p, b in zip(params, (8, 64), strict=True)]
    assert [g["batch_size"] for g in cls(groups).param_groups] == [8, 64]


@pytest.mark.parametrize("cls", [RootFreeRMSprop, RootFreeAdamW])
def test_parameters_that_cannot_be_trained_are_refused(cls):
    (good,) = parameters((3,))
    for bad, words in (
        (torch.zeros(3, dtype=torch.int64), "cast it"),
        (torch.zeros(3, dtype=torch.complex64), "view_as_real"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "cast it"),
        (torch.eye(3).to_sparse(), "dense"),
    ):
        with pytest.raises(TypeError, match=words):
            cls([good, bad], batch_size=8)
        optimizer = cls([good], batch_size=8)
        with pytest.raises(TypeError, match=words):
            optimizer.add_param_group({"params": [bad]})
        assert len(optimizer.param_groups) == 1
        assert set(optimizer.state) == {good}
    with pytest.raises(TypeError, match="pass a dict"):
        optimizer.add_param_group([good])


def bad_lists():
    p, g, s = (tensors("cpu", (4, 8)) for _ in range(3))
    integers = [torch.zeros(4, 8, dtype=torch.int64)]
    return {
        "grads has 2 tensors but params has 1": (p, g * 2, s),
        r"square_avgs has 0 tensors but params has 1": (p, g, []),
        r"grads\[0\] has shape \(8, 4\) but params\[0\] has \(4, 8\); pass it untransposed": (
            p,
            [g[0].t()],
            s,
        ),
        r"square_avgs\[0\] has shape \(4,\)": (p, g, tensors("cpu", (4,))),
        r"params\[0\] has dtype torch.int64": (integers, g, s),
        r"grads\[0\] has dtype torch.int64": (p, integers, s),
        r"grads\[0\] is torch.float64 but params\[0\] is torch.float32": (p, [g[0].double()], s),
        r"square_avgs\[0\] is torch.bfloat16 .* allocate it with": (p, g, [s[0].bfloat16()]),
        r"grads\[0\] is on meta but params\[0\] is on cpu; move it": (p, [g[0].to("meta")], s),
        r"grads\[0\] has layout torch.sparse_coo": (p, [g[0].to_sparse()], s),
    }


@pytest.mark.parametrize("words", bad_lists())
def test_lists_that_do_not_fit(words):
    params, grads, square_avgs = bad_lists()[words]
    before = [p.clone() for p in params]
    with pytest.raises((ValueError, TypeError), match=words):
        ops.rmsprop_(params, grads, square_avgs, lr=0.1, batch_size=8)
    assert_identical(params, before)


def test_momentum_needs_buffers_and_steps_need_a_count_each():
    with pytest.raises(ValueError, match="momentum_buffers is empty; pass"):
        ops.rmsprop_(*lists("cpu", 3), lr=0.1, batch_size=8, momentum=0.9)
    for steps in (torch.ones(3), torch.ones(2, dtype=torch.int64), torch.ones(())):
        with pytest.raises(ValueError, match=r"steps is .* of shape .*; pass"):
            ops.adamw_(*lists("cpu"), steps, lr=0.1, batch_size=8)


# Without extension and Triton


def test_the_reference_steps_in_with_one_warning():
    """A fresh interpreter that cannot import the kernels: same numbers, one warning, no crash."""
    script = """
        import sys, warnings
        sys.modules["rootfree_fused._C"] = sys.modules["triton"] = None
        import torch
        from rootfree_fused import RootFreeAdamW, ops
        from rootfree_fused.ops import extensions
        sys.modules["rootfree_fused." + extensions.known_tensors_module(torch.__version__)] = None
        assert ops.backends()["host"].startswith("Python: no _known_tensors_"), ops.backends()
        assert ops.backends()["cpu"].startswith("reference"), ops.backends()
        assert ops.backends()["cuda"].startswith("reference"), ops.backends()
        p = torch.nn.Parameter(torch.ones(3))
        start = {'damping': 0.0, 'initial_square_avg': 1.0}
        optimizer = RootFreeAdamW([p], lr=0.1, weight_decay=0.0, batch_size=1, **start)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                p.grad = torch.ones(3)
                optimizer.step()
        assert len(caught) == 1, caught
        assert "several times slower" in str(caught[0].message)
        assert "To cure this: pip install" in str(caught[0].message)
        assert (p - (1 - 0.1 * (0.1 + 0.19 + 0.271))).abs().max() < 1e-6, p
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_import_needs_no_triton_and_no_compiler_stack():
    """Importing the package loads neither Triton nor torch's compiler."""
    script = (
        "import sys, rootfree_fused; print('triton' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
