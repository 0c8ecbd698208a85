"""The squares of the parts of a gradient that single rows of activations make.

For y = x W^T a row r of x adds delta_r x_r^T to the gradient of W, where delta = dL/dy. The sum of
the squares of these parts is (delta o delta)^T (x o x): one more product of the gradient's size,
and no part is ever formed. A hook on a module's output has delta; x is kept as autograd keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

from .row_checks import averaging_ranks, check_wrappers, listed, names_of
from .row_squares import ADDS, identity, kind_of

# What the parts of a gradient, as the first accumulate() adds them up, may miss of it, of both.
_MISSING = 0.05


class TokenSquares:
    r"""Gives an optimizer the mean square of the gradient's parts, one a position (row).

    For the groups whose ``second_moment`` is not "batch". In a training loop:

        optimizer = RootFreeAdamW(model.parameters(), lr=1e-2, batch_size=8 * 4096,
                                  second_moment="micro")
        with TokenSquares(model, optimizer) as squares:
            for batch in loader:
                for x, y in batch.micro_batches(8):  # 4096 tokens each
                    loss_fn(model(x), y).backward()  # a mean, not divided by 8
                    squares.accumulate()
                optimizer.step()

    A call of a module on inputs x of R rows (all leading dimensions flattened) adds to the gradient
    the sum over its rows of

        Linear               delta_r x_r^T to the weight, delta_r to the bias
        Embedding            delta_r to the row of token r
        LayerNorm, RMSNorm   delta_r o xhat_r to the weight, delta_r to the bias

    with delta the gradient of the loss by the module's output. With K the most rows that a
    parameter met since the last ``accumulate()``, the gradient is the mean of K parts, each K times
    one of these terms (or 0), and what the optimizer gets is the mean of their squares:

        K (delta o delta)^T (x o x)                   weight of a Linear, (out, in)
        K sum_r delta_r^2                             bias
        K sum over r with token v of delta_r^2        row v of an Embedding
        K sum_r (delta_r o xhat_r)^2                  weight of a norm

    So a row is its own term of the loss, and a loss that is a mean over K rows has K terms. That is
    the square of each term's own gradient where rows do not mix, as in an MLP. Where they do, a
    part is not the gradient of one term: with attention, row r gathers what the terms of later
    positions send back through it. A parameter that several calls use (tied weights, a module
    called twice) has a part for each row of each call; the products between the calls' parts at
    one row, which the square of their sum would have, are left out, so that the result is at least
    1 / (number of calls) of that square. Rows that the loss ignores have delta = 0 and add nothing.

    It costs a product of the size of each weight's gradient, in float32 (float64 for float64
    parameters; TensorFloat32 where ``torch.set_float32_matmul_precision`` allows it), and 4 bytes a
    parameter between backward and ``accumulate()``. Activations are held as long as autograd
    holds them, by the same saved-tensor hooks: a checkpoint recomputes them.

    Args:
        model: holds every parameter of those groups in a Linear, Embedding, LayerNorm or RMSNorm.
        optimizer: one of rootfree_fused; its groups are read here.
        process_group: the ranks that gradients are averaged over, each the mean of its own loss.
            None takes those of a DistributedDataParallel model. The squares are summed over them
            in ``accumulate()``, which all ranks call; but under ``no_sync()`` they stay the rank's
            own, as its gradients do, until ``optimizer.reduce_accumulated()``.

    Raises:
        TypeError: a parameter in another module, sharded (DTensor), or not in the model; a module
            that was compiled, or a DataParallel.
        ValueError: an Embedding with sparse or scale_grad_by_freq.
        RuntimeError: several ranks and no `process_group`; (backward) create_graph=True.
    """

    _handles: tuple[Any, ...] = ()

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, process_group: Any = None
    ) -> None:
        check_wrappers(model)
        self._model = model
        self._optimizer = optimizer
        self._process_group, self._ranks = averaging_ranks(model, process_group)
        self._names = names_of(model, optimizer)
        self._modules = [
            module
            for module in model.modules()
            if any(p in self._names for p in module._parameters.values() if p is not None)
        ]
        self._anchor = torch.empty(0, device="cpu", requires_grad=True)
        self._checked: set[Tensor] = set()
        self._backward = -1
        self._forget()

    def __enter__(self) -> TokenSquares:
        if self._handles:
            raise RuntimeError("this TokenSquares is entered already; leave it first")
        self._handles = tuple(handle for module in self._modules for handle in self._attach(module))
        return self

    def _attach(self, module: nn.Module) -> Iterator[Any]:
        if isinstance(module, nn.Linear):
            yield module.register_forward_pre_hook(_cast_as_autocast, with_kwargs=True)
        yield module.register_forward_hook(self._after_forward, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._forget()

    def __getstate__(self) -> None:
        """Nothing: a copied model must neither take squares here nor copy the optimizer."""

    def accumulate(self, terms: float | Tensor | None = None) -> None:
        """Give gradients and squares to ``optimizer.accumulate``, after a backward.

        Args:
            terms: how many terms the loss of this micro-batch averages, by which it counts among
                the others, as in ``optimizer.accumulate``. None takes its K rows, and 1 where no
                group takes squares. Ranks add up theirs.

        Raises:
            RuntimeError: a parameter has a gradient but no squares.
            TypeError: float16 activations without a GradScaler that leaves the scale to the
                optimizer.
        """
        self._check_scaled()
        rows, terms = self._reduce_rows(None if terms is None else float(terms))
        have = [p for p in self._names if p.grad is not None]
        if missing := [self._names[p] for p in have if p not in rows]:
            raise RuntimeError(
                f"{listed(missing)} has a gradient but no squares: call its module rather than a "
                "function on its weight or one that was compiled before, and inside the with"
            )
        self._reduce(self._sums, rows, self._ranks**2)
        self._check_totals(have)
        parts = max([1, *rows.values()])
        squares = {p: self._sums[p].mul_(parts) for p in have}
        self._forget()
        optimizer: Any = self._optimizer
        if squares:
            optimizer.accumulate(terms=terms, squares=squares, parts=parts)
        else:
            optimizer.accumulate(terms=terms)

    def _check_scaled(self) -> None:
        groups = self._optimizer.param_groups
        if self._float16 and not all(group.get("amp_scaling") for group in groups):
            raise TypeError(
                "activations are float16 in a group with amp_scaling=False, where small gradients "
                "have no bits: scale the loss by a GradScaler with amp_scaling=True, or use "
                "bfloat16"
            )

    def _forget(self) -> None:
        # Of each parameter the sum of squares, and how many rows it is from.
        self._sums: dict[Tensor, Tensor] = {}
        self._rows: dict[Tensor, int] = {}
        # Of those that are not checked yet, the sum of the parts themselves.
        self._totals: dict[Tensor, Tensor] = {}
        self._float16 = False
        self._is_local = False  # gradients and squares are of this rank alone

    # Hooks ------------------------------------------------------------------------------------

    @_disable_dynamo
    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not self._handles or not output.requires_grad:
            return
        named = module._parameters.items()
        wanted = {name: p for name, p in named if p is not None and p in self._names}
        if not wanted:
            return
        saved = None
        if "weight" in wanted:
            x = _input(args, kwargs).detach()
            saved = _Saved.apply(self._anchor, x).grad_fn  # type: ignore[no-untyped-call]
        output.register_hook(partial(self._add, module, wanted, [saved]))

    def _add(
        self, module: nn.Module, uses: dict[str, nn.Parameter], held: list[Any], delta: Tensor
    ) -> None:
        """A backward has reached an output: add the squares of what it sends to the parameters.

        held: what has saved the input, until a backward that keeps no graph.
        """
        if not self._handles or not held:  # left; or run twice, of which autograd tells
            return
        (saved,) = held
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            held.clear()
        wanted = {name: p for name, p in uses.items() if _accumulates(p)}
        if not wanted:
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a backward with create_graph=True inside TokenSquares: what gradients of "
                "gradients send to a parameter has no squares; take them outside"
            )
        self._begin_backward()
        self._is_local |= not getattr(self._model, "require_backward_grad_sync", True)
        self._float16 |= delta.dtype == torch.float16
        x = saved.saved_tensors[0] if "weight" in wanted else None
        add = ADDS[kind_of(module)]
        sums = {name: _sum_in(self._sums, p) for name, p in wanted.items()}
        rows = add(module, x, delta, sums, torch.square)
        if not self._checked.issuperset(wanted.values()):
            totals = {name: _sum_in(self._totals, p) for name, p in wanted.items()}
            add(module, x, delta, totals, identity)
        for p in wanted.values():
            self._rows[p] = self._rows.get(p, 0) + rows

    def _begin_backward(self) -> None:
        """Drop what is left of a backward whose gradients were dropped."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            if all(p.grad is None for p in self._names):
                self._forget()

    # Ranks ------------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        return self._ranks == 1 or self._is_local

    def _reduce_rows(self, terms: float | None) -> tuple[dict[Tensor, int], float | None]:
        """Of each parameter the rows of all ranks, and the terms of all ranks."""
        if self._is_alone():
            return self._rows, terms
        numbers = torch.tensor(
            [*(self._rows.get(p, 0) for p in self._names), terms or 0],
            dtype=torch.float64,
            device=self._optimizer.param_groups[0]["params"][0].device,
        )
        torch.distributed.all_reduce(numbers, group=self._process_group)
        *counts, total = numbers.tolist()
        rows = {p: int(n) for p, n in zip(self._names, counts, strict=True) if n}
        return rows, None if terms is None else total

    def _reduce(self, sums: dict[Tensor, Tensor], among: Iterable[Tensor], divisor: int) -> None:
        if not self._is_alone():
            for param in among:
                total = _sum_in(sums, param)
                torch.distributed.all_reduce(total, group=self._process_group)
                total.div_(divisor)

    def _check_totals(self, params: list[Tensor]) -> None:
        """Raise where the parts do not add up to the gradient: the first time of each parameter."""
        new = [p for p in params if p not in self._checked]
        if not new:
            return
        self._reduce(self._totals, new, self._ranks)
        lost = {p: self._lost(p) for p in new}
        if wrong := [self._names[p] for p in new if lost[p] > _MISSING]:
            self._forget()
            raise RuntimeError(
                f"{listed(wrong)} has another gradient than the calls of its module make: it is "
                "used elsewhere too (F.linear(h, embedding.weight)), was not zeroed, was clipped, "
                "or a hook changes it; have one module a use, and accumulate() before what changes "
                "gradients"
            )
        self._checked.update(p for p in new if not math.isnan(lost[p]))

    def _lost(self, param: Tensor) -> float:
        """What part of its gradient the parts do not make; NaN where it is 0 or not finite."""
        grad = cast(Tensor, param.grad)
        size = grad.norm() + self._sums[param].sum().sqrt()
        return float((grad - self._totals[param]).norm() / size)


class _Saved(torch.autograd.Function):
    """Keeps x as autograd keeps what it saves: by its hooks, and refused if written since."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        return None, None


def _sum_in(sums: dict[Tensor, Tensor], param: Tensor) -> Tensor:
    """The sum of a parameter, which starts at 0."""
    if param not in sums:
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        sums[param] = torch.zeros(param.shape, dtype=dtype, device=param.device)
    return sums[param]


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def _cast_as_autocast(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The copy that autocast would make of a Linear's input, made here: one that both keep."""
    x = _input(args, kwargs)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    cast = x.to(torch.get_autocast_dtype(device))
    return ((cast, *args[1:]), kwargs) if args else (args, {**kwargs, "input": cast})


def _accumulates(param: Tensor) -> bool:
    """Whether the backward that runs adds to ``param.grad``."""
    try:
        found: bool = torch._C._will_engine_execute_node(get_gradient_edge(param).node)
    except RuntimeError:  # autograd.grad of the parameter, which returns it
        return False
    return found
