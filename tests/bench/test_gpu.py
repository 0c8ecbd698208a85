"""`python -m bench gpu`: rehearsed on the CPU, where parts fail on purpose."""

from __future__ import annotations

import dataclasses
import re
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from helpers.bench import CPU, needs_extras

from bench import gpu, gpu_cases, matrix
from bench.__main__ import main
from bench.measuring import rows
from bench.optimizers import eigh
from bench.optimizers.peers import limited
from bench.report import targets
from bench.workloads import operator

# What the CPU cannot rehearse.
GPU_ALONE = ("K K^T", "K m", "300, graph", "the same, graph", "RootFreeShampoo: graph")


@needs_extras
def test_the_rehearsal_gives_every_target_a_row(tmp_path, capsys):
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 0
    written = rows.read_rows(tmp_path / "gpu.jsonl")
    for target in targets.TARGETS:
        keys = {"case": target.case, "provider": target.provider, "metric": target.metric}
        found = rows.select(written, **keys)
        assert len(found) == (0 if target.what.startswith(GPU_ALONE) else 1), target
        assert not found or found[0]["unit"].split()[0] in ("ms", "x")
    printed = capsys.readouterr().out
    assert "no CUDA device" in printed
    assert "none of these is a result" in printed
    assert "reached" not in printed
    assert (tmp_path / "gpu.md").read_text() in printed


def collected(tmp_path):
    return rows.Rows(tmp_path / "gpu.jsonl", "gpu", CPU)


@pytest.mark.parametrize(
    ("script", "seconds", "why"),
    [
        ("import sys; print('x'); sys.exit('RuntimeError: out of luck')", 60.0, "out of luck"),
        ("import time; time.sleep(60)", 1.0, "stopped after 1 s"),
        ("import os; os.kill(os.getpid(), 11)", 60.0, "exit status -11"),
    ],
)
def test_a_part_that_fails_is_a_row(tmp_path, script, seconds, why, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    found = collected(tmp_path)
    gpu.run_part(found, "whole steps", [sys.executable, "-c", script], seconds)
    (row,) = rows.read_rows(found.path)
    assert (row["case"], row["metric"], row["value"]) == ("whole steps", "failed", 1)
    assert why in row["detail"]["why"]
    assert why in targets.table([row])


def test_a_part_that_hangs_takes_its_children_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    child = "import time; time.sleep(300)"
    script = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}])"
    script += "; print(c.pid, flush=True); c.wait()"
    printed = gpu.run_part(collected(tmp_path), "limits", [sys.executable, "-c", script], 2.0)
    status = Path(f"/proc/{int(printed)}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


def test_targets_come_last_whatever_fails_before(tmp_path):
    """Whoever sees the end of a long output alone sees them."""
    found = collected(tmp_path)
    for i in range(500):
        found.add("tests", "pytest", "failed test", None, "", test=f"tests/test_a.py::test_{i}")
    shown = targets.table(rows.read_rows(found.path))
    assert "test_19" in shown
    assert "test_20" not in shown
    assert "and 480 more" in shown
    assert all(target.what in shown[-4000:] for target in targets.TARGETS)


def test_the_limits_leave_time_to_start(capsys, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc-dirty")  # nothing is measured
    assert main(["gpu", "--dry-run"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert int(last.split()[0]) == sum(most for most, _ in gpu.LIMITS.values()) <= 540


def test_every_case_is_run():
    assert set(gpu.LIMITS) == {*gpu_cases.CASES, *gpu.TESTS}


def test_a_part_without_time_is_not_started(tmp_path):
    found = collected(tmp_path)
    assert gpu.run_part(found, "limits", ["/no/such/program"], 9.0) == ""
    (row,) = rows.read_rows(found.path)
    assert row["metric"] == "skipped"


def test_failing_tests_are_counted_and_named_also_where_the_run_was_stopped(tmp_path, monkeypatch):
    alone = [
        "tests/test_a.py::test_b[cuda-a case] FAILED             [ 16%]",
        "tests/test_a.py::test_c SKIPPED (needs 40 GB)           [ 20%]",
    ]
    workers = [
        "tests/test_a.py::test_d ",
        "[gw0] [ 33%] PASSED tests/test_a.py::test_d ",
        "[gw1] [100%] ERROR tests/test_a.py::test_e[F16 F32] ",
    ]
    for lines in (
        [*alone, *workers],
        [*alone, *workers, "FAILED tests/test_a.py::test_b[cuda-a case] - assert"],
    ):
        monkeypatch.setattr(gpu, "run_part", lambda *_, lines=lines: "\n".join(lines))
        monkeypatch.setattr(gpu, "small", lambda _: False)
        found = collected(tmp_path)
        gpu.run_tests(found, CPU, 60.0, "tests")
        written = rows.read_rows(found.path)
        counts = {row["metric"]: row["value"] for row in written if row["unit"] == "tests"}
        assert counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
        shown = targets.table(written)
        assert "tests, failed test: tests/test_a.py::test_b[cuda-a case]" in shown
        assert "tests, error test: tests/test_a.py::test_e[F16 F32]" in shown
    assert "test_b[cuda-a case] - assert" in shown


@needs_extras
def test_targets_are_the_end_of_what_a_disaster_prints(tmp_path, monkeypatch, capfd):
    """A case hangs, one dies of a signal, 500 tests fail; the others have their rows."""
    failing = tmp_path / "test_failing.py"
    failing.write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(500))\n"
        "def test_fails(i):\n    assert i < 0, 'x' * 200\n"
    )
    scripts = {"products": "import time; print('compiles', flush=True); time.sleep(300)"}
    scripts["many tensors"] = "import os; os.kill(os.getpid(), 11)"
    scripts["large diagonal"] = "pass"
    real_case, real_tests = gpu.case_command, gpu.pytest_command

    def case_command(args, name):
        script = scripts.get(name)
        return [sys.executable, "-c", script] if script else real_case(args, name)

    def pytest_command(selection):
        if selection is gpu.SMOKE:
            return [sys.executable, "-c", "pass"]
        command = real_tests([str(failing), "-p", "no:cacheprovider"])
        command[command.index("-m", 3) + 1] = ""  # whatever the mark
        return command

    monkeypatch.setattr(gpu, "case_command", case_command)
    monkeypatch.setattr(gpu, "pytest_command", pytest_command)
    monkeypatch.setattr(gpu, "small", lambda _: False)
    monkeypatch.setattr(gpu, "WORKERS", 2)
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    parts = ("smoke", "whole steps", "tests", *scripts)
    limits = {name: (3 if name == "products" else 120, 0.1) for name in gpu.LIMITS if name in parts}
    monkeypatch.setattr(gpu, "LIMITS", limits)
    arguments = ["gpu", "--device", "cpu", "--quick", "--dirty", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    streams = capfd.readouterr()
    end = (streams.err + streams.out)[-12_000:]
    assert all(target.what in end[-4000:] for target in targets.TARGETS)
    assert "products, failed: stopped after 3 s: compiles" in end
    assert "many tensors, failed: exit status -11" in end
    assert "tests, failed test" in end
    assert "more: see the rows" in end
    assert "failed 500 tests" in end
    written = rows.read_rows(tmp_path / "out" / "gpu.jsonl")
    assert rows.select(written, case="114 of 1024", provider=gpu_cases.AVERAGED, metric="time")
    assert "test_failing.py::test_fails[499]" in (tmp_path / "out" / "gpu-tests.log").read_text()
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as tar:
        assert {"gpu.jsonl", "gpu-tests.log", "gpu-products.log"} <= set(tar.getnames())


FAKE_TOOL = """#!/bin/sh
echo "$(basename "$0") $*"
found=0
case "$*" in *racecheck*) found=9 ;; esac
while [ "$1" != "{python}" ]; do shift; done
"$@" && echo "the case ran" && exit $found
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Runs the parts that a program watches, with the programs of these names on PATH alone."""

    def run(*tools):
        (tmp_path / "bin").mkdir()
        for tool in tools:
            path = tmp_path / "bin" / tool
            path.write_text(FAKE_TOOL.format(python=sys.executable))
            path.chmod(0o755)
        monkeypatch.setattr(gpu, "small", lambda _: False)
        monkeypatch.setattr(gpu, "LIMITS", {name: (120, 0.0) for name in gpu.TOOLS})
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        out = tmp_path / "out"
        code = main(["gpu", "--device", "cpu", "--dirty", "--out", str(out)])
        return code, rows.read_rows(out / "gpu.jsonl"), out

    return run


def test_cases_run_under_the_programs_that_watch_them(watched, monkeypatch):
    """An error that one finds is a failure, and its report is a log.

    Each case runs as it is once: that of memcheck here, that of ncu in the next test.
    """
    real = gpu.case_command

    def case_command(args, name):
        return real(args, name) if name == "memcheck" else [sys.executable, "-c", "pass"]

    monkeypatch.setattr(gpu, "case_command", case_command)
    code, written, out = watched("ncu", "compute-sanitizer")
    assert code == 1
    failed = [(row["case"], row["metric"], row["detail"]["why"]) for row in written]
    assert failed == [("racecheck", "failed", "exit status 9: the case ran")]
    logs = {name: (out / f"gpu-{name}.log").read_text() for name in gpu.TOOLS}
    assert all("the case ran" in log for log in logs.values())
    assert logs["ncu"].startswith("ncu --clock-control none --set full")
    assert logs["memcheck"].startswith("compute-sanitizer --tool memcheck")
    with tarfile.open(out / "gpu.tar.gz") as tar:
        assert {f"gpu-{name}.log" for name in gpu.TOOLS} <= set(tar.getnames())


def test_a_program_that_is_not_there_fails_nothing(watched):
    """And the case itself runs under the one that is."""
    code, written, out = watched("ncu")
    assert code == 0
    assert "the case ran" in (out / "gpu-ncu.log").read_text()
    skipped = [(row["case"], row["metric"], row["detail"]["why"]) for row in written]
    why = "no compute-sanitizer on PATH"
    assert skipped == [(name, "skipped", why) for name in ("memcheck", "racecheck")]


def test_launches_have_the_names_that_the_profiler_shows():
    """And the profiler that watches one finds its kernels by theirs."""
    pytest.importorskip("triton")
    launches = pytest.importorskip("bench.machine_code.launches")
    names = {
        kernel.fn.__name__
        for calls in (launches.matrix_calls("large"), launches.shampoo_calls("large"))
        for kernel, _ in calls.values()
    }
    found = {operator.launch_of(name) for name in names}
    own = {"gather", "product", "factor_momenta", "factors", "products", "params"}
    assert found == own | set(launches.SHAMPOO_KERNELS)
    assert operator.launch_of("_stacked_inverses_kernel") == "inverses"
    assert operator.launch_of("nvjet_tst_128x256_64x4") == "product"
    assert operator.launch_of("void at::native::vectorized_elementwise_kernel") is None
    pattern = re.compile(gpu.WATCHED.removeprefix("regex:"))
    of_factors = {"_factor_momenta_kernel", "_factors_kernel"}
    assert {name for name in names if pattern.search(name)} == of_factors
    assert pattern.search("_stacked_factors_kernel")


def off(optimizer, factor=1.1):
    """The optimizer with a step that is too long."""
    optimizer.param_groups[0]["lr"] *= factor
    return optimizer


def test_a_wrong_step_is_red_and_gets_no_time(tmp_path, monkeypatch):
    """Of the matrices, of the many tensors, and of the matrices whose kernels are profiled."""
    ours, tensors = gpu_cases.PEERS[gpu_cases.OURS], gpu_cases.CAPTURABLE
    wrong = dataclasses.replace(ours, build=lambda *args: off(ours.build(*args)))
    monkeypatch.setitem(gpu_cases.PEERS, gpu_cases.OURS, wrong)
    monkeypatch.setattr(
        gpu_cases,
        "CAPTURABLE",
        dataclasses.replace(tensors, build=lambda params: off(tensors.build(params))),
    )
    found = collected(tmp_path)
    for case in (gpu_cases.whole_steps, gpu_cases.many_tensors):
        case(found, CPU, 0.01)
    written = rows.read_rows(found.path)
    for case, provider in (("114 of 1024", gpu_cases.OURS), ("many tensors", "2,000 tensors")):
        (row,) = rows.select(written, case=case, provider=provider)
        assert (row["metric"], row["detail"]["right"]) == ("error", False)
    assert rows.select(written, case="114 of 1024", provider=gpu_cases.EIGH, metric="time")
    shown = targets.table(written)
    assert "| 114 of 1024: a step | **WRONG** | <= 6 ms |  |" in shown
    assert "- many tensors, 300 tensors: **WRONG**, error" in shown


def test_a_step_is_judged_by_the_factors_that_it_should_have(tmp_path):
    found = collected(tmp_path)
    values, grads = ([torch.full((6, 6), v, dtype=torch.bfloat16)] * 2 for v in (0.0, 0.1))
    for limit in (6, 1):
        peer = limited(gpu_cases.OURS, limit)
        assert matrix.checked_step(found, "c", "p", peer, values, grads)
    diagonal = dataclasses.replace(peer, displacement=limited(gpu_cases.OURS, 6).displacement)
    assert matrix.checked_step(found, "c", "p", diagonal, values, grads) is None


def test_a_target_is_reached_from_its_own_side(tmp_path):
    found = collected(tmp_path)
    found.add("a", "p", "time", 5.0, "ms")
    written = [{**row, "device": "NVIDIA H100, sm_90"} for row in rows.read_rows(found.path)]
    at_most, at_least = (targets.Target("t", "a", "p", "time", 6.0, side) for side in (True, False))
    assert targets._line(at_most, written)[-1] == "reached"
    assert targets._line(at_least, written)[-1] == "missed"
    absent = targets.Target("t", "b", "p", "time", 6.0)
    assert targets._line(absent, written)[1] == "not measured"


def test_the_eigendecomposition_shampoo_is_shampoo():
    params = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    twins = [p.clone() for p in params]
    optimizer = eigh.EighShampoo(params, lr=0.1, damping=0.01)
    left = [0.01 * torch.eye(5, dtype=torch.float64) for _ in params]
    right = [0.01 * torch.eye(3, dtype=torch.float64) for _ in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(5, 3, dtype=torch.float64)
        optimizer.step()
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            left[i] += p.grad @ p.grad.T
            right[i] += p.grad.T @ p.grad
            inverses = [torch.linalg.inv(m) for m in (left[i], right[i])]
            decomposed = [torch.linalg.svd(inverse) for inverse in inverses]
            a, b = (u @ torch.diag(s.pow(0.25)) @ vh for u, s, vh in decomposed)
            twin -= 0.1 * a @ p.grad @ b
    for p, twin in zip(params, twins, strict=True):
        assert (p - twin).abs().max() < 1e-9


def test_roots_are_renewed_at_the_interval_alone():
    grad = torch.eye(3, dtype=torch.float64)
    steps = {}
    for interval in (1, 2):
        p = torch.zeros(3, 3, dtype=torch.float64)
        p.grad = grad
        optimizer = eigh.EighShampoo([p], lr=1.0, damping=1.0, interval=interval)
        displacements = []
        for _ in range(3):
            before = p.clone()
            optimizer.step()
            displacements.append((before - p)[0, 0].item())
        steps[interval] = displacements
    renewed = [(1.0 + step) ** -0.5 for step in (1, 2, 3)]
    assert steps[1] == pytest.approx(renewed)
    assert steps[2] == pytest.approx([renewed[0], renewed[0], renewed[2]])


def test_roots_of_a_deficient_matrix_hold_in_float32():
    grad = 3 * torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    displacements = []
    for dtype in (torch.float32, torch.float64):
        p = torch.zeros(256, 16, dtype=dtype)
        p.grad = grad.to(dtype)
        eigh.EighShampoo([p], lr=1.0).step()
        displacements.append(p.double())
    assert (displacements[0] - displacements[1]).norm() < 1e-3 * displacements[1].norm()
