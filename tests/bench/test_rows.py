"""Rows: what an interrupted run keeps, what a table may mix, and the mark of a busy machine."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.bench import CPU, needs_extras, row

from bench import diag
from bench.__main__ import main
from bench.measuring import common, rows
from bench.report import cells, tables

DIRTY = {"options": ("--quick", "--dirty")}
CASES = {name: ([(7,)], torch.float32) for name in ("first", "second", "third")}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`bench diag` at a commit on CASES; interrupted in the case that is named, after its errors.

    Returns the exit status and the cases that were measured.
    """
    monkeypatch.setattr(diag, "cases", lambda *_: CASES)

    def run(at=None, commit="abc", options=("--quick",)):
        measured = []

        def measure(case, *args, measure):
            measured.append(case)
            if case == at:
                monkeypatch.setattr(diag, "interleave", interrupt)
            measure(case, *args)

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(rows, "commit", lambda: commit)
            patch.setattr(diag, "measure", partial(measure, measure=diag.measure))
            status = main(["diag", "--device", "cpu", "--out", str(tmp_path), *options])
        monkeypatch.setattr(diag, "interleave", common.interleave)
        return status, measured

    return run


@needs_extras
def test_an_interrupted_run_goes_on_after_its_last_whole_case(tmp_path, run, capsys):
    assert run(at="second") == (130, ["first", "second"])
    before = rows.read_rows(tmp_path / "diag.jsonl")
    assert rows.unique(before, "case") == ["first", "second"]
    assert "the same command" in capsys.readouterr().out

    assert run() == (0, ["second", "third"])
    after = rows.read_rows(tmp_path / "diag.jsonl")
    counts = [len(rows.select(after, case=case)) for case in CASES]
    assert counts == [len(rows.select(before, case="first"))] * 3
    assert after[: counts[0]] == before[: counts[0]]
    assert "keeps of an interrupted run: first\n" in capsys.readouterr().out

    assert run() == (0, list(CASES))  # a run that ended is not kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diag.jsonl", "diag.md"]


@needs_extras
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"commit": "def"}),
        ({"commit": "abc-dirty"} | DIRTY, {"commit": "abc-dirty"} | DIRTY),
        ({"commit": "unknown"}, {"commit": "unknown"}),
        ({}, {"options": ("--quick", "--seconds", "9")}),
    ],
    ids=["another commit", "uncommitted code", "no git", "other arguments"],
)
def test_rows_of_other_code_or_arguments_are_measured_again(tmp_path, run, first, then):
    assert run(at="second", **first) == (130, ["first", "second"])
    assert run(**then) == (0, list(CASES))
    commits = rows.unique(rows.read_rows(tmp_path / "diag.jsonl"), "commit")
    assert commits == [then.get("commit", "abc")]


def test_a_time_with_a_wide_band_is_marked_and_explained_under_its_table():
    def table(p80, samples=3):
        return tables.diag(
            [
                row("A", "error", 0.5, right=True),
                row("A", "time", 10.0, p20=9.0, p80=p80, samples=samples),
                row("A", "bandwidth", 1.0, bytes_per_parameter=28.0),
                row("A", "bandwidth fraction", 0.5),
            ]
        )

    assert "| A | 10 (9 to 11) |" in table(11.0)
    assert cells.NOISY not in table(11.0)
    assert "| A | 10 (9 to 11)ⁿ |" in table(11.0, samples=2)
    assert "| A | 10 (9 to 11.1)ⁿ |" in table(11.1)
    assert table(11.1).rstrip().endswith(cells.NOISE_NOTE)
    assert "more than 20% of the median" in cells.NOISE_NOTE


def test_rows_of_different_runs_do_not_stand_in_one_table():
    other = {**row("B", "time", 1.0), "commit": "def"}
    with pytest.raises(ValueError, match=r"different runs: a CPU.*commit abc; and .*commit def"):
        cells.provenance([row("A", "time", 1.0), other])
    lost = [{**own, "benchmark": "sweep"} for own in (row("A", "time", 1.0), other)]
    assert cells.provenance(lost).endswith("; commit abc, def")
    elsewhere = {**lost[1], "device": "another CPU"}
    with pytest.raises(ValueError, match="different runs: a CPU"):
        cells.provenance([*lost, elsewhere])


# Damaged files


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda line: line[:-20], "Unterminated string"),
        (lambda _: b"", "Expecting value"),
        (
            lambda _: b'{"kernel": "diag"}',
            r"it has keys \['kernel'\], not the keys benchmark",
        ),
        (lambda _: b"[1]", "it is a list, not the keys"),
        (lambda line: b"\xff" + line, "codec can't decode"),
    ],
    ids=["cut short", "empty", "other keys", "a list", "no text"],
)
def test_a_line_that_is_no_row_is_named_with_its_cure(tmp_path, damage, fault, monkeypatch):
    """In a report, and where a run goes on with its file."""
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    written = rows.Rows(tmp_path / "train_text.jsonl", "train", CPU)
    for value in (1.0, 2.0, 3.0):
        written.add("case", "provider", "loss", value, "nat")
    first, second, third = written.path.read_bytes().splitlines()
    written.path.write_bytes(b"\n".join([first, damage(second), third]) + b"\n")
    words = rf"train_text\.jsonl line 2 is no row: .*{fault}.*Remove the line"
    with pytest.raises(SystemExit, match=words):
        main(["report", "--rows", str(tmp_path)])
    with pytest.raises(SystemExit, match=words):
        written.refuse_others()


@needs_extras
def test_a_damaged_note_of_an_interrupted_run_is_named_with_its_cure(tmp_path, run):
    assert run(at="second") == (130, ["first", "second"])
    note = tmp_path / "diag.unfinished.json"
    note.write_text(note.read_text()[:-10])
    before = (tmp_path / "diag.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"diag\.unfinished\.json is damaged .*; remove it, and"):
        run()
    assert (tmp_path / "diag.jsonl").read_bytes() == before
    note.unlink()
    assert run() == (0, list(CASES))
