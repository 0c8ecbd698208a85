"""Gradients of micro-batches added up: the buffers, their counts, and what a step takes of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import state_dtype, usable_gradients
from ..ops.methods import DiagonalMethod
from ..reference import square_weights
from .amp_and_graphs import Scaling
from .shards import as_part_of, local

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

    total: Tensor
    part: Tensor | None
    grad: Tensor
    kind: str | None


class Accumulated:
    """What was accumulated since the last step.

    weight: the sum of the micro-batches' weights, by which the sums are to be divided.
    count: how many micro-batches there were. by_terms: whether weights are terms, or None.
    are_grads: whether the means are in the place of gradients already.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Buffers] = {}
        self._params: dict[int, weakref.ref[Tensor]] = {}
        self._flats: list[Tensor] = []
        self._dtypes: dict[int, torch.dtype | None] = {}
        self._scales: dict[float, Tensor] = {}
        self.counts: dict[int, int] = {}  # of micro-batches, by the parameter, where there were any
        self.forget()

    def forget(self) -> None:
        """Drop what was accumulated, and keep the memory."""
        self.give_back()
        self.weight, self.count = 0.0, 0
        self.by_terms: bool | None = None
        self.are_grads = False
        self.counts = {}

    def pending(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of the parameters that have something here."""
        return [p for p in params if id(p) in self.counts]

    def fit(self, params: Sequence[Tensor], kinds: Sequence[str | None]) -> bool:
        """Whether all these parameters have the buffers that they need."""
        return all(self.fits(p, kind) for p, kind in zip(params, kinds, strict=True))

    def prepare(self, params: Sequence[Tensor], kinds: Sequence[str | None]) -> None:
        """Make the buffers that parameters lack, one allocation for all of a dtype and device."""
        lacking: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, str | None]]] = {}
        for param, kind in zip(params, kinds, strict=True):
            if not self.fits(param, kind):
                own = local(param)
                lacking.setdefault((own.device, state_dtype(own)), []).append((param, kind))
        for (device, dtype), owners in lacking.items():
            sizes = [-(-local(p).numel() // _ALIGNMENT) * _ALIGNMENT for p, _ in owners]
            wanted = [size for size, (_, kind) in zip(sizes, owners, strict=True) if kind]
            flats = [
                torch.empty(sum(of), dtype=dtype, device=device) for of in (sizes, wanted) if of
            ]
            totals = iter(flats[0].split(sizes))
            parts = iter(flats[1].split(wanted)) if wanted else iter(())
            for param, kind in owners:
                total = _like(next(totals), local(param))
                part = _like(next(parts), local(param)) if kind else None
                grad = as_part_of(param, total)
                self._buffers[id(param)] = Buffers(total, part, grad, kind)
                self._params[id(param)] = weakref.ref(param)
        if lacking:
            self._flats = [of._base for of in self._tensors() if of._base is not None]

    def fits(self, param: Tensor, kind: str | None) -> bool:
        """Whether the parameter's buffers are right for what it is now."""
        buffers, owner = self._buffers.get(id(param)), self._params.get(id(param))
        if buffers is None or owner is None or owner() is not param or buffers.kind != kind:
            return False
        own, total = local(param), buffers.total
        return (
            total.shape == own.shape
            and total.device == own.device
            and total.dtype == state_dtype(own)
            and buffers.grad.shape == param.shape
        )

    def _tensors(self) -> list[Tensor]:
        """All sums and parts, of parameters that are still there."""
        gone = [key for key, owner in self._params.items() if owner() is None]
        for key in gone:
            del self._buffers[key], self._params[key]
        found = [(b.total, b.part) for b in self._buffers.values()]
        return [t for pair in found for t in pair if t is not None]

    def add(
        self,
        params: Sequence[Tensor],
        weight: float,
        given: Mapping[Tensor, Tensor],
        given_weight: float = 1.0,
    ) -> None:
        """Take the gradients of these parameters, whose buffers are there.

        given: by the parameter what is added, times its weight, instead of the gradient's square.
        """
        calls: dict[tuple[str | None, bool], list[Tensor]] = {}
        for param in params:
            kind = self._buffers[id(param)].kind if param not in given else None
            calls.setdefault((kind, id(param) not in self.counts), []).append(param)
        for (kind, first), owners in calls.items():
            own = [self._buffers[id(p)] for p in owners]
            torch.ops.rootfree_fused.accumulate_(
                [buffers.total for buffers in own],
                [buffers.part for buffers in own] if kind else [],
                usable_gradients(owners),
                weight=weight,
                signs=kind == "signs",
                first=first,
            )
            for param in owners:
                part = self._buffers[id(param)].part
                if param in given and part is not None:
                    if first:
                        part.zero_()
                    part.add_(local(given[param]), alpha=given_weight)
        for param in params:
            param.grad = None

    def counted(self, params: Iterable[Tensor], weight: float, parts: int) -> None:
        """Count what `add` added of a micro-batch, or of so many at once."""
        for param in params:
            self.counts[id(param)] = self.counts.get(id(param), 0) + parts
        self.weight, self.count = self.weight + weight, self.count + parts

    def counted_alone(self, param: Tensor) -> None:
        """The same of one parameter, whose own backwards are counted: all see the most of any."""
        self.counted([param], 0.0, 0)
        self.counts[id(param)] += 1
        self.count = max(self.count, self.counts[id(param)])
        self.weight, self.by_terms = float(self.count), False

    # As gradients -----------------------------------------------------------------------------

    def put(self, params: Iterable[Tensor]) -> None:
        """Put sums in the place of gradients, until `give_back`."""
        for param in self.pending(params):
            grad = self._buffers[id(param)].grad
            if grad.dtype != param.dtype:
                self._dtypes[id(param)] = param.grad_dtype
                param.grad_dtype = grad.dtype
            param.grad = grad

    def give_back(self) -> None:
        """Take them away again, and leave what is no sum."""
        for key in self.counts:
            param = self._params[key]()
            if param is None:
                continue
            if param.grad is self._buffers[key].grad:
                param.grad = None
            if key in self._dtypes and param.grad is None:
                param.grad_dtype = self._dtypes[key]
        self._dtypes = {}

    def become_means(self) -> None:
        """Divide the sums, and what is beside them, by their weights."""
        own = [self._buffers[key] for key in self.counts]
        if self.weight != 1:
            torch._foreach_mul_([buffers.total for buffers in own], 1 / self.weight)
            for kind, power in (("squares", 2), ("signs", 1)):
                parts = [b.part for b in own if b.part is not None and b.kind == kind]
                if parts:
                    torch._foreach_mul_(parts, self.weight**-power)
        self.weight, self.are_grads = 1.0, True

    def scaled(self, scaling: Scaling, device: torch.device) -> Scaling:
        """A scaler's tensors as they are for sums, which are `weight` times the gradients."""
        if self.weight == 1:
            return scaling
        if self.weight not in self._scales:
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
        parts = [self._buffers[id(param)].part for param in params]
        return Parts([part for part in parts if part is not None], self)

    # Many ranks -------------------------------------------------------------------------------

    def sum_over(self, process_group: Any, params: Sequence[Tensor]) -> None:
        """Sum over the ranks of a group, whose micro-batches then are all this rank's."""
        from torch import distributed

        every = [self._buffers[id(p)] for p in params]
        device = every[0].total.device
        header = [self.weight, self.count, len(every), sum(b.total.numel() for b in every)]
        header += [sum(b.part is not None for b in every), self.by_terms is True]
        own = torch.tensor(header, dtype=torch.float64, device=device)
        size = distributed.get_world_size(process_group)
        found = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(found, own, group=process_group)
        rows = torch.stack(found).tolist()
        if any(row[2:] != rows[0][2:] for row in rows if row[1] or row is rows[0]):
            raise RuntimeError(
                f"ranks accumulated different things (parameters, elements, parts, terms): "
                f"{[tuple(map(int, row[2:])) for row in rows]}; build the same optimizer on each, "
                "and pass terms= on all or on none"
            )
        there = [int(id(p) in self.counts) for p in params]
        touched = torch.tensor(there, dtype=torch.uint8, device=device)
        for buffers, param in zip(every, params, strict=True):
            if id(param) not in self.counts:
                buffers.total.zero_()
                if buffers.part is not None:
                    buffers.part.zero_()
        distributed.all_reduce(touched, distributed.ReduceOp.MAX, group=process_group)
        for flat in {id(f): f for f in self._flats}.values():
            distributed.all_reduce(flat, group=process_group)
        self.weight, self.count = sum(r[0] for r in rows), int(sum(r[1] for r in rows))
        for param, anywhere in zip(params, touched.tolist(), strict=True):
            if anywhere:
                self.counts.setdefault(id(param), 0)


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


def _like(flat: Tensor, own: Tensor) -> Tensor:
    """The first elements of a flat tensor as those of another lie, or else contiguous."""
    dense = torch.empty_like(own, device="meta")
    return flat.as_strided(own.shape, dense.stride(), flat.storage_offset())
