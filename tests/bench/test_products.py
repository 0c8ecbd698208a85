"""`python -m bench products`: formulas, their FLOPs, checks, and the kernels of the operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.bench import CPU, needs_extras, row
from torch.utils.flop_counter import FlopCounterMode

from bench import products
from bench.__main__ import main
from bench.measuring import rows
from bench.optimizers import peers
from bench.report import tables
from bench.workloads import formulas, operator
from rootfree_fused import reference

DTYPES = [torch.float32, torch.bfloat16]


def outputs(name, tensors):
    kernel = formulas.KERNELS[name]
    return kernel.formula(*(tensors[key] for key in kernel.takes))


# Formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formulas.KERNELS)
def test_flops_as_torch_counts_them(name):
    tensors = formulas.stacks(3, 8, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        outputs(name, tensors)
    assert counter.get_total_flops() == 3 * 8**3 * formulas.KERNELS[name].products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", formulas.KERNELS)
def test_bytes_are_those_of_the_operands_and_the_results(name, dtype):
    tensors = formulas.stacks(3, 8, dtype, CPU)
    after = outputs(name, tensors)
    assert set(after) == set(formulas.KERNELS[name].gives)
    taken = [tensors[key] for key in formulas.KERNELS[name].takes]
    total = sum(t.nbytes for t in (*taken, *after.values()))
    assert total == 3 * 8 * 8 * formulas.moved(name, dtype)


def test_needed_flops_are_those_with_symmetric_products_at_half_price():
    of = formulas.KERNELS
    transform = 4
    both = 2 * sum(of[name].needed for name in ("gram", "factor momentum", "factor update"))
    assert of["step"].needed == transform + both + of["apply"].needed == 18


def test_a_step_by_the_formulas_is_the_specification():
    tensors = {key: t.double() for key, t in formulas.stacks(2, 6, torch.float32, CPU).items()}
    found = outputs("step", {**tensors, "master": tensors["c"], "master_k": tensors["k"]})
    factors, momenta = (
        [tensors[a][1].clone(), tensors[b][1].clone()] for a, b in (("c", "k"), ("m", "mk"))
    )
    p, buffer, g = (tensors[key][1].clone() for key in ("p", "buffer", "g"))
    reference.update_factors_(
        g,
        factors,
        momenta,
        factor_lr=formulas.FACTOR_LR,
        factor_momentum=formulas.DECAY,
        damping=formulas.DAMPING,
        batch_size=formulas.BATCH,
    )
    settings = {"lr": formulas.LR, "momentum": formulas.MOMENTUM, "weight_decay": 0.0}
    update = reference.precondition(g, factors)
    reference.apply_(p, update, buffer, decoupled=True, **settings)
    truth = dict(zip(("master", "master_k", "m", "mk"), [*factors, *momenta], strict=True))
    for key, exact in {**truth, "p": p, "buffer": buffer}.items():
        assert (found[key][1] - exact).abs().max() < 1e-12, key


# Checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", operator.PARTS)
def test_the_operator_is_right_in_every_part(name, dtype):
    tensors = formulas.stacks(3, 40, dtype, CPU)
    run = operator.Operator(tensors)
    run(**operator.PARTS[name])
    after = run.results()
    assert formulas.error_of(name, tensors, after) <= peers.ROUNDINGS[dtype]
    for key in formulas.KERNELS[name].formula(*(tensors[k] for k in formulas.KERNELS[name].takes)):
        if key in after:
            off = {**after, key: 1.1 * after[key]}
            assert formulas.error_of(name, tensors, off) > peers.ROUNDINGS[dtype], key


@pytest.mark.parametrize("dtype", DTYPES)
def test_formulas_are_right_in_their_dtype_and_nan_is_not(dtype):
    tensors = formulas.stacks(2, 24, dtype, CPU)
    for name in formulas.KERNELS:
        after = outputs(name, tensors)
        assert formulas.error_of(name, tensors, after) <= peers.ROUNDINGS[dtype]
        broken = {key: value * float("nan") for key, value in after.items()}
        assert not formulas.error_of(name, tensors, broken) <= peers.ROUNDINGS[dtype]


# Subcommand -----------------------------------------------------------------------------------


@needs_extras
def test_products_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "SIZES", (16,))
    monkeypatch.setattr(products, "MANY", {"cpu": {16: 3}})
    assert main(["products", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    written = rows.read_rows(tmp_path / "products.jsonl")
    assert (tmp_path / "products.md").read_text() == tables.products(written) + "\n"
    rates = {
        r["provider"]: r["value"] for r in rows.select(written, case=products.LIMITS, metric="rate")
    }
    assert set(rates) == {"mm, bfloat16", "mm, float32"}
    assert "torch.compile is absent" in (tmp_path / "products.md").read_text()
    for case in ("1 of 16", "3 of 16"):
        of = rows.select(written, case=case, provider="IFShampoo, bfloat16")
        value = {r["metric"]: r["value"] for r in of}
        count = int(case[0])
        rate = 18 * count * 16**3 / value["step time"] / 1e9
        (of_rate,) = (r["detail"] for r in of if r["metric"] == "step rate")
        assert of_rate["flops"] == 18 * count * 16**3
        assert of_rate["bytes"] == formulas.moved("step", torch.bfloat16) * count * 16**2
        assert value["step rate"] == pytest.approx(rate, rel=1e-3)
        share = rate / rates["mm, bfloat16"]
        assert value["step rate fraction"] == pytest.approx(share, rel=1e-3)
        (plain,) = rows.select(
            written, case=case, provider="torch.bmm, bfloat16", metric="apply time"
        )
        assert value["apply speed"] == pytest.approx(plain["value"] / value["apply time"], rel=1e-3)
        (eigh,) = rows.select(written, case=case, metric=tables.RATIO)
        assert eigh["value"] > 0


@needs_extras
def test_a_wrong_kernel_is_red_and_has_no_time(tmp_path, monkeypatch):
    wrong = replace(
        formulas.KERNELS["apply"], formula=lambda p, b, *r: formulas.apply(p, 2 * b, *r)
    )
    kernels = {**formulas.KERNELS, "apply": wrong}
    monkeypatch.setattr(formulas, "KERNELS", kernels)  # what all is compared with
    monkeypatch.setattr(products, "SIZES", (16,))
    monkeypatch.setattr(products, "MANY", {"cpu": {}})
    assert main(["products", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    written = rows.read_rows(tmp_path / "products.jsonl")
    red = rows.select(written, metric="apply error", provider="IFShampoo, bfloat16")
    assert [r["detail"] for r in red] == [{"right": False}]
    assert not rows.select(written, metric="apply time")
    assert "**WRONG**" in (tmp_path / "products.md").read_text()


def test_a_compiler_that_does_not_work_is_absent_with_the_reason(monkeypatch):
    def fail(_):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    assert products.compiled_formulas(quick=False) == ({}, "RuntimeError: no C++ compiler")


def test_gram_is_half_of_what_both_take_more_than_apply(tmp_path):
    written = rows.Rows(tmp_path / "products.jsonl", "products", CPU)
    timing = {"gram": 9.0, "apply": 5.0, "step": 1.0}
    times = {
        ("IFShampoo, float32", name): products.Timing(seconds, seconds, seconds, 3)
        for name, seconds in timing.items()
    }
    products.Stack(10, 1, written, {"float32": 2.5}, times).add_times()
    (gram,) = rows.select(rows.read_rows(written.path), metric="gram time")
    assert gram["value"] == 2000.0
    (share,) = rows.select(rows.read_rows(written.path), metric="gram rate fraction")
    assert share["value"] == 10 / 2.0 / 2.5


def test_the_table_shows_time_share_error_and_the_ratio():
    eigh = tables.EIGH
    shown = tables.products(
        [
            row("mm, float32", "rate", 0.25, case=products.LIMITS),
            row("torch.compile", "absent", None, case=products.LIMITS, why="no compiler"),
            row("A", "gram error", 0.125, right=True),
            row("A", "gram time", 2.0),
            row("A", "gram rate fraction", 0.5),
            row("A", "apply error", None, right=False),
            row(eigh, "eigh error", 1e-6, right=True),
            row(eigh, "eigh time", 32.0, p20=32.0, p80=32.0),
            row(eigh, tables.RATIO, 24.0),
        ]
    )
    assert "torch.compile is absent (one large product): no compiler" in shown
    assert "| A | 2, 50% |  |  | **WRONG** |  | not finite |" in shown
    assert "| c | 32 | 24 | 1e-06 |" in shown
