"""The tables of README.md, each between `<!-- bench:NAME -->` and `<!-- /bench -->`, from rows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable

from ..diag import PROBE_BYTES
from ..rows import NOISY, Row, markdown, noisy, provenance, select, timed, unique
from .curves import loss, reached, step_time
from .step_table import FORWARD

Files = dict[str, list[Row]]

MARKS = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
OURS = "IFShampoo, bfloat16"
NOT_MEASURED = "not measured"
# Of the cases of `bench diag`, those in README: large, mixed and many.
DIAG_CASES = (
    "30M in one tensor, float32",
    "30M in one tensor, bfloat16",
    "ResNet-50, float32",
    "1,000 tensors of 1,000, float32",
    "1,000 tensors of 100, float32",
)


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
    times = select(rows, provider=provider, metric="time")
    chosen = (row for row in times if row["kernel"] != "diag" or row["case"] in DIAG_CASES)
    return {row["case"]: row for row in chosen}


def _speed_ups(rows: list[Row], ours: str, other: str) -> str:
    """How many times as long the other takes: mean, least and most over the cases with both."""
    mine, others = _times(rows, ours), _times(rows, other)
    pairs = [(others[case], row) for case, row in mine.items() if case in others]
    if not pairs:
        return NOT_MEASURED
    ratios = [theirs["value"] / own["value"] for theirs, own in pairs]
    span = f"{min(ratios):.2g} to {max(ratios):.2g}"
    mark = f" {NOISY}" if any(noisy(row) for pair in pairs for row in pair) else ""
    return f"**{statistics.geometric_mean(ratios):.1f}** ({span}){mark}"


# Tables ---------------------------------------------------------------------------------------


MATRIX_PEERS = {
    "sirfshampoo, bfloat16": "sirfshampoo: the same mathematics",
    "SOAP, float32": "SOAP of pytorch-optimizer",
    "Shampoo, float32": "Shampoo of pytorch-optimizer",
    "Shampoo by batched eigh": "Shampoo by batched `torch.linalg.eigh`",
}
COMPARED = [
    *(("matrix", OURS, other, MATRIX_PEERS[other]) for other in MATRIX_PEERS),
    ("diag", "RootFreeRMSprop, momentum 0.9", "torch RMSprop, momentum 0.9", "torch RMSprop"),
    ("diag", "RootFreeAdamW", "torch AdamW, fused", "torch's fused AdamW"),
]


def headline(files: Files) -> str:
    """Ratios of times on each machine: geometric mean, least and most over the cases of a run."""
    machines = {"": files["matrix"], "_amx": files["matrix_amx"]}
    lines: list[list[str]] = []
    for stem, ours, other, title in COMPARED:
        of_machines = [
            _speed_ups(files.get(stem + machine, []), ours, other) for machine in machines
        ]
        if any(cell != NOT_MEASURED for cell in of_machines):
            lines.append([f"{ours}, against {title}", *of_machines])
    header = ("times as fast (least to most)", *map(_machine, machines.values()))
    runs = [files[stem] for stem in ("diag", "matrix", "matrix_amx")]
    if "diag_amx" in files:
        runs.append(files["diag_amx"])
    return f"{markdown(header, lines)}\n\n{_measured(*runs)}"


def _machine(rows: list[Row]) -> str:
    amx = ", AMX" if "(amx)" in rows[0]["versions"]["rootfree_fused"] else ""
    return rows[0]["device"].replace("(R)", "") + amx


def diag(files: Files) -> str:
    """Milliseconds of a step in the chosen cases."""
    rows = files["diag"]
    names = [name for name in unique(rows, "provider") if name not in PROBE_BYTES]
    lines = [[name, *(_cell(rows, name, case) for case in DIAG_CASES)] for name in names]
    return f"{markdown(('ms a step', *DIAG_CASES), lines)}\n\n{_measured(rows)}"


def _cell(rows: list[Row], provider: str, case: str) -> str:
    of = {row["metric"]: row for row in select(rows, provider=provider, case=case)}
    if "time" in of:
        return timed(of["time"], band=False)
    return "WRONG" if "error" in of else NOT_MEASURED


def text(files: Files) -> str:
    """The transformer's losses, and when each optimizer is where torch's AdamW ends."""
    rows = files["train_text"]
    adamw = select(rows, provider="torch AdamW")
    lines = []
    for name in unique(select(rows, metric="test loss"), "provider"):
        own = select(rows, provider=name)
        when = reached(own, adamw)
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


# Of the optimizers of `bench step`, those in README.
NETWORK_PEERS = (
    OURS,
    "sirfshampoo, bfloat16",
    "SOAP, float32",
    "Shampoo by batched eigh",
    "torch Muon",
    "torch AdamW, fused",
)


def networks(files: Files) -> str:
    """Milliseconds of a step that renews the preconditioner, by network."""
    rows = files["step"]
    lines = []
    for case in unique(select(rows, provider=FORWARD), "case"):
        found = [
            select(rows, case=case, provider=name, metric="update step") for name in NETWORK_PEERS
        ]
        (share,) = select(rows, case=case, provider=OURS, metric="share at interval 10")
        cells = [timed(row[0], band=False) if row else NOT_MEASURED for row in found]
        lines.append([case, *cells, f"{share['value']:.0%}"])
    last = f"{OURS}, every 10th step: of a forward-backward"
    return f"{markdown(('ms a step', *NETWORK_PEERS, last), lines)}\n\n{_measured(rows)}"


MATRICES = "114 of 1024"
LARGE = ("one large tensor, float32", "one large tensor, bfloat16")


def gpu(files: Files) -> str:
    """Steps of the matrices of an eighth of a 953M model, and of one large tensor."""
    rows = files["gpu"]
    matrices = [
        [row["provider"], timed(row, band=False), f"{_value(rows, row, 'slowdown'):.3g}"]
        for row in select(rows, case=MATRICES, metric="time")
        if row["provider"] != "mm"
    ]
    header = (f"{MATRICES} x 1024, every factor renewed", "ms a step", f"x {OURS}")
    large = []
    for case in LARGE:
        names = unique(select(rows, case=case), "provider")
        for name in (name for name in names if name not in PROBE_BYTES):
            cell = _cell(rows, name, case)
            (time,) = select(rows, case=case, provider=name, metric="time") or (None,)
            share = f"{_value(rows, time, 'bandwidth fraction'):.1%}" if time else ""
            large.append([f"{name}, {case.rpartition(' ')[2]}", cell, share])
    other = ("one tensor of 10^9", "ms a step", "of the bandwidth of a copy")
    return f"{markdown(header, matrices)}\n\n{markdown(other, large)}\n\n{_measured(rows)}"


def _value(rows: list[Row], of: Row, metric: str) -> float:
    """Another metric of a row's case and provider."""
    (found,) = select(rows, case=of["case"], provider=of["provider"], metric=metric)
    value: float = found["value"]
    return value


TABLES: dict[str, Callable[[Files], str]] = {
    "headline": headline,
    "gpu": gpu,
    "diag": diag,
    "networks": networks,
    "text": text,
}
