"""Train small networks on real data, an optimizer beside the other, with the time of their steps.

The networks of a seed start from the same weights, see the same batches and take their steps in
turn. Settings are the best of a search (`python -m bench sweep`), or the constructor's defaults.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch

from rootfree_fused.optimizer.factor_state import default_dtype

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
from .measuring.rows import Row, Rows, read_rows, wrong
from .optimizers import METHODS, PEERS
from .optimizers.tuned import BASE, Settings
from .report import training as tables
from .workloads.problems import ON_A_GPU, PROBLEMS, rounded
from .workloads.training import Problem, Run, state_bytes, train

CHECK = "first steps"
DEFAULTS = ", defaults"
NAMES = [*BASE, *(name + DEFAULTS for name in BASE)]
OF_MATRICES = ("RootFreeShampoo", "IFShampoo")
# Who in optimizers/peers.py has the truth of a method; of those of matrices in the factors' dtype.
PEER_OF = {
    "RootFreeRMSprop": "RootFreeRMSprop, momentum 0.9",
    "RootFreeAdamW": "RootFreeAdamW",
    "torch AdamW": "torch AdamW, fused",
}


# Subcommand -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench train`."""
    add_measurement_arguments(parser)
    add_tasks(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help="some of them, or 'NAME, defaults'; if left out all at the best of their search, and "
        "where there was none at their defaults",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to train")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """The option for problems; those of a GPU are trained when they are named."""
    add_choice(parser, "--tasks", PROBLEMS)
    parser.set_defaults(tasks=[name for name in PROBLEMS if name not in ON_A_GPU])


def add_choice(parser: argparse.ArgumentParser, option: str, choices: dict) -> None:
    """An option for one or more of these; all of them if it is left out."""
    about = "one or more of them"
    parser.add_argument(
        option, nargs="+", choices=choices, default=list(choices), metavar="NAME", help=about
    )


def run(args: argparse.Namespace) -> int:
    """Compare the optimizers; 1 if a step was WRONG."""
    needs = itertools.chain(*(PROBLEMS[name].needs for name in args.tasks))
    for module in ("tqdm", "matplotlib", *needs):
        optional(module)  # now, not after the training
    written: list[Row] = []
    for name in args.tasks:
        with threads(PROBLEMS[name].threads):
            written += compare(PROBLEMS[name], chosen(name, args.methods), args)
    return int(bool(wrong(written)))


def chosen(task: str, names: list[str] | None) -> dict[str, tuple[str, Settings | None]]:
    """By the name of a row its method, and settings other than the defaults."""
    methods = METHODS[task]
    if names is None:
        names = [name if method.tuned else name + DEFAULTS for name, method in methods.items()]
    found = {}
    for name in names:
        method = name.removesuffix(DEFAULTS)
        if method not in methods or not (name.endswith(DEFAULTS) or methods[method].tuned):
            raise SystemExit(f"{method} has no settings for {task}; take '{method}{DEFAULTS}'")
        found[name] = method, None if name.endswith(DEFAULTS) else methods[method].best()
    return found


def compare(
    problem: Problem, chosen: dict[str, tuple[str, Settings | None]], args: argparse.Namespace
) -> list[Row]:
    """Train each of the chosen, and look at the data that no search has seen."""
    device = pick_device(args.device)
    rounds = 2 if args.quick else problem.rounds
    seeds = range(1 if args.quick else args.seeds)
    sets = problem.load(device, tuning=False)
    methods = METHODS[problem.name]
    optimizers = {
        name: partial(methods[method].optimizer, settings=settings or {})
        for name, (method, settings) in chosen.items()
    }
    path = args.out / f"train_{problem.name.replace(' ', '_')}.jsonl"
    rows = Rows(path, "train", device, arguments=args)
    by_name = {f"{problem.name}, seed {seed}": seed for seed in seeds}
    for case in rows.remaining((CHECK, *by_name)):
        if case == CHECK:
            check(problem, {name: method for name, (method, _) in chosen.items()}, rows, device)
            continue
        seed = by_name[case]
        for row in wrong(read_rows(rows.path)):
            optimizers.pop(row["provider"], None)
        runs: dict[str, Run] = {}
        with optional("tqdm").tqdm(total=rounds, unit="round", leave=False) as bar:
            for of_round in train(problem, optimizers, sets, device, seed=seed, rounds=rounds):
                runs = of_round
                bar.update()
        for name, finished in runs.items():
            method, settings = chosen[name]
            shown = {**(settings or methods[method].defaults), **methods[method].given}
            add_rows(rows, problem, name, finished, seed=seed, settings=shown)

    return rows.finish(tables.train)


def check(problem: Problem, chosen: dict[str, str], rows: Rows, device: torch.device) -> None:
    """Add the error of the first steps of each method on the network's shapes, against float64.

    Settings are those of optimizers/peers.py, where the truth is known; those of matrices update
    vectors by other methods.
    """
    shapes = [p.shape for p in problem.build_model().parameters()]
    float32 = {"dtype": torch.float32, "device": device}
    values, grads = (random_tensors(shapes, scale=0.1, seed=seed, **float32) for seed in (0, 1))
    factor_dtype = dtype_name(default_dtype(values[0]))
    names = PEER_OF | {name: f"{name}, {factor_dtype}" for name in OF_MATRICES}
    for name, method in chosen.items():
        if method not in names:
            continue
        peer = PEERS[names[method]]
        taken = [i for i, shape in enumerate(shapes) if method not in OF_MATRICES or len(shape) > 1]
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
    curves = {"training loss": run.training_loss} | {
        problem.metric if measure == "loss" else f"test {measure}": curve
        for measure, curve in run.held_out.items()
    }
    for metric, curve in curves.items():
        unit = "of all" if metric.endswith("accuracy") else problem.unit
        rows.add(problem.name, name, metric, curve[-1], unit, **detail, curve=rounded(curve))
    for metric, samples in (
        ("optimizer step", run.optimizer_step),
        ("training step", run.training_step),
    ):
        rows.add_time(problem.name, name, metric, summarize(samples), seed=seed)
    parameters = sum(p.numel() for p in run.model.parameters())
    state = state_bytes(run.optimizer) / parameters
    rows.add(problem.name, name, "state", state, "bytes a parameter", parameters=parameters)
