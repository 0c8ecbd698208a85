"""Steps on sums of micro-batches in Triton against the specification: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers.comparison import assert_bits_equal, assert_no_worse_than

pytest.importorskip("triton")

from helpers.kernels_lowbit import CASES as FORMATS
from helpers.kernels_lowbit import Lowbit
from helpers.layouts import channels_last, gapped, misaligned, transposed
from helpers.offline import on_its_device
from helpers.squares import CASES, KINDS, Sums, weights_of

from bench.host import as_on_cuda
from rootfree_fused.kernels import diag
from rootfree_fused.ops.methods import METHODS

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAN, INF, LARGEST = float("nan"), float("inf"), torch.finfo(F32).max
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16)]
BLOCK = diag.BLOCK
SHAPES = [(n,) for n in (0, 1, 33, BLOCK - 1, BLOCK, 3 * BLOCK + 7)]
MAIN_CASES = [("rmsprop", "mean"), ("adamw corrected", "variance"), ("sign", "signs")]

# The interpreter is numpy, which reports the infinities that some of the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _interpreter(request):
    with on_its_device(request):
        yield


def run(sums):
    """One step by the launcher, in place."""
    sums.run(lambda *tensors, **given: diag.update_(sums.name, *tensors, **given))


def check(sums):
    """One step is as near to float64 as the reference, and leaves what it only reads."""
    eager, truth = sums.expected(), sums.expected(F64)
    read = [t.clone() for t in (*sums.grads, *sums.parts)]
    run(sums)
    for several in zip(sums.written(), eager, truth, strict=True):
        assert_no_worse_than(*(torch.cat([t.flatten() for t in tensors]) for tensors in several))
    assert_bits_equal([*sums.grads, *sums.parts], read)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_steps_follow_the_specification(case, dtypes, device):
    check(Sums(case, SHAPES, dtypes, device=device))


@pytest.mark.parametrize("case", MAIN_CASES, ids=", ".join)
@pytest.mark.parametrize(
    ("like", "grad_like"),
    [
        (misaligned, misaligned),
        (torch.clone, misaligned),
        (transposed, transposed),
        (transposed, torch.clone),
        (channels_last, channels_last),
        (channels_last, torch.clone),
        (gapped, torch.clone),
        (gapped, gapped),
    ],
)
def test_layouts(case, like, grad_like, device):
    sums = Sums(case, [(5, 3, 13, 17), (2, 1, 3, 1)], like=like, grad_like=grad_like, device=device)
    check(sums)


@pytest.mark.parametrize("which", ["grads", "parts"])
def test_one_of_the_lists_may_have_strides_of_its_own(which, device):
    sums = Sums(("rmsprop", "mean"), [(5, 3, 13, 17)], device=device)
    setattr(sums, which, list(map(channels_last, getattr(sums, which))))
    check(sums)


def test_parts_that_start_late_make_the_row_ragged(device):
    sums = Sums(("adamw", "micro"), [(2 * BLOCK,)], device=device)
    lists = [sums.params, sums.grads, *sums.states]
    aligned = diag.prepare(lists, parts=sums.parts).launches[0].rows.host
    late = diag.prepare(lists, parts=list(map(misaligned, sums.parts))).launches[0].rows.host
    assert aligned[0, diag.ROW.aligned] == 2 * BLOCK
    assert late[0, diag.ROW.aligned] == 0


def test_steps_with_and_without_parts_are_plans_of_their_own(device):
    sums = Sums(("rmsprop", "mean"), [(300,), (50,)], device=device)
    parts, more = sums.parts, sums.more
    for given in (parts, [], parts, []):
        sums.parts, sums.more = given, more if given else {}
        check(sums)


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_the_sum_of_weights_may_be_on_either_device(place, device):
    sums = Sums(("adamw corrected", "micro"), [(300,)], device=device)
    sums.grad_scale = sums.grad_scale.to("cpu" if place == "cpu" else device)
    check(sums)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_sums_never_make_nan(kind, device):
    """And what s is afterwards is finite, so that the next step makes none either."""
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1e10, 1e19, 2e19, 1e38, LARGEST], device=device)
    case = "rmsprop without buffer", kind
    sums = Sums(case, [(2 * len(sizes) ** 2,)], device=device)
    g, square = (t.flatten() for t in torch.meshgrid(sizes, sizes, indexing="ij"))
    sums.grads, sums.parts = [torch.cat([g, -g])], [torch.cat([square, square])]
    for scale in (1.0, 2.0**-20, 2.0**20):
        sums.grad_scale = torch.tensor(scale)
        run(sums)
        assert sums.states[0][0].isfinite().all()
        assert (sums.states[0][0] >= 0).all()
        assert not sums.params[0].isnan().any()
        sums.params[0].zero_()


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_what_is_not_finite_is_as_in_the_reference(case, device):
    sums = Sums(case, [(BLOCK + 9,)], device=device)
    for i, (g, part) in enumerate([(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, INF)]):
        for tensors, x in ((sums.grads, g), (sums.parts, part)):
            tensors[0][i] = tensors[0][-1 - i] = x
    expected = sums.expected()
    run(sums)
    for (actual,), (e,) in zip(sums.written(), expected, strict=True):
        assert torch.equal(actual.isfinite(), e.isfinite())
        assert not (actual.isnan() & ~e.isnan()).any()


def test_where_there_were_infs_nothing_changes(device):
    for case in MAIN_CASES:
        sums = Sums(case, [(100,)], device=device)
        before = [t.clone() for ts in sums.written() for t in ts]
        sums.more = {**sums.more, "found_inf": torch.ones((), device=device)}
        run(sums)
        assert_bits_equal([t for ts in sums.written() for t in ts], before)


@pytest.mark.parametrize("wrong", [BF16, F64], ids=str)
def test_parts_are_float32(wrong, device):
    sums = Sums(("rmsprop", "mean"), [(10,)], device=device)
    sums.parts = [part.to(wrong) for part in sums.parts]
    with pytest.raises(TypeError, match=r"params\[0\].*float32"):
        run(sums)


@pytest.mark.parametrize("case", MAIN_CASES, ids=", ".join)
def test_the_operator_on_cuda_is_the_launcher(case, device, monkeypatch):
    launched, run_plan = [], diag.run_plan

    def noted(*args):
        launched.append(args[2])
        run_plan(*args)

    monkeypatch.setattr(diag, "run_plan", noted)
    sums = Sums(case, [(70,), (5, 3)], device=device)
    expected = sums.expected()
    with as_on_cuda():
        sums.run()
    assert launched == [sums.name]
    for actual, e in zip(sums.written(), expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-5, atol=1e-6)


# In fewer bytes ------------------------------------------------------------------------------

HALF_WAY = {
    "adamw_": {"beta1": 0.5, "beta2": 0.5},
    "rmsprop_": {"alpha": 0.5},
    "rmsprop_ without momentum": {"alpha": 0.5},
    "sign_": {"beta": 0.5, "sign_last": False},
}
LOWBIT = [(method, kind) for method in HALF_WAY for kind in KINDS if method != "sign_"]
LOWBIT.append(("sign_", "signs"))


def lowbit_parts(lists, kind):
    """Sums of two micro-batches, whose squares are exact, and what a step is given beside them."""
    first, second = lists.fresh_grads(), lists.fresh_grads()
    part = torch.sign if kind == "signs" else torch.square
    pairs = list(zip(first, second, strict=True))
    given = {"parts": [part(a.float()) + part(b.float()) for a, b in pairs]}
    given |= {"grad_scale": torch.tensor(2.0), **weights_of(kind, count=2, weight=1.0)}
    return [a.float() for a, _ in pairs], given


@pytest.mark.parametrize(("method", "kind"), LOWBIT)
@pytest.mark.parametrize("case", FORMATS)
def test_states_in_fewer_bytes_are_equal_to_the_bit(case, method, kind, device):
    shapes = [(n,) for n in (1, 257, 0, 2500)]
    lists = Lowbit(method, case, shapes, device, grad=F32, **HALF_WAY[method])
    for _ in range(2):
        grads, given = lowbit_parts(lists, kind)
        lists.step(grads, **given)
    lists.check_bits()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 701), "misaligned"), ((37, 41), "transposed"), ((37, 41), "gapped")],
    ids=str,
)
def test_blocks_follow_the_order_of_the_axes(shape, layout, device):
    settings = {"grad": F32, "layout": layout, **HALF_WAY["adamw_"]}
    lists = Lowbit("adamw_", "bfloat16 + 8, 8bit", [shape, shape], device, **settings)
    grads, given = lowbit_parts(lists, "micro")
    like = {"misaligned": misaligned, "transposed": transposed, "gapped": gapped}[layout]
    given["parts"] = list(map(like, given["parts"]))
    lists.step(grads, **given)
    lists.check_bits()


def test_the_lowbit_operator_takes_parts(device):
    lists = Lowbit("adamw_", "bfloat16 + 8, 8bit", [(700,)], device, grad=F32, **HALF_WAY["adamw_"])
    grads, given = lowbit_parts(lists, "mean")
    params, *others = lists.actual
    settings = {**lists.settings, **lists.random, **given}
    settings["batch_size"] = torch.tensor(settings["batch_size"])
    operator = getattr(torch.ops.rootfree_fused, METHODS["adamw_"].lowbit_name)
    with as_on_cuda():
        operator(params, grads, *others, lists.steps, torch.tensor(0.0), **settings)
    lists.specify(grads, torch.tensor(0.0), **given)
    lists.check_bits()
