"""Every example runs, counts what its docstring says, and learns."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from helpers.timm_alone import import_timm
from torch.nn.modules.module import register_module_forward_hook

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    of_ranks = {"fsdp2", "lightning_fsdp2"}
    elsewhere = {"gpt", "backend"}  # test_gpt_example.py, test_backend_example.py
    assert names == of_ranks | elsewhere | {
        "checkpoint",
        "train",
        "plain_loop",
        "hf_trainer",
        "lightning_module",
        "accelerate_loop",
        "timm_model",
    }


def test_plain_loop():
    batch_sizes, losses = run_example("plain_loop")
    assert batch_sizes == [32, 32, 32, 4] * 10
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_train():
    lrs, losses = run_example("train")
    assert len(lrs) == len(losses) == 200
    assert lrs == sorted(lrs, reverse=True)
    assert lrs[0] == 0.005
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_checkpoint():
    at_once, resumed = run_example("checkpoint")
    assert at_once == resumed
    assert sum(at_once[10:]) < 0.95 * sum(at_once[:10])


def printed_by(name):
    """The numbers of each line that an example of two processes prints, which import it."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    lines = [
        line.split(": ")[1]
        for line in run.stdout.splitlines()
        if "loss" in line or "resumed" in line
    ]
    return [line.split() for line in lines]


def test_lightning_fsdp2():
    (losses,) = printed_by("lightning_fsdp2")
    losses = list(map(float, losses))
    assert len(losses) == 40
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_fsdp2():
    at_once, resumed = printed_by("fsdp2")
    assert resumed == at_once[10:]
    losses = list(map(float, at_once))
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_lightning_module():
    batch_sizes, losses = run_example("lightning_module")
    assert batch_sizes == [32, 32, 4] * 10
    assert losses[-1] < 0.8 * losses[0]


def test_accelerate_loop():
    batch_sizes, losses = run_example("accelerate_loop")
    assert batch_sizes == [32, 32, 4] * 10
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_timm_model():
    import_timm()
    losses = run_example("timm_model")
    assert len(losses) == 30
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_hf_trainer():
    """The counter's number of tokens is the Trainer's, which divides the loss by it."""
    divisors = []

    def record(module, args, kwargs, output):
        if module.training and "labels" in kwargs:
            divisors.append(int(kwargs["num_items_in_batch"]))

    handle = register_module_forward_hook(record, with_kwargs=True)
    try:
        batch_sizes, losses = run_example("hf_trainer")
    finally:
        handle.remove()
    assert batch_sizes == divisors[::2] == divisors[1::2]
    assert sum(batch_sizes) == sum(11 - i % 5 for i in range(240))
    assert losses[-1] < 0.8 * losses[0]
