"""Optimizers side by side, for docs/choosing.md, and the plot of loss against memory."""

from __future__ import annotations

import statistics
from pathlib import Path

from ..measuring.rows import Row, select, unique
from .cells import markdown, timed
from .figures import logarithmic, save, styles, subplots
from .losses import in_order
from .training import mean_and_deviation, settings_text

WEIGHTS = 4  # bytes of a float32 weight, which `bench sweep --kinds formats` counts in
NEAR = 0.1  # nat
SHAPES = "4 layers of width 256"
# In the page: in `bench sweep`, in `bench matrix`.
OPTIMIZERS = {
    "`RootFreeShampoo`": ("RootFreeShampoo", "RootFreeShampoo, bfloat16"),
    "`IFShampoo`": ("IFShampoo", "IFShampoo, bfloat16"),
    "`RootFreeAdamW`": ("RootFreeAdamW", "RootFreeAdamW"),
    "`RootFreeRMSprop`": ("RootFreeRMSprop", "RootFreeRMSprop, momentum 0.9"),
    "SOAP": ("SOAP", "SOAP, float32"),
    "Muon": ("Muon", "torch Muon"),
    "torch's AdamW": ("torch AdamW", "torch AdamW, fused"),
}
FORMAT = ("weights", "param_residual", "state_format")


def table(sweep: list[Row], matrix: list[Row], text: list[Row]) -> str:
    """Of each optimizer memory, time, loss on text, and the lr that end near its best."""
    text = [row for row in text if row["metric"] == "state"]
    lines = []
    for title, (name, timed_as) in OPTIMIZERS.items():
        own = select(sweep, case="text", provider=name)
        time = select(matrix, case=SHAPES, provider=timed_as, metric="time")
        at_defaults = [row["value"] for row in _of_kind(own, "defaults")]
        loss = mean_and_deviation(at_defaults, ".3f") if at_defaults else ""
        cells = [_state(own, select(text, provider=name)), timed(time[0], band=False)]
        lines.append([title, *cells, loss, _near_the_best(_of_kind(own, "basin"))])
    header = (
        "optimizer",
        "state on text, bytes a parameter",
        f"ms a step, {SHAPES}",
        "test loss on text, at the defaults, nat",
        f"lr within {NEAR} nat of its best",
    )
    return markdown(header, lines)


def _of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["detail"].get("kind") == kind]


def _state(own: list[Row], compared: list[Row]) -> str:
    """In float32; of ours without the weights that its row counts in."""
    exact = [row for row in _of_kind(own, "formats") if _format(row) == {}]
    if exact:
        return f"{exact[0]['detail']['bytes_a_parameter'] - WEIGHTS:.3g}"
    return f"{compared[0]['value']:.3g}" if compared else ""


def _format(row: Row) -> dict[str, object]:
    return {key: of for key, of in row["detail"]["settings"].items() if key in FORMAT}


def _near_the_best(basin: list[Row]) -> str:
    ended = {r["detail"]["settings"]["lr"]: r["value"] for r in basin if r["value"] is not None}
    near = [lr for lr, value in ended.items() if value <= min(ended.values()) + NEAR]
    return f"{min(near):.2g} to {max(near):.2g}" if near else ""


# Loss against memory --------------------------------------------------------------------------


def memory_rows(rows: list[Row]) -> list[Row]:
    """Last losses with weights and state in fewer bytes."""
    return in_order(_of_kind(rows, "formats"))


def memory(rows: list[Row], path: Path) -> None:
    """A point a format; crossed out where weights are rounded and what is lost is lost."""
    figure, axis = subplots(height=4.2)
    by_method: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        settings = {
            key: of
            for key, of in row["detail"]["settings"].items()
            if key not in (*FORMAT, "batch_size")
        }
        of_method = by_method.setdefault(f"{row['provider']}, {settings_text(settings)}", {})
        of_method.setdefault(str(_format(row)), []).append(row)
    for name, look in styles(list(by_method)).items():
        for number, own in enumerate(by_method[name].values()):
            losses = [row["value"] for row in own if row["value"] is not None]
            x, y = own[0]["detail"]["bytes_a_parameter"], statistics.fmean(losses)
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            label = {"label": name if number == 0 else None}
            axis.errorbar(x, y, yerr=spread, **look | {"ls": ""} | label)
            if _format(own[0]) == {"weights": "bfloat16"}:
                axis.plot(x, y, "kx", ms=9)
    logarithmic(axis, "x")
    seeds = len(unique([{**row, "seed": row["detail"]["seed"]} for row in rows], "seed"))
    axis.set(
        xlabel="weights and state, bytes a parameter",
        ylabel=f"{rows[0]['metric']}, {rows[0]['unit']}",
    )
    axis.plot([], [], "kx", ms=9, label="bfloat16 weights by themselves")
    axis.legend(frameon=False, fontsize=8)
    save(figure, rows, path, f"Last loss on {rows[0]['case']} against memory: {seeds} seeds")
