"""The workloads of the papers that root-free optimizers come from, and small stand-ins for them."""

from __future__ import annotations

from . import convolutions
from .workload import Workload

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in convolutions.WORKLOADS}

__all__ = ["WORKLOADS", "Workload"]
