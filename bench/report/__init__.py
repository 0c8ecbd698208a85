"""Tables and plots of stored rows alone; nothing is measured.

Writes report.md and its plots into a folder, and with --readme the tables between the marks of
README.md, from the same rows.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

from ..common import optional
from ..rows import ROOT, Row, provenance, read_rows
from .pages import rewritten
from .plots import PLOTS

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
REPORT = "report.md"


def stored(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file of a folder, by the file's stem.

    Raises:
        SystemExit: there are none.
    """
    found = {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}
    files = {stem: rows for stem, rows in found.items() if rows}
    if not files:
        raise SystemExit(f"{folder} has no rows (*.jsonl); run `python -m bench diag` first")
    return files


def plotted(files: dict[str, list[Row]]) -> dict[str, tuple[str, list[Row]]]:
    """What is drawn: for each plot's file its kind, and the rows that it shows."""
    return {
        f"{stem}_{kind}.png": (kind, chosen)
        for kind, plot in PLOTS.items()
        for stem, rows in files.items()
        if (chosen := plot.rows(rows))
    }


def report(files: dict[str, list[Row]]) -> str:
    """Markdown: the plots, or that there are no rows for one, then the tables of every file."""
    parts = ["# Benchmarks", "Made of the rows beside this page by `python -m bench report`."]
    drawn = plotted(files)
    for kind, plot in PLOTS.items():
        parts += [f"## {plot.title}", plot.about]
        own = {name: rows for name, (of, rows) in drawn.items() if of == kind}
        for name, rows in own.items():
            parts += [f"![{plot.title}, {provenance(rows)}]({name})"]
        if not own:
            parts += [f"**Not drawn: no such rows are stored.** They come from {plot.made_by}."]
    for stem, rows in files.items():
        if stem.endswith("_tuning"):  # a search, which has no table
            continue
        module = importlib.import_module(f"bench.{rows[0]['kernel']}")
        parts.append(re.sub("^#", "##", module.table(rows).strip(), flags=re.MULTILINE))
        parts.append(f"Rows: [{stem}.jsonl]({stem}.jsonl)")
    return "\n\n".join(parts) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench report`."""
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of rows (*.jsonl)")
    parser.add_argument("--out", type=Path, help="folder for the report; that of the rows")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of README.md too")


def run(args: argparse.Namespace) -> int:
    """Write what the rows give."""
    optional("matplotlib")
    files = stored(args.rows)
    out = args.out or args.rows
    out.mkdir(parents=True, exist_ok=True)
    for name, (kind, rows) in optional("tqdm").tqdm(plotted(files).items(), unit="plot"):
        PLOTS[kind].draw(rows, out / name)
    page = out / REPORT
    page.write_text(report(files))
    print(f"report {page}")
    if args.readme:
        README.write_text(rewritten(README.read_text(), files))
        print(f"tables {README}")
    return 0
