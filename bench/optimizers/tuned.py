"""The optimizers of `python -m bench train`: what was searched, and the best of it.

`tuned` is the best of the 25 settings of `search` by `python -m bench train --tune`: the lowest
validation loss after the last round, mean of the problem's tuning seeds, on a part of the training
data that was held out; the comparison trains on all of it. On text the settings were trained with
one seed, and the best five of them with two more.
Rows: results/train_digits_tuning.jsonl, results/train_text_tuning.jsonl.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop

from ..measuring.common import optional
from ..workloads.digits import Digits
from ..workloads.text import Text

Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer, the settings that were searched, the best of them, and all others."""

    build: Callable[..., Optimizer]
    search: dict[str, tuple[Any, ...]]
    tuned: Settings
    fixed: Settings
    params: Callable[[nn.Module], Any] = nn.Module.parameters

    def grid(self) -> list[Settings]:
        """Every setting of the search."""
        values = itertools.product(*self.search.values())
        return [dict(zip(self.search, chosen, strict=True)) for chosen in values]

    def optimizer(self, model: nn.Module, settings: Settings) -> Optimizer:
        """The optimizer on a model's parameters."""
        return self.build(self.params(model), **settings, **self.fixed)


def soap(params: Iterable[Tensor], **settings: Any) -> Optimizer:
    """SOAP of pytorch-optimizer."""
    return optional("pytorch_optimizer").SOAP(params, **settings)


def muon(params: list[Settings], **settings: Any) -> Optimizer:
    """Muon of pytorch-optimizer, which has AdamW for what is no hidden matrix."""
    return optional("pytorch_optimizer").Muon(params, **settings)


def hidden_apart(model: nn.Module) -> list[Settings]:
    """The hidden matrices of the text's network for Muon, all else for AdamW."""
    hidden = [p for p in model.get_submodule("blocks").parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in hidden)]
    return [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]


# The stored searches are of the released start, at the dampings that were defaults then.
_rmsprop = partial(RootFreeRMSprop, damping=1e-4, initial_square_avg=1.0)
_adamw = partial(RootFreeAdamW, damping=1e-4, initial_square_avg=1.0)
_ifshampoo = partial(IFShampoo, damping=1e-3, initial_square_avg=1.0)

DIGITS = {
    "RootFreeRMSprop": Method(
        _rmsprop,
        search={"lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "alpha": (0.8, 0.9, 0.95, 0.98, 0.99)},
        tuned={"lr": 1e-3, "alpha": 0.9},
        fixed={"momentum": 0.9, "batch_size": Digits.batch_size},
    ),
    "RootFreeAdamW": Method(
        _adamw,
        search={
            "lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
            "betas": ((0.9, 0.9), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.995)),
        },
        tuned={"lr": 3e-1, "betas": (0.9, 0.99)},
        fixed={"batch_size": Digits.batch_size},
    ),
    "IFShampoo": Method(
        _ifshampoo,
        search={"lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "factor_lr": (0.1, 0.2, 0.4, 0.8, 1.6)},
        tuned={"lr": 4e-3, "factor_lr": 0.4},
        fixed={"batch_size": Digits.batch_size},
    ),
    "torch AdamW": Method(
        AdamW,
        search={
            "lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "betas": ((0.9, 0.6), (0.9, 0.8), (0.9, 0.9), (0.9, 0.99), (0.9, 0.999)),
        },
        tuned={"lr": 1e-2, "betas": (0.9, 0.8)},
        fixed={"fused": True},
    ),
    "torch SGD": Method(
        SGD,
        search={"lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0), "momentum": (0.0, 0.5, 0.8, 0.9, 0.95)},
        tuned={"lr": 1e-1, "momentum": 0.8},
        fixed={"fused": True},
    ),
}

TEXT = {
    "IFShampoo": Method(
        _ifshampoo,
        search={"lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2), "factor_lr": (0.1, 0.2, 0.4, 0.8, 1.6)},
        tuned={"lr": 2e-2, "factor_lr": 0.4},
        fixed={"batch_size": Text.batch_size},
    ),
    "RootFreeAdamW": Method(
        _adamw,
        search={
            "lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "betas": ((0.9, 0.8), (0.9, 0.9), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99)),
        },
        tuned={"lr": 3e-2, "betas": (0.9, 0.95)},
        fixed={"batch_size": Text.batch_size},
    ),
    "torch AdamW": Method(
        AdamW,
        search={
            "lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
            "betas": ((0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.9, 0.9999)),
        },
        tuned={"lr": 2e-3, "betas": (0.9, 0.999)},
        fixed={"fused": True},
    ),
    "SOAP": Method(
        soap,
        search={
            "lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
            "betas": ((0.5, 0.95), (0.7, 0.95), (0.8, 0.95), (0.9, 0.95), (0.95, 0.95)),
        },
        tuned={"lr": 1e-2, "betas": (0.8, 0.95)},
        fixed={},
    ),
    "Muon": Method(
        muon,
        search={
            "lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
            "adamw_lr": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        },
        tuned={"lr": 4e-2, "adamw_lr": 3.2e-2},
        fixed={},
        params=hidden_apart,
    ),
}

METHODS: dict[str, dict[str, Method]] = {"digits": DIGITS, "text": TEXT}
