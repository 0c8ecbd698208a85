"""The part of torchtitan 0.3.0's container that ours builds on, for where it is not installed.

Written from its interface: patterns, names and groups; a checkpoint of another form, no logging.
"""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("torchtitan", "torchtitan.components", "torchtitan.components.optimizer")


@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[ParamGroupConfig] = field(default_factory=list)
        implementation: str = "fused"

        def build(self, **objects):
            return self._owner(self, **objects)

    def __init_subclass__(cls):
        # Of a subclass without a Config of its own, the base would be built.
        if "Config" in vars(cls):
            cls.Config._owner = cls

    @staticmethod
    def _resolve_optimizer_factory(name):
        if name not in ("Adam", "AdamW"):
            raise NotImplementedError(name)
        return getattr(torch.optim, name)

    @staticmethod
    def _build_param_groups(model, param_group_configs, impl_kwargs):
        groups, patterns, claimed = {}, {}, set()
        for config in param_group_configs:
            named = [
                (name, param)
                for name, param in model.named_parameters()
                if name not in claimed and re.search(config.pattern, name)
            ]
            claimed |= {name for name, _ in named}
            group = {"params": [p for _, p in named], "param_names": [name for name, _ in named]}
            groups.setdefault(config.optimizer_name, []).append(
                group | impl_kwargs | config.optimizer_kwargs
            )
            patterns.setdefault(config.optimizer_name, []).append(config.pattern)
        return groups, patterns

    def __init__(self, config, *, model_parts):
        implementation = {"fused": config.implementation == "fused", "foreach": False}
        self.optimizers = []
        for model in model_parts:
            groups, _ = self._build_param_groups(model, config.param_groups, implementation)
            for name, of_name in groups.items():
                self.optimizers.append(self._resolve_optimizer_factory(name)(of_name))
        params = [p for model in model_parts for p in model.parameters()]
        torch.optim.Optimizer.__init__(self, params, {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict):
        for optimizer, saved in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def import_container():
    """Our container on torchtitan's, or on the stand-in where torchtitan is not installed."""
    try:
        importlib.import_module(PACKAGES[-1])
    except ImportError:
        for name in PACKAGES:
            sys.modules[name] = ModuleType(name)
        for stood_in in (OptimizersContainer, ParamGroupConfig):
            setattr(sys.modules[PACKAGES[-1]], stood_in.__name__, stood_in)
    return importlib.import_module("rootfree_fused.integrations.torchtitan")
