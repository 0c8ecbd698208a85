"""The settings of a run that goes on with another batch size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from .ops.checks import check_hyperparameters
from .optimizer.base import RootFreeOptimizer
from .optimizer.checks import check_counted

_POWERS = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
_LARGEST_CHANGE = 64
_DECAYS = ("alpha", "betas")
_MOST = 0.5  # that an average takes of a gradient: s of one gradient alone divides by its noise


def rescale_(
    optimizer: Optimizer,
    batch_size: float,
    *,
    rule: Literal["linear", "sqrt", "none"] = "linear",
    betas: bool = True,
) -> None:
    r"""Go on with gradients that average `batch_size` terms: set it in every group, and lr with it.

    With :math:`\kappa` the new batch size over the old, of each group:

    - ``lr``, and ``initial_lr`` that a scheduler has put there: times :math:`\kappa` ("linear") or
      :math:`\sqrt\kappa` ("sqrt"), or as it is ("none").
    - ``1 - beta`` of ``betas`` and ``alpha``: times :math:`\kappa`, so that averages reach as far
      back in examples as before, but at most 1/2 unless it was more. What is 0 stays 0.

    ``momentum`` stays: its buffer is a sum, whose size is part of the step. So do ``factor_lr`` and
    ``factor_momentum``: the factors' step is bounded by itself.

    The root-free s, :math:`B g^2`, estimates the variance of one term whatever B is, so the step is
    that of SGD with a fixed preconditioner: its lr grows with B. Adam's denominator shrinks with
    B, which is where the square-root rule is from. Where the gradient's mean is large beside its
    noise neither holds.

    Args:
        optimizer: a RootFreeRMSprop, RootFreeAdamW or IFShampoo.
        batch_size: of the steps to come, as the constructor takes it.
        rule: how lr follows.
        betas: whether averages follow.

    A tensor lr is written in place. A scheduler keeps numbers of its own, from which it computes
    the next lr: build it anew. A BatchSizeCounter writes the batch size itself: call this before
    the first step with the new one.

    Raises:
        TypeError: no optimizer of ours, or a group without batch_size (RootFreeShampoo).
        ValueError: no such rule, a batch size out of its domain, or settings that the optimizer
            does not take. Nothing has changed then.

    Warns:
        UserWarning: the change is more than 64-fold: no rule was measured there.
    """
    if not isinstance(optimizer, RootFreeOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass one of rootfree_fused")
    if rule not in _POWERS:
        raise ValueError(f"rule is {rule!r}; pass {', '.join(map(repr, _POWERS))}")
    for index, group in enumerate(optimizer.param_groups):
        if group.get("batch_size") is None:
            raise TypeError(
                f"group {index} of {type(optimizer).__name__} has no batch_size, so no rule for "
                "its lr is known; set its lr and betas yourself"
            )
        check_counted(index, group)
    new_size = check_hyperparameters({"batch_size": batch_size})["batch_size"]
    ratios = [float(new_size) / group["batch_size"] for group in optimizer.param_groups]
    changes = [
        _rescaled(group, ratio, ratio ** _POWERS[rule], betas) | {"batch_size": new_size}
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True)
    ]
    for index, (group, change) in enumerate(zip(optimizer.param_groups, changes, strict=True)):
        optimizer._check_named(index, optimizer._check_group, {**group, **change})
    extreme = max(ratios, key=lambda ratio: abs(math.log(ratio)), default=1.0)
    if not 1 / _LARGEST_CHANGE <= extreme <= _LARGEST_CHANGE:
        warnings.warn(
            f"batch_size changes by a factor of {extreme:g}: no rule for lr was measured beyond "
            f"{_LARGEST_CHANGE}",
            stacklevel=2,
        )
    for group, change in zip(optimizer.param_groups, changes, strict=True):
        for name, value in change.items():
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = value


def _rescaled(group: Mapping[str, Any], ratio: float, factor: float, betas: bool) -> dict[str, Any]:
    """The settings of a group that follow the batch size."""
    change = {name: float(group[name]) * factor for name in ("lr", "initial_lr") if name in group}
    if betas:
        change |= {name: _decays(group[name], ratio) for name in _DECAYS if name in group}
    return change


def _decays(decay: Any, ratio: float) -> Any:
    if isinstance(decay, (tuple, list)):
        return tuple(_decays(one, ratio) for one in decay)
    part = 1 - decay
    return 1 - min(part * ratio, max(part, _MOST)) if decay else decay
