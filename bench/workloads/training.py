"""Train copies of one network, an optimizer each, on the same batches at the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Data = Any  # what a problem's `load` returns and its other methods take
# A cosine to 0, or ("steps", shares of all steps, the factor at each of them).
Schedule = Literal["cosine"] | tuple[Literal["steps"], tuple[float, ...], float]


class Problem(Protocol):
    """A training problem. A round is what lies between two evaluations."""

    schedule: Schedule = "cosine"
    clip: float | None = None  # the largest norm of all gradients together

    name: str
    batch_size: int  # loss terms that a gradient averages
    rounds: int
    warm_up: float  # share of all steps in which the learning rate rises
    metric: str  # what the loss of `evaluate` is called, on the data of the comparison
    unit: str  # of a loss
    needs: tuple[str, ...]  # packages
    threads: int  # on a CPU, where nothing else runs: more wait for each other in a small network

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Data, Data]:
        """Training data, and held-out data: other data for tuning than for the comparison."""

    def build_model(self) -> nn.Module:
        """The network with its first weights, from torch's global generator."""

    def batches(self, data: Data, generator: torch.Generator) -> Iterable[Data]:
        """The batches of one round, always as many."""

    def loss(self, model: nn.Module, batch: Data) -> Tensor:
        """Mean over the batch's `batch_size` loss terms."""

    def evaluate(self, model: nn.Module, held_out: Data) -> dict[str, float]:
        """The `loss`, and other measures by their names; of a model in evaluation mode."""


def measured(problem: Problem, model: nn.Module, data: Data) -> dict[str, float]:
    """Every measure of a model in evaluation mode, and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return problem.evaluate(model, data)
    finally:
        model.train(training)


@dataclass
class Run:
    """One network in training, and what was measured: a value a round, seconds a step."""

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    clip: float | None = None
    micro_batches: int = 1
    training_loss: list[float] = field(default_factory=list)
    held_out: dict[str, list[float]] = field(default_factory=dict)
    optimizer_step: list[float] = field(default_factory=list)
    training_step: list[float] = field(default_factory=list)

    def step(self, problem: Problem, batch: Data, device: torch.device) -> Tensor:
        """One training step; returns the loss before it."""
        start = _now(device)
        self.optimizer.zero_grad()
        if self.micro_batches == 1:
            loss = problem.loss(self.model, batch)
            loss.backward()
        else:
            loss = self._accumulate(problem, batch)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        before = _now(device)
        self.optimizer.step()
        end = _now(device)
        self.schedule.step()
        self.optimizer_step.append(end - before)
        self.training_step.append(end - start)
        return loss.detach()

    def _accumulate(self, problem: Problem, batch: Data) -> Tensor:
        """The backwards of the micro-batches, taken by an optimizer of ours; their mean loss."""
        optimizer: Any = self.optimizer
        losses = []
        for part in zip(*(t.chunk(self.micro_batches) for t in batch), strict=True):
            losses.append(problem.loss(self.model, part))
            losses[-1].backward()
            optimizer.accumulate()
        if self.clip is not None:
            optimizer.accumulated_grads()
        return torch.stack(losses).mean()

    def evaluate(self, problem: Problem, data: Data) -> None:
        """Append every measure on held-out data."""
        for name, value in measured(problem, self.model, data).items():
            self.held_out.setdefault(name, []).append(value)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def learning_rate(step: int, *, steps: int, warm_up: int, schedule: Schedule = "cosine") -> float:
    """Factor of the learning rate at a step: a line to 1 in `warm_up` steps, then the schedule."""
    if step < warm_up:
        return (step + 1) / warm_up
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2
    _, shares, factor = schedule
    return factor ** sum(step >= round(share * steps) for share in shares)


def train(
    problem: Problem,
    optimizers: dict[str, Callable[[nn.Module], Optimizer]],
    sets: tuple[Data, Data],
    device: torch.device,
    *,
    seed: int,
    rounds: int,
    micro_batches: int = 1,
) -> Iterator[dict[str, Run]]:
    """Train one network an optimizer, all from the same weights on the same batches.

    Yields the runs, always the same ones, at the end of each round. They take their steps in turn,
    so that noise falls on the times of all alike. micro_batches: in how many equal ones each batch
    is taken.
    """
    train_set, held_out = sets
    generator = torch.Generator().manual_seed(seed)
    runs: dict[str, Run] = {}
    for _ in range(rounds):
        batches = list(problem.batches(train_set, generator))
        if not runs:
            runs = _start(problem, optimizers, device, seed=seed, steps=rounds * len(batches))
            for run in runs.values():
                run.micro_batches = micro_batches
        totals = dict.fromkeys(runs, 0.0)
        for batch in batches:
            for name, run in runs.items():
                totals[name] += run.step(problem, batch, device)
        for name, run in runs.items():
            run.training_loss.append(float(totals[name]) / len(batches))
            run.evaluate(problem, held_out)
        yield runs


def _start(
    problem: Problem,
    optimizers: dict[str, Callable[[nn.Module], Optimizer]],
    device: torch.device,
    *,
    seed: int,
    steps: int,
) -> dict[str, Run]:
    runs = {}
    factor = partial(
        learning_rate,
        steps=steps,
        warm_up=round(problem.warm_up * steps),
        schedule=problem.schedule,
    )
    for name, build in optimizers.items():
        torch.manual_seed(seed)
        model = problem.build_model().to(device)
        optimizer = build(model)
        runs[name] = Run(model, optimizer, LambdaLR(optimizer, factor), problem.clip)
    return runs


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, in lists and dicts too; caches left out."""

    def count(entry: Any) -> int:
        if isinstance(entry, Tensor):
            return entry.nbytes
        if isinstance(entry, dict):
            return sum(map(count, entry.values()))
        return sum(map(count, entry)) if isinstance(entry, (list, tuple)) else 0

    return count(dict(optimizer.state))
