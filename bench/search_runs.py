"""What a process of a search runs: a trial, or the best of a search with another seed."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .measuring.rows import Rows
from .optimizers.spaces import Space, method_of, settings_of
from .optimizers.tuned import Settings
from .plan import SEEDS, TUNING_SEEDS
from .report.generalization import TRAINING
from .sweep import trained
from .train import add_rows
from .trials import FINAL, Claim, Trials
from .workloads.papers import WORKLOADS, Workload
from .workloads.problems import rounded
from .workloads.training import measured, train


@dataclass(frozen=True)
class Plan:
    """What every process of a search is told; settings by method are what no trial changes."""

    workload: str
    data: Path | None
    device: str
    rounds: int
    spaces: dict[str, Space]
    fixed: dict[str, Settings]
    stages: tuple[int, ...]
    runs: int
    seed: int
    path: Path
    about: dict[str, Any]

    def trials(self) -> Trials:
        """Those of the database."""
        return Trials(
            self.path,
            self.spaces,
            self.about,
            seed=self.seed,
            runs=self.runs,
            stages=self.stages,
            finals=len(SEEDS),
        )

    def build(self, method: str, settings: Settings) -> Callable[[nn.Module], Optimizer]:
        """A method at settings, of a model."""
        batch_size = WORKLOADS[self.workload].batch_size
        of = method_of(method, batch_size, self.fixed[method])
        return partial(of.optimizer, settings=settings)


def work(plan: Plan) -> None:
    """Run trials until none is left, or who started this process ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    torch.set_num_threads(1)
    parent, trials = multiprocessing.parent_process(), plan.trials()
    for claim in trials.claims():
        start = time.perf_counter()
        value, kept = final(plan, trials, claim) if claim.stage == FINAL else trial(plan, claim)
        trials.end(claim, value, seconds=round(time.perf_counter() - start, 3), **kept)
        if parent and not parent.is_alive():
            break


def trial(plan: Plan, claim: Claim) -> tuple[float, dict[str, Any]]:
    """The last validation loss at drawn settings, and other last measures."""
    found, _ = trained(
        problem_of(plan.workload, plan.data),
        plan.build(claim.method, settings_of(claim.point)),
        loaded(plan.workload, plan.data, plan.device, tuning=True),
        torch.device(plan.device),
        seed=TUNING_SEEDS[0],
        rounds=plan.rounds,
    )
    value, steps = found.pop("loss")[-1], found.pop("steps")
    last = {name: rounded([curve[-1]])[0] for name, curve in found.items()}
    return value, {"steps": steps, "measures": last}


def final(plan: Plan, trials: Trials, claim: Claim) -> tuple[float, dict[str, Any]]:
    """The last test loss at the best settings, with the seed of this trial, and its rows."""
    problem, seed = problem_of(plan.workload, plan.data), SEEDS[claim.number]
    best = trials.best(claim.method)
    assert best is not None
    settings = settings_of(best.point)
    sets = loaded(plan.workload, plan.data, plan.device, tuning=False)
    runs = train(
        problem,
        {claim.method: plan.build(claim.method, settings)},
        sets,
        torch.device(plan.device),
        seed=seed,
        rounds=plan.rounds,
    )
    rows = Kept()
    try:
        *_, last = runs
    except torch.linalg.LinAlgError:
        detail = {"seed": seed, "settings": settings, "steps": [0], "diverged": True}
        rows.add(problem.name, claim.method, problem.metric, None, problem.unit, **detail)
        return math.nan, {"rows": rows.kept}
    ended = last[claim.method]
    shown = {**settings, **plan.fixed[claim.method]}
    add_rows(rows, problem, claim.method, ended, seed=seed, settings=shown)
    learnt = measured(problem, ended.model, problem.training_part(sets[0]))
    if "accuracy" in learnt:
        rows.add(problem.name, claim.method, TRAINING, learnt["accuracy"], "of all", seed=seed)
    return ended.held_out["loss"][-1], {"rows": rows.kept}


class Kept(Rows):
    """Rows that another process is to write."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def add(
        self, case: str, provider: str, metric: str, value: float | None, unit: str, **detail: Any
    ) -> None:
        """Keep it, a NaN as None."""
        finite = value is not None and math.isfinite(value)
        self.kept.append(
            {"metric": metric, "value": value if finite else None, "unit": unit, **detail}
        )


def problem_of(name: str, data: Path | None) -> Workload:
    """A workload, on the data in a folder where it needs some."""
    return WORKLOADS[name].with_data(data)


@cache
def loaded(name: str, data: Path | None, device: str, *, tuning: bool) -> tuple[Any, Any]:
    return problem_of(name, data).load(torch.device(device), tuning=tuning)


def untrained(plan: Plan, problem: Workload) -> float:
    """The validation loss before the first step."""
    device = torch.device(plan.device)
    _, held_out = loaded(plan.workload, plan.data, plan.device, tuning=True)
    torch.manual_seed(TUNING_SEEDS[0])
    return measured(problem, problem.build_model().to(device), held_out)["loss"]
