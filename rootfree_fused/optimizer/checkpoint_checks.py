"""What a checkpoint must be: all of it is checked and copied before any of it is assigned.

A checkpoint is a file that may be cut short, damaged or another optimizer's, or hold the state of a
run that had diverged. Each is refused by a ValueError that says where, what and how to go on.
"""

from __future__ import annotations

import math
import numbers
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import DTYPES, HYPERPARAMETERS, is_sharded
from ..ops.methods import second_moments
from ..reference.formats import NOT_FINITE
from ..reference.structures import Blocks
from .shards import as_laid_out, local
from .state import ROWS, Initial, State, initial_step, is_own

_DAMAGED = "the checkpoint is damaged or was saved after the run diverged; load an earlier one"
_FACTOR = re.compile(r"factor_\d+")
_WHOLE = "pass what state_dict() of the optimizer returned, as it was"


def check_is_dict(state_dict: Any) -> None:
    """Raise a TypeError unless it is a dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {_kind(state_dict)}; {_WHOLE}")


def check_state_dict(state_dict: Any) -> None:
    """Raise unless it has the form of every optimizer's state_dict.

    Raises:
        TypeError: it is no dict.
        ValueError: a part is missing or not of its type.
    """
    check_is_dict(state_dict)
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(
            f"state_dict has the keys {_sorted(state_dict)}, without "
            f"{', '.join(sorted(missing))}; {_WHOLE}"
        )
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise ValueError(f"state_dict['state'] is {_kind(states)}, not a dict; {_WHOLE}")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"state_dict['param_groups'] is {_kind(groups)}, not a list; {_WHOLE}")
    for index, group in enumerate(groups):
        _check_saved_group(f"state_dict group {index}", group)
        for key in group["params"]:
            if not isinstance(state := states.get(key, {}), Mapping):
                raise ValueError(
                    f"state_dict of parameter {key} is {_kind(state)}, not a dict; {_WHOLE}"
                )


def _check_saved_group(where: str, group: Any) -> None:
    """Raise a ValueError unless it is a dict that names parameters."""
    if not isinstance(group, Mapping):
        raise ValueError(f"{where} is {_kind(group)}, not a dict; {_WHOLE}")
    params = group.get("params")
    if not isinstance(params, (list, tuple)):
        raise ValueError(f"{where} has {_kind(params)} as params, not a list; {_WHOLE}")
    names = group.get("param_names") or params
    if not isinstance(names, (list, tuple)) or len(names) != len(params):
        raise ValueError(f"{where} has {len(params)} params but param_names {names!r}; {_WHOLE}")
    for key in params:
        if not isinstance(key, (int, str)):
            raise ValueError(
                f"{where} names a parameter by {_kind(key)}, not by a number; {_WHOLE}"
            )


def labels(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """What errors call the parameters of saved groups: the key, with the name if there is one."""
    return [
        str(key) if name == key else f"{key} ({name})"
        for group in groups
        for key, name in zip(
            group["params"], group.get("param_names") or group["params"], strict=True
        )
    ]


def check_named(saved: Mapping[Any, Any], keys: Sequence[Any]) -> None:
    """Raise a ValueError for a parameter that the groups name twice, or for state of one that none
    names.
    """
    if twice := [key for key, times in Counter(keys).items() if times > 1]:
        raise ValueError(f"the groups of state_dict name parameters {twice} twice; {_WHOLE}")
    wrappers = not any(isinstance(key, str) for key in keys)  # may have entries by name
    unknown = {key for key in saved.keys() - set(keys) if not (wrappers and isinstance(key, str))}
    if unknown:
        raise ValueError(
            f"state_dict has state for parameters {_sorted(unknown)} that none of its "
            "groups names; load it into the optimizer that saved it and save it again"
        )


def check_sizes(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError unless the saved groups have as many parameters as those of here."""
    sizes, saved_sizes = ([len(group["params"]) for group in part] for part in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has groups of {saved_sizes} parameters but this optimizer has groups "
            f"of {sizes}; build the optimizer with the groups of the one that was saved"
        )


def check_settings(
    where: str, owner: str, converters: str, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raise a ValueError unless a saved group has the settings of the group that takes it.

    converters: what makes a state_dict of `owner` of another optimizer's, if anything does.
    """
    elsewhere = (
        f"{converters}; any other optimizer has nothing to take along: load the model alone, and "
        f"begin with a new {owner} at an lr of its own"
    )
    missing = [name for name in group if name in HYPERPARAMETERS and name not in saved]
    if foreign := [name for name in saved if name in HYPERPARAMETERS and name not in group]:
        raise ValueError(
            f"{where} has {' and '.join(foreign)}, so it was not saved by {owner}; load a "
            f"checkpoint of {owner}; {elsewhere}"
        )
    if missing:
        raise ValueError(
            f"{where} has no {', no '.join(missing)}, so it was not saved by {owner} or is cut "
            f"short; load a checkpoint of {owner}, or set what is missing in that group; "
            f"{elsewhere}"
        )
    for name, value in saved.items():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor) and (fault := _no_data(part)):
                raise ValueError(f"{where}: {name} is {fault}; save it as a number")
            if isinstance(part, int) and abs(part) > 2**1023:
                raise ValueError(f"{where}: {name} is too large for a float; {_DAMAGED}")


def check_data(where: str, param: Tensor, saved: Mapping[str, Any]) -> None:
    """Raise a ValueError for saved state that cannot be read, a wrapper's too."""
    for key, value in saved.items():
        if is_sharded(value) and is_own(key) and not is_sharded(param):
            raise ValueError(
                f"{where}: {key} is a DTensor but the parameter is whole; load full_tensor() of it"
            )
        fault = _no_data(value) if isinstance(value, Tensor) else ""
        if fault and (is_own(key) or value.is_meta):
            raise ValueError(f"{where}: {key} is {fault}; it must be a dense tensor with data")


def check_saved(where: str, spec: Mapping[str, Initial], saved: Mapping[str, Any]) -> State:
    """The saved values as tensors that the declared state can take without a loss.

    Raises:
        ValueError: no tensor, a shape or dtype that does not fit, numbers that no state has.
    """
    values = {
        key: _checked(f"{where}: {key}", key, initial, saved[key]) for key, initial in spec.items()
    }
    started = {
        key: value.reshape(*value.shape[: spec[key].batch_axes], -1).any(-1).cpu()
        for key, value in values.items()
        if _FACTOR.fullmatch(key) and not is_sharded(value)
    }
    zero = [
        key for key, own in started.items() for other in started.values() if (other & ~own).any()
    ]
    if zero:
        raise ValueError(
            f"{where}: {', '.join(zero)} is zero and other factors are not, so that no step would "
            f"move the parameter: {_DAMAGED}"
        )
    return values


def fresh(initial: Initial, value: Tensor, device: torch.device) -> Tensor:
    """A copy of a saved value that nobody else holds, as the state is declared."""
    if is_sharded(initial.lies_as):
        value = as_laid_out(value, initial.lies_as)
    if is_sharded(value):
        return value.detach().clone()
    declared = initial(torch.device("meta"))
    return torch.empty_like(declared, device=device).copy_(value)


def takes(held: Any, value: Tensor) -> bool:
    """Whether a loaded value can be written into what the state holds."""
    return (
        isinstance(held, Tensor)
        and not _no_data(held)
        and (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device)
        and (0 not in held.stride() or held.numel() < 2)
        and not held.is_inference()
    )


def _checked(where: str, key: str, initial: Initial, value: Any) -> Tensor:
    declared = initial(torch.device("meta"))
    is_step = initial is initial_step
    if is_step and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _count(where, value, declared.dtype)
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is {_kind(value)}; it must be a tensor")
    if value.shape != declared.shape:
        raise ValueError(
            f"{where} has shape {tuple(value.shape)} but this model needs "
            f"{tuple(declared.shape)}{_of_structure(initial)}; load it into the model that it was "
            f"saved with{_cure_of_structure(initial, value)}"
        )
    if is_step and value.dtype is not torch.bool and not value.is_complex():
        return _count(where, value.item(), declared.dtype)
    if not _is_lossless(value.dtype, declared.dtype):
        cure = f"use parameters of the saved dtype, or cast it to {declared.dtype} first"
        if not declared.is_floating_point():
            cure = "load convert.to_format(state_dict, optimizer)"
        raise ValueError(
            f"{where} is {value.dtype} but this optimizer keeps {declared.dtype}, which would lose "
            f"bits; {cure}"
        )
    is_scale = key.endswith("_scale")
    _check_numbers(where, value, not_negative=is_scale or key in (ROWS, *second_moments()))
    if is_scale and value.dtype == torch.uint8 and bool((local(value) == NOT_FINITE).any()):
        raise ValueError(f"{where} holds nan: {_DAMAGED}")
    blocks = initial.structure if isinstance(initial.structure, Blocks) else None
    if blocks and not is_sharded(value) and _is_padded_with_more(blocks, value, initial.size):
        raise ValueError(
            f"{where} is not zero where its last block is padded, beyond the {initial.size} "
            f"elements of its axis: {_DAMAGED}"
        )
    if key.startswith("gram_") and not is_sharded(value):
        squares = initial.structure.diagonal(value) if initial.structure else value
        _check_numbers(where, squares, not_negative=True)
    return value


def _is_padded_with_more(blocks: Blocks, value: Tensor, size: int) -> bool:
    """Whether a factor has anything but zeros beyond the size of its axis."""
    return bool((value != blocks.without_padding(value, size)).any())


def _of_structure(initial: Initial) -> str:
    """Which factor a declared tensor is of, if it is of one."""
    if initial.structure is None:
        return ""
    return f", a {initial.structure.name} factor of an axis of {initial.size}"


def _cure_of_structure(initial: Initial, value: Tensor) -> str:
    """What else loads a factor that this axis has had, if it is diagonal."""
    if initial.structure is None or value.shape[initial.batch_axes :] != (initial.size,):
        return ""
    return (
        ", or give that group of the state_dict structures that make this axis diagonal, as "
        "'dense_or_diagonal' or ('diagonal', 'dense') do"
    )


def _no_data(value: Tensor) -> str:
    """What a tensor is whose elements cannot be read one by one, or nothing."""
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}"
    if value.is_quantized:
        return "a quantized tensor"
    if value.is_meta:
        return "on the device meta, without data"
    if is_sharded(value):
        return ""  # its shards are another's
    steps = zip(value.shape, value.stride(), strict=True)
    last = value.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if value.numel() and (last + 1) * value.element_size() > value.untyped_storage().nbytes():
        return "a tensor whose storage was freed"
    return ""


def _is_lossless(saved: torch.dtype, kept: torch.dtype) -> bool:
    if saved not in DTYPES:
        return saved is kept
    return torch.promote_types(saved, kept) is kept


def _count(where: str, value: Any, dtype: torch.dtype) -> Tensor:
    """A number of steps as a tensor that holds it exactly."""
    whole = 0 <= value <= 2**53 and value == int(value)
    count = torch.tensor(float(value) if whole else 0.0, dtype=dtype, device="cpu")
    if not whole or count.item() != value:
        raise ValueError(
            f"{where} is {_short(value)}, no whole number from 0 up that {dtype} holds: {_DAMAGED}"
        )
    return count


def _check_numbers(where: str, value: Tensor, *, not_negative: bool) -> None:
    """Raise a ValueError for numbers that stop or reverse every later step."""
    shards: Any = value
    own: Tensor = shards.to_local() if is_sharded(value) else value
    if not own.numel() or not own.is_floating_point():
        return
    low, high = (bound.item() for bound in torch.aminmax(own))  # NaN if there is one
    if not math.isfinite(low) or not math.isfinite(high):
        bad = low if not math.isfinite(low) else high
        raise ValueError(f"{where} holds {bad}: {_DAMAGED}")
    if not_negative and low < 0:
        raise ValueError(f"{where} holds {low}, where no square can be negative: {_DAMAGED}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    try:
        return f"{value:.10g}"
    except OverflowError:
        return "too large for a float"


def _sorted(keys: Iterable[Any]) -> list[Any]:
    return sorted(keys, key=str)
