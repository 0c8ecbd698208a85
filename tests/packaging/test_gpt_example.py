"""examples/gpt.py: it learns, goes on to the bit where it was killed, and says what it refuses."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"
SMALL = {"CONTEXT": 32, "SEQUENCES": 8, "WIDTH": 32, "LAYERS": 1}


@pytest.fixture
def example(two_threads):
    """Its names, with a small network."""
    names = runpy.run_path(str(EXAMPLE))["main"].__globals__
    names.update(SMALL)
    return names


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(10):
        (folder / f"{i}.py").write_text("def f(x):\n    return [x, None]\n" * 50 + f"# {i}\n")
    return folder


def trained(example, text, folder, **options):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return example["main"]([f"--text={text}", f"--folder={folder}", *flags])


def losses(curves, name="training"):
    return [loss for _, loss in curves[name]]


def test_it_runs_as_it_is(tmp_path):
    """A step of its own network on the standard library, by default with RootFreeShampoo."""
    command = [sys.executable, EXAMPLE, "--steps=1", "--folder", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "RootFreeShampoo on" in done.stdout
    (loss,) = re.findall(r"^step 1: validation loss (\d\.\d+) nat$", done.stdout, re.MULTILINE)
    assert 3 < float(loss) < math.log(97)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "optimizer",
    [
        "RootFreeShampoo",
        "RootFreeAdamW",
        "RootFreeRMSprop",
        "IFShampoo",
        "AdamW",
        "SGD",
        "Muon",
    ],
)
def test_every_optimizer_learns(optimizer, example, text, tmp_path):
    assert optimizer in example["LEARNING_RATES"]
    curves = trained(example, text, tmp_path, optimizer=optimizer, steps=40)
    assert [step for step, _ in curves["training"]] == list(range(1, 41))
    assert losses(curves)[-1] < 0.9 * losses(curves)[0]
    assert losses(curves, "validation")[-1] < 0.9 * losses(curves)[0]


@pytest.mark.parametrize("optimizer", ["RootFreeShampoo", "Muon"])
def test_a_killed_run_goes_on_to_the_bit(optimizer, example, text, tmp_path, monkeypatch):
    options = {"optimizer": optimizer, "steps": 9, "save_every": 3}
    at_once = trained(example, text, tmp_path / "at_once", **options)
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(example, text, tmp_path / "killed", **options)
    monkeypatch.undo()
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert len(saved["curves"]["training"]) == 3
    resumed = trained(example, text, tmp_path / "killed", **options)
    assert resumed == at_once
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["parts"][0]
        for name in ("at_once", "killed")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--optimizer=Adam", "invalid choice"),
        ("--lr=-1", "--lr is -1.0; pass a number above 0"),
        ("--lr=nan", "--lr is nan"),
        ("--steps=0", "--steps and --save-every are at least 1"),
        ("--save-every=0", "are at least 1"),
        (f"--folder={__file__}", "--folder is a file"),
    ],
)
def test_bad_arguments(flag, words, example, capsys):
    with pytest.raises(SystemExit):
        example["arguments"]([flag])
    assert words in capsys.readouterr().err


def test_a_folder_without_text_or_with_another_run(example, text, tmp_path):
    with pytest.raises(SystemExit, match=r"0 modules lie in .*--text"):
        trained(example, tmp_path, tmp_path / "run")
    trained(example, text, tmp_path / "run", steps=2)
    with pytest.raises(SystemExit, match=r"'steps': 2.*pass another --folder"):
        trained(example, text, tmp_path / "run", steps=3)
