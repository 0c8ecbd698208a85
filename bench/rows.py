"""Results: JSON rows, where they come from, and the tables made of them."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import rootfree_fused
from rootfree_fused import ops

from .common import Timing

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
ROW_KEYS = (
    "kernel",
    "case",
    "provider",
    "metric",
    "value",
    "unit",
    "detail",
    "device",
    "versions",
    "commit",
)


def describe_device(device: torch.device) -> str:
    """Model and threads, or model and capability; never a host name."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((v.strip() for k, _, v in lines if k.strip() == "model name"), model)
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}"


def versions(device: torch.device) -> dict[str, str]:
    """Versions, and what of ours ran: C++, Triton or the slow reference."""
    backend = ops.backends().get(device.type, "reference").partition(":")[0]
    return {
        "torch": torch.__version__,
        "rootfree_fused": f"{rootfree_fused.__version__}, {backend}",
        "python": platform.python_version(),
    }


def commit() -> str:
    """Short hash, -dirty where tracked files other than results differ; 'unknown' outside git."""
    try:
        hash_ = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{hash_}-dirty" if changed else hash_


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Rows:
    """The rows of one run, each in the file (JSON lines) as soon as it is added."""

    def __init__(
        self, path: Path, kernel: str, device: torch.device, *, append: bool = False
    ) -> None:
        self._constants = {
            "device": describe_device(device),
            "versions": versions(device),
            "commit": commit(),
        }
        self._kernel = kernel
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.write_text("")

    def add(
        self, case: str, provider: str, metric: str, value: float | None, unit: str, **detail: Any
    ) -> None:
        """One number; `value` is None where there is none to report, as after divergence."""
        finite = value is not None and math.isfinite(value)
        row = {
            "kernel": self._kernel,
            "case": case,
            "provider": provider,
            "metric": metric,
            "value": float(f"{value:.5g}") if finite else None,
            "unit": unit,
            "detail": detail,
            **self._constants,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def add_time(
        self, case: str, provider: str, metric: str, timing: Timing, **detail: Any
    ) -> None:
        """A median in ms with its percentiles."""
        p20, p80 = (float(f"{1e3 * t:.5g}") for t in (timing.p20, timing.p80))
        detail |= {"p20": p20, "p80": p80, "samples": timing.samples}
        self.add(case, provider, metric, 1e3 * timing.median, "ms", **detail)


def read_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows, start=1):
        if tuple(row) != ROW_KEYS:
            raise ValueError(f"{path.name} line {number} has keys {list(row)}, not {ROW_KEYS}")
    return rows


def select(rows: list[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def unique(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


# Tables ---------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def number(value: float | None, spec: str) -> str:
    """A value of a row as text; a value that was not finite has no number."""
    return "not finite" if value is None else format(value, spec)


def provenance(rows: list[Row]) -> str:
    """One line that says where, with what and from which commit the rows come."""
    row = rows[0]
    names = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['device']}; {names}; commit {row['commit']}"
