"""Input checks: every error names the argument, what it got and the cure, and changes nothing."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import structure_names

# Kernels compute in float32: what is larger would be infinite there.
LARGEST = torch.finfo(torch.float32).max
PLAIN = (Tensor, torch.nn.Parameter)  # tensors that are what their memory says
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DOMAINS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda x: 0 <= x <= LARGEST, "a number >= 0 that is finite in float32"),
    "alpha": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "beta": (lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
    "betas": (lambda x: 0 <= x < 1, "two numbers, each at least 0 and below 1"),
    "damping": (lambda x: 0 <= x <= LARGEST, "a number >= 0 that is finite in float32"),
    "weight_decay": (lambda x: 0 <= x <= LARGEST, "a number >= 0 that is finite in float32"),
    "momentum": (lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
    "factor_lr": (lambda x: 0 <= x <= LARGEST, "a number >= 0 that is finite in float32"),
    "factor_momentum": (lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
    "batch_size": (
        lambda x: 0 < x <= LARGEST,
        "the number of loss terms that the gradient averages, above 0 and finite in float32: the "
        "global "
        "batch size for a loss averaged over examples, the number of tokens for one averaged over "
        "tokens, 1 for a summed loss",
    ),
    "max_update": (lambda x: x > 0, "a number > 0, or None for no bound"),
    "update_rms": (lambda x: 0 < x <= LARGEST, "a number > 0 that is finite in float32"),
    "row_beta": (
        lambda x: 0 <= x < 1,
        "a number of at least 0 and below 1, or None to leave the rows of the update as they are",
    ),
    "vector_beta2": (lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
    "vector_rms": (lambda x: 0 < x <= LARGEST, "a number > 0 that is finite in float32"),
    "initial_square_avg": (
        lambda x: 0 < x <= LARGEST,
        "'auto', which takes the scale of the first gradient, or a finite number > 0 (1 is the "
        "released start)",
    ),
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "weight_decay_mode": ("decoupled", "momentum"),
    "second_moment": ("batch", "micro", "variance", "mean"),
    "sign": ("ema", "batch", "micro"),
    "bias_correction": (False, True),
    "update_schedule": ("constant", "log4"),
    "vector_method": ("rmsprop", "factor", "adam", "rootfree"),
    "factor_dtype": (None, torch.bfloat16, torch.float32, torch.float64),
    "param_residual": (None, "stochastic", 8, 16),
    "state_format": ("float32", "bfloat16", "8bit"),
    "maximize": (False, True),
    "capturable": (False, True),
    "amp_scaling": (False, True),
}
_OPTIONAL = ("max_update", "row_beta")
NUMBERS = _DOMAINS.keys()
SWITCHES = {name for name, choices in _CHOICES.items() if choices == (False, True)}
_LEAST = {
    "update_interval": 1,
    "max_dense_dim": 1,
    "block_size": 1,
    "batch_axes": 0,
    "rounding_seed": 0,
}
_SHAPED = ("structures", "hierarchical_sizes", "merge_axes", "combine")
HYPERPARAMETERS = {*_DOMAINS, *_CHOICES, *_LEAST, *_SHAPED}


def check_hyperparameters(values: Mapping[str, Any], undamped: str = "") -> dict[str, Any]:
    """The hyperparameters among `values`, their numbers as Python's own.

    undamped: what goes wrong at a damping of 0, for a method that does not take it.

    Raises:
        ValueError, TypeError: a value out of its domain.
    """
    damped = (lambda x: 0 < x <= LARGEST, f"a number > 0 that is finite in float32: {undamped}")
    domains = {**_DOMAINS, "damping": damped} if undamped else _DOMAINS
    settings = {k: _plain(k, v) for k, v in values.items() if k in HYPERPARAMETERS}
    for name, value in settings.items():
        if name in _CHOICES:
            if not any(value is c or (isinstance(c, str) and value == c) for c in _CHOICES[name]):
                raise ValueError(
                    f"{name} is {value!r}; pass {' or '.join(map(repr, _CHOICES[name]))}"
                )
        elif name == "structures":
            _check_structures(value)
        elif name == "hierarchical_sizes":
            _check_hierarchical_sizes(value)
        elif name == "merge_axes":
            settings[name] = value if isinstance(value, bool) else _sets(name, value, "True, False")
        elif name == "combine":
            named = isinstance(value, str) and value in ("none", "module")
            settings[name] = value if named else _sets(name, value, "'none', 'module'")
        elif name in _LEAST:
            _check_count(name, value, _LEAST[name])
        elif value is not None or name not in _OPTIONAL:
            contains, meaning = domains[name]
            for number in _numbers(name, value, meaning):
                if not contains(number):
                    raise ValueError(f"{name} is {value!r}; pass {meaning}")
    return settings


def _plain(name: str, value: Any) -> Any:
    """Python's number in place of numpy's, of a 0-d tensor or of any other real number's.

    A tensor lr stays: it is read where it is.
    """
    if name == "betas" and isinstance(value, (tuple, list)):
        return tuple([_plain("beta", beta) for beta in value])
    if isinstance(value, Tensor):
        one = value.numel() == 1 and not value.is_meta and not value.is_complex()
        return value.item() if one and name != "lr" else value
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        value = value.item()
    is_plain = type(value) in (bool, int, float) or not isinstance(value, numbers.Real)
    return value if is_plain else float(value)


def _check_structures(value: Any) -> None:
    structures = value if isinstance(value, (tuple, list)) else (value,)
    if not structures or any(structure_names.read(structure) is None for structure in structures):
        raise ValueError(
            f"structures is {value!r}; supported are "
            f"{', '.join(map(repr, structure_names.NAMES))}, and singd's names as "
            f"{structure_names.ALIASES}: pass one of them, or a tuple with one an axis"
        )


def _check_hierarchical_sizes(value: Any) -> None:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or any(type(size) is not int or size < 0 for size in value)
        or not any(value)
    ):
        raise ValueError(
            f"hierarchical_sizes is {value!r}; pass two whole numbers >= 0, of which one is not 0 "
            "((0, 0) is 'diagonal')"
        )


def _sets(name: str, value: Any, others: str) -> tuple[tuple[int, ...], ...]:
    """The value as tuples of whole numbers, by what a setting may be beside them."""
    given = value if isinstance(value, (tuple, list)) else ()
    sets = tuple(tuple(s) if isinstance(s, (tuple, list)) else () for s in given)
    if not sets or not all(sets) or any(type(i) is not int or i < 0 for s in sets for i in s):
        raise ValueError(
            f"{name} is {value!r}; pass {others}, or a tuple of tuples of whole numbers, as "
            "((0, 1), (2, 3))"
        )
    return sets


def check_switches(**switches: object) -> None:
    """Raise a TypeError for what is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; pass True or False")


def _check_count(name: str, value: Any, least: int) -> None:
    cure = f"pass a whole number >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; {cure}")
    if value < least:
        raise ValueError(f"{name} is {value!r}; {cure}")


def _numbers(name: str, value: Any, meaning: str) -> tuple[Any, ...]:
    """The numbers to compare with the domain of a hyperparameter."""
    if name == "lr" and isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or value.is_meta:
            raise ValueError(
                f"lr is {describe(value)}; pass a float, or one floating number as a tensor"
            )
        # Reading a tensor on another device would stall the host: such an lr is the caller's word.
        return (value.detach().reshape(()).item(),) if value.device.type == "cpu" else ()
    if name == "initial_square_avg" and isinstance(value, str) and value == "auto":
        return ()
    found = tuple(value) if name == "betas" and isinstance(value, (tuple, list)) else (value,)
    if name == "betas" and len(found) != 2:
        raise ValueError(f"betas is {value!r}; pass {meaning}")
    for number in found:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            cure = "; .item() makes a number of one element" if hasattr(number, "item") else ""
            what = f"{value!r}, a {type(number).__name__}"
            raise TypeError(f"{name} is {what}; pass {meaning}{cure}")
    return found


def check_param(name: str, param: Tensor) -> None:
    """Raise a TypeError unless `param` is a dense tensor of a floating dtype that is supported."""
    if param.layout is not torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; pass a dense (torch.strided) tensor")
    if param.dtype not in DTYPES:
        cure = "pass its real view (torch.view_as_real)" if param.is_complex() else "cast it"
        raise TypeError(
            f"{name} has dtype {param.dtype}; supported are float64, float32, bfloat16 and "
            f"float16: {cure}"
        )


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's diagonal state: never below float32, so that s cannot freeze."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor, found without an import of torch.distributed."""
    if type(value) in PLAIN and not torch.compiler.is_compiling():
        return False  # soon said; a compiler takes the type of any parameter for one of these
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(value, distributed.DTensor)


def _own_gradient(param: Any) -> Tensor:
    """The gradient; of a DTensor this rank's part, in the layout of the parameter."""
    grad = param.grad
    if not is_sharded(grad):
        return grad  # type: ignore[no-any-return]
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()  # type: ignore[no-any-return]


def gradients_suit(params: Sequence[Any]) -> bool:
    """Whether the kernels read every gradient as it is: of the parameter's dtype or float32.

    And laid out as the parameter, where these are DTensors.
    """
    return all(
        p.grad is not None
        and p.grad.dtype in (p.dtype, torch.float32)
        and (not is_sharded(p.grad) or p.grad.placements == p.placements)
        for p in params
    )


def usable_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients; those that do not suit in the dtype of the state, exact for narrower ones.

    Of DTensors this rank's parts.
    """
    grads = [_own_gradient(p) for p in params if p.grad is not None]
    return [
        g if g.dtype in (p.dtype, torch.float32) else g.to(state_dtype(p))
        for p, g in zip(params, grads, strict=True)
    ]


def check_tensors(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Mapping[str, Sequence[Tensor]]
) -> None:
    _check_lists("params", {"params": params, "grads": grads, **states})
    for i, param in enumerate(params):
        check_param(f"params[{i}]", param)
        check_param(f"grads[{i}]", grads[i])
        if grads[i].dtype not in (param.dtype, torch.float32):
            raise TypeError(
                f"grads[{i}] is {grads[i].dtype} but params[{i}] is {param.dtype}; "
                "cast the gradient to the parameter's dtype or to float32"
            )
        _check_like(f"grads[{i}]", grads[i], f"params[{i}]", param)
        for name, tensors in states.items():
            _check_like(f"{name}[{i}]", tensors[i], f"params[{i}]", param)
            if tensors[i].dtype != state_dtype(param):
                raise TypeError(
                    f"{name}[{i}] is {tensors[i].dtype} but params[{i}] is {param.dtype}, whose "
                    f"state is {state_dtype(param)}; allocate it with dtype={state_dtype(param)}"
                )


def check_sums(
    sums: Sequence[Tensor], grads: Sequence[Tensor], parts: Mapping[str, Sequence[Tensor]]
) -> None:
    """Raise unless gradients may be added to these sums, and what is made of them to `parts`."""
    _check_lists("sums", {"sums": sums, "grads": grads, **parts})
    for i, total in enumerate(sums):
        check_param(f"sums[{i}]", total)
        check_param(f"grads[{i}]", grads[i])
        if total.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"sums[{i}] is {total.dtype}; make it float32 or float64")
        narrow = (torch.float32, *(DTYPES[2:] if total.dtype == torch.float32 else ()))
        if grads[i].dtype not in (total.dtype, *narrow):
            raise TypeError(
                f"grads[{i}] is {grads[i].dtype} but sums[{i}] is {total.dtype}; add it to a sum "
                f"in {state_dtype(grads[i])}"
            )
        _check_like(f"grads[{i}]", grads[i], f"sums[{i}]", total)
        for name, tensors in parts.items():
            _check_like(f"{name}[{i}]", tensors[i], f"sums[{i}]", total)
            if tensors[i].dtype != total.dtype:
                raise TypeError(
                    f"{name}[{i}] is {tensors[i].dtype} but sums[{i}] is {total.dtype}; make both "
                    "the same"
                )


def _check_lists(first: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise unless all are lists of as many tensors as the first one."""
    for name, tensors in lists.items():
        if len(tensors) != len(lists[first]):
            raise ValueError(
                f"{name} has {len(tensors)} tensors but {first} has {len(lists[first])}; "
                "pass one for each parameter"
            )
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                cure = "leave its parameter out" if tensor is None else "pass torch.as_tensor(it)"
                raise TypeError(f"{name}[{i}] is a {type(tensor).__name__}; {cure}")


def check_scaling(grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Raise unless each is one number that the kernels can read, or None."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; pass a tensor or None")
        narrow = value.dtype not in (torch.float32, torch.float64)
        if value.numel() != 1 or narrow or value.is_meta:
            raise ValueError(
                f"{name} is {describe(value)}; pass one float32 number, as torch.amp.GradScaler "
                "keeps it"
            )


def check_reachable(params: Sequence[Tensor], values: Mapping[str, object]) -> None:
    """Raise a ValueError for a tensor that is neither on the CPU nor on the parameters' device."""
    devices = {param.device for param in params}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device.type != "cpu" and devices != {value.device}:
            raise ValueError(
                f"{name} is {describe(value)} but the parameters are on "
                f"{', '.join(sorted(map(str, devices)))}; move it to the CPU"
            )


def check_steps(steps: object, count: int) -> None:
    """Raise unless these are so many counts of steps, each at least 1."""
    if not isinstance(steps, Tensor):
        raise TypeError(
            f"steps is {steps!r}, a {type(steps).__name__}; pass a float32 tensor of shape "
            f"({count},), one count a parameter, or None for no bias correction"
        )
    if steps.shape != (count,) or steps.dtype != torch.float32:
        raise ValueError(
            f"steps is {describe(steps)}; pass a float32 tensor of shape ({count},), "
            "one count a parameter, or None for no bias correction"
        )
    # Reading a tensor on another device would stall the host.
    if steps.is_cpu and not bool((steps >= 1).all()):
        raise ValueError(f"steps is {steps.tolist()}; count the present step too: from 1 on")


def _check_like(name: str, tensor: Tensor, param_name: str, param: Tensor) -> None:
    if tensor.shape != param.shape:
        transposed = tensor.shape == param.shape[::-1]
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but {param_name} has {tuple(param.shape)}; "
            + ("pass it untransposed" if transposed else "pass one of the parameter's shape")
        )
    if tensor.device != param.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {param_name} is on {param.device}; "
            f"move it with .to({str(param.device)!r})"
        )


def describe(tensor: Tensor) -> str:
    return f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"
