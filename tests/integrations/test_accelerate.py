"""accelerate's prepare, checked first and counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo, Sign

accelerate = pytest.importorskip("accelerate")
from rootfree_fused.integrations.accelerate import check, prepare  # noqa: E402

RANK = Path(__file__).parents[1] / "helpers" / "fsdp2_rank.py"


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_micro_batches_are_counted_and_what_is_prepared_returned(accelerator):
    model = torch.nn.Linear(3, 2)
    optimizer = RootFreeAdamW(model.parameters(), batch_size="counted")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    prepared = prepare(accelerator, model, optimizer, scheduler)
    assert prepared[0] is model
    assert prepared[1].optimizer is optimizer
    assert prepared[2].scheduler is scheduler
    found = []
    for size in (4, 3, 5, 5):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(size, 3)).square().mean())
            prepared[1].step()
            prepared[1].zero_grad()
        found.append(optimizer.param_groups[0]["batch_size"])
    assert found == ["counted", 7, 7, 10]


@pytest.mark.parametrize("optimizer_class", [RootFreeShampoo, Sign])
def test_without_a_batch_size_it_is_prepared_too(accelerator, optimizer_class):
    model = torch.nn.Linear(3, 2)
    _, optimizer = prepare(accelerator, model, optimizer_class(model.parameters()))
    assert "batch_size" not in optimizer.param_groups[0]


@pytest.mark.parametrize("case", ["torch's", "prepared", "micro-batches", "count"])
def test_what_is_refused_is_not_prepared(accelerator, monkeypatch, case):
    model = torch.nn.Linear(3, 2)
    optimizer = RootFreeAdamW(model.parameters(), batch_size="counted")
    expected = TypeError, "pass one of rootfree_fused, before"
    settings = {}
    if case == "torch's":
        optimizer = torch.optim.AdamW(model.parameters())
    elif case == "prepared":
        optimizer = accelerator.prepare(optimizer)
    elif case == "micro-batches":
        optimizer = RootFreeAdamW(model.parameters(), batch_size="counted", second_moment="micro")
        expected = ValueError, "accelerator.accumulate adds them up in .grad"
    else:
        settings, expected = {"count": "words"}, (ValueError, "'samples', 'tokens'")
    monkeypatch.setattr(accelerator, "prepare", lambda *_: pytest.fail("prepared"))
    with pytest.raises(expected[0], match=expected[1]):
        prepare(accelerator, model, optimizer, **settings)
    assert not model._forward_hooks


@pytest.mark.parametrize("optimizer_class", [RootFreeShampoo, RootFreeRMSprop])
def test_state_that_fsdp2_would_lose_is_refused(accelerator, monkeypatch, optimizer_class):
    monkeypatch.setattr(type(accelerator), "is_fsdp2", True)
    monkeypatch.setattr(accelerator, "prepare", lambda *prepared: prepared)
    model = torch.nn.Linear(3, 2)
    settings = {} if optimizer_class is RootFreeShampoo else {"batch_size": 4}
    optimizer = optimizer_class(model.parameters(), **settings)
    prepare(accelerator, model, optimizer)
    assert not dict.keys(optimizer.state)  # nothing was allocated for whole parameters
    saved = optimizer.state_dict()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"load by accelerator\.load_state"):
        prepare(accelerator, model, optimizer)
    optimizer.load_state_dict(saved)
    prepare(accelerator, model, optimizer)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.accumulate()
    with pytest.raises(ValueError, match="has taken steps or gradients"):
        prepare(accelerator, model, optimizer)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks_of_fsdp2():
    """Two processes take the batches of one, go its way, and go on from accelerate's checkpoint."""
    command = [sys.executable, str(RANK)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == {"RootFreeShampoo", "RootFreeAdamW"}
    for name, of_class in found.items():
        size = 16 if name == "RootFreeAdamW" else None
        assert of_class["sharded"]
        assert of_class["batch sizes"] == [[size] * 3] * 2
        assert of_class["off"] < 1e-12  # all is float64
        assert of_class["resumed"]


def of_kind(kind, *, fsdp2=False, **parallel):
    names = ("tp_enabled", "cp_enabled", "sp_enabled")
    parallelism = SimpleNamespace(**{name: parallel.get(name, False) for name in names})
    return SimpleNamespace(
        distributed_type=accelerate.DistributedType(kind),
        is_fsdp2=fsdp2,
        parallelism_config=parallelism,
    )


@pytest.mark.parametrize("optimizer_class", [IFShampoo, RootFreeShampoo])
@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_flattened_parameters_are_refused_with_factors(optimizer_class, kind):
    with pytest.raises(ValueError, match=r"flattens parameters; use FSDP2 .*or RootFreeAdamW"):
        check(of_kind(kind), optimizer_class)


def test_a_batch_size_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"give RootFreeRMSprop its batch_size"):
        check(of_kind("DEEPSPEED"), RootFreeRMSprop)
    for name in ("tp_enabled", "cp_enabled", "sp_enabled"):
        with pytest.raises(ValueError, match=r"process_group= the data-parallel ranks"):
            check(of_kind("MULTI_GPU", **{name: True}), IFShampoo)


def test_the_rest_is_taken():
    for optimizer_class in (RootFreeAdamW, RootFreeShampoo):
        for kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
            check(of_kind(kind), optimizer_class)
        check(of_kind("FSDP", fsdp2=True), optimizer_class)
    check(of_kind("FSDP"), RootFreeAdamW)
    check(of_kind("MULTI_GPU", tp_enabled=True), RootFreeShampoo)
