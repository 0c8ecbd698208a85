"""The workloads of the papers that root-free optimizers come from, and small stand-ins for them."""

from __future__ import annotations

from . import convolutions, full, graph, sequences, transformers
from .workload import Workload

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for module in (convolutions, transformers, sequences, graph, full)
    for workload in module.WORKLOADS
}

__all__ = ["WORKLOADS", "Workload"]
