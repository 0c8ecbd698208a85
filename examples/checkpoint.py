"""Checkpoints that survive a killed process: written beside the old one, then put in its place.

python examples/checkpoint.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rootfree_fused import RootFreeShampoo


def save(state: Any, path: Path) -> None:
    """Replace the checkpoint at `path` as a whole or not at all.

    A process that dies on the way leaves the old one there, and a `.tmp` beside it that the next
    call overwrites.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # or the rename could reach the disk before the bytes
    os.replace(temporary, path)


class Training:
    """A small model and its optimizer, which go on from a checkpoint where there is one."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.path = path
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.optimizer = RootFreeShampoo(self.model.parameters())
        self.steps = 0
        if path.exists():
            # On the CPU, wherever it was saved; load_state_dict moves the state to its device.
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps = state["steps"]

    def step(self) -> float:
        """Train on the batch of this step; return its loss."""
        seeded = torch.Generator().manual_seed(self.steps)
        x = torch.randn(32, 8, generator=seeded)
        loss = nn.functional.cross_entropy(self.model(x), x[:, :3].argmax(1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        """All that it takes to go on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }


def main() -> tuple[list[float], list[float]]:
    """Twenty steps, at once and with a new process's start in between; return the losses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        training = Training(path)
        at_once = [training.step() for _ in range(20)]

        training = Training(path)
        resumed = [training.step() for _ in range(10)]
        save(training.state(), path)
        training = Training(path)
        resumed += [training.step() for _ in range(10)]
    return at_once, resumed


if __name__ == "__main__":
    for name, losses in zip(("at once:", "resumed:"), main(), strict=True):
        print("losses", name, *(f"{loss:.3f}" for loss in losses))
