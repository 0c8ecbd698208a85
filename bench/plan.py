"""Which training runs `bench sweep` makes, in which order, and what is the best of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from .measuring.rows import Row
from .optimizers import METHODS
from .optimizers.tuned import BASE, Settings

SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101, 102)
FINALISTS = 5  # settings that the other seeds train, the best of the first
BASIN = 9
NO_BASIN = ("long text", "wide text", "large text")
# What factors may be, on the problem whose axes are 64 to 384.
STRUCTURES: dict[str, list[Settings]] = {
    "RootFreeShampoo": [
        {"max_dense_dim": 96},
        {"max_dense_dim": 48},
        {"structures": "diagonal"},
    ],
    "IFShampoo": [
        {"max_dense_dim": 96},
        {"max_dense_dim": 48},
        {"structures": "block", "block_size": 48},
        {"structures": "hierarchical"},
        {"structures": "lower_toeplitz"},
        {"structures": "diagonal"},
    ],
}
# How weights and state are kept, on text: float32 weights, or bfloat16 ones (`WEIGHTS`).
WEIGHTS = "weights"
_ROUNDED: Settings = {WEIGHTS: "bfloat16"}
_ALL: list[Settings] = [
    {},
    _ROUNDED,
    {**_ROUNDED, "param_residual": "stochastic"},
    {**_ROUNDED, "param_residual": 16},
    {**_ROUNDED, "param_residual": 8},
    {**_ROUNDED, "param_residual": 8, "state_format": "bfloat16"},
    {**_ROUNDED, "param_residual": 8, "state_format": "8bit"},
    {**_ROUNDED, "param_residual": "stochastic", "state_format": "8bit"},
]
# A shorter memory shows bad formats of the second moment.
_SHORT: Settings = {"betas": (0.9, 0.9)}
FORMATS: dict[str, list[Settings]] = {
    "RootFreeAdamW": [*_ALL, *({**_SHORT, **own} for own in (_ALL[0], *_ALL[4:7]))],
    "IFShampoo": [_ALL[0], _ALL[1], _ALL[2], *_ALL[4:7]],
    "RootFreeShampoo": [_ALL[0], _ALL[1], _ALL[2], *_ALL[4:7]],
}
# What s follows, by micro-batches of 8, on digits; each at three learning rates.
MICRO_BATCHES = "micro_batches"
_MOMENTS = ("batch", "micro", "variance", "mean")
SECOND_MOMENTS: dict[str, tuple[float, ...]] = {
    "RootFreeAdamW": (3e-3, 1e-2, 3e-2),
    "RootFreeRMSprop": (3e-4, 1e-3, 3e-3),
}
SEARCHED = {"long text": "text"}  # where the settings of another problem are taken

Losses = dict[str, dict[int, float]]  # by settings as JSON and seed; inf where a run diverged
Case = tuple[str, str]  # task, method


@dataclass(frozen=True)
class Job:
    """One training run; settings as JSON, the defaults if they are empty."""

    kind: str
    task: str
    method: str
    settings: str
    seed: int

    @classmethod
    def of(cls, row: Row) -> Job:
        """The run that a row tells of."""
        detail = row["detail"]
        return cls(detail["kind"], row["case"], row["provider"], detail["chosen"], detail["seed"])

    @property
    def chosen(self) -> Settings:
        """The settings; a list in JSON is a tuple."""
        return _settings(self.settings)

    @property
    def tuning(self) -> bool:
        """Whether it trains on the tuning data."""
        return self.kind in ("basin", "search")


@dataclass(frozen=True)
class Choice:
    """What is to be trained: with so many of the seeds, or all; a stored search again or not."""

    cases: list[Case]
    kinds: list[str]
    seeds: int | None
    again: bool

    def stored(self, case: Case) -> Settings | None:
        """The best of a search that is stored already."""
        return None if self.again else METHODS[case[0]][case[1]].best()


def planned(choice: Choice, rows: list[Row]) -> list[Job]:
    """The runs that are no row yet, in their order."""
    done = set(map(Job.of, rows))
    found = chain(*(PLANS[kind](choice, rows) for kind in choice.kinds))
    return [job for job in found if job not in done]


def _defaults(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    for seed in SEEDS[: choice.seeds]:
        for task, name in choice.cases:
            yield Job("defaults", task, name, "{}", seed)


def _basin(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    """From the middle outwards, so that what is there shows the most."""
    for task, name in choice.cases:
        if task not in NO_BASIN:
            for settings in basin(name):
                yield Job("basin", task, name, json.dumps(settings), TUNING_SEEDS[0])


def basin(name: str) -> list[Settings]:
    """From lowest to highest lr of the search, all else at the defaults, the middle first.

    Muon's second lr keeps its ratio to the first.
    """
    defaults, (lowest, *_, highest) = BASE[name].defaults, BASE[name].search["lr"]
    steps = sorted(range(BASIN), key=lambda i: abs(i - BASIN // 2))
    chosen = []
    for lr in (lowest * (highest / lowest) ** (i / (BASIN - 1)) for i in steps):
        ratio = lr / defaults["lr"]
        scaled = {key: ratio * defaults[key] for key in ("lr", "adamw_lr") if key in defaults}
        chosen.append({key: float(f"{value:.3g}") for key, value in scaled.items()})
    return chosen


def _search(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    for task, name in (case for case in choice.cases if not choice.stored(case)):
        grid = list(map(json.dumps, METHODS[task][name].grid()))
        first, *others = TUNING_SEEDS[: choice.seeds]
        for settings in grid:
            yield Job("search", task, name, settings, first)
        best = finalists(losses(rows, task, name), len(grid))
        for seed in others:
            for settings in best:
                yield Job("search", task, name, settings, seed)


def _tuned(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    """Of a search in these rows that is whole, else of a stored one."""
    found = all_best(rows, TUNING_SEEDS[: choice.seeds])
    for seed in SEEDS[: choice.seeds]:
        for task, name in choice.cases:
            searched = found.get((SEARCHED.get(task, task), name))
            settings = choice.stored((task, name)) or searched
            if settings:
                yield Job("tuned", task, name, json.dumps(settings), seed)


def _structures(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    for seed in SEEDS[: choice.seeds]:
        for task, name in choice.cases:
            for structure in STRUCTURES.get(name, []) if task == "text" else []:
                settings = {**METHODS[task][name].defaults, **structure}
                yield Job("structures", task, name, json.dumps(settings), seed)


def _formats(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    for seed in SEEDS[: choice.seeds]:
        for task, name in choice.cases:
            for formats in FORMATS.get(name, []) if task == "text" else []:
                settings = {**METHODS[task][name].defaults, **formats}
                yield Job("formats", task, name, json.dumps(settings), seed)


def _second_moments(choice: Choice, rows: list[Row]) -> Iterator[Job]:
    for seed in SEEDS[: choice.seeds]:
        for task, name in choice.cases:
            for lr in SECOND_MOMENTS.get(name, ()) if task == "digits" else ():
                for moment in _MOMENTS:
                    chosen = {"lr": lr, "second_moment": moment, MICRO_BATCHES: 8}
                    settings = {**METHODS[task][name].defaults, **chosen}
                    yield Job("second moments", task, name, json.dumps(settings), seed)


# In the order of their runs: the best of a search is trained as soon as it is known.
PLANS = {
    "defaults": _defaults,
    "tuned": _tuned,
    "search": _search,
    "basin": _basin,
    "structures": _structures,
    "formats": _formats,
    "second moments": _second_moments,
}


# Best of a search -----------------------------------------------------------------------------


def losses(rows: Iterable[Row], task: str, name: str) -> Losses:
    """Of the runs of a search."""
    found: Losses = {}
    for row in rows:
        if (row["case"], row["provider"], row["detail"]["kind"]) == (task, name, "search"):
            value = math.inf if row["value"] is None else row["value"]
            found.setdefault(row["detail"]["chosen"], {})[row["detail"]["seed"]] = value
    return found


def finalists(found: Losses, size: int) -> list[str]:
    """The settings that the other seeds train; none before the first seed is whole."""
    first = {of: by[TUNING_SEEDS[0]] for of, by in found.items() if TUNING_SEEDS[0] in by}
    return sorted(first, key=first.__getitem__)[:FINALISTS] if len(first) == size else []


def all_best(rows: list[Row], seeds: tuple[int, ...] = TUNING_SEEDS) -> dict[Case, Settings]:
    """By problem and method the lowest mean of all seeds, of the searches that are whole."""
    found = {}
    for task, methods in METHODS.items():
        for name, method in methods.items():
            of = losses(rows, task, name)
            means = [
                (sum(of[settings].values()), settings)
                for settings in finalists(of, len(method.grid()))
                if set(of[settings]) == set(seeds)
            ]
            if means and len(means) == min(FINALISTS, len(of)):
                found[task, name] = _settings(min(means)[1])
    return found


def _settings(text: str) -> Settings:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
