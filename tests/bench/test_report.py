"""`python -m bench report`: README and the stored report say what the stored rows give."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.bench import RESULTS, needs_extras, row
from torch.utils._python_dispatch import TorchDispatchMode

from bench import report
from bench.__main__ import main
from bench.optimizers import diagonal
from bench.report import cells, figures, pages, plots

TEXTS = {path.name: path.read_text() for path in pages.PAGES}


@pytest.fixture(scope="module")
def files():
    return report.stored(RESULTS)


# What is stored -------------------------------------------------------------------------------


def test_the_tables_of_the_pages_are_those_of_the_stored_rows(files):
    for name, text in TEXTS.items():
        assert pages.rewritten(text, files) == text, name
    marks = [found[1] for text in TEXTS.values() for found in pages.MARKS.findall(text)]
    assert set(marks) == set(pages.TABLES)
    assert pages.MARKS.findall(TEXTS["README.md"])


@pytest.mark.parametrize("name", pages.TABLES)
def test_a_row_that_changes_changes_its_table(name, files):
    changed = copy.deepcopy(files)
    for other in (other for of in changed.values() for other in of if other["value"]):
        other["value"] *= 1.1 if other["provider"].startswith("IFShampoo") else 1.2
    assert pages.TABLES[name](changed) != pages.TABLES[name](files)


def test_the_headline_divides_the_times_of_the_rows(files):
    """By hand, from the bytes of the rows: a step of 114 matrices beside eigendecompositions."""
    rows = map(json.loads, (RESULTS / "h200" / "gpu.jsonl").read_text().splitlines())
    ms = {
        row["provider"]: row["value"]
        for row in rows
        if (row["case"], row["metric"]) == (pages.MATRICES, "time")
    }
    ratio = ms["Shampoo by batched eigh"] / ms["IFShampoo, bfloat16"]
    first = pages.headline(files).splitlines()[2]
    own, other = f"{ms['IFShampoo, bfloat16']:.3g}", f"{ms['Shampoo by batched eigh']:.0f}"
    assert first.endswith(f"| {own} | {other} | **{ratio:.3g}** |")


def test_marks_and_commits_stand_once(files):
    for table in pages.TABLES.values():
        text = table(files)
        assert text.count(cells.NOISE_NOTE) == (cells.NOISY in text.replace(cells.NOISE_NOTE, ""))
    assert pages._measured(files["xeon-amx/diag"], files["xeon-amx/step"]).count("0dafea6") == 1


def test_the_stored_report_and_plots_are_those_of_the_stored_rows(files):
    drawn = {name: of for name, of in report.plotted(files).items() if name in pages.pictures()}
    assert (RESULTS / report.REPORT).read_text() == report.report(files, drawn)
    found = {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.png")}
    assert found == set(drawn) == pages.pictures()
    for name, (_, shown) in drawn.items():
        assert figures.shows(RESULTS / name, shown), name


def test_rows_of_uncommitted_code_say_so(files):
    for name, rows in files.items():
        for stored in rows:
            assert stored["detail"].get("uncommitted", False) == ("dirty" in stored["commit"])
        if any("dirty" in stored["commit"] for stored in rows):
            assert "of uncommitted code, which no commit repeats" in report.searched(name, rows)


def test_a_mark_without_rows_or_of_an_unknown_name_is_refused(files):
    page = "<!-- bench:diag -->\n<!-- /bench -->"
    with pytest.raises(SystemExit, match=r"bench:diag needs the rows 'epyc/diag'.jsonl"):
        pages.rewritten(page, {})
    with pytest.raises(SystemExit, match=r"a page has a mark bench:dig;.*headline, .*diag"):
        pages.rewritten(page.replace("diag", "dig"), files)


def test_a_wrong_and_an_unmeasured_step_have_no_time_in_a_page():
    case = pages.DIAG_CASES[0]
    found = [row("A", "error", 9.0, case=case, right=False), row("B", "absent", None, case=case)]
    shown = pages.diag({"epyc/diag": found})
    others = " not measured |" * 4
    assert f"| A | WRONG |{others}" in shown
    assert f"| B | not measured |{others}" in shown


# Models ---------------------------------------------------------------------------------------


class CountFlops(TorchDispatchMode):
    """FLOPs of elementwise operations of a size; a root or division is one, a limit none."""

    FLOPS = {"lerp_": 3, "addcmul_": 2, "addcdiv_": 2}  # noqa: RUF012
    NONE = (
        "clamp",
        "clamp_max",
        "isinf",
        "where",
        "copy_",
        "clone",
        "detach",
        "ones_like",
        "zeros_like",
        "full_like",
        "_to_copy",
    )

    def __init__(self, size):
        super().__init__()
        self.size, self.total = size, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.numel() == self.size and name not in self.NONE:
            scaled = kwargs.get("value", 1) != 1 or kwargs.get("alpha", 1) != 1
            self.total += self.FLOPS.get(name, 1) + scaled
        return operator(*args, **kwargs)


def test_a_peer_has_a_colour_of_its_own_in_a_plot():
    """A variant of a peer, "sirfshampoo, float32", has its colour and is hollow."""
    known = [look[0] for look in figures.STYLES.values()]
    assert len(set(known)) == len(known)
    names = ["a new peer", *list(figures.STYLES)[:4], "another", "sirfshampoo, bfloat16"]
    looks = figures.styles([*names, "sirfshampoo, float32"])
    colours = [looks[name]["color"] for name in names]
    assert len(set(colours)) == len(colours)
    first, second = (looks[f"sirfshampoo, {dtype}"] for dtype in ("bfloat16", "float32"))
    assert first["color"] == second["color"]
    assert [first["fillstyle"], second["fillstyle"]] == ["full", "none"]


def test_points_that_lie_together_have_one_line_of_names():
    rows = [
        row("RootFreeAdamW", "bandwidth", value, case=case, bytes_per_parameter=15)
        for case, value in (("large", 30.0), ("small", 2.0), ("larger, float32", 40.0))
    ]
    found = plots.clusters_of(rows)
    assert [names for _, names in found] == [["small"], ["large", "larger"]]
    assert found[1][0] == pytest.approx((30 * 40) ** 0.5)


@pytest.mark.parametrize("name", plots.DIAGONAL_FLOPS)
def test_flops_of_a_diagonal_update_against_a_count(name, monkeypatch):
    counts = []
    for steps in (2, 3):
        monkeypatch.setattr(diagonal, "CHECK_STEPS", steps)
        with CountFlops(7) as counter:
            diagonal.PROVIDERS[name].eager(torch.full((7,), 0.1), torch.full((7,), 0.1))
        counts.append(counter.total)
    guard = 8 if name == "RootFreeAdamW" else 0  # of g - m beyond the largest number: no update
    assert counts[1] - counts[0] - guard == plots.DIAGONAL_FLOPS[name]


# Plots ----------------------------------------------------------------------------------------


def test_a_point_of_the_roofline_has_the_intensity_of_its_row():
    rate = {**row("gram", "rate", 1.5, flops=600.0, bytes=20.0), "unit": "TFLOP/s"}
    assert (plots.intensity(rate), plots.achieved(rate)) == (30.0, 1500.0)
    update = row("RootFreeRMSprop, momentum 0.9", "bandwidth", 56.0, bytes_per_parameter=26.0)
    assert (plots.intensity(update), plots.achieved(update)) == (0.5, 28.0)
    assert plots.intensity(row("gram", "rate", 1.5, flops=600.0)) is None
    copy_ = row("copy", "bandwidth", 40.0, bytes_per_parameter=16)
    assert plots.roofline_rows([update]) == []
    assert plots.roofline_rows([copy_]) == []
    assert plots.roofline_rows([copy_, update]) == [copy_, update]
    large = row("copy", "bandwidth", 30.0, case="large", bytes_per_parameter=16)
    disturbed = row("copy", "bandwidth", 20.0, case="disturbed", bytes_per_parameter=16)
    times = [
        row("copy", "time", 1.0),  # in a cache
        row("copy", "time", 15.0, case="large"),
        row("copy", "time", 20.0, case="disturbed"),
    ]
    found = plots.roofline_rows([copy_, large, disturbed, *times, update])
    assert found == [large, update]


def made_up():
    """Rows that every plot but the curves has something of."""
    sizes = {"flops": 64, "bytes": 8, "p20": 1, "p80": 1}
    kinds = {"time": "ms", "gram rate": "GFLOP/s"}
    found = [
        {**row("copy", "bandwidth", 40.0), "unit": "GB/s"},
        {**row("mm, bfloat16", "rate", 100.0), "unit": "GFLOP/s"},
        *(
            {**row(name, metric, 3.0, case=case, **sizes), "unit": unit}
            for name in (plots.OURS, "sirfshampoo, bfloat16", "some new peer")
            for metric, unit in kinds.items()
            for case in ("1 of 8", "4 of 8")
        ),
    ]
    return [{**each, "benchmark": "matrix"} for each in found]


@needs_extras
def test_the_report_of_a_folder_draws_what_has_rows(tmp_path, monkeypatch):
    (tmp_path / "matrix.jsonl").write_text("\n".join(map(json.dumps, made_up())))
    monkeypatch.setitem(report.TABLES, "matrix", lambda _: "# Made up\n\n## Case\n\ntable")
    assert main(["report", "--rows", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    kinds = ["roofline", "steps"]
    for kind in kinds:
        plot = tmp_path / f"matrix_{kind}.png"
        assert figures.shows(plot, plots.PLOTS[kind].rows(made_up()))
        assert f"a CPU; torch 2; commit abc](matrix_{kind}.png)" in page
    assert set(plots.PLOTS) - set(kinds) == {
        "loss",
        "basin",
        "generalization",
        "memory",
        "worlds",
        "search",
    }
    assert "## Made up\n\n### Case\n\ntable" in page


@needs_extras
def test_a_plot_is_drawn_again_only_where_its_rows_changed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "matrix.jsonl"
    monkeypatch.setitem(report.TABLES, "matrix", lambda _: "# Made up")
    drawn = []
    steps = plots.PLOTS["steps"]
    counted = steps._replace(draw=lambda *args: drawn.append(steps.draw(*args)))
    monkeypatch.setattr(report, "PLOTS", {"steps": counted})
    for value, count in ((3.0, 1), (3.0, 1), (4.0, 2)):
        rows = [{**of, "value": value} for of in made_up()]
        path.write_text("\n".join(map(json.dumps, rows)))
        assert main(["report", "--rows", str(tmp_path)]) == 0
        assert len(drawn) == count
    shown = capsys.readouterr().out
    assert (
        "| `IFShampoo` against sirfshampoo (the same mathematics) | **1.0** | 1 to 1 | 2 |" in shown
    )
    assert f"plot   {tmp_path / 'matrix_steps.png'}\n" in shown


@needs_extras
def test_a_plot_does_not_pass_for_one_of_other_rows(tmp_path):
    shown = plots.steps_rows(made_up())
    plots.steps(shown, tmp_path / "steps.png")
    assert figures.shows(tmp_path / "steps.png", shown)
    assert not figures.shows(tmp_path / "steps.png", [{**shown[0], "value": 3.1}, *shown[1:]])


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no rows .*python -m bench diag"):
        report.stored(tmp_path)
