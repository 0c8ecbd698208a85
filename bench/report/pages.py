"""The tables of README.md and of the pages in docs, each between `<!-- bench:NAME -->` and
`<!-- /bench -->`, from stored rows; and the comparison of one machine that `make bench` ends with.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path

from ..measuring.common import PROBE_BYTES
from ..measuring.rows import ROOT, Row, select, unique
from . import choice, generalization, searches
from .cells import NOISY, markdown, noisy, page, provenance, timed
from .losses import KINDS, formats, in_order, losses, second_moments, structures
from .tables import FORWARD
from .training import loss, reached, step_time

Files = dict[str, list[Row]]  # by machine and benchmark: "h200/gpu"

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
PICTURES = re.compile(r"bench/results/([\w/.-]+\.png)")
OURS, ROOTFREE = "IFShampoo, bfloat16", "RootFreeShampoo, bfloat16"
RMSPROP, ADAMW = "RootFreeRMSprop, momentum 0.9", "RootFreeAdamW"
NOT_MEASURED = "not measured"
SHARE = "bandwidth fraction"


def rewritten(text: str, files: Files) -> str:
    """The page with every marked table made anew.

    Raises:
        SystemExit: a mark of an unknown name, or a table whose rows are not stored.
    """

    def table(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in TABLES:
            raise SystemExit(f"a page has a mark bench:{name}; there are only {', '.join(TABLES)}")
        try:
            return f"{start}{TABLES[name](files)}\n{end}"
        except KeyError as missing:
            raise SystemExit(f"the table bench:{name} needs the rows {missing}.jsonl") from missing

    return MARKS.sub(table, text)


def pictures() -> set[str]:
    """The stored plots that a page shows, as paths in bench/results."""
    return {name for path in PAGES for name in PICTURES.findall(path.read_text())}


def _measured(*runs: list[Row]) -> str:
    """Where the numbers of a table come from, in small print; a machine's commits on one line."""
    commits: dict[str, list[str]] = {}
    for rows in runs:
        machine, _, commit = provenance(rows).partition("; commit ")
        found = commits.setdefault(machine, [])
        found += [] if commit in found else [commit]
    lines = (f"{machine}; commit {', '.join(of)}" for machine, of in commits.items())
    return f"<sub>{'<br>'.join(lines)}</sub>"


def _one(rows: list[Row], **wanted: str) -> Row:
    (found,) = select(rows, **wanted)
    return found


# Tables ---------------------------------------------------------------------------------------

MATRICES = "114 of 1024"
LARGE = ("one large tensor, float32", "one large tensor, bfloat16")
NETWORK = "GPT-2 medium, width 1/4, 6 of 24 layers, 1024 words, 8 x 256 tokens"
RESNET = "ResNet-50, float32"
SIRFSHAMPOO, SOAP, EIGH = "sirfshampoo, bfloat16", "SOAP, float32", "Shampoo by batched eigh"
TITLES = {
    MATRICES: "114 matrices of 1024 x 1024, H200",
    LARGE[0]: "one tensor of 10^9, H200",
    NETWORK: "GPT-2 medium, width 1/4, 6 of 24 layers, 2 cores",
    RESNET: "the parameters of ResNet-50, 2 cores",
    SIRFSHAMPOO: "sirfshampoo (the same mathematics)",
    EIGH: "Shampoo by batched `torch.linalg.eigh`",
    "torch Muon": "torch's Muon (keeps no factors)",
    "torch AdamW, fused": "torch's fused AdamW",
    SOAP: "SOAP of pytorch-optimizer",
    OURS: "`IFShampoo`",
    ROOTFREE: "`RootFreeShampoo`",
    ADAMW: "`RootFreeAdamW`",
    RMSPROP: "`RootFreeRMSprop`",
    "torch RMSprop, momentum 0.9": "torch's RMSprop",
}
# Of every file: case, metric of a time, ours, theirs.
HEADLINE = {
    "h200/gpu": [
        *((MATRICES, "time", OURS, other) for other in (EIGH, SIRFSHAMPOO, "torch Muon")),
        (LARGE[0], "time", ADAMW, "torch AdamW, fused"),
    ],
    "xeon-amx/step": [(NETWORK, "update step", OURS, other) for other in (SOAP, EIGH, SIRFSHAMPOO)],
    "xeon-amx/diag": [(RESNET, "time", ADAMW, "torch AdamW, fused")],
}


def headline(files: Files) -> str:
    """Milliseconds of a step, ours and another's from the same run, and how many times as fast."""
    lines = []
    for file, compared in HEADLINE.items():
        for case, metric, ours, other in compared:
            own = select(files[file], case=case)
            times = [_one(own, provider=name, metric=metric) for name in (ours, other)]
            shown = [timed(time, band=False) for time in times]
            if file.endswith("gpu") and select(own, provider=ours, metric=SHARE):
                shares = [_one(own, provider=name, metric=SHARE)["value"] for name in (ours, other)]
                shown = [
                    f"{ms}, {of:.0%} of a copy's bandwidth"
                    for ms, of in zip(shown, shares, strict=True)
                ]
            ratio = f"**{times[1]['value'] / times[0]['value']:.3g}**"
            lines.append([TITLES[case], TITLES[ours], TITLES[other], *shown, ratio])
    header = ("a step of", "ours", "beside", "ms, ours", "ms, beside", "times as fast")
    return page(markdown(header, lines), _measured(*(files[file] for file in HEADLINE)))


# Of the cases of `bench diag`, those in the pages: large, mixed and many.
DIAG_CASES = (
    "30M in one tensor, float32",
    "30M in one tensor, bfloat16",
    RESNET,
    "1,000 tensors of 1,000, float32",
    "1,000 tensors of 100, float32",
)


def diag(files: Files) -> str:
    """Milliseconds of a step in the chosen cases."""
    rows = files["epyc/diag"]
    names = [name for name in unique(rows, "provider") if name not in PROBE_BYTES]
    lines = [[name, *(_cell(rows, name, case) for case in DIAG_CASES)] for name in names]
    return page(markdown(("ms a step", *DIAG_CASES), lines), _measured(rows))


def formats_speed(files: Files) -> str:
    """Milliseconds of a step in fewer bytes, and how many of the step in float32."""
    rows = files["epyc/diag_formats"]
    times = [row for row in select(rows, metric="time") if row["provider"] not in PROBE_BYTES]
    exact = _one(times, provider=f"{ADAMW}, float32")["value"]
    lines = []
    for time in times:
        moved = _one(rows, provider=time["provider"], metric="bandwidth")["detail"]
        cells = [f"{moved['bytes_per_parameter']:.3g}", timed(time, band=False)]
        lines.append([time["provider"], *cells, f"{time['value'] / exact:.2f}"])
    header = ("30M in one tensor", "bytes moved a parameter", "ms a step", "x float32")
    return page(markdown(header, lines), _measured(rows))


def _cell(rows: list[Row], provider: str, case: str) -> str:
    of = {row["metric"]: row for row in select(rows, provider=provider, case=case)}
    if "time" in of:
        return timed(of["time"], band=False)
    return "WRONG" if "error" in of else NOT_MEASURED


def text(files: Files) -> str:
    """The transformer's losses, and when each optimizer is where torch's AdamW ends."""
    rows = files["epyc/train_text"]
    adamw = select(rows, provider="torch AdamW")
    lines = []
    for name in unique(select(rows, metric="test loss"), "provider"):
        own = select(rows, provider=name)
        when = reached(own, adamw)
        to_it = ("never", "never") if when is None else (f"{when[0]:.0f}", f"{when[1]:.1f}")
        times = (step_time(own, metric) for metric in ("optimizer step", "training step"))
        state = f"{select(own, metric='state')[0]['value']:.3g}"
        lines.append([name, loss(own), *to_it, *times, state])
    header = (
        "optimizer",
        "test loss, nat",
        "steps to AdamW's last",
        "seconds to it",
        "optimizer step, ms",
        "training step, ms",
        "state, bytes a parameter",
    )
    return page(markdown(header, lines), _measured(rows))


def trained(files: Files) -> str:
    """Losses at the defaults and at the best of a search, of every machine that has made some."""
    runs = [rows for name, rows in files.items() if name.endswith("/sweep")]
    rows = [row for own in runs for row in own if row["detail"]["kind"] in KINDS]
    return page(losses(rows), _measured(in_order(rows)))


def structured(files: Files) -> str:
    """Losses on text by the structure of factors."""
    runs = [rows for name, rows in files.items() if name.endswith("/sweep")]
    rows = in_order([row for own in runs for row in own])
    shown = [row for row in rows if row["detail"]["kind"] == "structures"]
    return page(structures(rows), _measured(shown))


def in_formats(files: Files) -> str:
    """Losses on text with weights and state in fewer bytes."""
    runs = [rows for name, rows in files.items() if name.endswith("/sweep")]
    rows = in_order([row for own in runs for row in own])
    shown = [row for row in rows if row["detail"]["kind"] == "formats"]
    return page(formats(rows), _measured(shown))


# Of the optimizers of `bench step`, those in the pages.
NETWORK_PEERS = (OURS, SIRFSHAMPOO, SOAP, EIGH, "torch Muon", "torch AdamW, fused")


def networks(files: Files) -> str:
    """Milliseconds of a step that renews the preconditioner, by network."""
    rows = files["xeon-amx/step"]
    lines = []
    for case in unique(select(rows, provider=FORWARD), "case"):
        found = [
            select(rows, case=case, provider=name, metric="update step") for name in NETWORK_PEERS
        ]
        share = _one(rows, case=case, provider=OURS, metric="share at interval 10")
        cells = [timed(row[0], band=False) if row else NOT_MEASURED for row in found]
        lines.append([case, *cells, f"{share['value']:.0%}"])
    last = f"{OURS}, every 10th step: of a forward-backward"
    return page(markdown(("ms a step", *NETWORK_PEERS, last), lines), _measured(rows))


def gpu(files: Files) -> str:
    """Steps of the matrices of an eighth of a 953M model, and of one large tensor."""
    rows = files["h200/gpu"]
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
            (time,) = select(rows, case=case, provider=name, metric="time") or (None,)
            share = f"{_value(rows, time, SHARE):.1%}" if time else ""
            title = f"{name}, {case.rpartition(' ')[2]}"
            large.append([title, _cell(rows, name, case), share])
    other = ("one tensor of 10^9", "ms a step", "of the bandwidth of a copy")
    return page(markdown(header, matrices), markdown(other, large), _measured(rows))


def _value(rows: list[Row], of: Row, metric: str) -> float:
    """Another metric of a row's case and provider."""
    value: float = _one(rows, case=of["case"], provider=of["provider"], metric=metric)["value"]
    return value


# One machine ----------------------------------------------------------------------------------

COMPARED = [
    *(("matrix", ROOTFREE, other) for other in (SOAP, "torch Muon", OURS)),
    *(("matrix", OURS, other) for other in (SIRFSHAMPOO, SOAP, EIGH, "torch Muon")),
    ("diag", RMSPROP, "torch RMSprop, momentum 0.9"),
    ("diag", ADAMW, "torch AdamW, fused"),
]


def summary(files: Files) -> str:
    """Ratios of times on one machine: geometric mean, least and most over the cases of a run."""
    lines, runs = [], []
    for file, ours, other in COMPARED:
        times = select(files.get(file, []), metric="time")
        mine, others = (_by_case(times, name) for name in (ours, other))
        pairs = [(others[case], row) for case, row in mine.items() if case in others]
        if pairs:
            ratios = [theirs["value"] / own["value"] for theirs, own in pairs]
            mark = NOISY * any(noisy(row) for pair in pairs for row in pair)
            mean = f"**{statistics.geometric_mean(ratios):.1f}**{mark}"
            span = f"{min(ratios):.2g} to {max(ratios):.2g}"
            lines.append([f"{TITLES[ours]} against {TITLES[other]}", mean, span, f"{len(pairs)}"])
            runs.append(files[file])
    header = ("times as fast", "mean", "least to most", "cases")
    return page(markdown(header, lines), _measured(*runs)) if lines else ""


def _of_machine(machine: str) -> Callable[[Files], str]:
    """`summary` of the rows that are stored of a machine."""

    def table(files: Files) -> str:
        start = f"{machine}/"
        return summary({n.removeprefix(start): r for n, r in files.items() if n.startswith(start)})

    return table


def _by_case(rows: list[Row], provider: str) -> dict[str, Row]:
    return {row["case"]: row for row in select(rows, provider=provider)}


def moments(files: Files) -> str:
    """What s follows of micro-batches, and where that was measured."""
    rows = files["epyc/sweep_second_moments"]
    return f"{second_moments(rows)}\n\n{_measured(rows)}"


def _search(workload: str) -> Callable[[Files], str]:
    """What trials of a search are worth, the best settings, and where that was measured."""

    def table(files: Files) -> str:
        rows = files[f"epyc/search_{workload}"]
        _, _, text = searches.table(rows).partition("\n\n")
        return text

    return table


def _generalization(workload: str) -> Callable[[Files], str]:
    def table(files: Files) -> str:
        rows = files[f"epyc/search_{workload}_final"]
        return f"{generalization.table(rows)}\n\n{_measured(rows)}"

    return table


def choosing(files: Files) -> str:
    """The optimizers side by side, for who must choose one."""
    sweep, matrix, text = (files[f"epyc/{name}"] for name in ("sweep", "matrix", "train_text"))
    shown = [row for row in in_order(sweep) if row["case"] == "text"]
    shown = [row for row in shown if row["detail"]["kind"] in ("defaults", "basin", "formats")]
    table = choice.table(sweep, matrix, text)
    return page(table, _measured(shown, [r for r in matrix if r["case"] == choice.SHAPES], text))


TABLES: dict[str, Callable[[Files], str]] = {
    "choosing": choosing,
    "moments": moments,
    "search_resnet": _search("digits_resnet"),
    "search_vit": _search("digits_vit"),
    "generalization_resnet": _generalization("digits_resnet"),
    "generalization_vit": _generalization("digits_vit"),
    "headline": headline,
    "gpu": gpu,
    "diag": diag,
    "networks": networks,
    "text": text,
    "losses": trained,
    "structures": structured,
    "formats": in_formats,
    "formats_speed": formats_speed,
    "epyc": _of_machine("epyc"),
    "xeon": _of_machine("xeon-amx"),
}


def write(path: Path, files: Files) -> None:
    """Rewrite the tables of a page where they have changed."""
    before = path.read_text()
    after = rewritten(before, files)
    if after != before:
        path.write_text(after)
        print(f"tables {path}")
