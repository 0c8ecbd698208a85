"""Results: JSON rows of a run, each with where it comes from, written and read."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import rootfree_fused
from rootfree_fused import ops

from .common import Timing, optional

Row = dict[str, Any]

ROOT = Path(__file__).parents[2]
DIRTY = "-dirty"
# How the names of what is ours start.
OURS = ("IFShampoo", "RootFree", "accumulate_", "rmsprop_")
ROW_KEYS = (
    "benchmark",
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
    """Short hash, -dirty where tracked files other than results differ; 'unknown' outside git.

    A copy without git is told by BENCH_COMMIT.
    """
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    try:
        hash_ = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return hash_ + DIRTY * bool(changed)


def refuse_uncommitted(asked: bool) -> None:
    """Stop before rows would name a commit that is not what runs, unless that is asked for."""
    if commit().endswith(DIRTY) and not asked:
        raise SystemExit(
            f"tracked files differ from the last commit, and rows would name {commit()}, which "
            "nobody can check out. Commit first (or pass --dirty; the rows then say so)"
        )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Rows:
    """The rows of one run, each in the file (JSON lines) as soon as it is added.

    With `arguments`, a run that is interrupted can go on: a note beside the file says which cases
    are whole, and the next run of equal commit, device, versions and arguments keeps them. Any
    other run starts a new file, and so does one of uncommitted code, which has no name.
    """

    def __init__(
        self,
        path: Path,
        benchmark: str,
        device: torch.device,
        *,
        append: bool = False,
        arguments: argparse.Namespace | None = None,
    ) -> None:
        self._constants = {
            "device": describe_device(device),
            "versions": versions(device),
            "commit": commit(),
        }
        self._benchmark = benchmark
        self.path = path
        self._note = path.with_suffix(".unfinished.json")
        self._run = {**self._constants, "arguments": _plain(arguments)}
        # Each whole case, and the bytes of the file up to its last row.
        self._whole: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            return
        if arguments and path.exists() and self._note.exists():
            noted = self._noted()
            named = not self._constants["commit"].endswith((DIRTY, "unknown"))
            if named and noted["run"] == self._run:
                self._whole = noted["whole"]
        if self._whole:
            os.truncate(path, max(self._whole.values()))
            print(f"{path} keeps of an interrupted run: {', '.join(self._whole)}")
        else:
            self._note.unlink(missing_ok=True)
            path.write_text("")

    def _noted(self) -> dict[str, Any]:
        try:
            return json.loads(self._note.read_text())
        except ValueError as error:
            raise SystemExit(
                f"{self._note} is damaged ({error}); remove it, and the run begins anew"
            ) from None

    def refuse_others(self) -> None:
        """Stop where the file has rows of another commit, device or version, or of none."""
        self.path.touch()
        for row in read_rows(self.path):
            own = {key: row[key] for key in self._constants}
            if own != self._constants or own["commit"].endswith((DIRTY, "unknown")):
                raise SystemExit(
                    f"{self.path} has rows of {own['commit']} on {own['device']}, which this run of"
                    f" {self._constants['commit']} cannot go on with; move it, or choose --out"
                )

    def remaining(self, cases: Iterable[str]) -> Iterator[str]:
        """The cases that are not in the file yet, with a progress bar.

        A case is whole once the next is asked for.
        """
        cases = list(cases)
        missing = [case for case in cases if case not in self._whole]
        done = len(cases) - len(missing)
        with optional("tqdm").tqdm(total=len(cases), initial=done, unit="case") as bar:
            for case in missing:
                bar.set_description(case)
                yield case
                self._whole[case] = self.path.stat().st_size
                self._note.write_text(json.dumps({"run": self._run, "whole": self._whole}))
                bar.update()

    def finish(self, table: Callable[[list[Row]], str] | None = None) -> list[Row]:
        """The run is whole: the next one measures everything again. Write and print its table."""
        self._note.unlink(missing_ok=True)
        written = read_rows(self.path)
        print(f"rows   {self.path}")
        if table:
            page = self.path.with_suffix(".md")
            page.write_text(table(written) + "\n")
            print(f"table  {page}\n\n{page.read_text()}")
        return written

    def add(
        self, case: str, provider: str, metric: str, value: float | None, unit: str, **detail: Any
    ) -> None:
        """One number; `value` is None where there is none to report, as after divergence."""
        if self._constants["commit"].endswith(DIRTY):
            detail["uncommitted"] = True
        finite = value is not None and math.isfinite(value)
        row = {
            "benchmark": self._benchmark,
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


def _plain(arguments: argparse.Namespace | None) -> dict[str, str]:
    """What was asked for; not the folder, nor the function that does it."""
    given = vars(arguments) if arguments else {}
    return {key: str(value) for key, value in given.items() if key not in ("out", "run")}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; stop at a line that is none."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            raise SystemExit(
                f"{path} line {number} is no row: {error}. Remove the line, which a run that was "
                "killed leaves cut short, or take the file from git again"
            ) from None
    return rows


def _row(line: bytes) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict) or tuple(row) != ROW_KEYS:
        found = f"has keys {list(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise ValueError(f"it {found}, not the keys {', '.join(ROW_KEYS)}")
    return row


def select(rows: list[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def unique(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def wrong(rows: list[Row]) -> list[Row]:
    """Errors of results that are not right, and got no time."""
    return [row for row in rows if row["detail"].get("right") is False]


def wrong_of_ours(rows: list[Row], ours: tuple[str, ...] = OURS) -> list[Row]:
    """Those that are a failure of this package; a WRONG optimizer of others is worth showing."""
    return [row for row in wrong(rows) if row["provider"].startswith(ours)]
