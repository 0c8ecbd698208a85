"""Who shares which matrices, and who of these owns the factors."""

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
from .exchange import Ranks
from .groups import Group, trains
from .joint import unit_of
from .owners import Cost, owners_of

Replicas = Literal["share", "repeat"]
REPLICAS = get_args(Replicas)


@dataclass(frozen=True)
class Held:
    """Who shares a matrix, and which of them owns its factors."""

    ranks: Ranks
    owner: int

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
        self._alone: Any = None  # the group of this rank

    def shares(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the factors of a parameter are one rank's."""
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
        """Give an owner to what has none; what has one keeps it.

        Group by group, so that it does not matter when, and of how many groups, someone asks.
        """
        loads: dict[int, list[Cost]] = {}
        for group in groups:
            new: dict[int, tuple[Ranks, list[tuple[Tensor, Cost]]]] = {}
            for param in filter(trains, group["params"]):
                if not self.shares(param, group):
                    continue
                ranks, cost = self._ranks_of(param), self._cost(param, group)
                of = loads.setdefault(id(ranks), [Cost(0, 0)] * ranks.size)
                if param in self._held:
                    of[self._held[param].owner] += cost
                else:
                    new.setdefault(id(ranks), (ranks, []))[1].append((param, cost))
            for key, (ranks, found) in new.items():
                owners = owners_of([cost for _, cost in found], loads[key])
                for (param, cost), owner in zip(found, owners, strict=True):
                    self._held[param] = Held(ranks, owner)
                    loads[key][owner] += cost

    def _ranks_of(self, param: Any) -> Ranks:
        if not is_sharded(param):
            count = dist.get_world_size(self._process_group)
            return self._known(self._process_group, param.device, [(r,) for r in range(count)])
        mesh, shared = param.device_mesh, list(range(param.device_mesh.ndim))
        if self._replicas == "repeat":
            shared = [d for d in shared if not param.placements[d].is_replicate()]
        if len(shared) < mesh.ndim:
            if not shared:
                self._alone = self._alone or _alone()
                return self._known(self._alone, param.device, [(0,)])
            mesh = mesh[tuple(_names(mesh)[d] for d in shared)]
        if mesh.ndim > 1:
            _names(mesh)
        group = (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
        places = product(*map(range, mesh.mesh.shape))
        where = {int(mesh.mesh[at]): at for at in places}
        ranks = dist.get_process_group_ranks(group)
        return self._known(group, param.device, [where[rank] for rank in ranks])

    def _known(self, group: Any, device: torch.device, coordinates: list[tuple[int, ...]]) -> Ranks:
        key = id(group), device, tuple(coordinates)
        if key not in self._ranks:
            self._ranks[key] = Ranks(group, device, coordinates)
        return self._ranks[key]


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


def _names(mesh: Any) -> tuple[str, ...]:
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(
            f"a parameter lies on {mesh}, a mesh of {mesh.ndim} axes without names; pass "
            "mesh_dim_names to init_device_mesh"
        )
    found: tuple[str, ...] = names
    return found


def _alone() -> Any:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
