"""Matrices that several ranks step together: one owns the factors, each has its part of the rest.

Or each has some rows of a matrix, and they sum what all rows enter (`staying`).
What travels, and who owns what, is agreed at the first step on the matrices that there are: a
collective, and the last one of which sizes are told. Every later step has two messages a pair of
ranks and wave, the first of which says whether all step on the same gradients with the same
settings.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.checks import DTYPES, is_sharded, state_dtype
from .agreement import ANEW, FAULT, check_told, told, trouble_of, word_of
from .amp_and_graphs import Scaling
from .exchange import Box, Matrix, Wave, are_parts_of, senders_of, waves_of
from .groups import Group, trains
from .holders import Held, Holders, Replicas
from .owners import Cost
from .ranks import Ranks
from .shards import local, local_state
from .state import EVERYWHERE, Initial, State
from .staying import RowsOfRanks

PATIENCE = 60.0  # seconds that a rank that saves waits for the others


class Sharing(Holders):
    """Which matrices are shared, by whom, and what they exchange.

    update_dtype: in which updates travel, None for that of the state.
    """

    def __init__(
        self,
        process_group: Any,
        replicas: Replicas,
        update_dtype: torch.dtype | None,
        cost: Callable[[Tensor, Group], Cost],
    ) -> None:
        if update_dtype is not None and update_dtype not in DTYPES:
            raise ValueError(
                f"update_dtype is {update_dtype!r}; pass torch.bfloat16 to send half the bytes, or "
                "None for the dtype of the state"
            )
        super().__init__(process_group, replicas, cost)
        self._update_dtype = update_dtype
        self._local = WeakTensorKeyDictionary()
        self._agreed: list[tuple[int, Tensor]] | None = None
        self._waves: dict[int, list[Wave]] = {}
        self._shared: set[int] = set()  # ids of the matrices in these
        self._staying: dict[int, RowsOfRanks] = {}  # of some of these
        self._begun = 0

    def state_here(self, param: Tensor, state: State, group: Mapping[str, Any]) -> State:
        """Of a state what this rank steps: nothing where another does, or its own members or rows.

        The same object as long as the tensors are the same.
        """
        stays = self.stays(param, group)
        if self.shares(param, group) and not stays:
            return state if self._held[param].here else {}
        if not is_sharded(param):
            return state
        own: State
        values, own = self._local.get(param, ((), {}))
        if len(values) != len(state) or not all(map(operator.is_, values, state.values())):
            empty = not local(param).numel() and not stays
            own = {} if empty else local_state(state)
            self._local[param] = tuple(state.values()), own
        return own

    @contextmanager
    def without_weak_references(self) -> Iterator[None]:
        """Without any to a parameter for a time."""
        held = list(self._held.items())
        self._held.clear()
        self._local.clear()
        try:
            yield
        finally:
            self._held.update(held)

    # What --------------------------------------------------------------------------------------

    def has_changed(self, groups: Sequence[Group]) -> bool:
        """Whether what trains is other than what ranks agreed on, or in other groups."""
        now, agreed = _trained(groups), self._agreed
        if agreed is None or len(now) != len(agreed):
            return True
        if any(a is not b or i != j for (i, a), (j, b) in zip(now, agreed, strict=True)):
            return True
        # A load may have brought settings with which rows do not stay.
        return not all(self.stays(p, groups[i]) for i, p in now if id(p) in self._staying)

    @property
    def has_plan(self) -> bool:
        """Whether ranks have agreed before, and on some matrix."""
        return any(self._waves.values())

    def agree(self, name: str, groups: Sequence[Group], fault: Exception | None = None) -> None:
        """Tell all ranks which matrices there are, and plan what they exchange.

        fault: why this rank takes no step.

        Raises:
            RuntimeError: the ranks do not have the same, or one has a fault; on all of them.
        """
        now, self._agreed = _trained(groups), None
        self.assign(groups)
        of: dict[int, tuple[Ranks, list[tuple[int, Any]]]] = {}
        for index, param in now:
            if self.shares(param, groups[index]):
                ranks = self._held[param].ranks
                of.setdefault(id(ranks), (ranks, []))[1].append((index, param))
        planned: dict[int, list[Wave]] = {index: [] for index in range(len(groups))}
        staying: dict[int, RowsOfRanks] = {}
        for ranks, own in of.values():
            what = [self._told(param, index, name, groups) for index, param in own]
            everyones = ranks.everyones((_text_of(fault), what, [_box(param) for _, param in own]))
            if trouble := trouble_of([(each, False, []) for each, *_ in everyones]):
                raise RuntimeError(trouble)
            check_told([what for _, what, _ in everyones])
            for index in planned:
                matrices, rows = [], []
                for i, (at, param) in enumerate(own):
                    if at != index:
                        continue
                    matrix = self._matrix(param, ranks, [boxes[i] for *_, boxes in everyones])
                    if self.stays(param, groups[index]):
                        rows.append(RowsOfRanks(param, ranks, ranks.rank in matrix.senders))
                        staying[id(param)] = rows[-1]
                    else:
                        matrices.append(matrix)
                waves = waves_of(matrices, ranks, rows)
                for first, wave in enumerate(waves):
                    wave.is_first = first == 0
                _allocate(waves)
                planned[index] += waves
        self._waves, self._agreed, self._staying = planned, now, staying
        self._shared = {id(param) for _, own in of.values() for _, param in own}

    def _told(self, param: Any, index: int, name: str, groups: Sequence[Group]) -> str:
        held, dtype = self._held[param], groups[index]["factor_dtype"]
        placements = param.placements if is_sharded(param) else "whole"
        where = "in rows" if self.stays(param, groups[index]) else f"owned by {held.owner}"
        return (
            f"{name} {tuple(param.shape)} {param.dtype} {placements} in group {index}, {where}, "
            f"with factor_dtype {dtype}, update_dtype {self._update_dtype}, replicas "
            f"{self._replicas!r}"
        )

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
        return Matrix(param, dtype, wire, owner, boxes, senders)

    # A step ------------------------------------------------------------------------------------

    def waves(self, index: int) -> list[Wave]:
        """Of a group."""
        return self._waves.get(index, [])

    def rows_of(self, param: Tensor) -> RowsOfRanks:
        """Of a parameter whose rows stay."""
        return self._staying[id(param)]

    def begin(
        self,
        groups: Sequence[Group],
        states: dict[Any, Any],
        scaling: Scaling,
        fault: Exception | None = None,
        anew: bool = False,
    ) -> None:
        """Bring the gradients of the first waves to their owners.

        states: of the parameters. fault: why this rank takes no step, which the others are told.
        anew: whether it has other parameters than those that were agreed on, and takes none before
        all agree on new ones.

        Raises:
            RuntimeError: another rank has a fault, or other gradients, settings or parameters.
        """
        self._begun += 1
        # Of a rank that takes no step the others read no more than its fault.
        what = [] if fault else told(groups, self._shared, states, self._begun, scaling)
        word, status = word_of(what), FAULT if fault else ANEW if anew else 0
        for rows in self._staying.values():
            rows.grad_scale = scaling["grad_scale"].item() if "grad_scale" in scaling else 1.0
        found: dict[int, tuple[Ranks, bool]] = {}
        for wave in (wave for waves in self._waves.values() for wave in waves if wave.is_first):
            heads = wave.gather({} if anew else _gradients(wave, fault), (word, status)).tolist()
            alike = all(state == status and (anew or of == word) for of, state in heads)
            known = found.get(id(wave.ranks), (wave.ranks, False))[1]
            found[id(wave.ranks)] = wave.ranks, known or fault is not None or not alike
        unlike = any(own for _, own in found.values())
        # Ranks of several meshes tell those of one what they know of another.
        for ranks, _ in [*found.values()] * len(found) if len(found) > 1 else []:
            unlike = ranks.any(unlike)
        if not unlike:
            return
        everyones = [ranks.everyones((_text_of(fault), anew, what)) for ranks, _ in found.values()]
        if fault is None:
            troubles = list(filter(None, map(trouble_of, everyones)))
            raise RuntimeError(
                (troubles or ["a rank that shares other matrices took no step, and so did none"])[0]
            )

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

    def saved(
        self,
        param: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Any],
        spec: Mapping[str, Initial],
    ) -> Any:
        """A copy of the state of a parameter as all ranks save it, a collective.

        Of a DTensor each tensor that its owner has whole, or that all ranks have, is a DTensor of
        rows, so that a checkpoint does not tell who they were; of a replica it is whole on every
        rank.
        """
        if param not in self._held:
            return state
        held: Held = self._held[param]
        stays = self.stays(param, group)

        def spread(value: Any, shape: tuple[int, ...]) -> Any:
            if stays:
                return value if is_sharded(value) else held.ranks.own_rows(value)
            how = held.ranks.by_rows if is_sharded(param) else held.ranks.broadcast
            return how(value, shape, held.owner)

        return {
            key: value if key in EVERYWHERE or key not in spec else spread(value, spec[key].shape)
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
        if self.has_members(param, group):
            return
        if is_sharded(param) and not self.shares(param, group):
            if group["batch_axes"] and group.get("initial_square_avg") == "auto":
                raise ValueError(
                    f"{name} is {where} of shape {tuple(param.shape)} without factors, cut across "
                    "members that batch_axes names, each of which would start at its own gradient; "
                    "pass initial_square_avg=1.0, or give it a group with batch_axes=0"
                )
            if not by_element:
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


def _trained(groups: Sequence[Group]) -> list[tuple[int, Tensor]]:
    return [(i, p) for i, group in enumerate(groups) for p in group["params"] if trains(p)]


def _text_of(fault: Exception | None) -> str | None:
    return None if fault is None else f"{type(fault).__name__}: {fault}"


def _gradients(wave: Wave, fault: Exception | None) -> dict[int, Tensor]:
    """This rank's parts; with a fault none, but others may need it to lay theirs out."""
    if fault is None:
        return wave.own_gradients()
    with suppress(Exception):
        wave.own_gradients()
    return {}


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
    made = {
        (dtype, device): [torch.zeros(count, dtype=dtype, device=device) for _ in range(2)]
        for (dtype, device), count in needed.items()
    }
    for wave in waves:
        at = dict.fromkeys(made, 0)
        for matrix in wave.owned():
            key = matrix.dtype, wave.ranks.device
            first, last = at[key], at[key] + matrix.param.numel()
            matrix.grad, matrix.moved = (
                flat[first:last].view(matrix.param.shape) for flat in made[key]
            )
            matrix.moved.grad = matrix.grad
            at[key] = last
