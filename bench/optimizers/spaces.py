"""What `bench search` draws from: its methods, and the space of each.

A space has a range for each setting, by the constructor's name of it: beta1 and beta2 are those of
betas, and "1 - momentum" is drawn for momentum. A point of a space has a number for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rootfree_fused.ops.checks import check_hyperparameters

from ..measuring.common import optional
from .tuned import BASE, SIZED, Method, Settings

Point = dict[str, float]
ONE_MINUS = "1 - "
BEST, LEAST_BEST, WIDER = 0.1, 3, 1.5  # of stage 1 the share, and how much wider stage 2 is
PUBLISHED = Path(__file__).with_name("search_spaces.json")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, drawn with equal odds on a logarithmic or plain axis."""

    low: float
    high: float
    log: bool = True

    @classmethod
    def read(cls, name: str, ends: Any) -> Range:
        """Of [low, high] or [low, high, "linear"]; a ValueError that says what is wrong."""
        is_list = isinstance(ends, list) and ends[2:] in ([], ["linear"])
        numbers = ends[:2] if is_list else []
        if len(numbers) < 2 or not all(type(end) in (int, float) for end in numbers):
            raise ValueError(f'{name} is {ends!r}; write [low, high] or [low, high, "linear"]')
        found = cls(float(ends[0]), float(ends[1]), len(ends) == 2)
        found.check(name)
        return found

    def check(self, name: str) -> None:
        """Raise a ValueError where nothing can be drawn."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"{name} is from {self.low:g} to {self.high:g}; the first must be the lower number"
            )
        if self.log and self.low <= 0:
            raise ValueError(
                f"{name} is from {self.low:g} to {self.high:g} on a logarithmic axis, which needs "
                'numbers above 0; write [low, high, "linear"]'
            )

    def written(self) -> list[Any]:
        """As `read` takes it."""
        return [self.low, self.high, *([] if self.log else ["linear"])]


Space = dict[str, Range]


# Methods --------------------------------------------------------------------------------------


def shampoo(params: Iterable[Tensor], **settings: Any) -> Optimizer:
    """Shampoo of pytorch-optimizer, the one with averaged factors."""
    return optional("pytorch_optimizer").ScalableShampoo(params, **settings)


METHODS = {
    "SGD": BASE["torch SGD"],
    "AdamW": BASE["torch AdamW"],
    "RootFreeRMSprop": BASE["RootFreeRMSprop"],
    "RootFreeAdamW": BASE["RootFreeAdamW"],
    "IFShampoo": BASE["IFShampoo"],
    "RootFreeShampoo": BASE["RootFreeShampoo"],
    "SOAP": BASE["SOAP"],
    "Shampoo": Method(  # without grafting and blocks, renewed every other step, as published
        shampoo,
        defaults={},
        given={
            "graft_type": 0,
            "block_size": 10**9,
            "nesterov": False,
            "decoupled_weight_decay": True,
            "start_preconditioning_step": 1,
            "preconditioning_compute_steps": 2,
        },
    ),
}
DEFAULT = ("SGD", "AdamW", "RootFreeRMSprop", "IFShampoo", "RootFreeShampoo")


def method_of(name: str, batch_size: int, fixed: Settings) -> Method:
    """A method with what no trial changes."""
    sized = {"batch_size": batch_size} if name in SIZED else {}
    return replace(METHODS[name], given={**METHODS[name].given, **sized, **fixed})


def settings_of(point: Mapping[str, float]) -> Settings:
    """Arguments of the constructor, of four digits: what is trained is what tables show."""
    found: Settings = {}
    for name, drawn in point.items():
        number = float(f"{drawn:.4g}")
        is_rest = name.startswith(ONE_MINUS)
        found[name.removeprefix(ONE_MINUS)] = round(1 - number, 12) if is_rest else number
    if "beta1" in found and "beta2" in found:
        found["betas"] = (found.pop("beta1"), found.pop("beta2"))
    return found


# Spaces ---------------------------------------------------------------------------------------


def _space(lr: tuple[float, float], **others: tuple[float, float]) -> Space:
    """Logarithmic ranges; one_minus_x is "1 - x"."""
    named = {name.replace("one_minus_", ONE_MINUS): ends for name, ends in others.items()}
    return {name: Range(*ends) for name, ends in {"lr": lr, **named}.items()}


# For stage 1.
WIDE: dict[str, Space] = {
    "SGD": _space((1e-3, 3.0), one_minus_momentum=(1e-2, 1.0), weight_decay=(1e-8, 1e-1)),
    "AdamW": _space(
        (1e-5, 3e-2),
        one_minus_beta1=(1e-2, 1.0),
        one_minus_beta2=(1e-4, 3e-1),
        eps=(1e-12, 1e-6),
        weight_decay=(1e-6, 3e-1),
    ),
    "RootFreeRMSprop": _space(
        (1e-5, 1.0),
        one_minus_momentum=(1e-2, 1.0),
        one_minus_alpha=(1e-4, 3e-1),
        damping=(1e-7, 5e-4),
        weight_decay=(1e-6, 1e-1),
    ),
    "RootFreeAdamW": _space(
        (1e-4, 1.0),
        one_minus_beta1=(1e-2, 1.0),
        one_minus_beta2=(1e-4, 3e-1),
        damping=(1e-7, 5e-4),
        weight_decay=(1e-6, 1e-1),
    ),
    "IFShampoo": {
        **_space(
            (1e-5, 1e-1),
            one_minus_momentum=(5e-2, 1.0),
            factor_lr=(2e-2, 1.6),
            damping=(3e-5, 1e-2),
            weight_decay=(1e-6, 1e-1),
        ),
        "factor_momentum": Range(0.0, 0.9, log=False),
    },
    "RootFreeShampoo": _space(
        (1e-4, 1e-1),
        one_minus_beta1=(1e-2, 1.0),
        one_minus_beta2=(5e-3, 3e-1),
        weight_decay=(1e-6, 3e-1),
    ),
    "SOAP": _space(
        (1e-5, 1e-1),
        one_minus_beta1=(1e-2, 1.0),
        one_minus_beta2=(5e-4, 3e-1),
        eps=(1e-12, 1e-6),
        weight_decay=(1e-6, 3e-1),
    ),
    "Shampoo": _space(
        (1e-5, 1e-1),
        one_minus_beta1=(1e-2, 1.0),
        one_minus_beta2=(5e-4, 3e-1),
        matrix_eps=(1e-12, 1e-6),
        weight_decay=(1e-6, 3e-1),
    ),
}


# What rows say of a wide space.
NOTES = {
    "IFShampoo": "damping up to 1e-2, above the published 5e-4: below 1e-3 runs that were driven "
    "to a training loss of zero diverged (docs/interface.md)"
}


def check_space(name: str, space: Space, method: Method) -> None:
    """Build the method at either end of its ranges.

    Raises:
        ValueError: nothing can be drawn, or an end is outside a domain or no argument.
    """
    for setting, ends in space.items():
        ends.check(f"{setting} of {name}")
    for end in ("low", "high"):
        settings = settings_of({setting: getattr(ends, end) for setting, ends in space.items()})
        try:
            check_hyperparameters(settings)  # torch's own take a momentum above 1
            method.build([torch.nn.Parameter(torch.zeros(2, 2))], **settings, **method.given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the space of {name} has what it does not take: {error}") from None


def read_spaces(path: Path) -> dict[str, Space]:
    """Spaces of a JSON file, {method: {setting: [low, high]}}.

    Raises:
        ValueError: it is no such file.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of spaces: {error}") from None
    is_of_spaces = isinstance(found, dict) and all(isinstance(v, dict) for v in found.values())
    if not is_of_spaces or not found or not all(found.values()):
        raise ValueError(f"{path} is no file of spaces; write {{method: {{setting: [low, high]}}}}")
    if unknown := found.keys() - METHODS:
        raise ValueError(f"{path} has {', '.join(sorted(unknown))}; methods: {', '.join(METHODS)}")
    for name, of in found.items():
        if len({f"{ONE_MINUS}beta1", f"{ONE_MINUS}beta2"} & of.keys()) == 1:
            raise ValueError(
                f"{name} in {path} has one of '1 - beta1' and '1 - beta2'; the constructor takes "
                "both, so give a range for each"
            )
    return {
        name: {setting: Range.read(f"{setting} of {name}", ends) for setting, ends in of.items()}
        for name, of in found.items()
    }


# Published ------------------------------------------------------------------------------------

_NAMES = {
    "sgd": ("SGD", {"momentum": "momentum"}),
    "adamw": (
        "AdamW",
        {"momentum": "beta1", "damping": "eps", "factor_or_square_rate": "1 - beta2"},
    ),
    "rfrmsprop": ("RootFreeRMSprop", {"factor_or_square_rate": "1 - alpha"}),
    "shampoo": (
        "Shampoo",
        {"momentum": "beta1", "damping": "matrix_eps", "factor_or_square_rate": "1 - beta2"},
    ),
    "ifshampoo": ("IFShampoo", {"factor_or_square_rate": "factor_lr"}),
}
# How the released code differs from our defaults.
RELEASED: dict[str, Settings] = {
    "RootFreeRMSprop": {"weight_decay_mode": "momentum", "initial_square_avg": 1.0},
    "IFShampoo": {
        "weight_decay_mode": "momentum",
        "initial_square_avg": 1.0,
        "update_interval": 2,
    },
}


@dataclass(frozen=True)
class Published:
    """The space of a method on a model as it was published, its best, and what is wrong with it."""

    space: Space
    best: Point
    faults: tuple[str, ...]


def published() -> dict[str, dict[str, Published]]:
    """By model and method. A reversed range is turned; one without the best is extended to it."""
    found: dict[str, dict[str, Published]] = {}
    for entry in json.loads(PUBLISHED.read_text())["entries"]:
        name, names = _NAMES[entry["optimizer"]]
        space, best, faults = {}, {}, []
        for key, ends in entry["space"].items():
            setting, number = names.get(key, key), entry["best"][key]
            written = f"{setting} is written from {ends[0]:g} to {ends[1]:g}"
            if ends[0] > ends[1]:
                faults.append(f"{written}; turned")
            if not min(ends) <= number <= max(ends):
                faults.append(f"{written} and its best is {number:g}; extended to it")
            space[setting] = Range(min(*ends, number), max(*ends, number))
            best[setting] = number
        found.setdefault(entry["model"], {})[name] = Published(space, best, tuple(faults))
    return found


# Stage 2 --------------------------------------------------------------------------------------


def narrowed(space: Space, ended: Sequence[tuple[Point, float | None]]) -> Space:
    """The range of each setting among the best tenth of stage 1, at least three, and 1.5 wider.

    It stays in stage 1's; of a momentum it is 1 - momentum that is 1.5 times as much or as little.

    Raises:
        ValueError: all runs diverged.
    """
    finite = sorted(
        ((point, value) for point, value in ended if value is not None), key=lambda run: run[1]
    )
    if not finite:
        raise ValueError("every run diverged")
    best = [point for point, _ in finite[: max(LEAST_BEST, round(BEST * len(ended)))]]
    found = {}
    for name, whole in space.items():
        numbers = [point[name] for point in best]
        low, high = min(numbers), max(numbers)
        if name in ("momentum", "beta1"):
            low, high = 1 - (1 - low) * WIDER, 1 - (1 - high) / WIDER
        else:
            low, high = low / WIDER, high * WIDER
        found[name] = replace(whole, low=max(whole.low, low), high=min(whole.high, high))
    return found
