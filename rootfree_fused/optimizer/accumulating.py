"""Micro-batches: gradients that are added up, and their squares, until a step takes them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from ..ops.checks import is_sharded
from .amp_and_graphs import Scaling
from .checks import check_gradient, check_squares, check_terms, name_of
from .groups import DeclaringOptimizer, Group, trains
from .known_tensors import KnownGradients
from .parts import Accumulated, Taken, kind_of

_UNUSED = "step() or zero_grad() first"


class AccumulatingOptimizer(DeclaringOptimizer):
    """An optimizer that takes the gradients of micro-batches before a step."""

    def __init__(self, params: Any, defaults: dict[str, Any], unknown: Mapping[str, Any]) -> None:
        self._start_accumulation()
        super().__init__(params, defaults, unknown)

    def _start_accumulation(self) -> None:
        self._accumulated = Accumulated()
        self._known: KnownGradients[Taken] = KnownGradients()
        self._hooks: list[RemovableHandle] = []

    @_disable_dynamo
    @torch.no_grad()
    def accumulate(
        self,
        terms: float | None = None,
        *,
        squares: Mapping[Tensor, Tensor] | None = None,
        parts: int = 1,
    ) -> None:
        """Take the gradients of a micro-batch: call it after each backward, then `step` once.

            for micro in batches:
                loss_fn(model(micro.x), micro.y).backward()    # a mean, not divided further
                optimizer.accumulate()
            optimizer.step()

        The step's gradient is the mean over micro-batches, which are added up in float32 (float64
        for float64 parameters) whatever the dtype of the gradients is. Each `.grad` becomes None.
        A parameter without a gradient in one of them counts as zero there. batch_size stays the
        number of terms of all of them together.

        Args:
            terms: how many loss terms this micro-batch averages, by which it then counts; with None
                all count alike, and one of several `parts` as so many. For all of a step or none.
            squares: of parameters with a `second_moment` other than "batch", the mean over parts of
                this micro-batch of their squared gradients, of the parameter's shape; others take
                the square of the micro-batch's own gradient. `micro.TokenSquares` makes them.
            parts: how many parts that is.

        Raises:
            RuntimeError: there is no gradient, they are taken by hooks, or `accumulated_grads` or
                `reduce_accumulated` has ended this accumulation.
            ValueError, TypeError: a gradient that no step could take, a value out of range; nothing
                was taken.

        Source: for squares, Roulet and Agarwala, "Per-example gradients: a new frontier for
        understanding and improving optimizers", arXiv 2510.00236; the formulas are ours.
        """
        if self._hooks:
            raise RuntimeError(
                "accumulate() was called, but accumulate_in_backward() takes the gradients; leave "
                "the call out, or remove() what that returned"
            )
        self._check_open()
        weight = self._weight_of(terms, parts)
        takens = self._take(squares or {})
        if not takens:
            raise RuntimeError("no parameter has a gradient; call backward() before accumulate()")
        self._accumulated.add(takens, weight, squares or {}, weight**2 / parts)
        self._accumulated.counted(weight, parts, terms is not None)

    @torch.no_grad()
    def accumulate_in_backward(self) -> RemovableHandle:
        """Have every gradient taken as soon as it is there, so that there never is a full set.

        A backward then is a micro-batch: call neither `accumulate` nor, before a step, anything
        else, and from one thread. Parameters that are added later are not among them, and a copy of
        the optimizer has none. A module that several reentrant checkpoints share has several
        gradients a backward, which would count as micro-batches: use `accumulate` there. remove()
        what is returned to end it.

        Raises:
            RuntimeError: it is so already, or something is accumulated; (backward) another
                optimizer has taken the gradient; (step) a backward has not ended: zero_grad() drops
                its half.
        """
        self._check_unused("accumulate_in_backward()")
        if self._hooks:
            raise RuntimeError(
                "accumulate_in_backward() was called already; remove() what it returned first"
            )
        optimizer = weakref.ref(self)

        def take(index: int, position: int, param: Tensor) -> None:
            owner = optimizer()
            if owner is not None and owner._hooks:
                owner._take_one(index, position, param)

        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(take, index, position))
            for index, group in enumerate(self.param_groups)
            for position, param in enumerate(group["params"])
            if trains(param)
        ]
        return _Hooks(self)

    @torch.no_grad()
    def accumulated_grads(self) -> list[Tensor]:
        """End an accumulation: put the mean gradients in the place of `.grad`, and return them.

        For what reads `.grad` before a step: clip_grad_norm_, and a gradient scaler, which looks
        for infs there. Means of float32 are `.grad` of bfloat16 parameters too, until the step.
        What clips them leaves the squares of micro-batches as they were.

        Raises:
            RuntimeError: nothing is accumulated.
        """
        accumulated = self._accumulated
        if not accumulated.count:
            raise RuntimeError("nothing is accumulated; call accumulate() after each backward")
        accumulated.check_backwards()
        if not accumulated.are_grads:
            self._check_taken_all()
            accumulated.put()
            accumulated.become_means()
        every = accumulated.pending(p for group in self.param_groups for p in group["params"])
        return [param.grad for param in every if param.grad is not None]

    @torch.no_grad()
    def reduce_accumulated(self, process_group: Any = None) -> None:
        """Sum what ranks accumulated, so that each rank's micro-batches are micro-batches of all.

        For DistributedDataParallel where every backward was under no_sync(): call it once before
        `step`, on every rank of the group. Where DistributedDataParallel averages gradients at each
        backward, and with FSDP2, a micro-batch is of all ranks already, and this is not called.

        Args:
            process_group: of torch.distributed; None for all ranks.

        Raises:
            RuntimeError: ranks accumulated different things, this or `accumulated_grads` was
                called, or another rank raises.
            ValueError: a parameter or its group's kind changed since `accumulate`.
            TypeError: parameters are DTensors. Nothing changed on any rank.
        """
        params, fault = [param for param, _ in self._trained()], None
        try:
            self._check_summable(params)
        except (RuntimeError, TypeError, ValueError) as error:
            fault = error
        self._accumulated.sum_over(process_group, params, fault)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim, and drop what was accumulated."""
        self._accumulated.forget()
        super().zero_grad(set_to_none)

    # For a step -------------------------------------------------------------------------------

    def _check_summable(self, params: list[Tensor]) -> None:
        """Raise where ranks could not sum what is accumulated; buffers for all of it."""
        self._check_open()
        self._accumulated.check_backwards()
        for index, group in enumerate(self.param_groups):
            self._check_same_kind(index, group, self._pending(group))
        if any(map(is_sharded, params)):
            raise TypeError(
                "parameters are DTensors, whose gradients FSDP2 reduces at each backward; leave "
                "reduce_accumulated() out"
            )
        self._prepare_all()

    def _buffers_made(self, group: Group) -> int | None:
        """Of which making are the parts that a group's step takes; None if it takes but means."""
        takes = bool(self._accumulated.count) and kind_of(group) is not None
        return self._accumulated.made if takes else None

    def _check_parts(self, index: int, group: Group) -> None:
        """Raise a ValueError for a second moment that needs more micro-batches than there are."""
        kind, count = group.get("second_moment", "batch"), self._accumulated.count or 1
        if kind in ("variance", "mean") and count < 2:
            raise ValueError(
                f"second_moment={kind!r} in group {index} needs at least 2 micro-batches a step, "
                f"got {count}; call optimizer.accumulate() after each backward"
            )

    def _check_micro_batches(self, scaling: Scaling) -> None:
        """Raise where a step could not be taken on what was accumulated."""
        accumulated = self._accumulated
        accumulated.check_backwards()
        for index, group in enumerate(self.param_groups):
            kind = kind_of(group)
            if any(accumulated.touched[id(p)].kind != kind for p in self._pending(group)):
                raise ValueError(
                    f"what group {index} takes of micro-batches changed since accumulate(), to "
                    f"{kind or 'their mean'}; set it back, or zero_grad() to drop what is there"
                )
        if not accumulated.are_grads:
            self._check_taken_all()
            if isinstance(getattr(self, "found_inf", None), int):  # the scaler looked at nothing
                self._check_before_scaler()
        elif accumulated.were_replaced():
            raise RuntimeError(
                ".grad was replaced since accumulated_grads(), and what is kept beside it is of "
                "others; change gradients in place, or zero_grad() to drop all"
            )
        if "found_inf" in scaling and "grad_scale" not in scaling and self._has_squares():
            raise ValueError(
                "scaler.unscale_(optimizer) was called where squares of micro-batches are "
                "accumulated, which it cannot unscale; leave it out, and pass amp_scaling=True"
            )

    def _pending(self, group: Group) -> list[Tensor]:
        return self._accumulated.pending(group["params"])

    def _has_squares(self) -> bool:
        return any(kind_of(group) == "squares" for group in self.param_groups)

    def _check_before_scaler(self) -> None:
        """Raise where a gradient scaler would look for infs in gradients that are not there."""
        accumulated = self._accumulated
        if not accumulated.count:
            return
        if not accumulated.are_grads:
            raise RuntimeError(
                f"{accumulated.count} micro-batches are accumulated, and a gradient scaler looks "
                "for infs in .grad; call optimizer.accumulated_grads() before scaler.step("
                "optimizer)"
            )
        if self._has_squares() and not all(group["amp_scaling"] for group in self.param_groups):
            raise ValueError(
                "squares of micro-batches are accumulated, and scaled squares cannot be unscaled "
                "later; pass amp_scaling=True"
            )

    def _check_taken_all(self) -> None:
        cure = "call accumulate() after each backward"
        if self._hooks:
            cure = (
                "DistributedDataParallel puts it there after the hooks: run each backward under "
                "no_sync(), and call reduce_accumulated() before the step"
            )
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    raise RuntimeError(
                        f"{name_of(index, position, group)} has a gradient that was not "
                        f"accumulated; {cure}, or zero_grad() to drop all"
                    )

    def _trained(self) -> list[tuple[Tensor, str | None]]:
        """All that may have a gradient, with what their method follows of micro-batches."""
        touched = self._accumulated.touched
        return [
            (param, kind_of(group))
            for group in self.param_groups
            for param in group["params"]
            if trains(param) or id(param) in touched
        ]

    def _take(self, squares: Mapping[Tensor, Tensor]) -> list[Taken]:
        """The parameters that have a gradient, of each group, after a check of all of them."""
        found: list[tuple[int, Group, Taken | None, list[Tensor]]] = []
        for index, group in enumerate(self.param_groups):
            known = self._known.find(index, group["params"])
            if known is None or known.kind != kind_of(group):
                own = [
                    self._checked_one(index, position, group)
                    for position, param in enumerate(group["params"])
                    if isinstance(param, Tensor) and param.grad is not None
                ]
                self._check_same_kind(index, group, own)
                found.append((index, group, None, own))
            else:
                found.append((index, group, known, known.params))
        if squares:
            every = [(p, kind_of(group)) for _, group, _, own in found for p in own]
            check_squares(squares, [p for p, _ in every], [kind for _, kind in every])
        if any(known is None for _, _, known, _ in found):
            self._prepare_all()
        takens = []
        for index, group, known, own in found:
            if known is None:
                known = self._accumulated.taken(own, kind_of(group))
                self._known.keep(index, group["params"], known)
            if own:
                takens.append(known)
        return takens

    def _check_same_kind(self, index: int, group: Group, params: list[Tensor]) -> None:
        """Raise a ValueError where what is there of these parameters could not be added to."""
        kind, touched = kind_of(group), self._accumulated.touched
        for param in params:
            if id(param) in touched and not touched[id(param)].fit(param, kind):
                raise ValueError(
                    f"a parameter of group {index}, now of shape {tuple(param.shape)} and "
                    f"{param.dtype}, or what the group takes of micro-batches, now "
                    f"{kind or 'their mean'}, changed since the last accumulate(); set it back, or "
                    "zero_grad() to drop what is there"
                )

    def _checked_one(self, index: int, position: int, group: Group) -> Tensor:
        """A parameter that has a gradient, after a check of both."""
        self._check_taken(index, position, group)
        param: Tensor = group["params"][position]
        check_gradient(name_of(index, position, group), param, param.grad)
        return param

    def _prepare_all(self) -> None:
        """Buffers for all that train, in one allocation."""
        every = self._trained()
        self._accumulated.prepare([p for p, _ in every], [kind for _, kind in every])

    @_disable_dynamo
    @torch.no_grad()
    def _take_one(self, index: int, position: int, param: Tensor) -> None:
        """As `accumulate`, of one parameter in the midst of a backward."""
        self._check_open()
        group = self.param_groups[index]
        if group["params"][position] is not param:
            return  # a step tells that it has a gradient
        if param.grad is None:
            raise RuntimeError(
                f"{name_of(index, position, group)} has no gradient in its own hook: another "
                "optimizer's accumulate_in_backward() took it; call it on one of them"
            )
        self._checked_one(index, position, group)
        self._check_same_kind(index, group, [param])
        self._accumulated.note_backward()
        kind = kind_of(group)
        if not self._accumulated.has_room(param, kind):
            self._prepare_all()
        self._accumulated.add([self._accumulated.taken([param], kind)], 1.0, {})
        self._accumulated.counted_alone(param)

    def _weight_of(self, terms: Any, parts: Any) -> float:
        check_terms(terms, parts)
        before = self._accumulated.by_terms
        if before is not None and before != (terms is not None):
            raise ValueError(
                "terms was given for some micro-batches of this step and not for others; pass it "
                "to all of them, or to none"
            )
        return float(parts if terms is None else terms)

    def _check_open(self) -> None:
        if self._accumulated.are_grads:
            raise RuntimeError(f"accumulated_grads() has ended this accumulation; {_UNUSED}")
        if self._accumulated.are_of_ranks:
            raise RuntimeError(f"reduce_accumulated() has ended this accumulation; {_UNUSED}")

    def _check_unused(self, what: str) -> None:
        if self._accumulated.count:
            raise RuntimeError(
                f"{what} was called, but {self._accumulated.count} micro-batches are accumulated; "
                f"{_UNUSED}"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._check_unused("a copy of the optimizer")
        return super().__getstate__()


class _Hooks(RemovableHandle):
    """What ends `accumulate_in_backward`."""

    def __init__(self, optimizer: AccumulatingOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def remove(self) -> None:
        """Leave gradients where they are from now on."""
        optimizer = self._optimizer()
        if optimizer is not None:
            for hook in optimizer._hooks:
                hook.remove()
            optimizer._hooks = []
