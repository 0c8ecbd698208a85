"""Keeps `group["batch_size"]` at the number of loss terms that are in the gradients.

A forward hook counts the terms of a call, a hook on the call's outputs adds them when a backward
reaches it, and the optimizer's step hooks write the sum into every group and start again. What is
counted is thus what was accumulated: an evaluation, a forward that no backward follows and the
recomputation of a checkpoint add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from .shampoo import RootFreeShampoo

Count = Callable[[tuple[Any, ...], dict[str, Any]], "float | Tensor"]


class BatchSizeCounter:
    """Counts loss terms and writes their number into every group before each step.

    The number is that of all micro-batches since the last step, on all ranks. Attach it to the
    module that the training loop calls once for every loss; the optimizer's own ``batch_size`` is
    overwritten at the first step. Give it "counted", so that a step before any count raises; a
    checkpoint that is loaded brings its last count along.

    In a plain loop:

        optimizer = RootFreeAdamW(model.parameters(), lr=1e-2, batch_size="counted")
        counter = BatchSizeCounter(model, optimizer)
        for x, y in loader:  # batches of any size
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()  # with batch_size = len(x)
        counter.remove()  # or: with BatchSizeCounter(model, optimizer): ...

    It is right for a loss that is a mean over what is counted: a mean of equal micro-batches is
    each loss divided by their number, and DistributedDataParallel averages over equal ranks by
    itself; with unequal ones the number is right and the weights of the terms are unequal. A
    summed loss has ``batch_size=1`` and needs no counter.

    Args:
        model: its calls are counted in training mode with gradients enabled, once a backward has
            reached an output. Give the result of ``torch.compile`` or a parallel wrapper rather
            than the module inside, and no module that only runs inside a checkpoint.
        optimizer: one of rootfree_fused. A RootFreeShampoo has no ``batch_size`` and needs none:
            the counter then counts nothing, so that one loop takes all four classes.
        count: what one call adds.

            - "samples": the leading dimension, which all tensors (of one axis or more) among the
              arguments must share. So does None, but for a model whose first argument is a matrix
              of integers, as language models take tokens: there samples and tokens differ, and it
              raises.
            - "tokens": the entries of the keyword argument ``labels`` that are not `ignore_index`.
            - "next_tokens": the same without the first of each sequence (last axis), for causal
              language models that shift the labels themselves, as those of transformers do.
            - A function of the call's ``(args, kwargs)`` that returns a number or a 0-d tensor.
        ignore_index: the label of what does not count in the loss.
        process_group: the ranks that gradients are averaged over. None takes those of a
            DistributedDataParallel model, and one process without torch.distributed;
            ``torch.distributed.group.WORLD`` means all, and is None without torch.distributed.

    Counts of tokens stay on their device until the step, which reads them: the host waits there,
    and, over several ranks, for an all-reduce of two numbers. Do not capture such a step.

    Counts are dropped with their gradients: where a backward finds every ``.grad`` None after an
    earlier one had filled some, as after a step that GradScaler skipped and ``zero_grad()``. With
    ``zero_grad(set_to_none=False)`` call ``reset()``.

    Copies and pickles of the model or the optimizer are not counted: attach a new counter.

    Raises:
        TypeError: (call) no tensor to count or to follow, or a count that is no number.
        ValueError: (constructor) a group without batch_size in another optimizer, an unknown
            `count`; (call) tensors that disagree about the number of samples, a matrix of integers
            without `count`; (step) a sum of 0, infinity or NaN.
        RuntimeError: (step) nothing was counted on some rank, or several ranks and no
            `process_group`. The step has changed nothing then.
    """

    # A copy has no more than these, and its hooks do nothing.
    _model: nn.Module | None = None
    _handles: tuple[Any, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        count: Literal["samples", "tokens", "next_tokens"] | Count | None = None,
        ignore_index: int = -100,
        process_group: Any = None,
    ) -> None:
        needs_none = isinstance(optimizer, RootFreeShampoo)
        for index, group in enumerate(optimizer.param_groups):
            if "batch_size" not in group and not needs_none:
                raise ValueError(
                    f"group {index} of {type(optimizer).__name__} has no batch_size; pass an "
                    "optimizer of rootfree_fused, and not a wrapper around it"
                )
        self._count = _count_function(count, ignore_index)
        self._model = model
        self._optimizer = optimizer
        self._process_group = process_group
        # Loss terms in the gradients, by call; and the last backward that added some.
        self._counted: dict[object, float | Tensor] = {}
        self._backward = -1
        self._grads_filled = False
        if needs_none:
            return
        self._handles = (
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def reset(self) -> None:
        """Forget what was counted: the gradients were dropped without a step."""
        self._counted.clear()

    def remove(self) -> None:
        """Detach from the model and the optimizer, whose groups keep their last batch size."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BatchSizeCounter:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __getstate__(self) -> None:
        """Nothing: a copied model must neither count here nor copy the optimizer."""

    # Hooks ------------------------------------------------------------------------------------

    @_disable_dynamo
    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        recomputed = torch._C._current_graph_task_id() != -1
        if module is not self._model or not module.training or recomputed:
            return
        if not torch.is_grad_enabled():
            return
        count = _checked(self._count(args, kwargs))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors:
            raise TypeError(
                f"{type(module).__name__} returned a {type(output).__name__} without tensors that "
                "can be found, so that its backward cannot be seen; return a tensor, or a tuple, "
                "list or dict of tensors"
            )
        arrive = partial(self._arrive, object(), count)
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(arrive)

    def _arrive(self, call: object, count: float | Tensor, grad: Tensor) -> None:
        """A backward has reached an output of a call; no gradient is accumulated from it yet."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            if self._grads_filled and not self._any_grad():
                self.reset()
            self._backward = backward
            self._grads_filled = True  # what a backward that fails on the way leaves
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._counted[call] = count

    def _after_backward(self) -> None:
        # False where gradients are kept elsewhere until they are synchronized.
        self._grads_filled = self._any_grad()

    def _any_grad(self) -> bool:
        groups, accumulated = (
            self._optimizer.param_groups,
            getattr(self._optimizer, "_accumulated", None),  # what accumulate() took
        )
        if accumulated is not None and accumulated.count:
            return True
        return any(p.grad is not None for group in groups for p in group["params"])

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._write()
            return None

        def counted() -> Any:
            loss = closure()
            self._write()
            return loss

        return args[:1], {**kwargs, "closure": counted}

    def _after_step(self, *_: Any) -> None:
        self.reset()

    # Counting ---------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the number of loss terms into every group."""
        total, missing = self._reduced()
        if missing:
            raise RuntimeError(
                f"step() cannot know its batch size: since the last step, no call of "
                f"{type(self._model).__name__} in training mode was followed by a backward"
                f"{f' on {missing:g} ranks' if self._ranks() > 1 else ''}. Call train() on it, and "
                "eval() only on the layers in it that are to stay as they are, attach the counter "
                "to the module that is called (Lightning: BatchSizeCallback with its name), call "
                'backward before step, or remove() the counter and set group["batch_size"]'
            )
        if not 0 < total < math.inf:
            raise ValueError(
                f"step() has a batch size of {total:g}: skip a step of which nothing counts in the "
                "loss and reset() the counter, or pass another count"
            )
        batch_size = int(total) if total.is_integer() else total
        for group in self._optimizer.param_groups:
            if group["batch_size"] != batch_size:
                group["batch_size"] = batch_size

    def _reduced(self) -> tuple[float, float]:
        """The sum over the ranks of what was counted, and on how many ranks nothing was."""
        total = float(sum(float(count) for count in self._counted.values()))
        missing = float(not self._counted)
        if self._ranks() == 1:
            return total, missing
        # Every rank takes part before any of them raises.
        device = self._optimizer.param_groups[0]["params"][0].device
        numbers = torch.tensor([total, missing], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(numbers, group=self._averaging_group())
        total, missing = numbers.tolist()
        return total, missing

    def _ranks(self) -> int:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return 1
        group = self._averaging_group()
        ranks = torch.distributed.get_world_size(group)
        if group is None and ranks > 1:
            raise RuntimeError(
                f"step() cannot know which of {ranks} ranks its gradients are averaged over; pass "
                "process_group=torch.distributed.group.WORLD for all of them (after "
                "init_process_group), or the data-parallel group"
            )
        return ranks

    def _averaging_group(self) -> Any:
        model = getattr(self._model, "_orig_mod", self._model)
        if self._process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            return model.process_group
        return self._process_group


def _checked(count: Any) -> float | Tensor:
    number = isinstance(count, (int, float)) and not isinstance(count, bool)
    if number or (isinstance(count, Tensor) and count.numel() == 1):
        return count.detach() if isinstance(count, Tensor) else count
    raise TypeError(f"count returned {count!r}; return a number or a tensor of one element")


def _count_function(count: Any, ignore_index: int) -> Count:
    if callable(count):
        return count  # type: ignore[no-any-return]
    if count is None:
        return _samples_of_no_tokens
    if count == "samples":
        return _samples
    if count in ("tokens", "next_tokens"):
        return partial(_tokens, ignore_index, int(count == "next_tokens"))
    raise ValueError(
        f"count is {count!r}; pass 'samples', 'tokens', 'next_tokens' or a function of (args, "
        "kwargs)"
    )


def _samples_of_no_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    integers = first is not None and not (first.is_floating_point() or first.is_complex())
    if first is not None and integers and first.dtype != torch.bool and first.ndim == 2:
        raise ValueError(
            f"the model was called with integers of shape {tuple(first.shape)}, as with tokens: a "
            f"loss that is a mean over tokens has {first.numel()} terms, one over samples "
            f"{len(first)}. Pass count='tokens' or 'next_tokens' (of labels=), count='samples', or "
            "a function of (args, kwargs), such as lambda args, kwargs: args[0].numel()"
        )
    return _samples(args, kwargs)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    leaves = tree_leaves((args, kwargs))
    shapes = [tuple(x.shape) for x in leaves if isinstance(x, Tensor) and x.ndim > 0]
    if not shapes:
        raise TypeError(
            "the model was called without a tensor that has an axis, so that samples cannot be "
            "counted; pass count=a function of (args, kwargs)"
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"the model was called with tensors of shapes {', '.join(map(str, shapes))}, whose "
            "leading dimensions differ, so that samples cannot be counted; pass count=a function "
            "of (args, kwargs), such as lambda args, kwargs: len(args[0])"
        )
    return shapes[0][0]


def _tokens(ignore_index: int, first: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor):
        raise TypeError(
            "the model was called without a tensor labels=..., so that tokens cannot be counted; "
            "call it with labels=, or pass count=a function of (args, kwargs)"
        )
    return (labels[..., first:] != ignore_index).sum()
