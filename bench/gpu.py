"""Everything that needs a GPU, in one command: the benchmarks of the targets, then the tests.

Each part is a process of its own with a limit of its own, so that one that fails or hangs leaves
the others their GPU and their time; rows are written as they are measured, and what a part printed
lies in a log beside them. The report names troubles first and ends with the targets. Without a GPU
the same command rehearses itself on small sizes, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .common import add_measurement_arguments, pick_device
from .gpu_cases import CASES, small
from .rows import ROOT, Row, Rows, markdown, number, provenance, read_rows, select, timed

# Seconds of each part on an H100 or H200, compilation included, the tests last: the most that it
# may take, and how much of that is for timing.
LIMITS = {
    "limits": (30, 2.0),
    "whole steps": (90, 10.0),
    "products": (60, 8.0),
    "large diagonal": (60, 8.0),
    "many tensors": (50, 8.0),
    "tests": (240, 0.0),
}
# On demand, by --case.
ALONE = (150, 30.0)
SHOWN_TROUBLES = 20
OURS = ("IFShampoo", "RootFree", "2,000 tensors", "300 tensors", "one tensor")


class Target(NamedTuple):
    """A row and the value that it has to reach."""

    what: str
    case: str
    provider: str
    metric: str
    goal: float
    at_most: bool = False
    unit: str = ""


def _targets() -> list[Target]:
    large = [
        Target(f"{name}, {dtype}, of a copy", f"one large tensor, {dtype}", name, *rest)
        for name in ("RootFreeRMSprop, momentum 0.9", "RootFreeAdamW")
        for dtype in ("float32", "bfloat16")
        for rest in (("bandwidth fraction", 0.92),)
    ]
    goals = {"1 of 4096": 1.7, "16 of 2048": 1.5, "32 of 1024": 1.4, "64 of 512": 1.1}
    ours = "IFShampoo, bfloat16"
    return [
        *large,
        Target("114 of 1024: a step", "114 of 1024", ours, "time", 6.0, True, "ms"),
        Target("the same, graph", "114 of 1024", f"{ours}, graph", "time", 6.0, True, "ms"),
        Target("of the mm rate", "114 of 1024", ours, "rate fraction", 0.6),
        Target("eigh Shampoo", "114 of 1024", "Shampoo by batched eigh", "slowdown", 50.0),
        Target("sirfshampoo", "114 of 1024", "sirfshampoo, bfloat16", "slowdown", 5.0),
        *(
            Target(f"K K^T, {case}, x bmm", case, "products", "speed", goal)
            for case, goal in goals.items()
        ),
        *(
            Target(f"K m, {case}, x bmm", case, "factors", "speed", 0.95)
            for case in ("16 of 2048", "32 of 1024")
        ),
        Target("2,000 tensors, x one", "many tensors", "2,000 tensors", "time ratio", 1.05, True),
        Target("300 tensors, host", "many tensors", "300 tensors", "host time", 0.1, True, "ms"),
        Target("2,000, host", "many tensors", "2,000 tensors", "host time", 0.5, True, "ms"),
        Target(
            "300, graph, host", "many tensors", "300 tensors, graph", "host time", 0.01, True, "ms"
        ),
    ]


TARGETS = _targets()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench gpu`."""
    add_measurement_arguments(parser)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which all ends")
    parser.add_argument("--case", choices=CASES, help="measure this one alone, in this process")
    parser.add_argument("--dry-run", action="store_true", help="print the limits, and their sum")


def run(args: argparse.Namespace) -> int:
    """Run every part; 1 if a test or a case failed, or a step was WRONG."""
    device = pick_device(args.device)
    if args.dry_run:
        for name, (most, _) in LIMITS.items():
            print(f"{most:4} s  {name}")
        print(f"{sum(most for most, _ in LIMITS.values()):4} s  at most")
        return 0
    path = args.out / "gpu.jsonl"
    if args.case:
        rows = Rows(path, "gpu", device, append=True)
        seconds = LIMITS.get(args.case, ALONE)[1]
        CASES[args.case](rows, device, 1.0 if args.quick or small(device) else seconds)
        return 0

    deadline = time.monotonic() + 60 * args.minutes
    rows = Rows(path, "gpu", device, arguments=args)
    if small(device):
        print("no CUDA device: small sizes on the CPU, no GPU test, no product by a kernel")
    for name in rows.remaining(LIMITS):
        seconds = min(LIMITS[name][0], deadline - time.monotonic())
        if name == "tests":
            run_tests(rows, device, seconds)
            continue
        command = [sys.executable, "-m", "bench", "gpu", "--case", name, "--device", device.type]
        command += ["--out", str(args.out.resolve()), *(["--quick"] if args.quick else [])]
        command += ["--reference"] * args.reference
        run_part(rows, name, command, seconds)
    rows.finish()
    written = read_rows(path)
    report = path.with_suffix(".md")
    report.write_text(table(written))
    print(f"rows   {path}\ntable  {report}")
    print(report.read_text())
    failed = any(row["metric"] == "failed" and row["value"] != 0 for row in written)
    return int(failed or bool(wrong_of_ours(written)))


def log_of(rows: Rows, name: str) -> Path:
    """Where a part's output goes, line by line."""
    return rows.path.with_name(f"gpu-{name.replace(' ', '-')}.log")


def run_part(rows: Rows, name: str, command: list[str], seconds: float) -> str:
    """A process; a row says if it failed, or was stopped, and with what last words."""
    if seconds < 10:
        rows.add(name, "process", "skipped", None, "", why="no time left")
        return ""
    log = log_of(rows, name)
    with log.open("w") as output:
        part = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = part.wait(timeout=seconds)
            why = f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, why = None, f"stopped after {seconds:.0f} s"
        stop_session(part)
    printed = log.read_text(errors="replace")
    if code != 0:
        last = " ".join(printed.strip().splitlines()[-1:])
        rows.add(name, "process", "failed", 1, "", why=f"{why}: {last}"[:300])
    return printed


def stop_session(part: subprocess.Popen[bytes]) -> None:
    """End a process and its children, which would use the GPU beside the next part."""
    try:
        os.killpg(part.pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended, and left none
        return
    part.wait()


def run_tests(rows: Rows, device: torch.device, seconds: float) -> None:
    """The tests with the mark `gpu`; on all cores, since most of their time is compilation."""
    if small(device):
        rows.add("tests", "pytest", "skipped", None, "", why="no CUDA device")
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rf", "--tb=short"]
    command += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "120"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(14, os.cpu_count() or 1))]
    output = run_part(rows, "tests", command, seconds)
    for outcome in ("passed", "failed", "skipped", "error"):
        found = re.search(rf"(\d+) {outcome}", output.rpartition("\n=")[2])
        rows.add("tests", "pytest", outcome, int(found[1]) if found else 0, "tests")
    for line in re.findall(r"^FAILED (.*)", output, re.MULTILINE):
        rows.add("tests", "pytest", "failed test", None, "", test=line[:300])


def table(rows: list[Row]) -> str:
    """Markdown: whatever failed or was left out, then the targets with what was measured."""
    limits = select(rows, case="limits")
    tests = [row for row in select(rows, case="tests") if row["unit"] == "tests"]
    parts = ["# GPU: measured against the targets", provenance(rows)]
    if not on_gpu(rows):
        parts.append("**A rehearsal on the CPU with small sizes: none of these is a result.**")
    troubles = [
        f"- {row['case']}, {row['metric']}: {row['detail'].get('why') or row['detail'].get('test')}"
        for row in rows
        if row["detail"].keys() & {"why", "test"}
    ]
    troubles += [
        f"- {row['case']}, {row['provider']}: **WRONG**, error {number(row['value'], '.3g')} "
        f"{row['unit']}"
        for row in wrong(rows)
    ]
    if more := len(troubles) - SHOWN_TROUBLES:
        troubles[SHOWN_TROUBLES:] = [f"- and {more} more: see the rows"] if more > 0 else []
    if troubles:
        parts.append("\n".join(troubles))
    for name, found in (("Tests", tests), ("Limits", limits)):
        numbers = [f"{row['metric']} {row['value']:.4g} {row['unit']}" for row in found]
        parts.append(f"{name}: {', '.join(numbers) or 'none'}")
    parts.append(markdown(("what", "measured", "target", ""), [_line(t, rows) for t in TARGETS]))
    return "\n\n".join(parts) + "\n"


def _line(target: Target, rows: list[Row]) -> list[str]:
    found = select(rows, case=target.case, provider=target.provider, metric=target.metric)
    goal = f"{'<=' if target.at_most else '>='} {target.goal:g} {target.unit}".strip()
    if wrong_of_ours(select(rows, case=target.case)):
        return [target.what, "**WRONG**", goal, ""]
    if not found or found[0]["value"] is None:
        return [target.what, "not measured", goal, ""]
    value = found[0]["value"]
    shown = timed(found[0], band=False) if "p20" in found[0]["detail"] else f"{value:.3g}"
    reached = value <= target.goal if target.at_most else value >= target.goal
    verdict = "reached" if reached else "missed"
    return [target.what, shown, goal, verdict if on_gpu(found) else "rehearsal"]


def wrong(rows: list[Row]) -> list[Row]:
    """Errors of steps that are not right, and got no time."""
    return [row for row in rows if row["detail"].get("right") is False]


def wrong_of_ours(rows: list[Row]) -> list[Row]:
    """Those that are a failure of this package."""
    return [row for row in wrong(rows) if row["provider"].startswith(OURS)]


def on_gpu(rows: list[Row]) -> bool:
    return "sm_" in rows[0]["device"]
