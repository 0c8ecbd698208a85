"""Everything that needs a GPU, in one command: the benchmarks of the targets, then the tests.

Each part is a process of its own with a limit of its own, so that one that fails or hangs leaves
the others their GPU and their time; rows are written as they are measured, and what a part printed
lies in a log beside them, all in one archive at the end. First come a few tests, which show what is
broken and leave compiled kernels to the benchmarks. Where ncu and compute-sanitizer are installed,
they watch a step each; what they say is a log. The report names troubles first and ends with
the targets. Without a GPU the same command rehearses itself on small sizes, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

from .gpu_cases import CASES, small
from .measuring.common import add_measurement_arguments, pick_device
from .measuring.rows import ROOT, Rows, wrong_of_ours
from .report.targets import GPU_OURS, table

# Seconds of each part on an H100 or H200, compilation included: the most that it may take, and how
# much of that is for timing.
LIMITS = {
    "smoke": (45, 0.0),
    "limits": (25, 2.0),
    "whole steps": (90, 10.0),
    "blocks": (40, 5.0),
    "products": (50, 8.0),
    "ncu": (40, 0.0),
    "large diagonal": (50, 8.0),
    "fewer bytes": (25, 3.0),
    "micro-batches": (20, 3.0),
    "many tensors": (40, 8.0),
    "one rank": (25, 3.0),
    "memcheck": (20, 0.0),
    "racecheck": (20, 0.0),
    "tests": (50, 0.0),  # and all that others leave
}
LEAST = 10.0  # seconds; with less left a part is not started
# Programs that watch a case, each with its options. Of `ncu`'s case a step has three launches of
# these names, so this is the second step's momenta, and its factors of one axis.
WATCHED = "regex:_factor_momenta_kernel|_factors_kernel|_stacked_factors_kernel"
NCU = ("--clock-control", "none", "--set", "full", "--kernel-name", WATCHED)
TOOLS = {
    "ncu": ["ncu", *NCU, "-s", "3", "-c", "2"],
    "memcheck": ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"],
    "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"],
}
SMOKE = ["tests/kernels/test_gpu.py", "-k", "serve or two_runs or captured_step or launches"]
# What says most first, in case that time runs out.
ALL_TESTS = ["tests/kernels/test_gpu.py", "tests/kernels", "tests/test_capture.py", "tests"]
TESTS = {"smoke": SMOKE, "tests": ALL_TESTS}
# Of 16 cores; 6 of them ran 97 % of 1,936 tests in 175 s on an H200, more is not yet measured.
WORKERS = 12
OUTCOMES = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"


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
        seconds = deadline - time.monotonic()
        if name != "tests":
            seconds = min(seconds, LIMITS[name][0])
        if name in TESTS:
            run_tests(rows, device, seconds, name)
            continue
        command = case_command(args, name)
        if name in TOOLS:
            run_watched(rows, device, seconds, name, command)
            continue
        run_part(rows, name, command, seconds)
    archive(rows)
    written = rows.finish(table)
    failed = any(row["metric"] == "failed" and row["value"] != 0 for row in written)
    return int(failed or bool(wrong_of_ours(written, GPU_OURS)))


def case_command(args: argparse.Namespace, name: str) -> list[str]:
    """This command for one case."""
    command = [sys.executable, "-m", "bench", "gpu", "--case", name]
    command += ["--device", pick_device(args.device).type, "--out", str(args.out.resolve())]
    chosen = {"--quick": args.quick, "--reference": args.reference, "--dirty": args.dirty}
    return command + [option for option, given in chosen.items() if given]


def log_of(rows: Rows, name: str) -> Path:
    """Where a part's output goes, line by line."""
    return rows.path.with_name(f"gpu-{name.replace(' ', '-')}.log")


def run_part(rows: Rows, name: str, command: list[str], seconds: float) -> str:
    """A process; a row says if it failed, or was stopped, and with what last words."""
    if seconds < LEAST:
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


def run_watched(
    rows: Rows, device: torch.device, seconds: float, name: str, command: list[str]
) -> None:
    """A case under one of `TOOLS`, where that is installed; its report is the part's log."""
    tool, *options = TOOLS[name]
    program = shutil.which(tool)
    if small(device) or program is None:
        why = "no CUDA device" if small(device) else f"no {tool} on PATH"
        rows.add(name, "process", "skipped", None, "", why=why)
        return
    # Every tensor an allocation of its own: what is written behind its end is seen.
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    run_part(rows, name, [*alone, program, *options, *command], seconds)


def stop_session(part: subprocess.Popen[bytes]) -> None:
    """End a process and its children, which would use the GPU beside the next part."""
    try:
        os.killpg(part.pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended, and left none
        return
    part.wait()


def run_tests(rows: Rows, device: torch.device, seconds: float, name: str) -> None:
    """Tests with the mark `gpu`, in several processes, since most of their time is compilation.

    What failed is read off the progress, which is there even where the run was stopped.
    """
    if small(device):
        rows.add(name, "pytest", "skipped", None, "", why="no CUDA device")
        return
    output = run_part(rows, name, pytest_command(TESTS[name]), seconds)
    found = outcomes(output)
    for outcome in ("passed", "failed", "skipped", "error"):
        count = sum(of == outcome for of in found.values())
        rows.add(name, "pytest", outcome, count, "tests")
    whys = dict(re.findall(r"^(?:FAILED|ERROR) (\S+::.*?) - (.*)", output, re.MULTILINE))
    for test, outcome in found.items():
        if outcome in ("failed", "error", "xpass"):
            said = f"{test} - {whys[test]}" if test in whys else test
            rows.add(name, "pytest", f"{outcome} test", None, "", test=said[:300])


def pytest_command(selection: list[str]) -> list[str]:
    """Names each test as it ends: `-vv`, since the project's own options have a `-q`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *selection, "-vv", "-rfE"]
    command += ["--tb=short", "--color=no", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    return command


def outcomes(output: str) -> dict[str, str]:
    """What became of each test, by the lines that pytest or its workers print meanwhile."""
    of_workers = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (.*?) *$", output, re.MULTILINE)
    alone = re.findall(rf"^(\S+::.*?) ({OUTCOMES})\b.*\[ *\d+%\]$", output, re.MULTILINE)
    return {test: outcome.lower() for outcome, test in of_workers} | {
        test: outcome.lower() for test, outcome in alone
    }


def archive(rows: Rows) -> None:
    """Rows and logs as one file, since few may come back from where they were written."""
    found = sorted(p for p in rows.path.parent.glob("gpu*") if p.suffix in (".log", ".jsonl"))
    with tarfile.open(rows.path.with_suffix(".tar.gz"), "w:gz") as tar:
        for path in found:
            tar.add(path, path.name)
