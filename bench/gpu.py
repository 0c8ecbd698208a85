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

import torch

from .gpu_cases import CASES, small
from .measuring.common import add_measurement_arguments, pick_device
from .measuring.rows import ROOT, Rows, wrong_of_ours
from .report.targets import GPU_OURS, table

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
        seconds = LIMITS[args.case][1]
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
        command += ["--reference"] * args.reference + ["--dirty"] * args.dirty
        run_part(rows, name, command, seconds)
    written = rows.finish(table)
    failed = any(row["metric"] == "failed" and row["value"] != 0 for row in written)
    return int(failed or bool(wrong_of_ours(written, GPU_OURS)))


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
