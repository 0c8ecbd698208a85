"""What trainers need to build and to feed these optimizers; each file imports its own trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from .. import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo

# What factories know by name.
CLASSES = (RootFreeShampoo, RootFreeRMSprop, RootFreeAdamW, IFShampoo)


def has_batch_size(optimizer_class: type[Optimizer]) -> bool:
    """Whether its steps need the number of loss terms."""
    return "batch_size" in inspect.signature(optimizer_class).parameters


def refuse_micro_batches(settings: Mapping[str, Any], trainer: str) -> None:
    """Raise a ValueError for settings that tell micro-batches apart, where nobody does."""
    for key in ("second_moment", "sign"):
        if settings.get(key) in ("micro", "variance", "mean"):
            raise ValueError(
                f"{key} is {settings[key]!r}, of micro-batches that optimizer.accumulate() takes, "
                f"but {trainer} adds them up in .grad; leave {key} out, or train in a loop of "
                "your own"
            )
