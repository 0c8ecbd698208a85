"""Compile every kernel in its launch configurations for sm_80, sm_90 and sm_100; nothing runs.

A row each: registers, spills, shared memory, what a multiprocessor holds of it, and the machine
code of the main path, the way of aligned matrices and full chunks. Wide: of that path's accesses
whose address depends on the thread, those of 16 bytes, or by the tensor memory accelerator; each
instruction counts once, and reads of tables and scalars do not count. Of the loop of products:
its length and the instructions that make 64-bit addresses. These are counts, never speeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..measuring.common import add_quick_argument, optional
from ..measuring.rows import Row, commit
from .instructions import CONVERSION, WIDE_ADDRESS, count, tensor_cores

if TYPE_CHECKING:
    from .offline import Program

# Keys of a row and titles of the table's columns.
COLUMNS = {
    "kernel": "kernel",
    "configuration": "configuration",
    "arch": "arch",
    "registers": "registers",
    "spill_bytes": "spill bytes",
    "shared_bytes": "shared bytes",
    "warps_per_sm": "warps an SM",
    "ctas_per_sm": "CTAs an SM",
    "wide_share": "wide",
    "tensor_core": "tensor core",
    "modelled": "modelled",
    "loop_instructions": "loop",
    "loop_wide_addresses": "64-bit addresses",
    "conversions": "conversions",
}
# FLOPs an element of an n x n weight, over n: 18 in one update, which has "product right" twice.
FLOPS = {
    "product left": 2,
    "product right": 2,
    "factor_momenta": 4,
    "factors": 4,
    "products": 2,
    "params": 2,
}


class Entry:
    """A kernel in one launch configuration, on one architecture."""

    def __init__(
        self,
        kernel: str,
        configuration: str,
        architecture: int,
        modelled: str,
        build: Callable[[], Program],
    ) -> None:
        self.build = build
        self.constants = {
            "kernel": kernel,
            "configuration": configuration,
            "arch": f"sm_{architecture}",
            "modelled": modelled,
        }

    def row(self) -> Row:
        """Without what a kernel that does not compile lacks, and with its `error` instead."""
        measured: dict[str, Any] = {}
        try:
            measured = measure(self.build())
        except Exception as error:  # whatever the compiler or a launcher says
            measured["error"] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        row = {**self.constants, **measured}
        return {key: row[key] for key in (*COLUMNS, "error") if key in row}


def measure(program: Program) -> Row:
    """The columns of a row that come from the machine code."""
    flow = program.flow
    cores = tensor_cores(program.instructions)
    return {
        "registers": program.registers,
        "spill_bytes": program.spill_bytes,
        "shared_bytes": program.shared_bytes,
        "warps_per_sm": program.resident_programs * program.num_warps,
        "ctas_per_sm": program.resident_programs,
        "wide_share": round(flow.wide_share, 3),
        "tensor_core": "+".join(cores) or "none",
        "loop_instructions": len(flow.main_loop),
        "loop_wide_addresses": count(flow.main_loop, WIDE_ADDRESS),
        "conversions": count(flow.main_path, CONVERSION),
    }


# Entries --------------------------------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def diag_entry(case: str, dtypes: tuple[torch.dtype, torch.dtype], architecture: int) -> Entry:
    """Bytes: p and its states read and written, g read."""
    from . import launches

    param, grad = dtypes
    states = 1 if case == "rmsprop" else 2
    moved = 2 * param.itemsize + grad.itemsize + 8 * states
    configuration = f"{case}, {_name(param)}"
    if grad != param:
        configuration += f", {_name(grad)} gradients"
    return Entry(
        "diag",
        configuration,
        architecture,
        f"{moved} bytes a parameter",
        lambda: launches.diag_program(case, dtypes, architecture),
    )


def matrix_entry(
    name: str,
    tiling: str,
    architecture: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    momentum: bool = True,
) -> Entry:
    """FLOPs of an n x n weight; the gather has none, and moves G and both factors."""
    from . import launches

    param, grad = dtypes
    stored = 4 if tiling == "float32" else 2
    modelled = f"{grad.itemsize + 5 * stored} bytes an element"
    if name in FLOPS:
        modelled = f"{FLOPS[name]} n FLOPs an element"
    configuration = tiling
    if name == "gather":  # one tiling for all
        factor = "float32" if tiling == "float32" else "bfloat16"
        configuration = f"{factor} factors, {_name(grad)} gradients"
    if name == "params":
        configuration += f", {_name(param)}" + ("" if momentum else ", no momentum")
    return Entry(
        name,
        configuration,
        architecture,
        modelled,
        lambda: launches.matrix_program(name, tiling, architecture, dtypes, momentum),
    )


def entries(architecture: int, quick: bool = False) -> Iterator[Entry]:
    """Every configuration that something may launch on this architecture, each once."""
    from . import launches

    float32 = launches.MATRIX_DTYPES[0]
    large = launches.large_tiling(architecture)
    for case in launches.DIAG_CASES[: 1 if quick else None]:
        for dtypes in launches.DIAG_DTYPES[: 1 if quick else None]:
            yield diag_entry(case, dtypes, architecture)
    for tiling in [large] if quick else launches.tilings(architecture):
        for name in launches.matrix_kernels(tiling):
            if name != "gather" or tiling != "small":
                yield matrix_entry(name, tiling, architecture)
    for dtypes in () if quick else launches.MATRIX_DTYPES:
        if dtypes[1] != torch.float32:
            yield matrix_entry("gather", large, architecture, dtypes)
        if dtypes != float32:
            yield matrix_entry("params", large, architecture, dtypes)
        yield matrix_entry("params", large, architecture, dtypes, momentum=False)


# Output ---------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row of the table."""
    if "error" in row:
        shown = [row["kernel"], row["configuration"], row["arch"], f"**{row['error']}**"]
        shown += [""] * (len(COLUMNS) - len(shown))
    else:
        shown = [f"{row[key]:.0%}" if key == "wide_share" else str(row[key]) for key in COLUMNS]
    return "| " + " | ".join(re.sub(r"\|", "/", cell) for cell in shown) + " |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench sass`."""
    add_quick_argument(parser)
    parser.add_argument(
        "--json", dest="out", type=Path, metavar="FILE", help="write the rows there, one a line"
    )
    parser.add_argument(
        "--arch", type=int, action="append", choices=(80, 90, 100), help="only this; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Print a row a kernel, configuration and architecture; 1 if one did not compile."""
    triton = optional("triton", extra="triton")
    architectures = args.arch or ([90] if args.quick else [80, 90, 100])
    constants = {
        "device": "compiled, not run",
        "versions": {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(),
    }
    versions = ", ".join(f"{name} {version}" for name, version in constants["versions"].items())
    print(f"{constants['device']}; {versions}; commit {constants['commit']}\n")
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("")
    failed = False
    for architecture in architectures:
        for entry in entries(architecture, args.quick):
            row = entry.row()
            failed |= "error" in row
            print(line(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({**row, **constants}, allow_nan=False) + "\n")
    return int(failed)
