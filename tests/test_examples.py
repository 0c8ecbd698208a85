"""Every example runs, and counts what its docstring says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_hook

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"checkpoint", "plain_loop", "hf_trainer", "lightning_module"}


def test_plain_loop():
    assert run_example("plain_loop") == [32, 32, 32, 4]


def test_checkpoint():
    at_once, resumed = run_example("checkpoint")
    assert at_once == resumed
    assert at_once[-1] < at_once[0]


def test_lightning_module():
    pytest.importorskip("lightning")
    assert run_example("lightning_module") == [32, 32, 4] * 2


def test_hf_trainer():
    """The counter's number of tokens is the Trainer's, which divides the loss by it."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    divisors = []

    def record(module, args, kwargs, output):
        if module.training and "labels" in kwargs:
            divisors.append(int(kwargs["num_items_in_batch"]))

    handle = register_module_forward_hook(record, with_kwargs=True)
    try:
        batch_sizes = run_example("hf_trainer")
    finally:
        handle.remove()
    assert batch_sizes == divisors[::2] == divisors[1::2]
    assert sum(batch_sizes) == sum(11 - i % 5 for i in range(24))
