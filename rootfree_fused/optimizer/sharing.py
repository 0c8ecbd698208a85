"""Matrices that several ranks step together: one owns the factors, each has its part of the rest.

What travels, and who owns what, is agreed at the first step on the matrices that there are: a
collective, and the last one of which sizes are told. Every later step has two messages a pair of
ranks and wave, the first of which says whether all step on the same gradients with the same
settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.checks import DTYPES, is_sharded, state_dtype
from .agreement import check_told, settings_told, trouble_of, word_of
from .exchange import Box, Matrix, Ranks, Wave, are_parts_of, senders_of, waves_of
from .groups import Group, trains
from .joint import unit_of
from .owners import Cost, owners_of
from .shards import local, local_state
from .state import Initial, State

Replicas = Literal["share", "repeat"]
REPLICAS = get_args(Replicas)
PATIENCE = 60.0  # seconds that a rank that saves waits for the others


@dataclass(frozen=True)
class Held:
    """Who shares a matrix, and which of them owns its factors."""

    ranks: Ranks
    owner: int

    @property
    def here(self) -> bool:
        return self.owner == self.ranks.rank


class Sharing:
    """Which matrices are shared, by whom, and what they exchange.

    process_group: of replicas that are no DTensors, as DistributedDataParallel has them; None where
        each of them does all. cost: of a parameter of a group.
    """

    def __init__(
        self,
        process_group: Any,
        replicas: Replicas,
        update_dtype: torch.dtype | None,
        cost: Callable[[Tensor, Group], Cost],
    ) -> None:
        if replicas not in REPLICAS:
            raise ValueError(f"replicas is {replicas!r}; pass 'share' or 'repeat'")
        if update_dtype is not None and update_dtype not in DTYPES:
            raise ValueError(
                f"update_dtype is {update_dtype!r}; pass torch.bfloat16 to send half the bytes, or "
                "None for the dtype of the state"
            )
        self._process_group, self._replicas = process_group, replicas
        self._update_dtype, self._cost = update_dtype, cost
        self._held = WeakTensorKeyDictionary()
        self._local = WeakTensorKeyDictionary()
        self._ranks: dict[Any, Ranks] = {}
        self._alone: Any = None  # the group of this rank
        self._agreed: list[Tensor] = []
        self._waves: dict[int, list[Wave]] = {}

    # Who ---------------------------------------------------------------------------------------

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
            is_sharded(p) or self.shares(p, group) for group in groups for p in _matrices(group)
        )

    def state_here(self, param: Tensor, state: State, group: Mapping[str, Any]) -> State:
        """Of a state what this rank steps: nothing where another does, or its own members.

        The same object as long as the tensors are the same.
        """
        if self.shares(param, group):
            return state if self._held[param].here else {}
        if not is_sharded(param):
            return state
        own: State
        values, own = self._local.get(param, ((), {}))
        if len(values) != len(state) or not all(map(_is, values, state.values())):
            empty = not local(param).numel()
            own = {} if empty else local_state(state)
            self._local[param] = tuple(state.values()), own
        return own

    def held(self, param: Tensor, groups: Sequence[Group]) -> Held:
        """Where a shared parameter of these groups has its factors."""
        if param not in self._held:
            self._assign(groups)
        held: Held = self._held[param]
        return held

    def _assign(self, groups: Sequence[Group]) -> None:
        """Give an owner to what has none; what has one keeps it."""
        new: dict[int, tuple[Ranks, list[tuple[Tensor, Cost]]]] = {}
        loads: dict[int, list[Cost]] = {}
        for group in groups:
            for param in _matrices(group):
                if not self.shares(param, group):
                    continue
                ranks, cost = self._ranks_of(param), self._cost(param, group)
                of = loads.setdefault(id(ranks), [Cost(0, 0)] * ranks.size)
                if param in self._held:
                    owner = self._held[param].owner
                    had = of[owner]
                    of[owner] = Cost(had.flops + cost.flops, had.bytes + cost.bytes)
                else:
                    new.setdefault(id(ranks), (ranks, []))[1].append((param, cost))
        for key, (ranks, found) in new.items():
            owners = owners_of([cost for _, cost in found], loads[key])
            for (param, _), owner in zip(found, owners, strict=True):
                self._held[param] = Held(ranks, owner)

    def _ranks_of(self, param: Any) -> Ranks:
        import torch.distributed as dist

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
        where = {int(mesh.mesh[at]): tuple(map(int, at)) for at in _places(mesh.mesh.shape)}
        ranks = dist.get_process_group_ranks(group)
        return self._known(group, param.device, [where[rank] for rank in ranks])

    def _known(self, group: Any, device: torch.device, coordinates: list[tuple[int, ...]]) -> Ranks:
        key = id(group), device, tuple(coordinates)
        if key not in self._ranks:
            self._ranks[key] = Ranks(group, device, coordinates)
        return self._ranks[key]

    # What --------------------------------------------------------------------------------------

    def agree(self, name: str, groups: Sequence[Group]) -> bool:
        """Where the matrices are others than at the last step, tell all ranks what there is.

        Returns whether they were others.

        Raises:
            RuntimeError: the ranks do not have the same; on all of them.
        """
        shared = [
            (index, param)
            for index, group in enumerate(groups)
            for param in _matrices(group)
            if self.shares(param, group)
        ]
        params = [param for _, param in shared]
        if len(params) == len(self._agreed) and all(map(_is, params, self._agreed)):
            return False
        of: dict[int, tuple[Ranks, list[tuple[int, Any]]]] = {}
        for index, param in shared:
            ranks = self.held(param, groups).ranks
            of.setdefault(id(ranks), (ranks, []))[1].append((index, param))
        self._waves = {index: [] for index in range(len(groups))}
        for ranks, own in of.values():
            told = [self._told(param, index, name) for index, param in own]
            everyones = ranks.everyones((told, [_box(param) for _, param in own]))
            check_told([told for told, _ in everyones])
            for index in self._waves:
                matrices = [
                    self._matrix(param, ranks, [boxes[i] for _, boxes in everyones])
                    for i, (at, param) in enumerate(own)
                    if at == index
                ]
                waves = waves_of(matrices, ranks)
                for first, wave in enumerate(waves):
                    wave.is_first = first == 0
                _allocate(waves)
                self._waves[index] += waves
        self._agreed = params
        return True

    def _told(self, param: Any, index: int, name: str) -> str:
        owner = self._held[param].owner
        placements = param.placements if is_sharded(param) else "whole"
        shape = tuple(param.shape)
        return f"{name} {shape} {param.dtype} {placements} in group {index}, owned by {owner}"

    def _matrix(self, param: Any, ranks: Ranks, boxes: list[Box]) -> Matrix:
        owner, dtype = self._held[param].owner, state_dtype(param)
        if not are_parts_of(boxes, param.shape):
            raise RuntimeError(
                f"a DTensor of shape {tuple(param.shape)} lies as {param.placements}, in parts "
                "that are not the whole; redistribute it to Shard or Replicate"
            )
        # By which axes of the mesh ranks differ that have the same.
        same = [0]
        if is_sharded(param) and len(ranks.coordinates[0]) == len(param.placements):
            same = [d for d, p in enumerate(param.placements) if p.is_replicate()]
        senders = senders_of(boxes, owner, ranks.coordinates, same)
        wire = self._update_dtype or dtype
        return Matrix(param, tuple(param.shape), dtype, wire, owner, boxes, senders)

    # A step ------------------------------------------------------------------------------------

    def waves(self, index: int) -> list[Wave]:
        """Of a group."""
        return self._waves.get(index, [])

    def begin(self, groups: Sequence[Group], fault: Exception | None = None) -> None:
        """Bring the gradients of the first waves to their owners.

        fault: why this rank takes no step, which the others are told.

        Raises:
            RuntimeError: another rank takes none, or steps on other gradients or settings.
        """
        word = word_of(groups)
        found: dict[int, tuple[Ranks, set[tuple[int, int]]]] = {}
        for index in self._waves:
            for wave in self._waves[index]:
                ranks = wave.ranks
                if wave.is_first:
                    grads = {} if fault else wave.own_gradients()
                    heads = wave.gather(grads, (word, int(fault is not None))).tolist()
                    found.setdefault(id(ranks), (ranks, set()))[1].update(map(tuple, heads))
        troubles = []
        for ranks, told in found.values():
            if told != {(word, 0)}:
                own = None if fault is None else f"{type(fault).__name__}: {fault}"
                troubles.append(trouble_of(ranks.everyones((own, settings_told(groups)))))
        if troubles and fault is None:
            raise RuntimeError(troubles[0])

    # Checkpoints -------------------------------------------------------------------------------

    def meet(self, what: str) -> None:
        """Wait for all ranks that share a matrix, a collective.

        Raises:
            RuntimeError: some have not come in PATIENCE.
        """
        for ranks in self._ranks.values():
            if (came := ranks.meet(PATIENCE)) < ranks.size:
                raise RuntimeError(
                    f"{what} was called on {came} of the {ranks.size} ranks that share matrices, "
                    "each of which has a part of the state; call it on all of them"
                )

    def saved(self, param: Tensor, state: Mapping[str, Any], spec: Mapping[str, Initial]) -> Any:
        """A copy of the state of a parameter as all ranks save it, a collective.

        Of a DTensor each tensor that its owner has whole is a DTensor of rows, so that a checkpoint
        does not tell who the owners were; of a replica it is whole on every rank.
        """
        if param not in self._held:
            return state
        held: Held = self._held[param]
        spread = held.ranks.by_rows if is_sharded(param) else held.ranks.broadcast
        return {
            key: value
            if key == "step" or key not in spec
            else spread(value, spec[key].shape, held.owner)
            for key, value in state.items()
        }

    # Checks ------------------------------------------------------------------------------------

    def check(self, name: str, param: Any, group: Group, *, by_element: bool) -> None:
        """Raise a ValueError for settings that parts of a parameter, or one rank, cannot step.

        by_element: whether vectors are updated so.
        """
        if not is_sharded(param) and not self.shares(param, group):
            return
        where = "a DTensor" if is_sharded(param) else "shared in process_group"
        if group["combine"] != "none":
            raise ValueError(
                f"{name} is {where} and combine is {group['combine']!r}, which joins it to another "
                "that may lie otherwise; pass combine='none'"
            )
        if is_sharded(param) and not self.shares(param, group):
            if not by_element and not self.has_members(param, group):
                raise ValueError(
                    f"{name} is {where} without factors and vector_method is "
                    f"{group['vector_method']!r}, which sees a vector as a whole; pass another one"
                )
        elif group["weight_decay"] and group.get("weight_decay_mode") == "momentum":
            raise ValueError(
                f"{name} is {where} and weight_decay_mode is 'momentum', which needs the whole "
                "parameter where its factors are; pass weight_decay_mode='decoupled'"
            )


def full(value: Any) -> Any:
    """A DTensor as the whole that it is, a collective; anything else as it is."""
    return value.full_tensor() if is_sharded(value) else value


def _matrices(group: Mapping[str, Any]) -> list[Tensor]:
    return list(filter(trains, group["params"]))


def _box(param: Any) -> Box:
    if not is_sharded(param):
        return Box((0,) * param.dim(), tuple(param.shape))
    (chunk,) = param.__create_chunk_list__()
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _allocate(waves: Sequence[Wave]) -> None:
    """Memory for the gradients and updates that this rank owns: that of one wave for all."""
    needed: dict[tuple[torch.dtype, torch.device], int] = {}
    for wave in waves:
        for key, count in wave.counts().items():
            needed[key] = max(needed.get(key, 0), count)
    flat = {
        (dtype, device): (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))
        for (dtype, device), count in needed.items()
    }
    made = {key: tuple(pair) for key, pair in flat.items()}
    for wave in waves:
        at = dict.fromkeys(made, 0)
        for matrix in wave.owned():
            key = matrix.dtype, wave.ranks.device
            first, count = at[key], math.prod(matrix.shape)
            grads, moves = made[key]
            matrix.grad = grads[first : first + count].view(matrix.shape)
            matrix.moved = moves[first : first + count].view(matrix.shape)
            matrix.moved.grad = matrix.grad
            at[key] = first + count


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
    import torch.distributed as dist

    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _places(shape: Sequence[int]) -> Iterable[tuple[int, ...]]:
    return product(*map(range, shape))


def _is(a: Any, b: Any) -> bool:
    return a is b
