"""torchtitan: its container of optimizers, which knows ours by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from . import CLASSES, has_batch_size, refuse_micro_batches

_CLASSES: dict[str, type[Optimizer]] = {known.__name__: known for known in CLASSES}


class RootFreeOptimizersContainer(OptimizersContainer):
    """torchtitan's container, whose groups may name the classes of rootfree_fused too.

        config.optimizer = RootFreeOptimizersContainer.Config(
            param_groups=[
                ParamGroupConfig(
                    pattern=".*", optimizer_name="RootFreeShampoo", optimizer_kwargs={"lr": 5e-3}
                )
            ]
        )

    The first pattern that matches a parameter counts, and groups of one name are one optimizer.
    `implementation` says nothing to these classes. torchtitan divides the loss by the tokens of a
    step that have a label, over all micro-batches and ranks: without padding `global_batch_size *
    seq_len`, the `batch_size` of a class that needs one, which is the config's after a load too.
    It clips gradients to `max_norm`, 1 by default.

    Raises:
        ValueError: an unknown name, no `batch_size`, the implementation "fused_opt_states_bf16", a
            second moment of micro-batches. No optimizer is built then.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As of torchtitan's container."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        _check(config)
        super().__init__(config, model_parts=model_parts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torchtitan's, but for `batch_size`: a run may go on with batches of another size."""
        sizes = [[g.get("batch_size") for g in of.param_groups] for of in self.optimizers]
        super().load_state_dict(state_dict)
        for optimizer, of_groups in zip(self.optimizers, sizes, strict=True):
            for group, size in zip(optimizer.param_groups, of_groups, strict=True):
                if size is not None:
                    group["batch_size"] = size

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Any]:
        try:
            return _CLASSES.get(name) or OptimizersContainer._resolve_optimizer_factory(name)
        except NotImplementedError as error:
            known = ", ".join(_CLASSES)
            raise ValueError(
                f"there is no optimizer {name!r}; name one of torchtitan's, or of {known}"
            ) from error

    @staticmethod
    def _build_param_groups(
        model: nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: dict[str, Any]
    ) -> Any:
        """Without torch's `fused` and `foreach` in groups of ours, which have no such settings."""
        groups, patterns = OptimizersContainer._build_param_groups(
            model, param_group_configs, impl_kwargs
        )
        for name in _CLASSES.keys() & groups.keys():
            for group in groups[name]:
                for key in impl_kwargs:
                    del group[key]
        return groups, patterns


def _check(config: OptimizersContainer.Config) -> None:
    """Raise a ValueError for what would fail, or be ignored, after other optimizers were built."""
    for group in config.param_groups:
        name, settings = group.optimizer_name, group.optimizer_kwargs
        RootFreeOptimizersContainer._resolve_optimizer_factory(name)
        if name not in _CLASSES:
            continue
        refuse_micro_batches(settings, "torchtitan")
        if has_batch_size(_CLASSES[name]) and "batch_size" not in settings:
            raise ValueError(
                f"{name} of pattern {group.pattern!r} needs batch_size, the number of tokens that "
                "a step averages over; put global_batch_size * seq_len into its optimizer_kwargs"
            )
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "the implementation 'fused_opt_states_bf16' is of torch's Adam; pass 'fused', and "
                f"'state_format': 'bfloat16' in the optimizer_kwargs of {name}"
            )
