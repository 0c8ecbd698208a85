"""The benchmarks: byte model, percentiles, rows, tables, and that a wrong kernel gets no time."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.bench import CPU, ROOT, needs_extras, row

from bench import diag, host, matrix
from bench.__main__ import SUBCOMMANDS, main, module, parser_of
from bench.measuring import common, rows
from bench.optimizers import diagonal, peers
from bench.report import tables
from rootfree_fused import RootFreeAdamW, RootFreeRMSprop
from rootfree_fused.ops import dispatch

TINY = {"tiny, float32": ([(300,), (), (0,), (2, 3)], torch.float32)}


def stepped(build, *shapes, dtype=torch.float32):
    params = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = build(params)
    optimizer.step()
    return optimizer


# Shapes, timers, byte model -------------------------------------------------------------------


def test_percentiles_interpolate_between_sorted_samples():
    timing = common.summarize([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert timing == common.Timing(median=3.5, p20=2.0, p80=5.0, samples=6)


def test_interleaving_shuffles_every_round_and_drops_the_warm_up():
    calls = []
    runs = {name: partial(calls.append, name) for name in "abc"}

    def timer(run):
        run()
        return float(len(calls))

    times = common.interleave(runs, timer, seconds=0.0, min_rounds=20)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[0] == "abc"
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    positions = [1.0 + i for i, name in enumerate(calls) if name == "a"]
    assert times["a"] == common.summarize(positions[1:])


def test_interleaving_stops_at_the_last_round():
    times = common.interleave({"a": int}, common.time_host, seconds=60.0, max_rounds=7)
    assert times["a"].samples == 7


@pytest.mark.parametrize(
    ("build", "dtype", "expected"),
    [
        (partial(RootFreeRMSprop, batch_size=1, momentum=0.9), torch.float32, 28),
        (partial(RootFreeRMSprop, batch_size=1, momentum=0.0), torch.float32, 20),
        (partial(RootFreeAdamW, batch_size=1), torch.float32, 28),
        (partial(RootFreeRMSprop, batch_size=1, momentum=0.9), torch.bfloat16, 22),
        (partial(RootFreeRMSprop, batch_size=1, momentum=0.0), torch.bfloat16, 14),
        (partial(RootFreeAdamW, batch_size=1), torch.bfloat16, 22),
        (partial(torch.optim.AdamW, fused=True), torch.float32, 28),
        (partial(torch.optim.AdamW, fused=True), torch.bfloat16, 14),  # bfloat16 state
        (partial(torch.optim.RMSprop, momentum=0.9), torch.float32, 28),
        (partial(torch.optim.SGD, momentum=0.9), torch.float32, 20),
    ],
)
def test_step_bytes_against_hand_counts(build, dtype, expected):
    optimizer = stepped(build, (7, 11), (), (5,), dtype=dtype)
    assert common.step_bytes(optimizer) == expected * (77 + 1 + 5)


# Error ----------------------------------------------------------------------------------------


def entry(*values, dtype=torch.float32):
    return {"param": torch.tensor(values, dtype=dtype)}


def test_error_ratio_is_in_units_of_the_eager_error():
    truth = entry(1.0, 2.0, dtype=torch.float64)
    assert common.error_ratio([(entry(1.0, 2.5), entry(1.25, 2.0), truth)]) == 2.0


def test_error_ratio_takes_the_worst_over_all_chunks_and_floors_the_eager_error():
    truth = entry(1.0, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    off = entry(1.0 + 4 * eps)
    assert common.error_ratio([(off, entry(1.0), truth)]) == pytest.approx(4.0)
    chunks = [(off, entry(1.0), truth), (entry(1.0), entry(1.0 + 2 * eps), truth)]
    assert common.error_ratio(chunks) == pytest.approx(2.0)


def test_an_unwritten_element_is_never_right():
    truth = entry(1.0, dtype=torch.float64)
    ratio = common.error_ratio([(entry(float("nan")), entry(1.0), truth)])
    assert not ratio <= diagonal.ALLOWED_ERROR


@pytest.mark.parametrize("name", diagonal.PROVIDERS)
def test_providers_are_right_in_float32(name):
    params = common.random_tensors(
        [(300,), (2, 3)], scale=0.1, dtype=torch.float32, device=CPU, seed=0
    )
    grads = common.random_tensors(
        [(300,), (2, 3)], scale=0.1, dtype=torch.float32, device=CPU, seed=1
    )
    provider = diagonal.PROVIDERS[name]
    optimizer = diag.built(provider, params, grads)
    assert diag.check(provider, optimizer, params, grads) <= diagonal.ALLOWED_ERROR


# Rows -----------------------------------------------------------------------------------------


def test_a_row_is_in_the_file_at_once_and_has_every_key(tmp_path):
    written = rows.Rows(tmp_path / "sub" / "rows.jsonl", "diag", CPU)
    written.add("case", "provider", "time", 1.23456789, "ms", samples=3)
    written.add("case", "provider", "time", float("nan"), "ms")
    first, second = rows.read_rows(written.path)
    assert tuple(first) == rows.ROW_KEYS
    assert first["value"] == 1.2346
    assert first["detail"] == {"samples": 3}
    assert first["versions"].keys() == {"torch", "rootfree_fused", "python"}
    assert "thread" in first["device"]
    assert second["value"] is None
    assert str(ROOT) not in written.path.read_text()


def test_rows_of_uncommitted_code_are_refused_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc-dirty")
    monkeypatch.setattr(diag, "cases", lambda *_: TINY)
    command = ["diag", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"Commit first \(or pass --dirty"):
        main(command)
    assert not list(tmp_path.iterdir())
    assert main([*command, "--dirty"]) == 0
    written = rows.read_rows(tmp_path / "diag.jsonl")
    assert {(r["commit"], r["detail"]["uncommitted"]) for r in written} == {("abc-dirty", True)}


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_that_measures_can_refuse(name):
    """Those without a device compile or read; `host` and all others time what is installed."""
    parser = argparse.ArgumentParser()
    module(name).add_arguments(parser)
    asks = {"--reference", "--dirty", "--device"} & {*parser._option_string_actions}
    assert len(asks) == (0 if name in ("sass", "report", "layouts") else 3)


def test_commit_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    assert rows.commit() == "unknown"


# Tables ---------------------------------------------------------------------------------------


def test_diag_table_shows_time_band_bandwidth_and_error():
    text = tables.diag(
        [
            row("A", "error", 0.5, right=True),
            row("A", "time", 2.0, p20=1.9, p80=2.25),
            row("A", "bandwidth", 55.55, bytes_per_parameter=28.0),
            row("A", "bandwidth fraction", 0.914),
            row("A", "host time", 0.0123, p20=0.012, p80=0.013),
            row("B", "error", 141.0, right=False),
            row("C", "error", None, right=False),
        ]
    )
    assert "a CPU; torch 2; commit abc" in text
    assert "| A | 2 (1.9 to 2.25) | 28 | 55.5 | 91% | 0.012 | 0.50 |" in text
    assert "| B | **WRONG** |  |  |  |  | **141.00** |" in text
    assert "| C | **WRONG** |  |  |  |  | **not finite** |" in text


# Subcommands ----------------------------------------------------------------------------------


def test_the_command_alone_lists_its_subcommands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)


@pytest.mark.parametrize("command", ["diag", "search", "train", "report"])
@pytest.mark.parametrize("below", ["", "/folder"])
def test_a_file_where_a_folder_is_to_be_is_refused(command, below, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit):
        main([command, "--out", f"{file}{below}"])
    assert f"{file} is a file; pass a folder" in capsys.readouterr().err


def test_the_help_names_defaults_cases_and_where_it_runs(capsys):
    shown = {}
    for name in ("diag", "sweep"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown[name] = " ".join(capsys.readouterr().out.split())
    assert "each of the 17 cases (default: 4.0)" in shown["diag"]
    assert len([*diag.cases(CPU, False), diag.FEWER_BYTES, diag.MICRO_BATCHES]) == 17
    assert "(default: None)" not in shown["diag"]
    assert "search again where the best of a search is stored" in shown["sweep"]
    main([])
    assert "pip install --no-build-isolation -e" in capsys.readouterr().out


def test_make_bench_takes_a_part_of_the_cases(tmp_path, monkeypatch):
    assert set(matrix.SHORT) < set(matrix.CASES)
    every = {quick: list(diag.cases(CPU, quick)) for quick in (False, True)}
    parts = {quick: [c for c in cases if c.endswith(diag.SHORT)] for quick, cases in every.items()}
    assert parts[False] == ["ResNet-50, float32", "1,000 tensors of 1,000, float32"]
    assert len(parts[True]) == 2
    tiny = TINY["tiny, float32"]
    monkeypatch.setattr(diag, "cases", lambda _, quick: dict.fromkeys(every[quick], tiny))
    command = ["diag", "--short", "--seconds", "0", "--device", "cpu", "--out", str(tmp_path)]
    for quick, options in ((False, []), (True, ["--quick"])):
        assert main([*command, *options]) == 0
        assert rows.unique(rows.read_rows(tmp_path / "diag.jsonl"), "case") == parts[quick]


def test_the_commands_of_the_makefile_are_understood():
    lines = (ROOT / "Makefile").read_text().splitlines()
    commands = [line.partition("-m bench ")[2] for line in lines if "-m bench " in line]
    assert len(commands) == 8
    for command in commands:
        words = command.replace("$(FLAGS)", "--dirty" * ("report" not in command)).split()
        assert parser_of(words).parse_args(words).subcommand == words[0]


def test_the_reference_is_not_timed_unless_asked(tmp_path, monkeypatch):
    """Sources that hide the build, an installation without a compiler: rows would be of torch."""
    missing = {"cpu": "reference: No module named 'rootfree_fused._C'", "cuda": "Triton 3.6.0"}
    monkeypatch.setattr(common.ops, "backends", lambda: missing)
    monkeypatch.setattr(diag, "cases", lambda *_: TINY)
    command = ["diag", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"_C.*pip install --no-build-isolation -e \. .*--refer"):
        main(command)
    assert not list(tmp_path.iterdir())
    common.require_kernels(torch.device("cuda"), reference=False)
    with pytest.raises(SystemExit, match="no kernels for this device"):
        common.require_kernels(torch.device("mps"), reference=False)
    assert main([*command, "--reference"]) == 0


@needs_extras
@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "tqdm", "pytorch_optimizer"])
def test_a_missing_package_is_named_with_its_cure(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.*pip install rootfree-fused\[bench\]"):
        main(["train", "--quick", "--out", str(tmp_path)])


@needs_extras
def test_diag_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diag, "cases", lambda *_: TINY)
    assert main(["diag", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    written = rows.read_rows(tmp_path / "diag.jsonl")
    in_formats = rows.select(written, case=diag.FEWER_BYTES)
    assert len(rows.select(in_formats, metric="time")) == 2 + len(
        rows.select(in_formats, metric="error")
    )
    assert all(row["detail"]["right"] for row in rows.select(in_formats, metric="error"))
    sums = rows.select(written, case=diag.MICRO_BATCHES)
    assert len(rows.select(sums, metric="time")) == 5 + len(rows.select(sums, metric="error")) == 13
    assert all(row["detail"]["right"] for row in rows.select(sums, metric="error"))
    of_tiny = rows.select(written, case="tiny, float32")
    assert set(rows.unique(of_tiny, "provider")) == {*common.PROBE_BYTES, *diagonal.PROVIDERS}
    timed = rows.select(of_tiny, metric="time")
    assert len(timed) == len(diagonal.PROVIDERS) + len(common.PROBE_BYTES)
    assert (tmp_path / "diag.md").read_text() == tables.diag(written) + "\n"
    assert f"table  {tmp_path / 'diag.md'}\n" in capsys.readouterr().out


@needs_extras
def test_a_wrong_kernel_is_marked_and_gets_no_time(tmp_path, monkeypatch):
    right = diagonal.PROVIDERS["RootFreeAdamW"]
    wrong = diagonal.Provider(partial(right.build, damping=2e-4), right.eager)
    monkeypatch.setattr(diag, "cases", lambda *_: TINY)
    monkeypatch.setattr(diag, "PROVIDERS", {"RootFreeAdamW": right, "RootFreeAdamW, off": wrong})
    assert main(["diag", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    of_wrong = rows.select(rows.read_rows(tmp_path / "diag.jsonl"), provider="RootFreeAdamW, off")
    assert [r["metric"] for r in of_wrong] == ["error"]
    assert of_wrong[0]["detail"] == {"right": False}
    assert "| RootFreeAdamW, off | **WRONG** |" in (tmp_path / "diag.md").read_text()


@needs_extras
def test_an_interruption_keeps_the_rows_so_far(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diag, "cases", lambda *_: TINY)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diag, "interleave", interrupt)
    assert main(["diag", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert len(rows.read_rows(tmp_path / "diag.jsonl")) == len(diagonal.PROVIDERS)
    assert str(tmp_path) in capsys.readouterr().out


# Matrices


def test_flops_of_an_update_step_by_hand():
    # T, H, V, P: 2 m n m or 2 m n n each; M M^T, M^T M at half: m m n + n n m;
    # K^T K and K K^T at half: 2 n^3 together a side; K m: 2 n^3 a side.
    m, n = 3, 5
    products = 2 * (2 * m * m * n + 2 * m * n * n)
    symmetric = m * m * n + n * n * m + 2 * (m**3 + n**3)
    assert matrix.step_flops([(m, n)]) == products + symmetric + 2 * (m**3 + n**3)
    assert matrix.step_flops([(7, 7)] * 2) == 2 * 18 * 7**3


@needs_extras
def test_matrix_end_to_end(tmp_path, monkeypatch):
    right = peers.PEERS["IFShampoo, float32"]

    def off(params, interval):
        optimizer = right.build(params, interval)
        optimizer.param_groups[0]["lr"] *= 1.1
        return optimizer

    chosen = {name: peers.PEERS[name] for name in ("IFShampoo, float32", peers.EIGH)}
    gone = peers.Peer(off, "no_such_package")
    wrong = {"IFShampoo, off": replace(right, build=off), "gone": gone}
    monkeypatch.setattr(matrix, "PEERS", chosen | wrong)
    monkeypatch.setattr(matrix, "CASES", {str(i): [(6, 4), (3, 3)] for i in range(4)})
    assert main(["matrix", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    written = rows.read_rows(tmp_path / "matrix.jsonl")
    report = (tmp_path / "matrix.md").read_text()
    assert report == tables.matrix(written) + "\n"
    assert "| IFShampoo, off | **WRONG** |" in report
    timed = rows.unique(rows.select(written, metric="time"), "provider")
    assert timed == ["IFShampoo, float32", peers.EIGH]
    assert "| gone | absent |" in report
    some = ["--out", str(tmp_path / "some"), "--optimizers", "IFShampoo, float32"]
    assert main(["matrix", "--quick", "--device", "cpu", *some]) == 0
    written = rows.read_rows(tmp_path / "some" / "matrix.jsonl")
    assert rows.unique(written, "provider") == ["IFShampoo, float32"]


# Host time


def test_host_end_to_end(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    for named in (host, tables):
        monkeypatch.setattr(named, "HOST_GOALS", {3: 100.0, 40: 1.0})
    before = triton.runtime.driver._active, dispatch.triton_serves
    assert main(["host", "--quick", "--out", str(tmp_path)]) == 0
    assert (triton.runtime.driver._active, dispatch.triton_serves) == before
    written = rows.read_rows(tmp_path / "host.jsonl")
    assert len(written) == 2 * len(host.OPTIMIZERS) * 4
    assert all(r["unit"] == "ms" and r["value"] > 0 for r in written)
    assert (tmp_path / "host.md").read_text() == tables.host(written) + "\n"


def test_a_stubbed_step_launches_once_and_moves_nothing(monkeypatch):
    pytest.importorskip("triton")
    from rootfree_fused.kernels import diag as kernels

    launched = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *args, **named: launched.append(1) or launch(*args, **named)
    )
    with host.one_rank(), host.stubbed():
        steps = host.steps(3)
        step = steps["RootFreeRMSprop", host.KNOWN]
        params = step.__self__.param_groups[0]["params"]
        before = [p.detach().clone() for p in params]
        step()
        step()
    assert launched == [1, 1]
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
