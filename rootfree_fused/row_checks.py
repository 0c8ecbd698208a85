"""Of which parameters squares are wanted, and of which models they can be had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from .ops.checks import is_sharded
from .row_squares import kind_of


def check_wrappers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if compiled or isinstance(module, DataParallel):
            raise TypeError(
                f"{name or 'the model'} is {'compiled' if compiled else 'a DataParallel'}, whose "
                "modules call no hooks of their own; take squares of a model that is "
                f"{'not compiled' if compiled else 'a DistributedDataParallel'}"
            )


def averaging_ranks(model: nn.Module, group: Any) -> tuple[Any, int]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None, 1
    if group is None and isinstance(model, DistributedDataParallel):
        group = model.process_group
    ranks = torch.distributed.get_world_size(group)
    if group is None and ranks > 1:
        raise RuntimeError(
            f"TokenSquares cannot know which of {ranks} ranks gradients are averaged over; pass "
            "process_group=torch.distributed.group.WORLD for all of them, or the data-parallel "
            "group"
        )
    return group, ranks


def _wanted(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The parameters whose squares the optimizer takes, and what they are called there."""
    for index, group in enumerate(optimizer.param_groups):
        if group.get("second_moment", "batch") == "batch":
            continue
        for position, p in enumerate(group["params"]):
            if p.requires_grad:
                yield f"parameter {position} of group {index}", p


def names_of(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """The names of the parameters whose squares are wanted, after a check that they can be had."""
    uses: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for place, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                uses.setdefault(p, []).append((f"{place}.{name}".lstrip("."), module))
    found = {}
    for name, p in _wanted(optimizer):
        if p not in uses:
            raise TypeError(
                f"{name}, of shape {tuple(p.shape)}, is in no module of {type(model).__name__}; "
                "pass the model that has it, or give it a group with second_moment='batch'"
            )
        for name, module in uses[p]:
            _check_use(name, p, module)
        found[p] = uses[p][0][0]
    return found


def _check_use(name: str, param: Tensor, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind_of(module) is None:
        raise TypeError(
            f"{name} is in a {kind}, which is no Linear, Embedding, LayerNorm or RMSNorm; give it "
            "a group with second_moment='batch'"
        )
    if is_sharded(param):
        raise TypeError(
            f"{name} is a DTensor, whose squares are not taken; give it a group with "
            "second_moment='batch'"
        )
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        raise ValueError(
            f"{name} is in an Embedding with sparse or scale_grad_by_freq; pass False for both, or "
            "give it a group with second_moment='batch'"
        )


def listed(names: list[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
