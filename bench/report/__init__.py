"""Tables and plots of stored rows alone; nothing is measured.

Writes report.md and plots beside the rows. Of those in bench/results, a folder a machine, it draws
the plots that README.md or docs/ show, and rewrites the tables between the marks of these pages.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from ..measuring.common import new_folder, optional
from ..measuring.rows import ROOT, Row, read_rows, unique
from . import losses, searches, tables, targets, training
from .cells import provenance
from .figures import shows
from .pages import PAGES, pictures, summary, write
from .plots import PLOTS

RESULTS = ROOT / "bench" / "results"
REPORT = "report.md"
# By the name of the benchmark.
TABLES: dict[str, Callable[[list[Row]], str]] = {
    "diag": tables.diag,
    "matrix": tables.matrix,
    "products": tables.products,
    "step": tables.step,
    "distributed": tables.distributed,
    "host": tables.host,
    "gpu": targets.table,
    "train": training.train,
    "sweep": losses.sweep,
    "defaults": training.defaults,
    "search": searches.table,
}


def stored(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file of a folder and of the machines in it, by path without a suffix.

    Raises:
        SystemExit: there are none.
    """
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")])
    found = {path.relative_to(folder).with_suffix("").as_posix(): read_rows(path) for path in paths}
    files = {name: rows for name, rows in found.items() if rows}
    if not files:
        raise SystemExit(f"{folder} has no rows (*.jsonl); run `python -m bench diag` first")
    return files


def plotted(files: dict[str, list[Row]]) -> dict[str, tuple[str, list[Row]]]:
    """What can be drawn: for each plot's file its kind, and the rows that it shows."""
    return {
        f"{name}_{kind}.png": (kind, chosen)
        for kind, plot in PLOTS.items()
        for name, rows in files.items()
        if (chosen := plot.rows(rows))
    }


def report(files: dict[str, list[Row]], drawn: dict[str, tuple[str, list[Row]]]) -> str:
    """Markdown: the plots that are drawn, then the tables of every file."""
    parts = ["# Benchmarks", "Made of the rows beside this page by `python -m bench report`."]
    for name, (kind, rows) in drawn.items():
        plot = PLOTS[kind]
        parts += [f"## {plot.title}", plot.about, f"![{plot.title}, {provenance(rows)}]({name})"]
    before = ""
    for name, rows in files.items():
        machine, _, stem = name.rpartition("/")
        parts += [f"## {machine}"] if machine != before else []
        before = machine
        if stem.endswith("_tuning"):
            parts.append(searched(name, rows))
        else:
            deeper = "###" if machine else "##"
            table = TABLES[rows[0]["benchmark"]](rows)
            parts.append(re.sub("^#", deeper, table, flags=re.MULTILINE))
            parts.append(f"Rows: [{name}.jsonl]({name}.jsonl)")
    return "\n\n".join(parts) + "\n"


def searched(name: str, rows: list[Row]) -> str:
    """A line: a search has no table."""
    dirty = sum("uncommitted" in row["detail"] for row in rows)
    about = f"{dirty} of them of uncommitted code, which no commit repeats; " if dirty else ""
    commits = ", ".join(unique(rows, "commit"))
    return f"Search: [{name}.jsonl]({name}.jsonl), {len(rows)} settings, {about}commit {commits}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench report`."""
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of rows (*.jsonl)")
    parser.add_argument("--out", type=new_folder, help="folder for the report; that of the rows")


def run(args: argparse.Namespace) -> int:
    """Write what the rows give; a plot whose rows have not changed stays as it is."""
    optional("matplotlib")
    files = stored(args.rows)
    out = args.out or args.rows
    drawn = plotted(files)
    if args.rows.resolve() == RESULTS:
        drawn = {name: of for name, of in drawn.items() if name in pictures()}
        for path in PAGES:
            write(path, files)
    for name, (kind, rows) in drawn.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.exists() and shows(path, rows)):
            PLOTS[kind].draw(rows, path)
    page = out / REPORT
    page.write_text(report(files, drawn))
    if table := summary(files):
        print(f"{table}\n")
    print("".join(f"plot   {out / name}\n" for name in drawn) + f"report {page}")
    return 0
