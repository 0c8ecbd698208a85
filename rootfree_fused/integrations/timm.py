"""timm: the optimizers by name, in its factory and its training script."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch.optim import Optimizer

from .. import RootFreeRMSprop
from . import CLASSES, has_batch_size


def register() -> tuple[str, ...]:
    """Put the optimizers into timm's registry, under their lower-case names, which it returns.

        rootfree_fused.integrations.timm.register()
        optimizer = timm.optim.create_optimizer_v2(model, "rootfreeshampoo", lr=5e-3)

    The names have no underscore: timm takes what stands before one for a prefix, so that
    "rootfree_adamw" is torch's AdamW. timm gives biases, norms and what `model.no_weight_decay()`
    names no decay, and 0 where it is told no `weight_decay`. Its `momentum` reaches
    RootFreeRMSprop alone. "lookahead_rootfreeshampoo" works, but a BatchSizeCounter does not take
    the wrapper.

    Raises:
        ValueError: (when an optimizer is built) no `batch_size` for a class that needs one, or
            timm's fallback optimizers, which there are none of.
        TypeError: (when an optimizer is built) `eps`, `foreach` and others that the class has not.
    """
    for optimizer_class in CLASSES:
        info = OptimInfo(
            name=optimizer_class.__name__.lower(),
            opt_class=partial(_build, optimizer_class),
            description=f"{optimizer_class.__name__} of rootfree_fused",
            # timm drops silently what a class is said not to have: the class refuses it.
            has_eps=True,
            has_betas=True,
            has_momentum=optimizer_class is RootFreeRMSprop,
        )
        default_registry.register(info)
    return tuple(optimizer_class.__name__.lower() for optimizer_class in CLASSES)


def _build(optimizer_class: type[Optimizer], params: Any, **settings: Any) -> Optimizer:
    params = list(params)
    groups = [group for group in params if isinstance(group, dict)]
    if any(group.get("use_fallback") for group in groups):
        raise ValueError(
            f"{optimizer_class.__name__} has no fallback optimizer; leave out fallback_list and "
            "fallback_no_weight_decay, and give tables of tokens a group with "
            "merge_axes=((0, 1),), whose update is that of a vector"
        )
    in_groups = bool(groups) and all("batch_size" in group for group in groups)
    if has_batch_size(optimizer_class) and "batch_size" not in settings and not in_groups:
        raise ValueError(
            f"{optimizer_class.__name__} needs batch_size, the number of loss terms that a "
            "gradient averages; pass create_optimizer_v2(..., batch_size=N), or to timm's train.py "
            "--opt-kwargs batch_size=N: its --batch-size times the ranks times --grad-accum-steps"
        )
    return optimizer_class(params, **settings)
