"""The state of sirfshampoo and of the paper's released code as ours: training goes on from it.

    optimizer = IFShampoo(model.parameters(), batch_size=128, factor_dtype=torch.float32)
    optimizer.load_state_dict(convert.from_sirfshampoo(theirs, optimizer))

Nothing is approximated: what follows is the continuation of what was, and what has no counterpart
is refused. `from_ifshampoo` alone goes from one method to another, and says what it takes along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .diag import RootFreeAdamW, RootFreeRMSprop
from .matrix import IFShampoo
from .ops import structure_names
from .ops.checks import state_dtype
from .optimizer import formats
from .optimizer.base import RootFreeOptimizer
from .optimizer.checkpoint import check_formats_of
from .optimizer.checkpoint_checks import check_sizes
from .optimizer.checks import COUNTED
from .optimizer.conversion import Converted, Entry, assembled, entries_of, state_dict_of
from .optimizer.groups import Group
from .optimizer.layouts import layout_of
from .optimizer.stacks import members_of
from .optimizer.state import MOMENTUM, RESIDUAL, ROWS, State
from .reference import is_update_step
from .reference.formats import decoded
from .reference.rootfree_shampoo import scaled
from .shampoo import RootFreeShampoo

# How the state of another IF-Shampoo goes into a RootFreeShampoo.
_ON = ", whose state from_ifshampoo then makes one of a RootFreeShampoo"
# Their names of settings, and ours.
_RMSPROP = {
    "lr": "lr",
    "alpha": "alpha",
    "eps": "damping",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
}
_ADAMW = {"lr": "lr", "betas": "betas", "eps": "damping", "weight_decay": "weight_decay"}
_RELEASED_SHAMPOO = {"lr": "lr", "momentum": "momentum", "weight_decay": "weight_decay"}
_SIRFSHAMPOO = {
    "lr": "lr",
    "alpha1": "momentum",
    "lam": "damping",
    "kappa": "weight_decay",
    "beta2": "factor_lr",
    "alpha2": "factor_momentum",
    "T": "update_interval",
}
# What both IF-Shampoos do.
_SHAMPOO: Group = {
    "max_update": None,
    "merge_axes": False,
    "vector_method": "factor",
    "weight_decay_mode": "momentum",
    "maximize": False,
}


def from_sirfshampoo(source: Optimizer | Mapping[str, Any], optimizer: IFShampoo) -> dict[str, Any]:
    """A `state_dict` for `optimizer` with the state and the settings of a SIRFShampoo.

    Args:
        source: a `sirfshampoo.SIRFShampoo` on the parameters of `optimizer`, or its `state_dict()`,
            whose parameters must then come in the order of those of `optimizer`.
        optimizer: an IFShampoo with the factor_dtype that the source has (preconditioner_dtypes).
            Its `batch_size` stays where the source counted its batches itself, as do `alpha` and
            `capturable`. It is not changed.

    Raises:
        ValueError: a structure, a schedule or a dtype that IFShampoo does not have, parameters that
            share factors, other parameters, settings that differ in one group of `optimizer`, or
            no state of a SIRFShampoo.
        TypeError: `optimizer` is not an IFShampoo.
    """
    if not isinstance(optimizer, IFShampoo):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass an IFShampoo{_ON}")
    saved = state_dict_of(source)
    for key in ("global_step", "preconditioner", "preconditioner_momenta"):
        if key not in saved:
            raise ValueError(f"the source has no {key!r}; pass a SIRFShampoo or its state_dict()")
    if any(len(group["params"]) != 1 for group in saved["param_groups"]):
        raise ValueError(
            "the source has parameters that share factors, which IFShampoo does not have; only "
            "one pre-conditioner a parameter (sirfshampoo's default) can be converted"
        )

    def convert(entry: Entry) -> Converted:
        settings = {**_renamed(entry, _SIRFSHAMPOO), **_SHAMPOO, "update_schedule": "constant"}
        if callable(settings["update_interval"]):
            raise ValueError(
                f"T of group {entry.position} is a function, but IFShampoo updates its factors "
                "every T steps; set T of the source's groups to a whole number first"
            )
        settings["structures"] = _structures(entry)
        if saved.get("batch_size_valid") == "always":
            settings["batch_size"] = saved["batch_size"]
        factors, momenta = (
            [None if matrix is None else matrix.to_dense() for matrix in saved[key][entry.position]]
            for key in ("preconditioner", "preconditioner_momenta")
        )
        state = _factor_state(entry, settings, factors, momenta)
        return Converted(settings, {"step": saved["global_step"], **entry.state, **state})

    return assembled(optimizer, [convert(entry) for entry in entries_of(source, saved, optimizer)])


def from_released_code(
    source: Optimizer | Mapping[str, Any], optimizer: RootFreeOptimizer
) -> dict[str, Any]:
    """A `state_dict` for `optimizer` with the state and settings of the paper's released code.

    Their v is s / batch_size.

    Args:
        source: a `MyRmsProp`, a `MyAdamW` or a `LocalOptimizer_GGT` (IF-Shampoo) of
            yorkerlin/remove-the-square-root on the parameters of `optimizer`. For the first two
            also a `state_dict()`, whose parameters must then come in the order of those of
            `optimizer`, and which says nothing of batch_size and bias_correction: `optimizer` must
            have the batch_size that v was made with, which is 1 for dummy_scaling.
        optimizer: a RootFreeRMSprop, RootFreeAdamW or IFShampoo in the source's place; an
            IFShampoo with the factor_dtype that the source has (cast_dtype). It is not changed.

    Raises:
        ValueError: a schedule or a dtype that IFShampoo does not have, other parameters, settings
            that differ in one group of `optimizer`, or no state of the class that it replaces.
        TypeError: the `state_dict()` of a LocalOptimizer_GGT, which lacks the factors, or an
            `optimizer` of another package.
    """
    if not isinstance(optimizer, RootFreeOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass one of rootfree_fused")
    if isinstance(optimizer, IFShampoo):
        if isinstance(source, Mapping):
            raise TypeError(
                "source is a state_dict, which for the released IF-Shampoo lacks the factors; pass "
                "the LocalOptimizer_GGT itself"
            )
        return _from_released_shampoo(
            _checked(source, "params_list", "precond_B_blocks"), optimizer
        )
    adamw = isinstance(optimizer, RootFreeAdamW)
    if not adamw and not isinstance(optimizer, RootFreeRMSprop):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, which the released code has not; pass a "
            f"RootFreeRMSprop, a RootFreeAdamW or an IFShampoo{_ON}"
        )
    saved = state_dict_of(source)
    names, moment = (_ADAMW, "exp_avg_sq") if adamw else (_RMSPROP, "square_avg")
    own: Group = {"maximize": False}
    if not adamw:
        own["weight_decay_mode"] = "momentum"
    if not isinstance(source, Mapping):
        released = _checked(source, "batch_averaged", "batch_size", *(["bias_correction"] * adamw))
        own["batch_size"] = _released_batch_size(released)
        if adamw:
            own["bias_correction"] = released.bias_correction

    def convert(entry: Entry) -> Converted:
        settings = {**_renamed(entry, names), **own}
        if not entry.state:  # it never had a gradient
            return Converted(settings, {})
        if not {"step", moment} <= entry.state.keys():
            raise ValueError(
                f"parameter {entry.position} of the source has the state {sorted(entry.state)}, "
                f"without {moment}; pass the class that {type(optimizer).__name__} replaces"
            )
        v = entry.state[moment]
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        batch_size = {**entry.own, **settings}["batch_size"]
        if batch_size == COUNTED:
            raise ValueError(
                f"batch_size is {COUNTED!r}, by which v cannot be multiplied; build "
                f"{type(optimizer).__name__} with the batch_size that v was made with"
            )
        s = wide * batch_size
        return Converted(settings, {**entry.state, moment: s})

    return assembled(optimizer, [convert(entry) for entry in entries_of(source, saved, optimizer)])


def from_ifshampoo(
    source: IFShampoo | Mapping[str, Any], optimizer: RootFreeShampoo
) -> dict[str, Any]:
    """A `state_dict` for `optimizer` that starts in the direction in which an IFShampoo went.

    Of a matrix M is the source's momentum at an RMS of 1, the scale of the gradients that it now
    averages; zero stays zero. The update is normalized, so that only M's direction and its weight
    against them matter. S and K start anew, as multiples of the identity, and the first steps
    continue along M: S is an average of squares, which IFShampoo does not keep, and its factors, in
    units of the batch size, are at their own fixed point. M holds preconditioned gradients, so that
    K must not be theirs too; it forgets them in 1 / (1 - beta1) steps, while K learns.

    Steps are kept, and the average of rows starts at 1, its mean, as their count no longer says
    that it is new. Vectors start anew, steps and all: Adam's averages are of plain gradients.
    Settings are those of `optimizer`, since lr has another unit, but `maximize` is the source's.

    Build a scheduler anew on `optimizer`, after the load, and step it as often as the old one was
    (`for _ in range(old.last_epoch): scheduler.step()`): the `state_dict()` of the old one would
    bring the source's lr along.

    Args:
        source: an IFShampoo on the parameters of `optimizer`, or its `state_dict()`, whose
            parameters must then come in the order of those of `optimizer`. Either stays as it is.
        optimizer: a RootFreeShampoo. It is not changed.

    Raises:
        ValueError: other parameters, or no state of an IFShampoo.
        TypeError: `optimizer` is not a RootFreeShampoo.
    """
    if not isinstance(optimizer, RootFreeShampoo):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass a RootFreeShampoo")
    saved = state_dict_of(source)
    if any("factor_lr" not in group for group in saved["param_groups"]):
        raise ValueError(
            "the source has a group without factor_lr; pass an IFShampoo or its state_dict(), or "
            "begin with a new RootFreeShampoo at an lr of its own: it takes nothing along of others"
        )

    def convert(entry: Entry) -> Converted:
        settings = {"maximize": entry.group["maximize"]}
        layout = layout_of(entry.param.shape, entry.own)
        # It belongs to the weight.
        kept = {key: value for key, value in entry.state.items() if key == RESIDUAL}
        if layout is None or not entry.state:
            return Converted(settings, kept)
        dtype = state_dtype(entry.param)
        batch_axes = entry.own["batch_axes"]
        shape = (*entry.param.shape[:batch_axes], layout.sizes[0])
        rows = torch.ones(shape, dtype=dtype, device=entry.param.device)
        state = {"step": entry.state["step"], ROWS: rows, **kept}
        if MOMENTUM in entry.state:
            scale = entry.state.get(formats.scale_of(MOMENTUM))
            state[MOMENTUM] = decoded(entry.state[MOMENTUM], scale).to(dtype, copy=True)
            for member in members_of([state[MOMENTUM]], batch_axes):
                member.copy_(scaled(member, 1.0))
        return Converted(settings, state)

    return assembled(optimizer, [convert(entry) for entry in entries_of(source, saved, optimizer)])


def to_format(
    source: RootFreeOptimizer | Mapping[str, Any], optimizer: RootFreeOptimizer
) -> dict[str, Any]:
    """A `state_dict` for `optimizer`, in its formats, of one that was saved in others.

    What they hold less is rounded to nearest: `load_state_dict` refuses to lose it unasked. A
    residual of float32 weights that became bfloat16 is in no checkpoint; see `to_bfloat16_`.

    Args:
        source: an optimizer of the class of `optimizer` on as many parameters, or its
            `state_dict()`. Either stays as it is.
        optimizer: whose `param_residual` and `state_format` the result has. It is not changed.

    Raises:
        ValueError: other groups, no state of this class, or state without what its formats have.
        TypeError: `optimizer` has no formats.
    """
    if not isinstance(optimizer, RootFreeOptimizer) or not formats.have_settings(
        optimizer.defaults
    ):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; pass one that has a state_format"
        )
    saved = state_dict_of(source)
    check_sizes(optimizer.param_groups, saved["param_groups"])
    states = dict(saved["state"])
    groups = []
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        groups.append({**old, **{name: group[name] for name in formats.SETTINGS}})
        for key, param in zip(old["params"], group["params"], strict=True):
            if own := states.get(key):
                check_formats_of(optimizer, key, param, group, old, own)
                own = optimizer._gathered(param, group, own)
                spec = optimizer._full_spec(param, group)
                states[key] = formats.sent(formats.converted(own, spec, param.device))
    return {"state": states, "param_groups": groups}


def _from_released_shampoo(source: Any, optimizer: IFShampoo) -> dict[str, Any]:
    names = {param: name for name, (param,) in source.params_list.items()}
    due = next(k for k in count(source.steps) if is_update_step(k, source.T, "log4"))
    if source.steps and source.next_step != due:
        raise ValueError(
            f"the source updates its factors next at step {source.next_step}, but with "
            f"T={source.T} from the start that is step {due}; set its T to what it was trained with"
        )

    def convert(entry: Entry) -> Converted:
        name = names[entry.param]
        discounted = any(part in name for part in ("norm", "proj", "bias"))
        settings = {
            **_renamed(entry, _RELEASED_SHAMPOO),
            **_SHAMPOO,
            "damping": source.damping,
            "factor_lr": source.lr_cov * (0.25 if discounted else 1.0),
            "factor_momentum": source.beta2,
            "update_interval": source.T,
            "update_schedule": "log4",
            "structures": "dense",
            "batch_size": _released_batch_size(source),
        }
        if not source.steps:
            return Converted(settings, {})
        axes = entry.param.squeeze().dim()
        factors, momenta = (
            [blocks[f"{name}_dim-{axes - axis}"] for axis in range(axes)]
            for blocks in (source.precond_B_blocks, source.precond_m_B_blocks)
        )
        state = _factor_state(entry, settings, factors, momenta)
        return Converted(settings, {"step": source.steps, **entry.state, **state})

    saved = source.state_dict()
    return assembled(optimizer, [convert(entry) for entry in entries_of(source, saved, optimizer)])


def _checked(source: Any, *attributes: str) -> Any:
    if missing := [name for name in attributes if not hasattr(source, name)]:
        raise ValueError(
            f"the source is a {type(source).__name__}, without {', '.join(missing)}; pass the "
            "released optimizer of the class that is to be replaced"
        )
    return source


def _released_batch_size(source: Any) -> float:
    averaged = source.batch_averaged and not getattr(source, "dummy_scaling", False)
    return source.batch_size if averaged else 1


def _renamed(entry: Entry, names: Mapping[str, str]) -> Group:
    """The settings of a parameter by our names, with the lr that schedulers start from."""
    if missing := names.keys() - entry.group.keys():
        raise ValueError(
            f"the source's group of parameter {entry.position} has no "
            f"{', '.join(sorted(missing))}; pass an optimizer of the class that is to be replaced, "
            "or its state_dict()"
        )
    if "differentiable" in entry.group:
        raise ValueError(
            "the source is an optimizer of torch.optim, which divides by a root: its state is no "
            "start for an optimizer without one; begin with a new one at an lr of its own"
        )
    kept = {key: entry.group[key] for key in ("initial_lr",) if key in entry.group}
    return {**kept, **{ours: entry.group[theirs] for theirs, ours in names.items()}}


def _structures(entry: Entry) -> str | tuple[str, ...]:
    structures = entry.group["structures"]
    if others := {name for name in structures if structure_names.read(name) is None}:
        raise ValueError(
            f"group {entry.position} of the source has the structures {sorted(others)}; IFShampoo "
            f"has those of singd that it calls dense, diagonal, {structure_names.ALIASES} alone"
        )
    return structures[0] if len(set(structures)) == 1 else tuple(structures)


def _factor_state(
    entry: Entry,
    settings: Group,
    factors: Sequence[Tensor | None],
    momenta: Sequence[Tensor | None],
) -> State:
    """Factors and momenta, one an axis, by our keys; a momentum that was not kept starts at 0."""
    group = {**entry.own, **settings}
    layout = layout_of(entry.param.shape, group)
    sizes = layout.sizes if layout else ()
    if not len(sizes) == len(factors) == len(momenta):
        raise ValueError(
            f"parameter {entry.position} of the source has {len(factors)} factors, but one of "
            f"shape {tuple(entry.param.shape)} has {len(sizes)}; build the optimizer with the same "
            "parameters, in the same order"
        )
    state: State = {}
    for axis, structure in enumerate(layout.structures if layout else ()):
        for key, value in (("factor", factors[axis]), ("factor_momentum", momenta[axis])):
            if value is None:
                continue
            dtype = group["factor_dtype"]
            if structure.is_dense and torch.promote_types(value.dtype, dtype) != dtype:
                raise ValueError(
                    f"the source's factors are {value.dtype} but factor_dtype is {dtype}, which "
                    f"would lose bits; build the optimizer with factor_dtype="
                    f"{torch.promote_types(value.dtype, torch.bfloat16)}"
                )
            state[f"{key}_{axis}"] = structure.from_matrix(value)
    return state
