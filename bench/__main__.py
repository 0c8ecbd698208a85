"""Command line of the benchmarks.

Run it in the root of a clone that was installed with `pip install --no-build-isolation -e .[bench]`
(or `make bench`): elsewhere there is no bench, and without -e the sources in the root hide what was
built. A full run takes minutes, the number of its cases times --seconds and their checks; --quick
takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from .measuring.common import optional, pick_device, require_kernels
from .measuring.rows import refuse_uncommitted

SUBCOMMANDS = {
    "diag": "time the diagonal update against torch, with its error beside every time",
    "matrix": "time steps of IFShampoo against every peer, factors updated every step",
    "products": "time each product of IF-Shampoo against torch.bmm, torch.compile and eigh",
    "step": "time whole steps on the layers of well-known networks, and what they cost",
    "layouts": "which factors large models have, their bytes and FLOPs; nothing is measured",
    "distributed": "how the work of matrices is shared among ranks: from shapes, and their times",
    "host": "time the host's part of a step, with the launch stubbed out",
    "sass": "compile every kernel for GPUs, and show registers, spills and wide accesses",
    "gpu": "the GPU tests, then every benchmark of the targets, in minutes",
    "train": "train small networks with several optimizers in turn, with the times of their steps",
    "sweep": "losses of many training runs at once: defaults, over lr, searches; no times",
    "search": "two-stage random search of settings on a workload, and the best of it tested",
    "defaults": "train small networks at every constructor's defaults",
    "report": "tables and plots of stored rows, and those of README.md and docs/",
}


def module(name: str) -> ModuleType:
    """Where a subcommand is."""
    room = "bench.machine_code" if name == "sass" else "bench"
    return optional(f"{room}.{name}", extra="triton" if name == "sass" else "bench")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parser_of(argv: list[str]) -> argparse.ArgumentParser:
    """A parser of this command; only the subcommand that it names is imported."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="subcommand", title="subcommands")
    for name, summary in SUBCOMMANDS.items():
        of = module(name) if name in argv else None
        about = of.__doc__ if of else summary
        sub = subparsers.add_parser(
            name, help=summary, description=about, formatter_class=Formatter
        )
        if of:
            of.add_arguments(sub)
            sub.set_defaults(run=of.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; 0 if every result was right."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of(argv)
    args = parser.parse_args(argv)
    if args.subcommand is None:
        parser.print_help()
        return 0
    if "reference" in args and not getattr(args, "dry_run", False):  # it measures on a device
        require_kernels(pick_device(args.device), args.reference)
        refuse_uncommitted(args.dirty)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted")
        if getattr(args, "out", None):
            print(
                f"the rows so far are in {args.out}; the same command, on the same commit, goes on "
                "after the last whole case"
            )
        return 130


if __name__ == "__main__":
    sys.exit(main())
