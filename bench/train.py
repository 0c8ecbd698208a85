"""Train small networks on real data: a CNN on digits, a character-level transformer on text.

The networks of a seed start from the same weights, see the same batches and take their steps in
turn. Settings come from a search of equal size for each optimizer, on a validation split.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import torch

from rootfree_fused.optimizer.layouts import default_dtype

from .matrix import checked_step
from .measuring.common import (
    add_measurement_arguments,
    dtype_name,
    optional,
    pick_device,
    random_tensors,
    summarize,
    threads,
)
from .measuring.rows import Row, Rows, read_rows, select, wrong
from .optimizers import METHODS, PEERS
from .optimizers.tuned import Method, Settings
from .report import training as tables
from .workloads.digits import Digits
from .workloads.text import Text
from .workloads.training import Problem, Run, state_bytes, train

PROBLEMS: dict[str, Problem] = {"digits": Digits(), "text": Text()}
TUNING_SEEDS = {"digits": (100, 101, 102, 103, 104), "text": (100, 101, 102)}
# How many settings, the best of the first seed, the other seeds train: a run of text is ten times
# as long as one of digits.
FINALISTS = {"digits": 25, "text": 5}
NEEDED = {"digits": ("sklearn",), "text": ("pytorch_optimizer",)}
# Two threads are a third faster on digits, but on a busy machine they wait for each other.
THREADS = {"digits": 1, "text": 2}


CHECK = "first steps"
# Who in optimizers/peers.py has the truth of a method, IFShampoo in the dtype of its factors aside.
PEER_OF = {
    "RootFreeRMSprop": "RootFreeRMSprop, momentum 0.9",
    "RootFreeAdamW": "RootFreeAdamW",
    "torch AdamW": "torch AdamW, fused",
}


# Subcommand -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench train`."""
    add_measurement_arguments(parser)
    parser.add_argument("--problem", choices=PROBLEMS, help="one of them; both if left out")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to train")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search the settings again: 9 minutes on digits, 40 on text, on two cores",
    )


def run(args: argparse.Namespace) -> int:
    """Compare the tuned optimizers, or tune them; 1 if a step was WRONG."""
    names = [args.problem] if args.problem else list(PROBLEMS)
    for module in ("tqdm", "matplotlib", *itertools.chain(*(NEEDED[name] for name in names))):
        optional(module)  # now, not after the training
    written: list[Row] = []
    for name in names:
        with threads(1 if args.tune else THREADS[name]):
            written += (tune if args.tune else compare)(PROBLEMS[name], METHODS[name], args)
    return int(bool(wrong(written)))


def compare(problem: Problem, methods: dict[str, Method], args: argparse.Namespace) -> list[Row]:
    """Train with the tuned settings and look at the test data."""
    device = pick_device(args.device)
    rounds = 2 if args.quick else problem.rounds
    seeds = range(1 if args.quick else args.seeds)
    sets = problem.load(device, tuning=False)
    optimizers = {name: partial(m.optimizer, settings=m.tuned) for name, m in methods.items()}
    rows = Rows(args.out / f"train_{problem.name}.jsonl", "train", device, arguments=args)
    by_name = {f"{problem.name}, seed {seed}": seed for seed in seeds}
    for case in rows.remaining((CHECK, *by_name)):
        if case == CHECK:
            check(problem, methods, rows, device)
            continue
        seed = by_name[case]
        for row in wrong(read_rows(rows.path)):
            optimizers.pop(row["provider"], None)
        with optional("tqdm").tqdm(total=rounds, unit="round", leave=False) as bar:
            runs = train(
                problem, optimizers, sets, device, seed=seed, rounds=rounds, progress=bar.update
            )
            for name, finished in runs.items():
                settings = {**methods[name].tuned, **methods[name].fixed}
                add_rows(rows, problem, name, finished, seed=seed, settings=settings)

    return rows.finish(tables.train)


def check(problem: Problem, methods: dict[str, Method], rows: Rows, device: torch.device) -> None:
    """Add the error of the first steps of a method on the network's shapes, against float64.

    Settings are those of optimizers/peers.py, where the truth is known; IFShampoo's vectors take
    the update of RootFreeRMSprop.
    """
    shapes = [p.shape for p in problem.build_model().parameters()]
    float32 = {"dtype": torch.float32, "device": device}
    values, grads = (random_tensors(shapes, scale=0.1, seed=seed, **float32) for seed in (0, 1))
    factor_dtype = dtype_name(default_dtype(values[0]))
    names = PEER_OF | {"IFShampoo": f"IFShampoo, {factor_dtype}"}
    for name in methods:
        if name not in names:
            continue
        peer = PEERS[names[name]]
        taken = [i for i, shape in enumerate(shapes) if name != "IFShampoo" or len(shape) > 1]
        before, gradients = ([tensors[i] for i in taken] for tensors in (values, grads))
        checked_step(rows, problem.name, name, peer, before, gradients)


def add_rows(
    rows: Rows, problem: Problem, name: str, run: Run, *, seed: int, settings: Settings
) -> None:
    """Final values with their curves, medians of the times of a step, and the state's size."""
    steps, rounds = len(run.training_step), len(run.training_loss)
    ends = range(steps // rounds, steps + 1, steps // rounds)
    elapsed = list(itertools.accumulate(run.training_step))
    detail = {
        "seed": seed,
        "settings": settings,
        "steps": list(ends),
        "seconds": rounded([elapsed[end - 1] for end in ends]),
    }
    curves = {f"test {measure}": curve for measure, curve in run.held_out.items()}
    for metric, curve in {"training loss": run.training_loss, **curves}.items():
        unit = "nat" if metric.endswith("loss") else "of all"
        rows.add(problem.name, name, metric, curve[-1], unit, **detail, curve=rounded(curve))
    for metric, samples in (
        ("optimizer step", run.optimizer_step),
        ("training step", run.training_step),
    ):
        rows.add_time(problem.name, name, metric, summarize(samples), seed=seed)
    parameters = sum(p.numel() for p in run.model.parameters())
    state = state_bytes(run.optimizer) / parameters
    rows.add(problem.name, name, "state", state, "bytes a parameter", parameters=parameters)


def rounded(values: list[float]) -> list[float | None]:
    """Four digits; None where a run diverged, because JSON has no NaN."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]


# Tuning ---------------------------------------------------------------------------------------


def tune(problem: Problem, methods: dict[str, Method], args: argparse.Namespace) -> list[Row]:
    """Train every setting of every search on the validation split, and print the best."""
    device = pick_device(args.device)
    rounds = 2 if args.quick else problem.rounds
    seeds = TUNING_SEEDS[problem.name][: 1 if args.quick else None]
    sets = problem.load(device, tuning=True)
    rows = Rows(args.out / f"train_{problem.name}_tuning.jsonl", "train", device, arguments=args)
    for name in rows.remaining(methods):
        method = methods[name]
        with optional("tqdm").tqdm(total=rounds * len(seeds), unit="round", leave=False) as bar:
            ends = search(problem, method, sets, device, seeds, rounds, bar.update)
        for settings, last in zip(method.grid(), ends, strict=True):
            rows.add(
                problem.name,
                name,
                "validation loss",
                fmean(last["loss"]),
                "nat",
                settings=settings,
                seeds=list(seeds[: len(last["loss"])]),
                rounds=rounds,
                **{measure: rounded(values) for measure, values in last.items()},
            )

    written = rows.finish()
    for name, method in methods.items():
        found = best(select(written, provider=name))
        inside = "inside" if interior(found, method.search) else "on the edge of"
        print(f"{name}: {found}, {inside} the search; in use {method.tuned}")
    return written


def search(
    problem: Problem,
    method: Method,
    sets: tuple[Any, Any],
    device: torch.device,
    seeds: tuple[int, ...],
    rounds: int,
    progress: Callable[[], object],
) -> list[dict[str, list[float]]]:
    """What each setting of the grid ends at, a value a seed that it was trained with."""
    optimizers = {
        str(i): partial(method.optimizer, settings=settings)
        for i, settings in enumerate(method.grid())
    }
    ends: dict[str, dict[str, list[float]]] = {i: {} for i in optimizers}
    for seed in seeds:
        runs = train(problem, optimizers, sets, device, seed=seed, rounds=rounds, progress=progress)
        for i, finished in runs.items():
            for measure, curve in finished.held_out.items():
                ends[i].setdefault(measure, []).append(curve[-1])
        first = {i: last["loss"][0] for i, last in ends.items()}
        order = sorted(first, key=lambda i: first[i] if math.isfinite(first[i]) else math.inf)
        optimizers = {i: optimizers[i] for i in order[: FINALISTS[problem.name]]}
    return list(ends.values())


def best(rows: list[Row]) -> Settings:
    """Of the settings trained with every seed that of the lowest value; NaN, as null, is none."""
    seeds = max(len(row["detail"]["seeds"]) for row in rows)
    ended = [r for r in rows if r["value"] is not None and len(r["detail"]["seeds"]) == seeds]
    return min(ended, key=lambda row: row["value"])["detail"]["settings"]


def interior(settings: Settings, search: dict[str, tuple[Any, ...]]) -> bool:
    """No setting is the first or last value of its range; lists are JSON's tuples."""
    positions = {key: [_plain(v) for v in values] for key, values in search.items()}
    return all(_plain(settings[key]) in values[1:-1] for key, values in positions.items())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
