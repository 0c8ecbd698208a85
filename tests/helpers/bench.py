"""What the tests of the benchmarks share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
CPU = torch.device("cpu")
needs_extras = pytest.mark.skipif(
    not all(map(find_spec, ("sklearn", "matplotlib", "tqdm", "pytorch_optimizer"))),
    reason="pip install rootfree-fused[bench]",
)


def row(provider, metric, value, *, case="c", **detail):
    """A row of results with made-up provenance; a time is of enough samples."""
    if "p20" in detail:
        detail = {"samples": 9, **detail}
    return {
        "benchmark": "diag",
        "case": case,
        "provider": provider,
        "metric": metric,
        "value": value,
        "unit": "",
        "detail": detail,
        "device": "a CPU",
        "versions": {"torch": "2"},
        "commit": "abc",
    }
