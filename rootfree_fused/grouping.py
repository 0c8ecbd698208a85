"""Which parameters of a model get which settings, chosen from its modules and shapes."""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from torch import nn

from .optimizer.base import RootFreeOptimizer
from .optimizer.matrix import MatrixOptimizer
from .shampoo import RootFreeShampoo

_SHOWN = 3  # names of a group

Settings = tuple[tuple[str, Any], ...]
Named = list[tuple[str, nn.Parameter]]


class ParamGroups(list[dict[str, Any]]):
    """Groups for an optimizer; `print` shows a line a group, as they were chosen."""

    def __init__(self, groups: dict[tuple[str, Settings], Named]) -> None:
        super().__init__(
            {"params": named, **dict(settings)} for (_, settings), named in groups.items()
        )
        self._text = "\n".join(_line(*key, named) for key, named in groups.items())

    def __str__(self) -> str:
        return self._text


def _line(kind: str, settings: Settings, named: Named) -> str:
    entries = sum(param.numel() for _, param in named)
    chosen = ", ".join(
        f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in settings
    )
    shown = ", ".join(name for name, _ in named[:_SHOWN])
    rest = f", {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return f"{len(named)} {kind}, {entries:,} entries: {chosen} ({shown}{rest})"


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    *,
    optimizer_class: type[RootFreeOptimizer] = RootFreeShampoo,
    tables: Literal["matrix", "vector"] = "matrix",
    update_rms: float = 0.3,
) -> ParamGroups:
    """Groups of a model's parameters by what they are, each parameter once.

        groups = param_groups(model, weight_decay=0.1)
        print(groups)  # what it chose
        optimizer = RootFreeShampoo(groups, lr=5e-3)

    - Vectors (biases, gains: one axis that is not 1) have no decay, nor have those that
      `model.no_weight_decay()` names, as timm's models do.
    - Tables (weights of `Embedding` and `EmbeddingBag`) are matrices, which is how all stored runs
      were trained, or vectors, which have no factors; which is better is not measured.
    - Weights that are stored as (inputs, outputs), of transformers' Conv1D and of transposed
      convolutions, have `update_rms` times outputs over inputs and no balanced rows in
      RootFreeShampoo.
    - All others, heads too, are matrices.

    Args:
        model: the module whose parameters are grouped, with their names.
        weight_decay: of all but vectors.
        optimizer_class: the class that the groups are for.
        tables: "matrix" or "vector".
        update_rms: as of RootFreeShampoo's constructor.

    Returns:
        A list of groups, which a constructor takes as `params`; empty ones are left out.

    Raises:
        TypeError: `model` is no module.
        ValueError: unknown `tables`, or "vector" for a class that has no factors.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if tables not in ("matrix", "vector"):
        raise ValueError(f"tables is {tables!r}; pass 'matrix' or 'vector'")
    if tables == "vector" and not issubclass(optimizer_class, MatrixOptimizer):
        raise ValueError(
            f"tables is 'vector', but {optimizer_class.__name__} has no factors and steps every "
            "parameter by elements; leave tables out"
        )
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "weight", 0), nn.Parameter)
    ]
    lookups = {id(m.weight) for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    transposed = {id(m.weight) for m in modules if _stores_inputs_first(m)}
    without_decay: Any = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[str, Settings], Named] = {}
    for name, param in model.named_parameters():
        kind, settings = "matrices", dict[str, Any](weight_decay=weight_decay)
        if sum(size != 1 for size in param.shape) < 2:
            kind = "vectors"
        elif id(param) in lookups:
            kind = "tables"
            if tables == "vector":
                settings["merge_axes"] = (tuple(range(param.ndim)),)
        elif id(param) in transposed and optimizer_class is RootFreeShampoo:
            kind = "matrices of (inputs, outputs)"
            inputs, outputs = param.shape[0], prod(param.shape[1:])
            settings |= {"update_rms": update_rms * outputs / inputs, "row_beta": None}
        if kind == "vectors" or name in without_decay:
            settings["weight_decay"] = 0.0
        groups.setdefault((kind, tuple(settings.items())), []).append((name, param))
    return ParamGroups(groups)


def _stores_inputs_first(module: nn.Module) -> bool:
    convolutions = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    # transformers need not be installed.
    return isinstance(module, convolutions) or type(module).__name__ == "Conv1D"
