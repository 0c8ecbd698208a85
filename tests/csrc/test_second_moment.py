"""The C++ bodies of steps on sums of micro-batches against the specification."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.comparison import assert_bits_equal, assert_no_worse_than
from helpers.layouts import channels_last, cropped, expanded_rows, gapped, misaligned, transposed
from helpers.lowbit import BF16, E5M3, F32, S8, WEIGHTS, assert_stored_equal, problem
from helpers.squares import CASES, KINDS, Sums, weights_of

from rootfree_fused import ops

F64, F16 = torch.float64, torch.float16
NAN, INF, LARGEST = float("nan"), float("inf"), torch.finfo(F32).max
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F64, F64), (F64, F32)]
SHAPE = (5, 3, 40, 70)
LAYOUTS = [torch.clone, gapped, transposed, channels_last, misaligned, cropped]
MAIN_CASES = [("rmsprop", "mean"), ("adamw corrected", "variance"), ("sign", "signs")]

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        ops.backends()["cpu"].startswith("reference") and not shutil.which("c++"),
        reason="no extension, and no compiler to build it",
    ),
]


def check(sums):
    """One step is as near to float64 as the reference, and leaves what it only reads."""
    eager, truth = sums.expected(), sums.expected(F64)
    read = [t.clone() for t in (*sums.grads, *sums.parts)]
    sums.run()
    for several in zip(sums.written(), eager, truth, strict=True):
        assert_no_worse_than(*(torch.cat([t.flatten() for t in tensors]) for tensors in several))
    assert_bits_equal([*sums.grads, *sums.parts], read)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_steps_follow_the_specification(case, dtypes):
    check(Sums(case, [(1,), (33,), (1025,), (), (0, 3)], dtypes))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", MAIN_CASES, ids=", ".join)
def test_hundreds_of_tensors(case):
    check(Sums(case, [(n,) for n in torch.randint(0, 3000, (400,)).tolist()]))


@pytest.mark.parametrize("grad_like", [*LAYOUTS, expanded_rows])
@pytest.mark.parametrize("like", LAYOUTS)
def test_layouts(like, grad_like):
    for case in MAIN_CASES:
        check(Sums(case, [SHAPE, (2, 1, 3, 1)], like=like, grad_like=grad_like))


def test_parts_of_another_layout_than_the_sums():
    sums = Sums(("rmsprop", "mean"), [SHAPE], like=channels_last)
    sums.parts = [part.contiguous() for part in sums.parts]
    check(sums)


@pytest.mark.parametrize("case", MAIN_CASES[:2], ids=", ".join)
def test_weights_of_the_batch_are_a_step_without_parts(case):
    """But for the roundings on the way."""
    sums = Sums(case, [(1000,)], (F64, F64))
    sums.more = weights_of("batch")
    (arguments, keywords), (twins, _) = sums.arguments(), sums.arguments()
    operator = getattr(torch.ops.rootfree_fused, sums.name)
    operator(*arguments, **keywords)
    del keywords["parts"]
    operator(*twins, **keywords)
    for found, expected in zip(arguments[0] + arguments[2], twins[0] + twins[2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_finite_sums_never_make_nan(kind):
    """And what s is afterwards is finite, so that the next step makes none either."""
    sizes = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1e10, 1e19, 2e19, 1e38, LARGEST])
    sums = Sums(("rmsprop without buffer", kind), [(2 * len(sizes) ** 2,)])
    g, square = (t.flatten() for t in torch.meshgrid(sizes, sizes, indexing="ij"))
    sums.grads, sums.parts = [torch.cat([g, -g])], [torch.cat([square, square])]
    for scale in (1.0, 2.0**-20, 2.0**20):
        sums.grad_scale = torch.tensor(scale)
        sums.run()
        assert sums.states[0][0].isfinite().all()
        assert (sums.states[0][0] >= 0).all()
        assert not sums.params[0].isnan().any()
        sums.params[0].zero_()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_what_is_not_finite_is_as_in_the_reference(case):
    sums = Sums(case, [(77,)])
    for i, (g, part) in enumerate([(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, INF)]):
        for tensors, x in ((sums.grads, g), (sums.parts, part)):
            tensors[0][i] = tensors[0][-1 - i] = x  # in a vector and in the tail
    expected = sums.expected()
    sums.run()
    for (actual,), (e,) in zip(sums.written(), expected, strict=True):
        # torch.lerp makes NaN of infinity for weights above 1/2; here it stays infinity.
        assert torch.equal(actual.isfinite(), e.isfinite())
        assert not (actual.isnan() & ~e.isnan()).any()


def test_where_there_were_infs_nothing_changes():
    for case in MAIN_CASES:
        sums = Sums(case, [(100,)])
        before = [t.clone() for ts in sums.written() for t in ts]
        sums.more = {**sums.more, "found_inf": torch.ones(())}
        sums.run()
        assert_bits_equal([t for ts in sums.written() for t in ts], before)


MISUSE = {
    "a part less": (lambda parts: parts[:1], "length"),
    "a flat part": (lambda parts: [parts[0], parts[1].flatten()], r"params\[1\].*one shape"),
    "a double part": (lambda parts: [parts[0], parts[1].double()], r"params\[1\] differ in dtype"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_changes_nothing(case):
    change, words = MISUSE[case]
    sums = Sums(("adamw corrected", "mean"), [(4, 8), (4, 8)])
    sums.parts = change(sums.parts)
    before = [t.clone() for ts in sums.written() for t in ts]
    with pytest.raises(RuntimeError, match=words):
        sums.run()
    assert_bits_equal([t for ts in sums.written() for t in ts], before)


# In fewer bytes: settings by which nothing is rounded that a kernel may contract


def with_parts(method, kind, **options):
    result = problem(method, **options)
    grads = [grad.float() for grad in result.grads]
    parts = [grad.square() + grad.roll(1).square() for grad in grads]
    if kind == "signs":
        parts = [grad.sign() + grad.roll(1).sign() for grad in grads]
    like = options.get("like", torch.clone)
    scaling = {"grad_scale": torch.tensor(2.0), "parts": list(map(like, parts))}
    result.more = scaling | weights_of(kind, count=2, weight=1.0)
    return result


LOWBIT = [(m, k) for m in ("rmsprop", "rmsprop without buffer", "adamw") for k in KINDS]
LOWBIT.append(("sign", "signs"))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("method", "kind"), LOWBIT)
def test_every_format_has_the_specified_bits(method, kind, weight):
    for states in [(F32, F32), (BF16, BF16), (S8, E5M3), (E5M3, S8)]:
        actual = with_parts(method, kind, weight=weight, states=states, grad=F32)
        expected = actual.copy().specified()
        assert_stored_equal(actual.run(), expected)


@pytest.mark.parametrize("like", [channels_last, transposed, gapped])
def test_strides_change_no_bit(like):
    shapes = [(3, 5, 20, 30), (2, 0, 3, 4)]
    plain, strided = (
        with_parts("adamw", "micro", shapes=shapes, like=how) for how in (torch.clone, like)
    )
    strided.more["parts"] = list(map(like, plain.more["parts"]))
    assert_stored_equal(strided.run(), plain.run())


def test_parts_in_fewer_bytes_are_refused():
    before = with_parts("adamw", "micro")
    wrong = before.copy()
    wrong.more["parts"] = [part.bfloat16() for part in wrong.more["parts"]]
    with pytest.raises(RuntimeError, match=r"parts\[0\] must be float32"):
        wrong.run()
    assert_stored_equal(wrong, before)
