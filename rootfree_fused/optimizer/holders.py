"""Who shares which matrices, and who of these owns the factors, or whether each has its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.checks import is_sharded
from .formats import has_whole_blocks
from .groups import Group, trains
from .joint import unit_of
from .owners import Cost, Volume, owners_of, staying, summed_elements
from .ranks import Ranks

Replicas = Literal["share", "repeat"]
REPLICAS = get_args(Replicas)


@dataclass(frozen=True)
class Held:
    """Who shares a matrix, and which of them owns its factors, if its rows do not stay."""

    ranks: Ranks
    owner: int
    stays: bool = False

    @property
    def here(self) -> bool:
        return self.owner == self.ranks.rank


class Holders:
    """The ranks of each matrix, and its owner.

    process_group: of replicas that are no DTensors, as DistributedDataParallel has them; None where
        each of them does all. cost: of a parameter of a group.
    """

    def __init__(
        self, process_group: Any, replicas: Replicas, cost: Callable[[Tensor, Group], Cost]
    ) -> None:
        if replicas not in REPLICAS:
            raise ValueError(f"replicas is {replicas!r}; pass 'share' or 'repeat'")
        _check_group(process_group)
        self._process_group, self._replicas, self._cost = process_group, replicas, cost
        self._held = WeakTensorKeyDictionary()
        self._ranks: dict[Any, Ranks] = {}
        self._of_mesh: dict[Any, Ranks] = {}

    def shares(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether several ranks do the work of a parameter with factors."""
        if not is_sharded(param) and self._process_group is None:
            return False
        if self.has_members(param, group):
            return False
        return unit_of(param, group).layout is not None

    def has_members(self, param: Any, group: Mapping[str, Any]) -> bool:
        """Whether a DTensor is cut between members alone, each of which is stepped where it is."""
        axes = group["batch_axes"]
        if not axes or not is_sharded(param):
            return False
        cut = [p for p in param.placements if not p.is_replicate()]
        return bool(cut) and all(getattr(p, "dim", axes) < axes for p in cut)

    def stays(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether each rank steps the rows that it has of a shared parameter."""
        held: Held | None = self._held.get(param)
        return held is not None and held.stays and has_free_rows(param, group)

    def any_in(self, groups: Iterable[Group]) -> bool:
        """Whether a step is more than what each process does on its own."""
        return any(
            is_sharded(p) or self.shares(p, group)
            for group in groups
            for p in filter(trains, group["params"])
        )

    def held(self, param: Tensor, groups: Sequence[Group]) -> Held:
        """Where a shared parameter of these groups has its factors."""
        if param not in self._held:
            self.assign(groups)
        held: Held = self._held[param]
        return held

    def assign(self, groups: Sequence[Group]) -> None:
        """Give an owner to what has none, or leave its rows where they are; what has one keeps it.

        Group by group, so that it does not matter when, and of how many groups, someone asks.
        """
        loads: dict[int, list[Cost]] = {}
        for group in groups:
            new: dict[int, tuple[Ranks, list[Tensor]]] = {}
            for param in filter(trains, group["params"]):
                if not self.shares(param, group):
                    continue
                ranks = self._ranks_of(param)
                of = loads.setdefault(id(ranks), [Cost(0, 0)] * ranks.size)
                if param not in self._held:
                    new.setdefault(id(ranks), (ranks, []))[1].append(param)
                elif not self.stays(param, group):
                    of[self._held[param].owner] += self._cost(param, group)
            for key, (ranks, found) in new.items():
                stay = staying([_volume(param, group) for param in found], ranks.size)
                owned = [param for i, param in enumerate(found) if i not in stay]
                costs = [self._cost(param, group) for param in owned]
                for i in stay:
                    self._held[found[i]] = Held(ranks, 0, stays=True)
                for param, cost, owner in zip(
                    owned, costs, owners_of(costs, loads[key]), strict=True
                ):
                    self._held[param] = Held(ranks, owner)
                    loads[key][owner] += cost

    def _ranks_of(self, param: Any) -> Ranks:
        if not is_sharded(param):
            group = self._process_group
            ranks = dist.get_process_group_ranks(group)
            return self._known(param.device, ranks, [(i,) for i in range(len(ranks))], group)
        mesh, axes = param.device_mesh, tuple(range(param.device_mesh.ndim))
        if self._replicas == "repeat":
            axes = tuple(d for d in axes if not param.placements[d].is_replicate())
        key = mesh, axes, param.device
        if key not in self._of_mesh:
            where = _places(mesh, axes)
            group = mesh.get_group(axes[0]) if len(axes) == 1 else None
            ranks = dist.get_process_group_ranks(group) if group is not None else sorted(where)
            places = [where[rank] for rank in ranks]
            self._of_mesh[key] = self._known(param.device, ranks, places, group)
        return self._of_mesh[key]

    def _known(
        self,
        device: torch.device,
        ranks: list[int],
        coordinates: Sequence[tuple[int, ...]],
        group: Any,
    ) -> Ranks:
        key = device, tuple(ranks), tuple(coordinates), id(group)
        if key not in self._ranks:
            self._ranks[key] = Ranks(ranks, device, coordinates, group)
        return self._ranks[key]


def _places(mesh: Any, axes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Where each rank is in these axes of a mesh that is where this one is in the others."""
    here, everyone = mesh.get_coordinate(), mesh.mesh
    lines = [range(n) if d in axes else (here[d],) for d, n in enumerate(everyone.shape)]
    return {int(everyone[at]): tuple(at[d] for d in axes) for at in product(*lines)}


def has_free_rows(param: Any, group: Mapping[str, Any]) -> bool:
    """Whether a DTensor is cut by rows alone, and these have a diagonal factor."""
    if not is_sharded(param) or group["batch_axes"]:
        return False
    cut = [p for p in param.placements if not p.is_replicate()]
    layout = unit_of(param, group).layout
    return (
        bool(cut)
        and all(getattr(p, "dim", None) == 0 for p in cut)
        and layout is not None
        and layout.has_diagonal_rows
        and layout.sizes[0] == param.shape[0]
        and has_whole_blocks(param, group)
    )


def _volume(param: Tensor, group: Mapping[str, Any]) -> Volume:
    layout = unit_of(param, group).layout
    assert layout is not None
    free = has_free_rows(param, group)
    return Volume(param.numel(), summed_elements(layout) if free else None)


def _check_group(group: Any) -> None:
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(group).__name__}; pass torch.distributed.group.WORLD, "
            "mesh.get_group() or what new_group() gives to its members"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group is one that this rank is no member of; pass one that it is")
