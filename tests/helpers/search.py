"""Searches of a known function, in this process or another."""

from __future__ import annotations

import math
import os
import signal
import time

from bench.optimizers.spaces import Range
from bench.trials import FINAL, NARROW_STAGE, WIDE_STAGE, Trials

SPACE = {"lr": Range(1e-5, 1.0), "1 - momentum": Range(1e-2, 1.0)}
ALL = (WIDE_STAGE, NARROW_STAGE, FINAL)


def valley(point):
    """Lowest at lr 5e-3; nothing above 0.3."""
    lr = point.get("lr", 5e-3)
    return math.nan if lr > 0.3 else 1 + math.log10(lr / 5e-3) ** 2


def trials_of(path, *, runs, stages=(WIDE_STAGE,), methods=("SGD",), seed=0, **about):
    about = {"workload": "valley", "commit": "abc", **about}
    spaces = dict.fromkeys(methods, SPACE)
    return Trials(path, spaces, about, seed=seed, runs=runs, stages=stages, finals=2)


def search(trials, objective=valley):
    """The claims that were taken, in their order."""
    taken = []
    for claim in trials.claims():
        taken.append(claim)
        trials.end(claim, objective(claim.point), process=os.getpid())
    return taken


def killed_in(path, runs, last):
    """Be killed while the trial of that number runs."""
    trials = trials_of(path, runs=runs)
    for claim in trials.claims():
        if claim.number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        trials.end(claim, valley(claim.point))


def share(path, runs, together, log):
    """Take trials beside other processes, a line each into a file; begin when all are there."""
    trials = trials_of(path, runs=runs)
    together.wait()
    for claim in trials.claims():
        with log.open("a") as file:
            file.write(f"{claim.number}\n")
        time.sleep(0.01)
        trials.end(claim, valley(claim.point), process=os.getpid())
