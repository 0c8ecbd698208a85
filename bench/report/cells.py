"""What tables are made of: numbers as text, marks of noise, and where rows come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..measuring.rows import Row, select, unique

# A time whose percentiles are further apart, (p80 - p20) / median, was taken on a busy machine; of
# fewer samples nobody knows.
NOISY_SPREAD = 0.2
LEAST_SAMPLES = 3
NOISY = "ⁿ"
NOISE_NOTE = (
    f"{NOISY} noisy: the 20th and 80th percentiles are more than {NOISY_SPREAD:.0%} of the median "
    f"apart, or there are fewer than {LEAST_SAMPLES} samples. Measure again before you compare."
)


def page(*parts: str) -> str:
    """Paragraphs and tables; where a number is marked as noisy, the last line says what that is."""
    text = "\n\n".join(parts)
    return f"{text}\n\n{NOISE_NOTE}" if NOISY in text else text


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def lines_of(rows: list[Row], line: Callable[[list[Row]], list[str]]) -> list[list[str]]:
    """A line a provider."""
    return [line(select(rows, provider=name)) for name in unique(rows, "provider")]


def by_metric(rows: list[Row]) -> dict[str, Row]:
    return {row["metric"]: row for row in rows}


def number(value: float | None, spec: str) -> str:
    """A value of a row as text; a value that was not finite has no number."""
    return "not finite" if value is None else format(value, spec)


def noisy(row: Row) -> bool:
    """Whether a time varied by more than NOISY_SPREAD, or too few samples say."""
    value, detail = row["value"], row["detail"]
    if value is None:
        return False
    few = detail["samples"] < LEAST_SAMPLES
    return few or detail["p80"] - detail["p20"] > NOISY_SPREAD * value


def timed(row: Row, spec: str = "", *, scale: float = 1.0, band: bool = True) -> str:
    """A time as text, with its 20th and 80th percentile, and marked where it is noisy."""
    if row["value"] is None:
        return number(None, spec)
    times = (row["value"], row["detail"]["p20"], row["detail"]["p80"])
    value, p20, p80 = (f"{scale * t:{spec}}" if spec else _three_digits(t) for t in times)
    shown = f"{value} ({p20} to {p80})" if band else value
    return shown + NOISY * noisy(row)


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def provenance(rows: list[Row]) -> str:
    """One line that says where, with what and from which commits the rows come.

    Raises:
        ValueError: they come from several machines, or of what is timed from several commits, so
            that they cannot stand in one table.
    """
    machines = list(dict.fromkeys(map(_machine, rows)))
    commits = unique(rows, "commit")
    is_timed = any(row["benchmark"] != "sweep" for row in rows)
    if len(machines) > 1 or (is_timed and len(commits) > 1):
        lines = dict.fromkeys(f"{_machine(row)}; commit {row['commit']}" for row in rows)
        raise ValueError(f"rows of one table come from different runs: {'; and '.join(lines)}")
    return f"{machines[0]}; commit {', '.join(commits)}"


def _machine(row: Row) -> str:
    names = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{row['device']}; {names}"
