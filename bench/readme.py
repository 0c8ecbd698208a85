"""The tables of README.md, each between `<!-- bench:NAME -->` and `<!-- /bench -->`, from rows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable

from .curves import loss, reached, step_time
from .diag import PROBE_BYTES
from .rows import Row, markdown, provenance, select, timed, unique

Files = dict[str, list[Row]]

MARKS = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
OURS = "IFShampoo, bfloat16"


def rewritten(page: str, files: Files) -> str:
    """The page with every marked table made anew.

    Raises:
        SystemExit: a mark of an unknown name, or a table whose rows are not stored.
    """

    def table(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in TABLES:
            raise SystemExit(f"README has a mark bench:{name}; there are only {', '.join(TABLES)}")
        try:
            return f"{start}{TABLES[name](files)}\n{end}"
        except KeyError as missing:
            raise SystemExit(f"the table bench:{name} needs the rows {missing}.jsonl") from missing

    return MARKS.sub(table, page)


def _measured(*runs: list[Row]) -> str:
    """Where the numbers of a table come from, in small print; a machine's runs on one line."""
    commits: dict[str, list[str]] = {}
    for rows in runs:
        machine, _, commit = provenance(rows).partition("; commit ")
        commits.setdefault(machine, []).append(commit)
    lines = (f"{machine}; commit {', '.join(of)}" for machine, of in commits.items())
    return f"<sub>{'<br>'.join(lines)}</sub>"


def _times(rows: list[Row], provider: str) -> dict[str, Row]:
    """The row of a provider's time, by case."""
    return {row["case"]: row for row in select(rows, provider=provider, metric="time")}


def _speed_ups(rows: list[Row], ours: str, other: str) -> list[float]:
    """How many times as long the other takes, in every case that has both."""
    mine, others = _times(rows, ours), _times(rows, other)
    return [others[case]["value"] / row["value"] for case, row in mine.items() if case in others]


# Tables ---------------------------------------------------------------------------------------


def headline(files: Files) -> str:
    """Ratios of times, the smallest and the largest over the cases of the same run."""
    compared = [
        ("diag", "RootFreeRMSprop, momentum 0.9", "torch RMSprop, momentum 0.9"),
        ("diag", "RootFreeAdamW", "torch AdamW, fused"),
        *(
            (stem, OURS, other)
            for other in (
                "sirfshampoo, bfloat16",
                "SOAP, float32",
                "Shampoo, float32",
                "Shampoo by batched eigh",
            )
            for stem in ("matrix", "matrix_amx")
        ),
    ]
    lines = []
    for stem, ours, other in compared:
        ratios = _speed_ups(files[stem], ours, other)
        if ratios:
            middle = statistics.geometric_mean(ratios)
            span = f"{min(ratios):.2g} to {max(ratios):.2g}"
            device = files[stem][0]["device"]
            amx = ", AMX" if "(amx)" in files[stem][0]["versions"]["rootfree_fused"] else ""
            lines.append([ours, other, f"**{middle:.1f}**", span, f"{device}{amx}"])
    header = ("a step of", "instead of", "times as fast, mean", "least to most", "on")
    runs = [files[stem] for stem in ("diag", "matrix", "matrix_amx")]
    return f"{markdown(header, lines)}\n\n{_measured(*runs)}"


def diag(files: Files) -> str:
    """Milliseconds of a step in every case."""
    rows = files["diag"]
    cases = unique(rows, "case")
    names = [name for name in unique(rows, "provider") if name not in PROBE_BYTES]
    of = {name: _times(rows, name) for name in names}
    lines = [
        [name, *(timed(times[case], band=False) if case in times else "WRONG" for case in cases)]
        for name, times in of.items()
    ]
    return f"{markdown(('ms a step', *cases), lines)}\n\n{_measured(rows)}"


def text(files: Files) -> str:
    """The transformer's losses, and when each optimizer is where torch's AdamW ends."""
    rows = files["train_text"]
    adamw = select(rows, provider="torch AdamW", metric="test loss")
    goal = statistics.mean(row["detail"]["curve"][-1] for row in adamw)
    lines = []
    for name in unique(rows, "provider"):
        own = select(rows, provider=name)
        when = reached(own, goal)
        state = f"{select(own, metric='state')[0]['value']:.3g}"
        lines.append(
            [
                name,
                loss(own),
                *(("never", "never") if when is None else (f"{when[0]:.0f}", f"{when[1]:.1f}")),
                step_time(own, "optimizer step"),
                step_time(own, "training step"),
                state,
            ]
        )
    header = (
        "optimizer",
        "test loss, nat",
        "steps to AdamW's last",
        "seconds to it",
        "optimizer step, ms",
        "training step, ms",
        "state, bytes a parameter",
    )
    return f"{markdown(header, lines)}\n\n{_measured(rows)}"


TABLES: dict[str, Callable[[Files], str]] = {
    "headline": headline,
    "diag": diag,
    "text": text,
}
