"""`python -m bench step`: its networks, FLOP and byte models, checks, means and growth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.bench import CPU, needs_extras, row
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from bench import step
from bench.__main__ import main
from bench.measuring import common, rows
from bench.optimizers import peers
from bench.report import tables
from bench.workloads import networks
from rootfree_fused import RootFreeAdamW

CHOSEN = ("IFShampoo, float32", "RootFreeAdamW", peers.EIGH)
TINY = networks.Model(list(networks.gpt2(16, 1, 8, 32)), 2)


# Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "count", "elements"),
    [
        (networks.resnet50(), 161, 25_557_032),
        (networks.vit_b16(), 152, 86_567_656),
        (networks.gpt2(), 148, 124_439_808),
        (networks.gpt2(1024, 24), 292, 354_823_168),
        (networks.llama_1b(), 146, 1_235_814_400),
        # A whole layer: attention, router, experts.
        (networks.qwen3_30b_a3b(experts=128), 389, 18_874_368 + 262_144 + 603_979_776),
    ],
)
def test_networks_have_the_published_sizes(layers, count, elements):
    found = list(layers)
    assert len(found) == count
    assert sum(math.prod(layer.shape) for layer in found) == elements


def test_resnet50_has_the_published_shapes_and_products():
    layers = list(networks.resnet50())
    assert layers[0].shape == (64, 3, 7, 7)
    assert layers[12].shape == (256, 64, 1, 1)  # the first shortcut
    assert [layer.shape for layer in layers[-2:]] == [(1000, 2048), (1000,)]
    # 4.09 billion multiply-adds an image of 224 x 224, as torchvision says
    assert networks.Model(layers, 1).flops() / 6 == pytest.approx(4.09e9, rel=1e-3)


def test_flops_of_convolutions_and_layers_as_torch_counts_them():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(4 * 25, 7)
    )
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    positions = {(4, 3, 3, 3): 25, (7, 100): 1}
    layers = [
        networks.Layer(shape, positions.get(shape, 0)) for shape in map(shape_of, net.parameters())
    ]
    assert networks.Model(layers, 2).flops() == counter.get_total_flops()


def shape_of(tensor):
    return tuple(tensor.shape)


def test_the_stand_in_makes_the_products_that_are_counted():
    model = networks.Model(list(networks.resnet50(8, 32)), 2)
    run = networks.forward_backward(model, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == model.flops() > 1e7


def test_matrices_are_split_from_vectors_lookups_and_long_axes():
    long_, lookup, dot = (networks.Layer(s, p) for s, p in (((30, 4), 1), ((5, 6), 0), ((1, 9), 1)))
    kept = [networks.Layer((4, 3, 2, 2), 5), networks.Layer((7, 20), 1)]
    matrices, others = networks.split(
        [long_, kept[0], lookup, dot, kept[1], networks.Layer((3,))], 20
    )
    assert matrices == [(4, 12), (7, 20)]
    assert others == [(30, 4), (5, 6), (1, 9), (3,)]


# Bytes and growth -----------------------------------------------------------------------------


def test_what_an_optimizer_holds_is_counted_wherever_it_is():
    p = torch.nn.Parameter(torch.zeros(10))
    p.grad = torch.zeros(10)
    optimizer = RootFreeAdamW([p], batch_size=1)
    assert common.held_bytes([optimizer], [p]) == 2 * 40 + 4  # two states and the step count
    other = SGD([p], lr=0.1)
    whole = torch.zeros(6)
    other.hidden = {"cache": [whole[:2], (whole[2:],)], "again": p.grad, "p": p}
    assert common.held_bytes([other], [p]) == 24


def test_growth_is_the_slope_in_logarithms():
    sizes = [3, 10, 50]
    assert step.exponent(sizes, [7e-3 * size**2.5 for size in sizes]) == pytest.approx(2.5)
    assert step.exponent(sizes, [5.0] * 3) == pytest.approx(0)


# Checks ---------------------------------------------------------------------------------------


def check(peer, tmp_path):
    written = rows.Rows(tmp_path / "step.jsonl", "step", CPU)
    parameters = step.Parameters.of(*networks.split(TINY.layers, 32), CPU)
    found = step.checked("c", "IFShampoo, float32", peer, parameters, written)
    tensors = [*parameters.matrices, *parameters.others]
    restored = all(map(torch.equal, tensors, parameters.values))
    return found, rows.read_rows(written.path), restored


def test_both_steps_are_checked_and_the_parameters_put_back(tmp_path):
    found, written, restored = check(peers.PEERS["IFShampoo, float32"], tmp_path)
    assert list(found) == [step.UPDATE, step.BETWEEN]
    assert [r["metric"] for r in written] == [f"error, {kind}" for kind in found] + ["state"]
    assert restored


@pytest.mark.parametrize("interval", [1, peers.NEVER])
def test_an_optimizer_that_is_off_in_either_step_is_not_timed(interval, tmp_path):
    right = peers.PEERS["IFShampoo, float32"]

    def off(params, asked):
        optimizer = right.build(params, asked)
        optimizer.param_groups[0]["lr"] *= 1.1 if asked == interval else 1.0
        return optimizer

    found, written, restored = check(replace(right, build=off), tmp_path)
    assert found == {}
    assert written[-1]["detail"] == {"right": False}
    assert restored


def test_a_slow_a_failing_and_a_large_optimizer_are_absent_with_the_reason(tmp_path, monkeypatch):
    def fail(params, interval):
        raise RuntimeError("out of luck")

    def why(*args):
        found, (written,), restored = check(*args)
        assert (found, written["metric"], restored) == ({}, "absent", True)
        return written["detail"]["why"]

    right = peers.PEERS["IFShampoo, float32"]
    with monkeypatch.context() as patch:
        patch.setattr(step, "LIMIT", 0.0)
        assert "more than the limit of 0 s" in why(right, tmp_path)
    assert why(peers.Peer(fail, "torch"), tmp_path) == "RuntimeError: out of luck"
    with pytest.raises(RuntimeError, match="out of luck"):
        check(peers.Peer(fail), tmp_path)
    monkeypatch.setattr(step, "available_memory", lambda _: 1000.0)
    assert "its state may need" in why(right, tmp_path)


def test_memory_is_asked_for_axes_with_a_whole_factor():
    parameters = step.Parameters.of([(10, 30)], [(7,)], CPU)
    states = 16 * 307
    needs = {dense: peers.Peer(int, dense=dense) for dense in (9, 20, 30)}
    assert parameters.need(needs[9]) == states
    assert parameters.need(needs[20]) == states + 32 * 100
    assert parameters.need(needs[30]) == states + 32 * 1000
    assert parameters.need(replace(needs[30], renews=False)) == states


# Subcommand -----------------------------------------------------------------------------------


@needs_extras
def test_step_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "PEERS", {name: peers.PEERS[name] for name in CHOSEN})
    monkeypatch.setattr(step, "GROWING", ("RootFreeAdamW",))
    monkeypatch.setattr(step, "QUICK", {"tiny": lambda: TINY})
    assert main(["step", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    written = rows.read_rows(tmp_path / "step.jsonl")
    assert (tmp_path / "step.md").read_text() == tables.step(written) + "\n"
    for name in CHOSEN:
        own = {r["metric"]: r["value"] for r in rows.select(written, case="tiny", provider=name)}
        update = own[step.UPDATE]
        between = own.get(step.BETWEEN, update)
        assert own["mean at interval 10"] == pytest.approx((update + 9 * between) / 10, rel=1e-3)
        (whole,) = rows.select(written, provider=tables.FORWARD)
        share = own["mean at interval 2"] / whole["value"]
        assert own["share at interval 2"] == pytest.approx(share, rel=1e-3)
    assert len(rows.select(written, metric="growth", provider="RootFreeAdamW")) == 3


@needs_extras
def test_a_wrong_step_of_ours_ends_in_red(tmp_path, monkeypatch):
    right = peers.PEERS["RootFreeAdamW"]
    wrong = replace(
        right, displacement=lambda p, g, interval: right.displacement(p, 2 * g, interval)
    )
    monkeypatch.setattr(step, "PEERS", {"RootFreeAdamW": wrong})
    monkeypatch.setattr(step, "GROWING", ())
    monkeypatch.setattr(step, "QUICK", {"tiny": lambda: TINY})
    assert main(["step", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "| RootFreeAdamW | **WRONG** |" in (tmp_path / "step.md").read_text()


def test_the_table_shows_absence_growth_and_the_worse_error():
    errors = {"error, update step": 0.5, "error, step between": 0.25}
    times = {"update step": 8.0, "step between": 2.0}
    shares = {f"share at interval {k}": 0.125 * k for k in tables.INTERVALS}
    shown = tables.step(
        [
            *(row("A", name, value, case="net", right=True) for name, value in errors.items()),
            *(row("A", name, ms, case="net", p20=ms, p80=ms + 0.5) for name, ms in times.items()),
            *(row("A", name, value, case="net") for name, value in shares.items()),
            row("A", "state", 16.0, case="net"),
            row("B", "absent", None, case="net", why="no such module"),
            row("A", "time at 4", 3.0, case="against depth", size=4, p20=3.0, p80=3.1),
            row("A", "growth", 1.5, case="against depth"),
        ]
    )
    assert "| A | 8 (8 to 8.5) | 2ⁿ | 0.125 | 0.25 | 1.25 | 16 | 0.5 |" in shown
    assert "| B | absent: no such module |" in shown
    assert "| A | 3 | 1.50 |" in shown
