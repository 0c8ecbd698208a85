"""Two-stage random search: every method has as many trials of a workload, each from its own space.

Stage 1 draws from wide ranges, or given ones, stage 2 from what its best tenth spans. The trial
with the lowest validation loss is trained with three other seeds on all training data, and tested.
A run that diverges has no value, and is counted.

Trials are in a database, OUT/search_WORKLOAD.db. The same command goes on with a search that was
stopped; several at once share its trials.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from datetime import datetime, timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import torch

from .measuring.common import add_measurement_arguments, optional, pick_device, threads
from .measuring.rows import DIRTY, Rows, commit, describe_device, versions
from .optimizers import spaces
from .optimizers.spaces import METHODS, Space, method_of, settings_of
from .optimizers.tuned import Settings
from .report import searches
from .report import training as tables
from .report.cells import markdown
from .search_runs import Plan, problem_of, untrained, work
from .sweep import QUICK_ROUNDS
from .train import add_choice
from .trials import FINAL, NARROW_STAGE, WIDE_STAGE, Trials
from .workloads.papers import WORKLOADS, Workload
from .workloads.training import train

STAGES = {
    "1": (WIDE_STAGE,),
    "2": (NARROW_STAGE, FINAL),
    "both": (WIDE_STAGE, NARROW_STAGE, FINAL),
}
LEAST_RUNS, QUICK_RUNS = 10, 10
NEEDED = {"SOAP": "pytorch_optimizer", "Shampoo": "pytorch_optimizer"}  # packages, by method
POLL = 2.0  # seconds between two looks at what ended


# Subcommand -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench search`."""
    add_measurement_arguments(parser)
    parser.add_argument("--workload", choices=WORKLOADS, metavar="NAME", help="what is trained")
    add_choice(parser, "--methods", METHODS)
    parser.set_defaults(methods=None)
    parser.add_argument("--stage", choices=STAGES, default="both", help="1, 2 or both")
    parser.add_argument(
        "--runs", type=int, help="of a method in each stage; 30, or 10 with --quick"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--space",
        default="wide",
        metavar="SPACE",
        help="wide, published (of the workload's model), or a file of JSON: "
        '{"AdamW": {"lr": [1e-4, 1e-2], "1 - beta1": [0.01, 1], '
        '"1 - beta2": [0.001, 0.3], ...}, ...}',
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data of a workload that needs it")
    parser.add_argument(
        "--list", action="store_true", help="show the workloads, their data and minutes a run"
    )


def run(args: argparse.Namespace) -> int:
    """Search, as far as it has not been done, and write its rows."""
    optional("tqdm")
    device = pick_device(args.device)
    if args.list:
        print(listed(args.data, device))
        return 0
    with threads(1):
        try:
            plan = planned(args, device)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if plan.path.exists() and plan.about["commit"].endswith((DIRTY, "unknown")):
            raise SystemExit(
                f"{plan.path} is there, and uncommitted code, {plan.about['commit']}, goes on with "
                "no search; move the file, or choose --out"
            )
        trials = plan.trials()
        check_stages(plan, trials)
        counts = ", ".join(f"{name} {len(space)}" for name, space in plan.spaces.items())
        print(f"settings searched: {counts}")
        try:
            spread(plan, trials, args.jobs)
        finally:
            write(plan, trials, device)
    return 0


def planned(args: argparse.Namespace, device: torch.device) -> Plan:
    """The search that is asked for; a ValueError where it cannot be made."""
    if args.workload is None:
        raise ValueError(f"pass --workload, one of {', '.join(WORKLOADS)}; --list shows them")
    problem = problem_of(args.workload, args.data)
    if missing := problem.missing():
        raise ValueError(f"{args.workload}: {missing}")
    if args.data is not None and problem.needs_data is None:
        raise ValueError(f"{args.workload} brings its data; leave --data out")
    runs = (QUICK_RUNS if args.quick else 30) if args.runs is None else args.runs
    if runs < 1:
        raise ValueError(f"--runs is {runs}; pass a number of at least 1")
    if args.stage != "1" and runs < LEAST_RUNS:
        raise ValueError(
            f"--runs is {runs}; the best tenth of stage 1 needs at least 30 runs to be three of "
            f"them: pass 30, or at the least {LEAST_RUNS}, or --stage 1"
        )
    if not 0 <= args.seed < 10_000:
        raise ValueError(f"--seed is {args.seed}; pass a number from 0 to 9999")
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}; pass a number of at least 1")
    found, fixed = spaces_of(args.space, args.methods, problem)
    for module in {"optuna", *problem.needs, *(NEEDED[name] for name in found if name in NEEDED)}:
        optional(module)
    for name, space in found.items():
        spaces.check_space(name, space, method_of(name, problem.batch_size, fixed[name]))
    rounds = QUICK_ROUNDS if args.quick else problem.rounds
    return Plan(
        args.workload,
        args.data,
        str(device),
        rounds,
        found,
        fixed,
        STAGES[args.stage],
        runs,
        args.seed,
        args.out / f"{_stem(args.workload)}.db",
        about={
            "workload": args.workload,
            "rounds": rounds,
            "settings": "released" if args.space == "published" else "ours",
            "commit": commit(),
            "device": describe_device(device),
            "versions": versions(device),
        },
    )


def spaces_of(
    asked: str, methods: list[str] | None, problem: Workload
) -> tuple[dict[str, Space], dict[str, Settings]]:
    """Of each method its space, and the settings that no trial changes.

    Raises:
        ValueError: there is none, or no such file.
    """
    fixed: dict[str, Settings] = {}
    if asked == "wide":
        known = spaces.WIDE
    elif asked == "published":
        by_model = spaces.published()
        model = problem.published
        if model not in by_model:
            have = [name for name, of in WORKLOADS.items() if of.published in by_model]
            raise ValueError(
                f"no space was published for {problem.name}; for {', '.join(have)}. Pass "
                "--space wide"
            )
        known = {name: of.space for name, of in by_model[model].items()}
        fixed = spaces.RELEASED
    else:
        known = spaces.read_spaces(Path(asked))
    names = [n for n in spaces.DEFAULT if n in known] if methods is None else methods
    if absent := [name for name in names if name not in known]:
        raise ValueError(
            f"--space {asked} has none of {', '.join(absent)}; it has {', '.join(known)}"
        )
    chosen = names or list(known)
    if asked == "published":
        for name in chosen:
            for fault in by_model[model][name].faults:
                print(f"{model}, {name}: {fault}")
    return {name: known[name] for name in chosen}, {name: fixed.get(name, {}) for name in chosen}


def check_stages(plan: Plan, trials: Trials) -> None:
    """Stop where stage 2 is asked for alone and stage 1 is not whole."""
    if WIDE_STAGE in plan.stages:
        return
    for name in plan.spaces:
        done = len(trials.ended((name, WIDE_STAGE)))
        if done < plan.runs:
            raise SystemExit(
                f"{plan.path} has {done} of {plan.runs} runs of stage 1 of {name}, by which stage "
                "2 is narrowed; pass --stage both"
            )


# Trials ---------------------------------------------------------------------------------------


def spread(plan: Plan, trials: Trials, jobs: int) -> None:
    """Make what has not ended in so many processes; a bar shows how much has, by whomever."""
    start, first = time.monotonic(), _ended(trials)
    total = sum(map(trials.size, trials.keys))
    if first == total:
        return
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(plan,), daemon=True) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        with optional("tqdm").tqdm(total=total, initial=first, unit="run") as bar:
            running = workers
            while running:
                wait([worker.sentinel for worker in running], timeout=POLL)
                running = [worker for worker in workers if worker.is_alive()]
                bar.total, ended = sum(map(trials.size, trials.keys)), _ended(trials)
                if ended > first:
                    left = (bar.total - ended) * (time.monotonic() - start) / (ended - first)
                    bar.set_postfix_str(f"ends {datetime.now() + timedelta(seconds=left):%H:%M}")
                bar.update(ended - bar.n)
                for worker in workers:
                    if worker.exitcode:
                        raise SystemExit(
                            f"a process of the search ended with {worker.exitcode}; the same "
                            "command goes on"
                        )
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _ended(trials: Trials) -> int:
    return sum(len(trials.ended(key)) for key in trials.keys)


# Results --------------------------------------------------------------------------------------


def write(plan: Plan, trials: Trials, device: torch.device) -> None:
    """The rows of every trial that ended, and of the final runs, with their tables."""
    if not _ended(trials):
        return
    problem = problem_of(plan.workload, plan.data)
    stem = plan.path.stem
    with trials.alone():
        rows = Rows(plan.path.with_name(f"{stem}.jsonl"), "search", device)
        before = untrained(plan, problem)
        for method in plan.spaces:
            for stage in (WIDE_STAGE, NARROW_STAGE):
                add_stage(rows, problem, trials, (method, stage), before)
        rows.finish(searches.table)
        finals = [run for name in plan.spaces for run in trials.ended((name, FINAL))]
        if finals:
            rows = Rows(plan.path.with_name(f"{stem}_final.jsonl"), "train", device)
            for name in plan.spaces:
                for of in trials.ended((name, FINAL)):
                    for kept in of.kept["rows"]:
                        rows.add(problem.name, name, **kept)
            rows.finish(tables.train)


def add_stage(
    rows: Rows, problem: Workload, trials: Trials, key: tuple[str, int], before: float
) -> None:
    """A row of the space of a stage, and one a trial."""
    method, stage = key
    ended = trials.ended(key)
    if not ended:
        return
    space = trials.space(key) or {}
    ranges = {name: ends.written() for name, ends in space.items()}
    about = {"stage": stage, "space": ranges, "untrained": before}
    if stage == WIDE_STAGE and space == spaces.WIDE.get(method) and method in spaces.NOTES:
        about["note"] = spaces.NOTES[method]
    rows.add(problem.name, method, searches.SEARCHED, len(space), "settings", **about)
    for of in ended:
        detail = {"stage": stage, "run": of.number, "settings": settings_of(of.point), **of.kept}
        rows.add(problem.name, method, searches.VALIDATION, of.value, problem.unit, **detail)


def listed(data: Path | None, device: torch.device) -> str:
    """A table of the workloads; minutes are those of a round of AdamW times all rounds."""
    lines = []
    for name in WORKLOADS:
        problem = problem_of(name, data)
        needs = problem.needs_data
        if missing := problem.missing():
            lines.append([name, needs or "none", missing, ""])
            continue
        is_long = needs is not None and device.type == "cpu"
        minutes = "not measured on a CPU" if is_long else f"{_minutes(problem, device):.2g}"
        lines.append([name, needs or "none", "yes", minutes])
    return markdown(["workload", "data", "on this machine", "minutes a run"], lines)


def _minutes(problem: Workload, device: torch.device) -> float:
    build = partial(METHODS["AdamW"].optimizer, settings={})
    with threads(1):
        sets = problem.load(device, tuning=True)
        rounds = train(problem, {"": build}, sets, device, seed=0, rounds=problem.rounds)
        next(rounds)  # which loads and compiles
        start = time.perf_counter()
        next(rounds)
        return (time.perf_counter() - start) * problem.rounds / 60


def _stem(workload: str) -> str:
    return f"search_{workload.replace(' ', '_')}"
