"""The optimizers of `bench train` and `bench sweep`: defaults, what is searched, and the best.

`defaults` are the constructor's, which a test reads: torch's, pytorch-optimizer's, ours, and of KL
the authors' code. `tuned` is the best of the 25 settings of `search`: the lowest loss after the
last round, mean of the tuning seeds, on a part of the data that the comparison does not show. All
settings were trained with one seed, and the best five of them with two more; on digits, in the
searches of results/epyc, all of them with five. Rows: results/*/train_*_tuning.jsonl, and those of
kind search in results/*/sweep.jsonl.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo

from ..measuring.common import optional
from ..workloads.autoencoder import Autoencoder
from ..workloads.digits import Digits
from ..workloads.text import Text
from .kl import KLSOAP, KLShampoo

Settings = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer, its defaults of what is searched, the search, its best, and all others.

    `fixed` is with what the search was made, and `given` what any run needs to be told.
    """

    build: Callable[..., Optimizer]
    defaults: Settings
    search: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tuned: Settings | None = None
    fixed: Settings = field(default_factory=dict)
    given: Settings = field(default_factory=dict)
    params: Callable[[nn.Module], Any] = nn.Module.parameters

    def grid(self) -> list[Settings]:
        """Every setting of the search; none where there is none."""
        values = itertools.product(*self.search.values()) if self.search else ()
        return [{**dict(zip(self.search, chosen, strict=True)), **self.fixed} for chosen in values]

    def best(self) -> Settings | None:
        """All that `tuned` was trained with."""
        return None if self.tuned is None else {**self.tuned, **self.fixed}

    def optimizer(self, model: nn.Module, settings: Settings) -> Optimizer:
        """The optimizer on a model's parameters."""
        return self.build(self.params(model), **settings, **self.given)


def soap(params: Iterable[Tensor], **settings: Any) -> Optimizer:
    """SOAP of pytorch-optimizer."""
    return optional("pytorch_optimizer").SOAP(params, **settings)


def muon(params: list[Settings], **settings: Any) -> Optimizer:
    """Muon of pytorch-optimizer, which has AdamW for what is no hidden matrix."""
    return optional("pytorch_optimizer").Muon(params, **settings)


def hidden_apart(model: nn.Module) -> list[Settings]:
    """The matrices that are no embedding nor the last for Muon, all else for AdamW."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    others = {id(p) for p in model.parameters() if p.ndim < 2} | set(map(id, embeddings))
    *hidden, last = (p for p in model.parameters() if id(p) not in others)
    others.add(id(last))
    rest = [p for p in model.parameters() if id(p) in others]
    return [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]


DECADES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_AVERAGES = ((0.9, 0.8), (0.9, 0.9), (0.9, 0.95), (0.9, 0.98), (0.95, 0.95))

# In the order in which runs are made. The ranges are those of a problem that has none of its own.
BASE = {
    "RootFreeShampoo": Method(
        RootFreeShampoo,
        defaults={"lr": 5e-3, "betas": (0.9, 0.95)},
        search={"lr": DECADES, "betas": _AVERAGES},
    ),
    "SOAP": Method(
        soap,
        defaults={"lr": 3e-3, "betas": (0.95, 0.95)},
        search={
            "lr": DECADES,
            "betas": ((0.7, 0.95), (0.8, 0.95), (0.9, 0.95), (0.95, 0.95), (0.9, 0.99)),
        },
    ),
    "Muon": Method(
        muon,
        defaults={"lr": 2e-2, "adamw_lr": 3e-4},
        search={"lr": (2e-3, 6e-3, 2e-2, 6e-2, 2e-1), "adamw_lr": DECADES},
        params=hidden_apart,
    ),
    "torch AdamW": Method(
        AdamW,
        defaults={"lr": 1e-3, "betas": (0.9, 0.999)},
        search={
            "lr": DECADES,
            "betas": ((0.9, 0.8), (0.9, 0.9), (0.9, 0.95), (0.9, 0.99), (0.9, 0.999)),
        },
        given={"fused": True},
    ),
    "KL-Shampoo": Method(
        KLShampoo,
        defaults={"lr": 1e-4, "betas": (0.9, 0.98)},
        search={"lr": DECADES, "betas": _AVERAGES},
    ),
    "KL-SOAP": Method(
        KLSOAP,
        defaults={"lr": 1e-4, "betas": (0.9, 0.98)},
        search={"lr": DECADES, "betas": _AVERAGES},
    ),
    "IFShampoo": Method(
        IFShampoo,
        defaults={"lr": 1.2e-2, "factor_lr": 0.8},
        search={"lr": DECADES, "factor_lr": (0.1, 0.2, 0.4, 0.8, 1.6)},
    ),
    "RootFreeAdamW": Method(
        RootFreeAdamW,
        defaults={"lr": 1e-2, "betas": (0.9, 0.95)},
        search={
            "lr": DECADES,
            "betas": ((0.9, 0.8), (0.9, 0.9), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99)),
        },
    ),
    "RootFreeRMSprop": Method(
        RootFreeRMSprop,
        defaults={"lr": 1e-3, "alpha": 0.9},
        search={"lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "alpha": (0.8, 0.9, 0.95, 0.98, 0.99)},
    ),
    "torch SGD": Method(
        SGD,
        defaults={"lr": 1e-3, "momentum": 0.0},
        search={"lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0), "momentum": (0.0, 0.5, 0.8, 0.9, 0.95)},
        given={"fused": True},
    ),
}
SIZED = ("IFShampoo", "RootFreeAdamW", "RootFreeRMSprop")  # those that are told the batch size
COMPARED = tuple(BASE)[:8]


def _methods(
    batch_size: int, names: Iterable[str] = COMPARED, **own: Settings
) -> dict[str, Method]:
    """The methods of a problem; `own` has the fields of one that differ there, its name in _."""
    found = {}
    for name in names:
        given = {"batch_size": batch_size} if name in SIZED else BASE[name].given
        changed = own.get(name.replace(" ", "_").replace("-", "_"), {})
        found[name] = replace(BASE[name], given=given, **changed)
    return found


# The searches of before the sweep are of the released start, at the dampings that were defaults.
_released = {"damping": 1e-4, "initial_square_avg": 1.0}
_ifshampoo = {"damping": 1e-3, "initial_square_avg": 1.0}

AUTOENCODER = _methods(
    Autoencoder.batch_size,
    RootFreeShampoo={"tuned": {"lr": 1e-2, "betas": (0.9, 0.95)}},
    SOAP={"tuned": {"lr": 3e-2, "betas": (0.7, 0.95)}},
    Muon={"tuned": {"lr": 6e-2, "adamw_lr": 1e-2}},
    torch_AdamW={"tuned": {"lr": 3e-2, "betas": (0.9, 0.99)}},
    KL_Shampoo={"tuned": {"lr": 3e-2, "betas": (0.9, 0.9)}},
    KL_SOAP={"tuned": {"lr": 3e-2, "betas": (0.9, 0.95)}},
    IFShampoo={"tuned": {"lr": 3e-2, "factor_lr": 0.2}},
    RootFreeAdamW={"tuned": {"lr": 1e-1, "betas": (0.9, 0.98)}},
)

DIGITS = _methods(
    Digits.batch_size,
    BASE,
    RootFreeShampoo={"tuned": {"lr": 3e-3, "betas": (0.9, 0.98)}},
    SOAP={"tuned": {"lr": 1e-2, "betas": (0.8, 0.95)}},
    Muon={"tuned": {"lr": 2e-2, "adamw_lr": 3e-2}},
    KL_Shampoo={"tuned": {"lr": 3e-3, "betas": (0.9, 0.9)}},
    KL_SOAP={"tuned": {"lr": 1e-2, "betas": (0.9, 0.98)}},
    RootFreeRMSprop={"tuned": {"lr": 1e-3, "alpha": 0.9}, "fixed": _released},
    RootFreeAdamW={
        "search": {
            "lr": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
            "betas": ((0.9, 0.9), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.995)),
        },
        "tuned": {"lr": 3e-1, "betas": (0.9, 0.99)},
        "fixed": _released,
    },
    IFShampoo={
        "search": {"lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "factor_lr": (0.1, 0.2, 0.4, 0.8, 1.6)},
        "tuned": {"lr": 4e-3, "factor_lr": 0.4},
        "fixed": _ifshampoo,
    },
    torch_AdamW={
        "search": {
            "lr": DECADES,
            "betas": ((0.9, 0.6), (0.9, 0.8), (0.9, 0.9), (0.9, 0.99), (0.9, 0.999)),
        },
        "tuned": {"lr": 1e-2, "betas": (0.9, 0.8)},
    },
    torch_SGD={"tuned": {"lr": 1e-1, "momentum": 0.8}},
)

TEXT = _methods(
    Text().batch_size,
    RootFreeShampoo={"tuned": {"lr": 1e-2, "betas": (0.9, 0.95)}},
    IFShampoo={
        "search": {"lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2), "factor_lr": (0.1, 0.2, 0.4, 0.8, 1.6)},
        "tuned": {"lr": 2e-2, "factor_lr": 0.4},
        "fixed": _ifshampoo,
    },
    RootFreeAdamW={"tuned": {"lr": 3e-2, "betas": (0.9, 0.95)}, "fixed": _released},
    torch_AdamW={
        "search": {
            "lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
            "betas": ((0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.9, 0.9999)),
        },
        "tuned": {"lr": 2e-3, "betas": (0.9, 0.999)},
    },
    SOAP={
        "search": {
            "lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
            "betas": ((0.5, 0.95), (0.7, 0.95), (0.8, 0.95), (0.9, 0.95), (0.95, 0.95)),
        },
        "tuned": {"lr": 1e-2, "betas": (0.8, 0.95)},
    },
    Muon={
        "search": {
            "lr": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
            "adamw_lr": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        },
        "tuned": {"lr": 4e-2, "adamw_lr": 3.2e-2},
    },
    KL_Shampoo={"tuned": {"lr": 3e-2, "betas": (0.9, 0.9)}},
    KL_SOAP={"tuned": {"lr": 1e-2, "betas": (0.9, 0.9)}},
)

_at_any_lr = {name: {"lr": method.search["lr"]} for name, method in BASE.items()}
_lrs_of_large = {
    "RootFreeShampoo": (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    "SOAP": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "Muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    "torch AdamW": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "IFShampoo": (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
    "RootFreeAdamW": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}
# By problem. Long text takes the settings of text; wide and large text are searched over lr alone.
METHODS: dict[str, dict[str, Method]] = {
    "autoencoder": AUTOENCODER,
    "digits": DIGITS,
    "text": TEXT,
    "long text": {name: replace(of, search={}) for name, of in TEXT.items()},
    "wide text": {
        name: replace(of, search=_at_any_lr[name], tuned=None, fixed={})
        for name, of in TEXT.items()
    },
    "large text": {
        name: replace(of, search={"lr": _lrs_of_large[name]})
        for name, of in _methods(8192, _lrs_of_large).items()
    },
}
