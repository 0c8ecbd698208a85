"""Tables and the plot of the losses of `bench sweep`, from rows alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from ..measuring.rows import Row, select, unique
from ..optimizers.tuned import BASE
from ..workloads.problems import PROBLEMS
from .cells import lines_of, markdown, page, provenance
from .figures import logarithmic, save, styles, subplots
from .training import mean_and_deviation, settings_text

MOMENTS = ("batch", "micro", "variance", "mean")
KINDS = {"defaults": "At the defaults", "tuned": "At the best of a search"}


def sweep(rows: list[Row]) -> str:
    """Losses at the defaults and at the best of a search, and the settings that this is."""
    chosen = [row for row in in_order(rows) if row["detail"]["kind"] == "tuned"]

    def line(own: list[Row]) -> list[str]:
        of = {row["case"]: row["detail"]["settings"] for row in own}
        cells = (settings_text(of[case]) if case in of else "" for case in unique(chosen, "case"))
        return [own[0]["provider"], *cells]

    parts = ["# Losses of training", provenance(rows), losses(rows)]
    if chosen:
        header = ["settings", *unique(chosen, "case")]
        parts += ["## Settings of the search", markdown(header, lines_of(chosen, line))]
    return page(*parts)


def losses(rows: list[Row]) -> str:
    """A table for each kind of settings, an optimizer a line and a problem a column."""
    rows = in_order(rows)
    parts = []
    for kind, title in KINDS.items():
        own = [row for row in rows if row["detail"]["kind"] == kind]
        if own:
            parts += [f"**{title}**", _table(own)]
    if by_structure := structures(rows):
        parts += ["**At the defaults, by the structure of factors**", by_structure]
    if by_format := formats(rows):
        parts += ["**At the defaults, weights and state in fewer bytes**", by_format]
    if by_moment := second_moments(rows):
        parts += ["**Digits in 8 micro-batches a step, by what s follows**", by_moment]
    notes = (
        "The loss after the last step, mean and standard deviation over the seeds, lowest in bold: "
        "on text and digits of the test data, in nat, of the autoencoder on all images, squared "
        "error. Nothing is timed."
    )
    return page(*parts, notes)


def structures(rows: list[Row]) -> str:
    """Of each optimizer a line for dense factors, as "auto" has them, and one for each other."""
    structured = [row for row in rows if _kind(row) == "structures"]
    lines = []
    for name in unique(structured, "provider"):
        for case in unique(structured, "case"):
            dense = [r for r in select(rows, case=case, provider=name) if _kind(r) == "defaults"]
            found = {"dense": dense} if dense else {}
            for row in select(structured, case=case, provider=name):
                found.setdefault(_structure(row), []).append(row)
            most = max(map(len, found.values()))
            lines += [[name, of, _cell(own, most)] for of, own in found.items()]
    return markdown(["optimizer", "factors", "test loss"], lines) if lines else ""


def _structure(row: Row) -> str:
    settings = row["detail"]["settings"]
    if "structures" not in settings:
        return f"blocks up to {settings['max_dense_dim']}"
    size = f" of {settings['block_size']}, as released" if "block_size" in settings else ""
    return f"{settings['structures'].replace('_', ' ')}{size}"


def second_moments(rows: list[Row]) -> str:
    """Of each optimizer a line a second moment, and a column a learning rate in order."""
    own = [row for row in rows if _kind(row) == "second moments"]
    lines = []
    for name in unique(own, "provider"):
        found: dict[str, dict[float, list[Row]]] = {}
        for row in select(own, provider=name):
            settings = row["detail"]["settings"]
            of = found.setdefault(settings["second_moment"], {})
            of.setdefault(settings["lr"], []).append(row)
        for moment in filter(found.__contains__, MOMENTS):
            by_lr = found[moment]
            most = max(map(len, by_lr.values()))
            cells = [f"{lr:g}: {_cell(by_lr[lr], most)}" for lr in sorted(by_lr)]
            lines.append([name, moment, *cells])
    header = ["optimizer", "second_moment", "lr: test loss", "", ""]
    return markdown(header, lines) if lines else ""


def formats(rows: list[Row]) -> str:
    """Of each optimizer a line a format, with the difference to float32 of the same seeds."""
    stored = [row for row in rows if _kind(row) == "formats"]
    stored.sort(key=lambda row: -row["detail"]["bytes_a_parameter"])
    lines = []
    for name in unique(stored, "provider"):
        by_memory: dict[str, dict[str, list[Row]]] = {}
        for row in select(stored, provider=name):
            settings = dict(row["detail"]["settings"])
            format_of = {key: settings.pop(key) for key in _FORMAT if key in settings}
            by_memory.setdefault(settings_text(settings), {}).setdefault(
                settings_text(format_of), []
            ).append(row)
        for memory, found in by_memory.items():
            exact = {row["detail"]["seed"]: row["value"] for row in found.get("", [])}
            most = max(map(len, found.values()))
            for own in found.values():
                lines.append(
                    [name, memory, *_format_cells(own), _cell(own, most), _off(own, exact)]
                )
    header = ["optimizer", "settings", "weights", "state", "bytes a parameter", "test loss"]
    return markdown([*header, "beside float32"], lines) if lines else ""


_FORMAT = ("weights", "param_residual", "state_format")


def _format_cells(rows: list[Row]) -> list[str]:
    """Weights, state and bytes."""
    settings = rows[0]["detail"]["settings"]
    weights = settings.get("weights", "float32")
    if residual := settings.get("param_residual"):
        weights += f", {residual}" if residual == "stochastic" else f" + {residual}"
    size = f"{rows[0]['detail']['bytes_a_parameter']:.2f}"
    return [weights, settings.get("state_format", "float32"), size]


def _off(rows: list[Row], exact: dict[int, float | None]) -> str:
    """Mean and standard deviation over the seeds of the difference."""
    pairs = [(row["value"], exact.get(row["detail"]["seed"])) for row in rows]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if rows[0]["detail"]["settings"].keys().isdisjoint(_FORMAT) or not differences:
        return ""
    spread = f" ± {statistics.stdev(differences):.3f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.3f}{spread}"


def _kind(row: Row) -> str:
    kind: str = row["detail"]["kind"]
    return kind


def in_order(rows: list[Row]) -> list[Row]:
    """By problem, optimizer and lr: runs end in any order."""
    problems, names = list(PROBLEMS), list(BASE)

    def place(row: Row) -> tuple[float, ...]:
        lr = row["detail"]["settings"]["lr"]
        return problems.index(row["case"]), names.index(row["provider"]), lr

    return sorted(rows, key=place)


def _table(rows: list[Row]) -> str:
    cases = {case: select(rows, case=case) for case in unique(rows, "case")}
    most = {case: max(_seeds(of).values()) for case, of in cases.items()}
    steps = {case: max(row["detail"]["steps"] for row in of) for case, of in cases.items()}
    means = {
        case: {name: _mean(select(of, provider=name)) for name in unique(of, "provider")}
        for case, of in cases.items()
    }

    def line(own: list[Row]) -> list[str]:
        name = own[0]["provider"]
        cells = []
        for case, of in means.items():
            shown = _cell(select(own, case=case), most[case])
            cells.append(f"**{shown}**" if of.get(name) == min(of.values()) else shown)
        return [name, *cells]

    header = ["optimizer", *(f"{case}, {count:,} steps" for case, count in steps.items())]
    return markdown(header, lines_of(rows, line))


def _seeds(rows: list[Row]) -> dict[str, int]:
    """How many runs each optimizer has."""
    return {name: len(select(rows, provider=name)) for name in unique(rows, "provider")}


def _mean(rows: list[Row]) -> float:
    values = [row["value"] for row in rows]
    return math.inf if None in values else statistics.fmean(values)


def _cell(rows: list[Row], seeds: int) -> str:
    """Says so where it has fewer seeds than others, or one of them diverged."""
    values = [row["value"] for row in rows if row["value"] is not None]
    if not rows:
        return "not measured"
    if len(values) < len(rows):
        return f"{len(rows) - len(values)} of {len(rows)} diverged"
    few = f" ({len(rows)} of {seeds} seeds)" if len(rows) < seeds else ""
    return mean_and_deviation(values, ".3f") + few


# Basins ---------------------------------------------------------------------------------------


def basin_rows(rows: list[Row]) -> list[Row]:
    """Last losses at several learning rates."""
    return in_order([row for row in rows if row["detail"].get("kind") == "basin"])


def basin(rows: list[Row], path: Path) -> None:
    """A panel a problem; on the upper edge lies what ended there, above it, or diverged."""
    cases = unique(rows, "case")
    figure, _ = subplots(len(cases), height=4.6)
    for axis, case in zip(figure.axes, cases, strict=True):
        own = select(rows, case=case)
        ended = {name: _ended(select(own, provider=name)) for name in unique(own, "provider")}
        lowest, top = edges(list(ended.values()))
        for name, look in styles(unique(own, "provider")).items():
            of = select(own, provider=name)
            x = [row["detail"]["settings"]["lr"] for row in of]
            y = [top if row["value"] is None else min(top, row["value"]) for row in of]
            axis.plot(x, y, **look, lw=1.8, ms=5, clip_on=False)
        logarithmic(axis, "x", at=(1,))
        logarithmic(axis, "y")
        axis.set(xlabel="lr", ylabel=f"{own[0]['metric']}, {own[0]['unit']}", title=case)
        axis.set_ylim(lowest, top)
    named = {}  # of all panels, as not every method is in each
    for axis in figure.axes:
        named |= {line.get_label(): line for line in axis.lines}
    shown = dict(handles=list(named.values()), labels=list(named))
    figure.legend(**shown, frameon=False, fontsize=8, loc="outside right center")
    save(figure, rows, path, "Last loss against lr, one seed; at the top: above it, or diverged")


def _ended(rows: list[Row]) -> list[float]:
    return [row["value"] for row in rows if row["value"] is not None]


def edges(ended: list[list[float]]) -> tuple[float, float]:
    """Of the logarithmic axis of losses, of each optimizer's: to three times the worst best."""
    bests = [min(own) for own in ended if own]
    lowest, highest = min(bests), min(max(map(max, filter(None, ended))), 3 * max(bests))
    margin = (highest / lowest) ** 0.04
    return lowest / margin, highest * margin
