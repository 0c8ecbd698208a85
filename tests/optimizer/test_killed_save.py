"""A process that is killed while it saves leaves the old checkpoint, which loads and steps."""

from __future__ import annotations

import pickle
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("resource", reason="limits the size of files, which Windows cannot")
HELPER = Path(__file__).parents[1] / "helpers" / "killed_save.py"
EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoint.py"


def test_a_save_that_is_killed_leaves_the_old_checkpoint(tmp_path):
    example = runpy.run_path(str(EXAMPLE))
    old = tmp_path / "old.pt"
    training = example["Training"](old)
    for _ in range(3):
        training.step()
    example["save"](training.state(), old)
    expected = [training.step() for _ in range(3)]

    whole = old.stat().st_size
    sizes = [0, 1, whole // 2, whole - 1]
    for size in sizes:
        shutil.copy(old, tmp_path / f"{size}.pt")
    command = [sys.executable, HELPER, tmp_path, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(int(signal.SIGXFSZ))] * len(sizes), done.stderr

    for size in sizes:
        path, temporary = tmp_path / f"{size}.pt", tmp_path / f"{size}.pt.tmp"
        assert temporary.stat().st_size == size
        with pytest.raises(
            (RuntimeError, OSError, EOFError, pickle.UnpicklingError)
        ):  # it was in the middle
            torch.load(temporary)
        resumed = example["Training"](path)
        assert resumed.steps == 3
        assert [resumed.step() for _ in range(3)] == expected
        example["save"](resumed.state(), path)  # over what the killed one left
        assert example["Training"](path).steps == 6
        assert not temporary.exists()
