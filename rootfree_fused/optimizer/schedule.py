"""Which steps update factors; counted on the host, since it decides which kernels run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import is_update_step
from .groups import Group

# Of each parameter that a step updates, whether it updates its factors too.
UpdatesFactors = tuple[bool, ...]
# float32 counts one by one up to here.
_LARGEST_EXACT = 2**24


class FactorSchedule:
    """The step counts of each group's last step as the host knows them, and what follows."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[Tensor, list[int]]] = {}

    def at(self, index: int, group: Group, steps: Tensor) -> UpdatesFactors:
        """Which parameters of a group update their factors at this step."""
        source, counts = self._counts.pop(index, (None, []))
        if group["update_interval"] == 1:
            return (True,) * len(steps)
        counts = [count + 1 for count in counts] if source is steps else []
        # On a device they are read once: nothing waits for it.
        if not counts or (steps.is_cpu and not group["capturable"]):
            counts = _exact(steps, counts)
        self._counts[index] = steps, counts
        return _at(counts, group)

    def after(self, index: int, group: Group, steps: Tensor) -> UpdatesFactors:
        """Which will at the step after these."""
        if group["update_interval"] == 1:
            return (True,) * len(steps)
        source, counts = self._counts.get(index, (None, []))
        counts = counts if source is steps else [int(count) for count in steps.tolist()]
        return _at([count + 1 for count in counts], group)

    def after_last(self, index: int, group: Group) -> UpdatesFactors | None:
        """Which will at the step after the group's last; None where its counts are not known."""
        if index not in self._counts:
            return None
        _, counts = self._counts[index]
        return _at([count + 1 for count in counts], group)

    def count_replay(self) -> None:
        """A graph took a step."""
        for index, (steps, counts) in self._counts.items():
            self._counts[index] = steps, [count + 1 for count in counts]


def check_capturable_schedules(groups: list[dict[str, Any]], *, by_kind: bool) -> None:
    """Raise a RuntimeError for groups that update their factors at some steps only.

    by_kind: CapturedStep has a graph for each kind of step, and chooses by the count of steps.
    """
    for group in groups:
        interval = "step() was called under CUDA graph capture with update_interval="
        interval += str(group["update_interval"])
        if group["update_interval"] > 1 and not by_kind:
            raise RuntimeError(
                f"{interval}: replays would update the factors always or never; capture the "
                "training step with rootfree_fused.CapturedStep"
            )
        if group["update_interval"] > 1 and group["amp_scaling"]:
            raise RuntimeError(
                f"{interval} and amp_scaling=True: only the device knows which steps were skipped; "
                "use update_interval=1 or amp_scaling=False"
            )


def _exact(steps: Tensor, counted: list[int]) -> list[int]:
    """The counts, which float32 holds up to 2^24; above, those of the host, which it then rounds.

    A count that a load or a user changed is taken from `steps`, and so is one without a host's;
    this step's own 1 is lost there from 2^25 on.
    """
    counts = [int(count) + (count >= 2 * _LARGEST_EXACT) for count in steps.tolist()]
    if counted and max(counts) >= _LARGEST_EXACT:
        before = torch.tensor([count - 1 for count in counted], dtype=steps.dtype)
        if torch.equal(before + 1, steps):
            steps.copy_(torch.tensor(counted, dtype=steps.dtype))
            return counted
    return counts


def _at(counts: list[int], group: Group) -> UpdatesFactors:
    """Which of the parameters update their factors at these steps, counted from 1."""
    interval, schedule = group["update_interval"], group.get("update_schedule", "constant")
    updates = {count: is_update_step(count - 1, interval, schedule) for count in set(counts)}
    return tuple(updates[count] for count in counts)
