"""Compile every kernel in its launch configurations for sm_80, sm_90 and sm_100; nothing runs.

A row each: registers, spills, shared memory, what a multiprocessor holds of it, and the machine
code of the main path, that of aligned matrices and full chunks. Wide: of that path's accesses
whose address depends on the thread, those of 16 bytes, or by the tensor memory accelerator; each
instruction counts once, and reads of tables and scalars do not count. Of the loop of products:
its length and the instructions that make 64-bit addresses. These are counts, never speeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..measuring.common import add_quick_argument, dtype_name, optional
from ..measuring.rows import commit
from ..workloads import lowbit
from . import launches
from .instructions import CONVERSION, WIDE_ADDRESS, count, tensor_cores
from .offline import Program

Row = dict[str, Any]

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


class Entry(NamedTuple):
    """A kernel in one launch configuration, on one architecture."""

    kernel: str
    configuration: str
    architecture: int
    modelled: str
    build: Callable[[], Program]

    def row(self) -> Row:
        """Its columns; of a kernel that does not compile the `error` and what is known anyway."""
        known = {"arch": f"sm_{self.architecture}", **self._asdict()}
        try:
            found = known | measure(self.build())
        except Exception as error:  # whatever the compiler or a launcher says
            said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            found = known | {"error": said}
        return {key: found[key] for key in (*COLUMNS, "error") if key in found}


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


def diag_entry(case: str, dtypes: launches.Dtypes, architecture: int) -> Entry:
    """Bytes: p and its states read and written, g and squares read."""
    param, grad = dtypes
    update, _, squares = case.partition(", ")
    states = 1 if update == "rmsprop" else 2
    moved = 2 * param.itemsize + grad.itemsize + 8 * states + 4 * bool(squares)
    configuration = f"{case}, {dtype_name(param)}"
    if grad != param:
        configuration += f", {dtype_name(grad)} gradients"

    def build() -> Program:
        return launches.diag_program(case, dtypes, architecture)

    return Entry("diag", configuration, architecture, f"{moved} bytes a parameter", build)


def accumulate_entry(grad: torch.dtype, part: str, first: bool, architecture: int) -> Entry:
    """Bytes: g read, the sum and the part written, and read but for the first."""
    sums = 1 if part == "no parts" else 2
    moved = grad.itemsize + sums * (4 if first else 8)
    configuration = f"{part}, {dtype_name(grad)} gradients" + (", first" if first else "")

    def build() -> Program:
        return launches.accumulate_program(grad, part, first, architecture)

    modelled = f"{moved} bytes an element"
    return Entry("accumulate", configuration, architecture, modelled, build)


def lowbit_entry(method: str, name: str, architecture: int) -> Entry:
    """Bytes but for those of scales: 10 in 256 elements where both states have 8 bits."""
    case = lowbit.CASES[name]

    def build() -> Program:
        return launches.lowbit_program(method, case, architecture)

    modelled = f"{case.bytes_moved} bytes a parameter"
    return Entry("lowbit", f"{method}, {name}", architecture, modelled, build)


def packing_entry(name: str, formats: str, architecture: int) -> Entry:
    """Bytes but for those of scales: at most 4 in 256 elements."""
    case = lowbit.PACKED[formats]

    def build() -> Program:
        return launches.packing_program(name, case, architecture)

    return Entry(name, formats, architecture, f"{case.bytes_moved} bytes an element", build)


def matrix_entry(
    name: str,
    tiling: str,
    architecture: int,
    dtypes: launches.Dtypes = (launches.F32, launches.F32),
    momentum: bool = True,
) -> Entry:
    """FLOPs of an n x n weight; the gather has none, and moves G and both factors."""
    param, grad = dtypes
    stored = 4 if tiling == "float32" else 2
    modelled = f"{grad.itemsize + 5 * stored} bytes an element"
    if name in launches.FLOPS:
        modelled = f"{launches.FLOPS[name]} n FLOPs an element"
    configuration = tiling
    if name == "gather":  # one tiling for all
        factor = "float32" if tiling == "float32" else "bfloat16"
        configuration = f"{factor} factors, {dtype_name(grad)} gradients"
    if name == "params":
        configuration += f", {dtype_name(param)}" + ("" if momentum else ", no momentum")

    def build() -> Program:
        return launches.matrix_program(name, tiling, architecture, dtypes, momentum)

    return Entry(name, configuration, architecture, modelled, build)


def shampoo_entry(name: str, tiling: str, architecture: int) -> Entry:
    """A launch of root-free Shampoo; it takes parameters and gradients of any dtype."""
    stored = 4 if tiling == "float32" else 2
    if name in launches.SHAMPOO_FLOPS:
        modelled = f"{launches.SHAMPOO_FLOPS[name]} n FLOPs an element"
    elif name == "rows":  # sums alone
        modelled = "4 bytes a row and tile"
    else:
        own, operands = launches.SHAMPOO_BYTES[name]
        modelled = f"{own + operands * stored} bytes an element"

    def build() -> Program:
        return launches.shampoo_program(name, tiling, architecture)

    return Entry(f"shampoo {name}", tiling, architecture, modelled, build)


def entries(architecture: int, quick: bool = False) -> Iterator[Entry]:
    """Every configuration that something may launch on this architecture, each once."""
    float32 = launches.MATRIX_DTYPES[0]
    large = launches.large_tiling(architecture)
    for case, dtypes in launches.DIAG_LAUNCHES[: 1 if quick else None]:
        yield diag_entry(case, dtypes, architecture)
    for sums in launches.SUMS if not quick else ():
        yield accumulate_entry(*sums, architecture)
    for name in lowbit.CASES if not quick else ():
        for method in launches.LOWBIT_METHODS:
            yield lowbit_entry(method, name, architecture)
    for formats in lowbit.PACKED if not quick else ():
        for name in launches.PACKING:
            yield packing_entry(name, formats, architecture)
    for tiling in [large] if quick else launches.tilings(architecture):
        for name in launches.matrix_kernels(tiling):
            if name != "gather" or tiling != "small":
                yield matrix_entry(name, tiling, architecture)
        for name in launches.shampoo_kernels(tiling)[: 1 if quick else None]:
            yield shampoo_entry(name, tiling, architecture)
    for dtypes in () if quick else launches.MATRIX_DTYPES:
        if dtypes[1] != launches.F32:
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
    return "| " + " | ".join(cell.replace("|", "/") for cell in shown) + " |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench sass`."""
    add_quick_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print a row a kernel, configuration and architecture; 1 if one did not compile."""
    triton = optional("triton", extra="triton")
    print(f"compiled, not run; triton {triton.__version__}; commit {commit()}\n")
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3), flush=True)
    failed = False
    for architecture in [90] if args.quick else launches.ARCHITECTURES:
        for entry in entries(architecture, args.quick):
            row = entry.row()
            failed |= "error" in row
            print(line(row), flush=True)
    return int(failed)
