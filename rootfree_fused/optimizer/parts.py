"""Gradients of micro-batches added up: the buffers, their counts, and what a step takes of them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import state_dtype
from ..ops.methods import DiagonalMethod
from ..reference import square_weights
from .amp_and_graphs import Scaling
from .known_tensors import reader
from .shards import as_part_of, local

_HEADER = 16  # numbers by which ranks see that they accumulated alike
_ALIGNMENT = 16  # elements: kernels move 16 bytes at a time, and caches have lines of 64


def kind_of(group: Mapping[str, Any]) -> str | None:
    """What a group's method follows of micro-batches: "squares", "signs", or nothing of them."""
    if group.get("sign") == "micro":
        return "signs"
    return None if group.get("second_moment", "batch") == "batch" else "squares"


class Buffers(NamedTuple):
    """Of one parameter: plain tensors of this rank's part, and what `.grad` is for the time of a
    step.
    """

    param: weakref.ref[Tensor]
    total: Tensor
    part: Tensor | None
    grad: Tensor
    kind: str | None

    def fit(self, param: Tensor, kind: str | None) -> bool:
        """Whether they are right for what the parameter is now."""
        own, total = local(param), self.total
        return (
            self.kind == kind
            and total.shape == own.shape
            and total.device == own.device
            and total.dtype == state_dtype(own)
            and self.grad.shape == param.shape
        )


class Taken(NamedTuple):
    """Parameters of a group that have gradients, as they were checked, and where those go."""

    params: list[Tensor]
    kind: str | None
    grads: Callable[[], list[Tensor]]
    buffers: dict[int, Buffers]  # by the id of the parameter

    def lists(self) -> tuple[list[Tensor], list[Tensor]]:
        """The sums, and the parts that there are."""
        own = self.buffers.values()
        return [b.total for b in own], [b.part for b in own if b.part is not None]


class Accumulated:
    """What was accumulated since the last step.

    weight: the sum of the micro-batches' weights, by which the sums are to be divided.
    count: how many micro-batches there were. by_terms: whether weights are terms, or None.
    are_grads: whether the means are in the place of gradients already.
    are_of_ranks: whether the sums are those of all ranks already.
    touched: by the id of a parameter that had a gradient its buffers.
    made: how often buffers were made, of which a prepared step has those of one time.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Buffers] = {}
        self._dtypes: dict[int, torch.dtype | None] = {}
        self._scales: dict[float, Tensor] = {}
        self.made = 0
        self.touched: dict[int, Buffers] = {}
        self.forget()

    def forget(self) -> None:
        """Drop what was accumulated, and keep the memory."""
        self.give_back()
        self.weight, self.count = 0.0, 0
        self.by_terms: bool | None = None
        self.are_grads = self.are_of_ranks = False
        self.touched = {}
        self._first: list[Taken] = []
        self._open_backwards: set[int] = set()
        self._alone: dict[int, int] = {}  # micro-batches of each parameter that came alone

    def pending(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of the parameters that have something here."""
        return [p for p in params if id(p) in self.touched]

    def has_room(self, param: Tensor, kind: str | None) -> bool:
        """Whether the parameter has buffers, and these are right for what it is now."""
        known = self._buffers.get(id(param))
        return known is not None and known.param() is param and known.fit(param, kind)

    def prepare(self, params: Sequence[Tensor], kinds: Sequence[str | None]) -> None:
        """Make the buffers that parameters lack, one allocation for all of a dtype and device."""
        lacking: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, str | None]]] = {}
        for param, kind in zip(params, kinds, strict=True):
            if not self.has_room(param, kind):
                own = local(param)
                lacking.setdefault((own.device, state_dtype(own)), []).append((param, kind))
        if lacking:  # and drop what was of parameters that are gone
            self._buffers = {k: b for k, b in self._buffers.items() if b.param() is not None}
            self.made += 1
        for (device, dtype), owners in lacking.items():
            sizes = [-(-local(p).numel() // _ALIGNMENT) * _ALIGNMENT for p, _ in owners]
            wanted = [size for size, (_, kind) in zip(sizes, owners, strict=True) if kind]
            totals, parts = (
                iter(torch.empty(sum(of), dtype=dtype, device=device).split(of) if of else ())
                for of in (sizes, wanted)
            )
            for param, kind in owners:
                total = _like(next(totals), local(param))
                part = _like(next(parts), local(param)) if kind else None
                grad = as_part_of(param, total)
                self._buffers[id(param)] = Buffers(weakref.ref(param), total, part, grad, kind)

    def taken(self, params: list[Tensor], kind: str | None) -> Taken:
        """What `add` takes of parameters that have a gradient and buffers."""
        buffers = {id(param): self._buffers[id(param)] for param in params}
        return Taken(params, kind, reader(params), buffers)

    def add(
        self,
        takens: list[Taken],
        weight: float,
        given: Mapping[Tensor, Tensor],
        given_weight: float = 1.0,
    ) -> None:
        """Take the gradients of these parameters.

        given: by the parameter what is added, times its weight, instead of the gradient's square.
        """
        alike = len(takens) == len(self._first) and all(map(operator.is_, takens, self._first))
        for kind in dict.fromkeys(taken.kind for taken in takens):
            own = [taken for taken in takens if taken.kind == kind]
            if not given and (alike or not self.touched):
                totals, parts = zip(*(taken.lists() for taken in own), strict=True)
                grads = [taken.grads() for taken in own]
                _add_(kind, chain(*totals), chain(*parts), chain(*grads), weight, not self.touched)
                continue
            for taken in own:
                self._add_one_by_one(taken, weight, given, given_weight)
        if not self.touched:
            self._first = takens
        for taken in takens:
            if not alike:
                self.touched.update(taken.buffers)
            for param in taken.params:
                param.grad = None

    def _add_one_by_one(
        self,
        taken: Taken,
        weight: float,
        given: Mapping[Tensor, Tensor],
        given_weight: float,
    ) -> None:
        """Where parameters have gradients in other micro-batches, or squares that are given."""
        columns = zip(taken.params, taken.buffers.items(), taken.grads(), strict=True)
        for param, (key, own), grad in columns:
            first = key not in self.touched
            told = param in given and own.part is not None
            parts = [] if told or own.part is None else [own.part]
            _add_(taken.kind, [own.total], parts, [grad], weight, first)
            if told:
                assert own.part is not None
                if first:
                    own.part.zero_()
                own.part.add_(local(given[param]), alpha=given_weight)

    def counted(self, weight: float, parts: int, by_terms: bool) -> None:
        """Count what `add` added of a micro-batch, or of so many at once."""
        self.weight, self.count = self.weight + weight, self.count + parts
        self.by_terms = by_terms

    def note_backward(self) -> None:
        """Note that a backward is on its way, until it has ended."""
        backward = torch._C._current_graph_task_id()
        if backward not in self._open_backwards:
            self._open_backwards.add(backward)
            ended = partial(self._open_backwards.discard, backward)
            torch.autograd.Variable._execution_engine.queue_callback(ended)

    def check_backwards(self) -> None:
        """Raise a RuntimeError where one failed on its way, so that half of it is here."""
        if self._open_backwards:
            raise RuntimeError(
                "a backward whose gradients were taken as they came has not ended; zero_grad() to "
                "drop what is there of it"
            )

    def were_replaced(self) -> bool:
        """Whether other gradients are where those are that parts belong to."""
        own = [buffers for buffers in self.touched.values() if buffers.part is not None]
        found = [(buffers.param(), buffers.grad) for buffers in own]
        return any(param is not None and param.grad is not grad for param, grad in found)

    def counted_alone(self, param: Tensor) -> None:
        """The same of one parameter, whose own backwards are counted: all see the most of any."""
        self._alone[id(param)] = self._alone.get(id(param), 0) + 1
        self.count = max(self.count, self._alone[id(param)])
        self.weight, self.by_terms = float(self.count), False

    # As gradients -----------------------------------------------------------------------------

    def put(self) -> None:
        """Put sums in the place of gradients, until `give_back`.

        Raises:
            ValueError: a parameter is another one than it was; then nothing is there.
        """
        for key, own in self.touched.items():
            param = own.param()
            if param is None:
                continue
            try:
                if own.grad.dtype != param.dtype:
                    self._dtypes[key] = param.grad_dtype
                    param.grad_dtype = own.grad.dtype
                param.grad = own.grad
            except RuntimeError as error:  # torch's, for another shape or device
                self.give_back()
                raise ValueError(
                    f"a parameter of shape {tuple(own.grad.shape)} changed since accumulate(), to "
                    f"{tuple(param.shape)} on {param.device}: {error}; zero_grad() drops what is "
                    "there"
                ) from None

    def give_back(self) -> None:
        """Take them away again, and leave what is no sum."""
        for key, own in self.touched.items():
            param = own.param()
            if param is None:
                continue
            if param.grad is own.grad:
                param.grad = None
            if key in self._dtypes and param.grad is None:
                param.grad_dtype = self._dtypes[key]
        self._dtypes = {}

    def become_means(self) -> None:
        """Divide the sums, and what is beside them, by their weights."""
        own = self.touched.values()
        if self.weight != 1:
            torch._foreach_mul_([buffers.total for buffers in own], 1 / self.weight)
            for kind, power in (("squares", 2), ("signs", 1)):
                parts = [b.part for b in own if b.part is not None and b.kind == kind]
                if parts:
                    torch._foreach_mul_(parts, self.weight**-power)
        self.weight, self.are_grads = 1.0, True

    def scaled(self, scaling: Scaling) -> Scaling:
        """A scaler's tensors as they are for sums, which are `weight` times the gradients."""
        if self.weight == 1:
            return scaling
        if self.weight not in self._scales:
            device = next(iter(self.touched.values())).total.device
            scale = torch.tensor(self.weight, dtype=torch.float64, device="cpu")
            self._scales = {self.weight: scale if device.type == "mps" else scale.to(device)}
        scale = self._scales[self.weight]
        if "grad_scale" in scaling:
            scale = scale * scaling["grad_scale"].to(scale.device).double().reshape(())
        return {**scaling, "grad_scale": scale}

    def of(self, group: Mapping[str, Any], params: Sequence[Tensor]) -> Parts | None:
        """What a step on these parameters of a group takes beside the sums."""
        if not self.count or kind_of(group) is None:
            return None
        parts = [self.touched[id(param)].part for param in params]
        return Parts([part for part in parts if part is not None], self)

    # Many ranks -------------------------------------------------------------------------------

    def sum_over(
        self, process_group: Any, params: Sequence[Tensor], fault: Exception | None
    ) -> None:
        """Sum over the ranks of a group, whose micro-batches then are all this rank's.

        fault: why this rank cannot, of which others are told.
        """
        from torch import distributed

        if fault and not distributed.is_initialized():
            raise fault
        every = [] if fault else [self._buffers[id(p)] for p in params]
        device = params[0].device
        flats = _flats(every)
        header = [self.weight, self.count, self.by_terms is True, fault is not None]
        header += [len(every), len(flats), *(flat.numel() for flat in flats)]
        header = (header + [0.0] * _HEADER)[:_HEADER]
        own = torch.tensor(header, dtype=torch.float64, device=device)
        size = distributed.get_world_size(process_group)
        found = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(found, own, group=process_group)
        rows = torch.stack(found).tolist()
        if fault:
            raise fault
        if faulty := [rank for rank, row in enumerate(rows) if row[3]]:
            raise RuntimeError(f"rank {faulty[0]} cannot sum what it accumulated, and says why")
        by_terms = {row[2] for row in rows if row[1]}
        if any(row[4:] != rows[0][4:] for row in rows) or len(by_terms) > 1:
            raise RuntimeError(
                "ranks accumulated different things (terms, parameters, allocations, elements): "
                f"{[tuple(map(int, [row[2], *row[4:]])) for row in rows]}; build the same "
                "optimizer on each, and pass terms= on all or on none"
            )
        there = [int(id(p) in self.touched) for p in params]
        touched = torch.tensor(there, dtype=torch.uint8, device=device)
        for buffers, param in zip(every, params, strict=True):
            if id(param) not in self.touched:
                buffers.total.zero_()
                if buffers.part is not None:
                    buffers.part.zero_()
        distributed.all_reduce(touched, distributed.ReduceOp.MAX, group=process_group)
        for flat in flats:
            distributed.all_reduce(flat, group=process_group)
        self.weight, self.count = sum(r[0] for r in rows), int(sum(r[1] for r in rows))
        self.by_terms = True in by_terms
        anywhere = zip(params, every, touched.tolist(), strict=True)
        self.touched = {id(param): buffers for param, buffers, there in anywhere if there}
        self.are_of_ranks = bool(self.touched)


class Parts(NamedTuple):
    """What a step takes of micro-batches beside their mean gradient, one tensor a parameter."""

    tensors: list[Tensor]
    accumulated: Accumulated

    def at(self, indices: Sequence[int]) -> Parts:
        """Those of the parameters at these places."""
        return self._replace(tensors=[self.tensors[i] for i in indices])


def of_operator(
    method: DiagonalMethod, parts: Parts | None, group: Mapping[str, Any]
) -> dict[str, Any]:
    """The parts, and what to make of them, as arguments of a method's operator."""
    if parts is None:
        return {}
    return {"parts": parts.tensors, **weights_of(method, parts, group)}


def weights_of(
    method: DiagonalMethod, parts: Parts | None, group: Mapping[str, Any]
) -> dict[str, float]:
    """What a method makes of the parts."""
    if parts is None:
        return {}
    of = parts.accumulated
    if method.parts == "signs":
        return {"part_weight": 1 / of.weight}
    weights = square_weights(group["second_moment"], of.count)
    return dict(zip(method.weights, weights, strict=True))


def _add_(
    kind: str | None,
    totals: Iterable[Tensor],
    parts: Iterable[Tensor],
    grads: Iterable[Tensor],
    weight: float,
    first: bool,
) -> None:
    torch.ops.rootfree_fused.accumulate_(
        list(totals),
        list(parts),
        list(grads),
        weight=weight,
        signs=kind == "signs",
        first=first,
    )


def _flats(every: Iterable[Buffers]) -> list[Tensor]:
    """The allocations of some buffers, in the order of these."""
    tensors = [t for buffers in every for t in (buffers.total, buffers.part) if t is not None]
    bases = [tensor if tensor._base is None else tensor._base for tensor in tensors]
    return list({id(base): base for base in bases}.values())


def _like(flat: Tensor, own: Tensor) -> Tensor:
    """The first elements of a flat tensor as those of another lie, or else contiguous."""
    dense = torch.empty_like(own, device="meta")
    return flat.as_strided(own.shape, dense.stride(), flat.storage_offset())
