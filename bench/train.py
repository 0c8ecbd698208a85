"""Train a small CNN on scikit-learn's handwritten digits with four optimizers.

The four networks of a seed start from the same weights, see the same batches and take their steps
in turn. Settings come from a search of equal size for each, on a validation split.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from rootfree_fused import RootFreeAdamW, RootFreeRMSprop

from .common import optional, pick_device, summarize, threads
from .curves import plot, table
from .digits import BATCH, Run, load_digits, train
from .rows import Row, Rows, read_rows, select

CASE = "digits"
EPOCHS = 30
TUNING_SEEDS = (100, 101, 102, 103, 104)

Settings = dict[str, Any]


# Methods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """An optimizer, the settings that were searched, the best of them, and all others."""

    build: Callable[..., Optimizer]
    search: dict[str, tuple[Any, ...]]
    tuned: Settings
    fixed: Settings

    def grid(self) -> list[Settings]:
        """Every setting of the search."""
        values = itertools.product(*self.search.values())
        return [dict(zip(self.search, chosen, strict=True)) for chosen in values]

    def optimizer(self, model: nn.Module, settings: Settings) -> Optimizer:
        """The optimizer on a model's parameters."""
        return self.build(model.parameters(), **settings, **self.fixed)


# `tuned` is the best of the 25 settings of `search` by `python -m bench train --tune`: the lowest
# validation loss after EPOCHS epochs, mean of TUNING_SEEDS, on a fifth of the training images that
# was held out; then all training images are used. Rows: results/train_tuning.jsonl.
METHODS = {
    "RootFreeRMSprop": Method(
        RootFreeRMSprop,
        search={"lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "alpha": (0.8, 0.9, 0.95, 0.98, 0.99)},
        tuned={"lr": 1e-3, "alpha": 0.9},
        fixed={"momentum": 0.9, "batch_size": BATCH},
    ),
    "RootFreeAdamW": Method(
        RootFreeAdamW,
        search={
            "lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
            "betas": ((0.9, 0.9), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.995)),
        },
        tuned={"lr": 3e-1, "betas": (0.9, 0.99)},
        fixed={"batch_size": BATCH},
    ),
    "torch AdamW": Method(
        AdamW,
        search={
            "lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "betas": ((0.9, 0.6), (0.9, 0.8), (0.9, 0.9), (0.9, 0.99), (0.9, 0.999)),
        },
        tuned={"lr": 1e-2, "betas": (0.9, 0.8)},
        fixed={"fused": True},
    ),
    "torch SGD": Method(
        SGD,
        search={"lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0), "momentum": (0.0, 0.5, 0.8, 0.9, 0.95)},
        tuned={"lr": 1e-1, "momentum": 0.8},
        fixed={"fused": True},
    ),
}


# Subcommand -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench train`."""
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to train")
    parser.add_argument(
        "--tune", action="store_true", help="search the settings again instead; takes minutes"
    )


def run(args: argparse.Namespace) -> int:
    """Compare the tuned optimizers, or tune them."""
    for module in ("sklearn", "tqdm", "matplotlib"):
        optional(module)  # now, not after the training
    with threads(1):  # two are a third faster, but on a busy machine they wait for each other
        return tune(args) if args.tune else compare(args)


def compare(args: argparse.Namespace) -> int:
    """Train with the tuned settings on all training images and look at the test images."""
    device = pick_device(args.device)
    epochs = 2 if args.quick else EPOCHS
    seeds = range(1 if args.quick else args.seeds)
    train_set, test_set = load_digits(device, tuning=False)
    optimizers = {name: partial(m.optimizer, settings=m.tuned) for name, m in METHODS.items()}
    rows = Rows(args.out / "train.jsonl", "train", device)
    with optional("tqdm").tqdm(total=epochs * len(seeds), unit="epoch") as bar:
        for seed in seeds:
            bar.set_description(f"{len(METHODS)} optimizers, seed {seed}")
            runs = train(
                optimizers, train_set, test_set, seed=seed, epochs=epochs, progress=bar.update
            )
            for name, finished in runs.items():
                add_rows(rows, name, seed, finished, images=len(test_set[1]))

    written = read_rows(rows.path)
    report, figure = args.out / "train.md", args.out / "train.png"
    report.write_text(table(written))
    plot(written, figure)
    print(report.read_text())
    print(f"rows   {rows.path}\ntable  {report}\nplot   {figure}")
    return 0


def add_rows(rows: Rows, name: str, seed: int, finished: Run, *, images: int) -> None:
    """Final values with their curves, and medians of the times of a step."""
    settings = {**METHODS[name].tuned, **METHODS[name].fixed}
    for metric, curve, unit in (
        ("test accuracy", finished.accuracy, "of images"),
        ("test loss", finished.held_out_loss, "nat"),
        ("training loss", finished.training_loss, "nat"),
    ):
        detail = {"seed": seed, "settings": settings, "images": images, "curve": rounded(curve)}
        rows.add(CASE, name, metric, curve[-1], unit, **detail)
    for metric, samples in (
        ("optimizer step", finished.optimizer_step),
        ("training step", finished.training_step),
    ):
        rows.add_time(CASE, name, metric, summarize(samples), seed=seed)


def rounded(values: list[float]) -> list[float | None]:
    """Four digits; None where a run diverged, because JSON has no NaN."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]


# Tuning ---------------------------------------------------------------------------------------


def tune(args: argparse.Namespace) -> int:
    """Train every setting of every search on the validation split, and print the best."""
    device = pick_device(args.device)
    epochs = 2 if args.quick else EPOCHS
    seeds = TUNING_SEEDS[:1] if args.quick else TUNING_SEEDS
    train_set, validation_set = load_digits(device, tuning=True)
    rows = Rows(args.out / "train_tuning.jsonl", "train", device)
    with optional("tqdm").tqdm(total=epochs * len(seeds) * len(METHODS), unit="epoch") as bar:
        for name, method in METHODS.items():
            bar.set_description(f"{len(method.grid())} settings of {name}")
            optimizers = {str(s): partial(method.optimizer, settings=s) for s in method.grid()}
            runs = [
                train(
                    optimizers,
                    train_set,
                    validation_set,
                    seed=s,
                    epochs=epochs,
                    progress=bar.update,
                )
                for s in seeds
            ]
            for key, settings in zip(optimizers, method.grid(), strict=True):
                losses = [by_setting[key].held_out_loss[-1] for by_setting in runs]
                accuracies = [by_setting[key].accuracy[-1] for by_setting in runs]
                rows.add(
                    CASE,
                    name,
                    "validation loss",
                    fmean(losses),
                    "nat",
                    settings=settings,
                    seeds=list(seeds),
                    epochs=epochs,
                    losses=rounded(losses),
                    accuracy=fmean(accuracies),
                )

    written = read_rows(rows.path)
    for name, method in METHODS.items():
        found = best(select(written, provider=name))
        inside = "inside" if interior(found, method.search) else "on the edge of"
        print(f"{name}: {found}, {inside} the search; in use {method.tuned}")
    print(f"rows   {rows.path}")
    return 0


def best(rows: list[Row]) -> Settings:
    """The settings of the lowest value; a run that diverged has none."""
    ended = [row for row in rows if row["value"] is not None]
    return min(ended, key=lambda row: row["value"])["detail"]["settings"]


def interior(settings: Settings, search: dict[str, tuple[Any, ...]]) -> bool:
    """No setting is the first or last value of its range; lists are JSON's tuples."""
    positions = {key: [_plain(v) for v in values] for key, values in search.items()}
    return all(_plain(settings[key]) in values[1:-1] for key, values in positions.items())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
