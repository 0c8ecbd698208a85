"""The training problems by name, and what of a run on one is written."""

from __future__ import annotations

import math

from .autoencoder import Autoencoder
from .digits import Digits
from .text import Text
from .training import Problem

# In the order in which runs are made.
PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Autoencoder(),
        Digits(),
        Text(),
        Text("long text", rounds=60),
        Text("wide text", width=256, layers=4, rounds=12),
        Text(
            "large text",
            width=512,
            layers=8,
            rounds=12,
            context=256,
            sequences=32,
            autocast=True,
        ),
    )
}
ON_A_GPU = ("large text",)  # a CPU would take hours


def rounded(values: list[float]) -> list[float | None]:
    """Four digits; None where a run diverged, because JSON has no NaN."""
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]
