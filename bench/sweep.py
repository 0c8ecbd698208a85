"""Losses of many short training runs, spread over processes of one thread each; nothing is timed.

    defaults   every optimizer as its constructor builds it, on the comparison's data
    tuned      the best of a search that is whole, or is stored already, on the same data
    search     the 25 settings of every search, and the best five of them with two seeds more
    basin      the defaults at nine learning rates over two decades, on the tuning data
    structures   the defaults with factors of other structures, on text, on the comparison's data
    formats    the defaults with weights and state in fewer bytes, on the same
    second moments   what s follows of 8 micro-batches, at three learning rates, on digits

Runs are made in this order, or in that of --kinds. Each is a row as soon as it ends; the same
command, or one with other choices, goes on with the runs that have none.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import queue
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from .measuring.common import add_measurement_arguments, optional, pick_device, threads
from .measuring.rows import Rows, read_rows
from .optimizers import METHODS
from .optimizers.tuned import BASE, COMPARED
from .plan import MICRO_BATCHES, PLANS, WEIGHTS, Choice, Job, all_best, planned
from .report import losses
from .train import add_choice, add_tasks
from .workloads.bfloat16 import on_bfloat16_weights
from .workloads.problems import PROBLEMS, rounded
from .workloads.training import Data, Problem, Run, state_bytes, train

QUICK_ROUNDS = 2


# Subcommand -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench sweep`."""
    add_measurement_arguments(parser)
    parser.set_defaults(device="cpu")
    add_choice(parser, "--kinds", PLANS)
    add_tasks(parser)
    add_choice(parser, "--methods", BASE)
    parser.set_defaults(methods=list(COMPARED))
    parser.add_argument(
        "--again", action="store_true", help="search again where the best of a search is stored"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=1e4, help="when to stop")


def run(args: argparse.Namespace) -> int:
    """Make the runs that are not in the file yet, as far as the time allows."""
    stop = time.monotonic() + 60 * args.minutes
    for module in {"tqdm", *chain(*(PROBLEMS[name].needs for name in args.tasks))}:
        optional(module)
    device = pick_device(args.device)
    with threads(1):
        rows = Rows(args.out / "sweep.jsonl", "sweep", device, append=True)
        rows.refuse_others()
        left = spread(lambda: plan_of(rows, args), rows, args, stop)
    print(f"{left} runs of the plan are left" if left else "the plan is whole")
    written = rows.finish(losses.sweep if read_rows(rows.path) else None)
    for (task, name), settings in all_best(written).items():
        tuned = {key: settings[key] for key in METHODS[task][name].search}
        print(f"{task}, {name}: {tuned=}")
    return 0


def plan_of(rows: Rows, args: argparse.Namespace) -> list[Job]:
    """What is to be made, and is no row yet."""
    cases = [(task, name) for task in args.tasks for name in args.methods if name in METHODS[task]]
    choice = Choice(cases, args.kinds, 1 if args.quick else None, args.again)
    return planned(choice, read_rows(rows.path))


def spread(plan: Callable[[], list[Job]], rows: Rows, args: argparse.Namespace, stop: float) -> int:
    """Run the first of the plan that nobody runs, in every process that is free; how many are left.

    The plan is made anew whenever a run has ended, since the best of a search come into it.
    """
    ended: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
    running: set[Job] = set()
    train_one = partial(train_job, device=args.device, quick=args.quick)
    context = multiprocessing.get_context("spawn")
    left = plan()
    with (
        context.Pool(args.jobs, torch.set_num_threads, (1,)) as pool,  # its end ends what runs
        optional("tqdm").tqdm(total=len(left), unit="run") as bar,
    ):
        while left:
            for job in [job for job in left if job not in running][: args.jobs - len(running)]:
                report = partial(_report, ended, job)
                pool.apply_async(train_one, (job,), callback=report, error_callback=report)
                running.add(job)
            try:
                job, result = ended.get(timeout=max(stop - time.monotonic(), 0))
            except queue.Empty:
                break
            if isinstance(result, BaseException):
                raise result
            add_row(rows, job, result)
            running.remove(job)
            left = plan()
            bar.update()
            bar.total = bar.n + len(left)
    return len(left)


def _report(ended: queue.SimpleQueue[tuple[Job, Any]], job: Job, result: Any) -> None:
    ended.put((job, result))


def add_row(rows: Rows, job: Job, result: dict[str, Any]) -> None:
    """The last loss of a run, and its curves."""
    problem, method = PROBLEMS[job.task], METHODS[job.task][job.method]
    metric = "validation loss" if job.tuning and problem.metric == "test loss" else problem.metric
    rows.add(
        job.task,
        job.method,
        metric,
        result["loss"][-1],
        problem.unit,
        kind=job.kind,
        chosen=job.settings,
        settings={**(job.chosen or method.defaults), **method.given},
        seed=job.seed,
        steps=result.pop("steps"),
        process_seconds=result.pop("process_seconds"),
        bytes_a_parameter=result.pop("bytes_a_parameter"),
        **{measure: rounded(curve) for measure, curve in result.items()},
    )


# One run --------------------------------------------------------------------------------------


def train_job(job: Job, *, device: str, quick: bool) -> dict[str, Any]:
    """What a run measured at the end of each round; a NaN where it diverged."""
    start = time.process_time()
    problem, method = PROBLEMS[job.task], METHODS[job.task][job.method]
    settings = dict(job.chosen)
    in_bfloat16 = settings.pop(WEIGHTS, None) == "bfloat16"
    micro_batches = settings.pop(MICRO_BATCHES, 1)
    build = partial(method.optimizer, settings=settings)
    if in_bfloat16:
        build = partial(on_bfloat16_weights, build)
    found, run = trained(
        problem,
        build,
        loaded(job.task, job.tuning, device),
        torch.device(device),
        seed=job.seed,
        rounds=QUICK_ROUNDS if quick else problem.rounds,
        micro_batches=micro_batches,
    )
    found["bytes_a_parameter"] = round(bytes_of(run.optimizer), 3) if run else None
    return {**found, "process_seconds": round(time.process_time() - start, 2)}


def trained(
    problem: Problem,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    sets: tuple[Data, Data],
    device: torch.device,
    *,
    seed: int,
    rounds: int,
    micro_batches: int = 1,
) -> tuple[dict[str, Any], Run | None]:
    """What one network measured in each round, and the steps it took; a NaN where it diverged."""
    found: dict[str, Any] = {"loss": [math.nan], "steps": 0}
    run = None
    try:
        settings: dict[str, Any] = {"seed": seed, "rounds": rounds, "micro_batches": micro_batches}
        for of_round in train(problem, {"": build}, sets, device, **settings):
            (run,) = of_round.values()
            found = {**run.held_out, "training loss": run.training_loss}
            found["steps"] = len(run.training_step)
            if not math.isfinite(run.training_loss[-1]):
                found["loss"] = [*found["loss"][:-1], math.nan]
                break
    except torch.linalg.LinAlgError:
        found["loss"] = [*found["loss"], math.nan]
    return found, run


def bytes_of(optimizer: torch.optim.Optimizer) -> float:
    """Of weights and state, a parameter."""
    weights = [param for group in optimizer.param_groups for param in group["params"]]
    stored = state_bytes(optimizer) + sum(param.nbytes for param in weights)
    return stored / sum(param.numel() for param in weights)


@cache
def loaded(task: str, tuning: bool, device: str) -> tuple[Any, Any]:
    """The data of a problem, read once a process."""
    return PROBLEMS[task].load(torch.device(device), tuning=tuning)
