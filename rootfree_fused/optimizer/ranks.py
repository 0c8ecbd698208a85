"""The ranks that share the work of some matrices, and what they do together."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

_MET: Counter[str] = Counter()  # how often these ranks have met, whichever optimizer asked
# Of a world the groups that were made of some of its ranks, for all optimizers.
_GROUPS: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


class Ranks:
    """The ranks that share the work of some matrices: those of a mesh, or of a process group.

    ranks: in the world, in the order of the group. coordinates: where each is in the mesh.
    group: of these ranks, None where there is none yet.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        device: torch.device,
        coordinates: Sequence[tuple[int, ...]],
        group: Any = None,
    ) -> None:
        self._ranks, self._given, self.device = list(ranks), group, device
        self.coordinates = list(coordinates)
        self.size, self.rank = len(ranks), self._ranks.index(dist.get_rank())

    @cached_property
    def group(self) -> Any:
        """Made at the first collective, to which all of them come."""
        return group_of(self._ranks) if self._given is None else self._given

    def exchange(
        self, received: Tensor, sent: Tensor, sizes: list[int], own_sizes: list[int]
    ) -> None:
        dist.all_to_all_single(received, sent, sizes, own_sizes, group=self.group)

    def everyones(self, value: Any) -> list[Any]:
        """What each rank gives, a collective."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def any(self, value: bool) -> bool:
        """Whether it is so on some rank, a collective."""
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def sum_(self, values: Tensor) -> None:
        """What all give, in place of what this one gives; the same bits on all."""
        dist.all_reduce(values, group=self.group)

    def gathered(self, values: Tensor) -> Tensor:
        """What each rank gives, along a new first axis."""
        found = values.new_empty(self.size * values.numel())
        dist.all_gather_into_tensor(found, values, group=self.group)
        return found.view(self.size, *values.shape)

    def meet(self, patience: float) -> int:
        """How many ranks have come here within so many seconds; unlike a barrier it can fail.

        What a rank does that was alone here is as if it had not come.
        """
        store = dist.distributed_c10d._get_default_store()
        ranks = str(self._ranks)
        key = f"rootfree_fused/{ranks}/{_MET[ranks]}"
        end, came = time.monotonic() + patience, store.add(key, 1)
        while came < self.size:
            if time.monotonic() > end:
                store.add(key, -1)
                return came
            time.sleep(0.001)
            came = store.add(key, 0)
        _MET[ranks] += 1
        return came

    @cached_property
    def mesh(self) -> Any:
        """Of one axis."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self.group, self.device.type)

    def by_rows(self, whole: Tensor, shape: tuple[int, ...], owner: int) -> Tensor:
        """A tensor of a shape that its owner has, as a DTensor cut by rows."""
        counts = rows_of(shape[0], self.size)
        each = math.prod(shape[1:]) * whole.dtype.itemsize
        own = counts[self.rank], *shape[1:]
        rows = torch.empty(own, dtype=whole.dtype, device=self.device)
        mine = self.rank == owner
        sent = whole.contiguous().view(-1) if mine else rows.new_empty(0)
        sizes = [each * counts[self.rank] if rank == owner else 0 for rank in range(self.size)]
        own_sizes = [each * count if mine else 0 for count in counts]
        self.exchange(rows.view(-1).view(torch.uint8), sent.view(torch.uint8), sizes, own_sizes)
        return self._of_rows(rows, shape)

    def own_rows(self, whole: Tensor) -> Tensor:
        """A tensor that all ranks have, as a DTensor cut by rows."""
        counts = rows_of(whole.shape[0], self.size)
        first = sum(counts[: self.rank])
        return self._of_rows(whole[first : first + counts[self.rank]].clone(), whole.shape)

    def _of_rows(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(
            rows,
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def broadcast(self, whole: Tensor, shape: tuple[int, ...], owner: int) -> Tensor:
        """A copy of what the owner has, of a shape, on every rank."""
        copy = torch.empty(shape, dtype=whole.dtype, device=self.device)
        if self.rank == owner:
            copy.copy_(whole)
        dist.broadcast(copy, group_src=owner, group=self.group)
        return copy


def group_of(ranks: Sequence[int]) -> Any:
    """The group of ranks of several axes of a mesh, a collective of them alone.

    A mesh that is flattened has such a group too, but keeps what it was flattened to: from then on
    torch gathers wrongly what lies on it with Shard(0) on two axes, in rows that are uneven.
    Other ranks need not come, nor know of it: they may have other matrices, or another mesh.
    """
    world = dist.group.WORLD
    if len(ranks) == dist.get_world_size():
        return world
    groups = _GROUPS.setdefault(world, {})
    key = tuple(ranks)
    if key not in groups:
        groups[key] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[key]


def rows_of(length: int, ranks: int) -> list[int]:
    """How many rows of a tensor each rank has, as torch.distributed.tensor.Shard(0) cuts it."""
    each = -(-length // ranks)
    return [min(each, max(length - rank * each, 0)) for rank in range(ranks)]
