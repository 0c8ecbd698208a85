"""What is checked of tensors that a step has not met before, so that nothing raises once it runs.

Every error names the parameter, what is wrong with it and the cure; nothing has moved by then.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import HYPERPARAMETERS, check_param, is_sharded
from ..ops.overlap import Named
from .shards import check_layout, local
from .state import Initial, is_own

_ANEW = "start it anew with optimizer.state.pop(param), or load a checkpoint"

_MOST_TERMS = 1e12
COUNTED = "counted"  # a batch size that a counter writes before the first step


def check_counted(index: int, group: Mapping[str, Any]) -> None:
    """Raise a ValueError for a batch size that is to be counted, where nothing has."""
    if isinstance(size := group.get("batch_size"), str) and size == COUNTED:
        raise ValueError(
            f"batch_size of group {index} is {COUNTED!r}, but nothing counted it; attach a "
            "BatchSizeCounter, or what of rootfree_fused.integrations does so in your trainer, or "
            "pass the number of loss terms that the gradient averages"
        )


# What users of torch.optim pass from habit, and what there is instead.
_OF_ANOTHER_CLASS = (
    "leave it out; where param_groups() made the group, pass it optimizer_class= your class"
)
_REPLACED = {
    "eps": "damping replaces it: added to s without a root, in the unit of s, a squared gradient "
    "times the batch size",
    "fused": "leave it out: every step runs fused kernels, as ops.backends() says",
    "foreach": "leave it out: every step runs fused kernels, as ops.backends() says",
    "differentiable": "leave it out: a step is not differentiable",
    "amsgrad": "leave it out: there is no such variant",
    "centered": "leave it out: there is no such variant",
    "nesterov": "leave it out: there is no such variant",
    "dampening": "leave it out: there is no such variant",
    "betas": "pass alpha=, the decay of s, and momentum=",
    "alpha": "pass betas=(beta1, beta2): beta2 is the decay of s",
    **dict.fromkeys(("update_rms", "row_beta", "merge_axes"), _OF_ANOTHER_CLASS),
    "decoupled_weight_decay": "pass weight_decay_mode='decoupled' or 'momentum' where there is one",
}

# What the constructor has for all groups.
_OF_ALL_GROUPS = frozenset({"process_group", "replicas", "update_dtype"})


def refuse_unknown(owner: type, names: Iterable[str], replaced: Mapping[str, str]) -> None:
    """Raise a TypeError for arguments that the constructor of `owner` does not have.

    `replaced` says what `owner` has in place of some, before what all classes have.
    """
    for name in names:
        cure = _cure(owner, name, replaced)
        raise TypeError(f"{owner.__name__} has no argument {name!r}; {cure}")


def refuse_misspelt(
    owner: type, index: int, keys: Iterable[Any], known: Iterable[str], replaced: Mapping[str, str]
) -> None:
    """Raise a TypeError for keys of a group that would be settings, but have no effect here.

    Those of schedulers, frameworks and users stay, as in torch.optim: "initial_lr", "lr_scale".
    """
    settings = {"params", *known}
    for key in keys:
        if key in settings or not isinstance(key, str):
            continue
        if key in HYPERPARAMETERS | _OF_ALL_GROUPS or key in _REPLACED or key in replaced:
            cure = _cure(owner, key, replaced)
            raise TypeError(f"{owner.__name__} has no setting {key!r}, as in group {index}; {cure}")
        close = get_close_matches(key.lower(), settings, cutoff=0.8)
        if close and not any(name in key for name in close):  # as weight_decay in no_weight_decay
            raise TypeError(
                f"{owner.__name__} has no setting {key!r}, as in group {index}; spell it "
                f"{close[0]!r}, or give a key of your own another name"
            )


def refuse_of_all_groups(owner: type, group: Mapping[Any, Any]) -> None:
    """Raise a TypeError for arguments of the constructor, which have no effect in a group."""
    for key in sorted(_OF_ALL_GROUPS & group.keys()):
        cure = _cure(owner, key, {})
        raise TypeError(f"{owner.__name__} has no setting {key!r} of a group; {cure}")


def _cure(owner: type, name: str, replaced: Mapping[str, str]) -> str:
    known = list(inspect.signature(owner).parameters)[1:-1]
    if name in known:
        return "take it out of the group and pass it to the constructor, for all groups"
    return {**_REPLACED, **replaced}.get(name, f"it has {', '.join(known)}")


def name_of(index: int, position: int, group: Mapping[str, Any]) -> str:
    """What errors call a parameter: its place, and its name where it has one."""
    names = group.get("param_names", ())
    name = f" ({names[position]})" if position < len(names) else ""
    return f"parameter {position}{name} of group {index}"


def check_tensor(name: str, param: Any) -> None:
    """Raise a TypeError unless a step by elements may take it, whole or as a DTensor."""
    if not isinstance(param, Tensor):
        raise TypeError(
            f"{name} is a {type(param).__name__}; put parameters (torch.nn.Parameter) into a group"
        )
    check_param(name, param)


def check_whole(name: str, param: Tensor) -> None:
    """Raise a TypeError for a part of a parameter that does not say which part it is."""
    if getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"{name} is a flat shard of FullyShardedDataParallel, of shape {tuple(param.shape)}: "
            "without its axes it has no factors, and the method would be another one; use "
            "DistributedDataParallel, or ZeroRedundancyOptimizer to shard the state, or "
            "RootFreeRMSprop"
        )


def check_gradient(name: str, param: Tensor, grad: Any) -> None:
    """Raise unless a step can read it as the gradient of the parameter."""
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name}, of shape {tuple(grad.shape)}, has layout {grad.layout}; pass "
            "dense gradients: sparse=False in torch.nn.Embedding, or grad.to_dense()"
        )
    if not grad.is_floating_point():
        raise TypeError(f"the gradient of {name} is {grad.dtype}; cast it to {param.dtype}")
    check_param(f"the gradient of {name}", grad)
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {name} has shape {tuple(grad.shape)} but the parameter has "
            f"{tuple(param.shape)}; run the backward anew after a change of its shape"
        )
    check_layout(f"the gradient of {name}", grad, param)
    if grad.device != param.device:
        raise ValueError(
            f"the gradient of {name} is on {grad.device} but the parameter is on {param.device}; "
            f"move it with .to({str(param.device)!r})"
        )


def check_devices(index: int, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Raise a ValueError where a tensor on another device would take the step with it."""
    if len({param.is_meta for param in params}) > 1:
        position = next(
            i for i, p in enumerate(group["params"]) if p.is_meta and p.grad is not None
        )
        raise ValueError(
            f"{name_of(index, position, group)} is on meta, where it has no values, and others of "
            "its group are not; give it memory (module.to_empty), or set its gradient to None"
        )
    lr = group["lr"]
    if params and isinstance(lr, Tensor) and lr.device.type != "cpu":
        devices = sorted({str(param.device) for param in params})
        if str(lr.device) not in devices:
            raise ValueError(
                f"lr of group {index} is on {lr.device} but its parameters are on "
                f"{', '.join(devices)}; keep lr on the CPU, or move it with .to({devices[0]!r})"
            )


def lacks(
    name: str, state: Mapping[str, Any], spec: Mapping[str, Initial], *, complete: bool
) -> list[str]:
    """Which of the declared keys a state lacks: none of them, or all, or those of new settings.

    complete: whether it had those too.

    Raises:
        ValueError: some of those that it was allocated with.
    """
    missing = [key for key in spec if key not in state]
    lost = [key for key in missing if complete or not spec[key].optional]
    if lost and len(missing) < len(spec):
        raise ValueError(
            f"the state of {name} lacks {', '.join(map(repr, lost))} and has "
            f"{', '.join(repr(key) for key in state if key in spec)}; {_ANEW}"
        )
    return missing


def has_no_values(param: Tensor, state: Mapping[str, Any], spec: Mapping[str, Initial]) -> bool:
    """Whether state that took no step was left on meta, where its parameter is no longer."""
    tensors = [state[key] for key in spec if isinstance(state.get(key), Tensor)]
    if param.is_meta or not any(tensor.is_meta for tensor in tensors):
        return False
    step = state.get("step")
    return isinstance(step, Tensor) and step.numel() == 1 and (step.is_meta or step.item() == 0)


def check_state(
    name: str, param: Tensor, state: Mapping[Any, Any], spec: Mapping[str, Initial]
) -> None:
    """Raise unless the state is what the settings and the parameter's present shape need."""
    for key, initial in spec.items():
        value = state[key]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{key} of {name} is {value!r}, a {type(value).__name__}, and not a tensor; {_ANEW}"
            )
        if tuple(value.shape) != tuple(initial.shape):
            raise ValueError(
                f"{name} is of shape {tuple(param.shape)}, for which {key} has shape "
                f"{tuple(initial.shape)}, but it has {tuple(value.shape)}: state of another shape "
                f"or of other settings; {_ANEW}"
            )
        if value.dtype != initial.dtype:
            raise TypeError(
                f"{key} of {name} is {value.dtype} but must be {initial.dtype} for a "
                f"{param.dtype} parameter; cast it, or {_ANEW}"
            )
        if value.layout is not torch.strided:
            raise TypeError(f"{key} of {name} has layout {value.layout}; {_ANEW}")
        if initial.lies_as is not None:
            _check_spread(f"{key} of {name}", value, param)
        elif not value.is_contiguous():
            raise ValueError(f"{key} of {name} is not contiguous; {_ANEW}")
        if value.is_meta and not param.is_meta:
            raise ValueError(f"{key} of {name} is on meta, where it has no values; {_ANEW}")
        if key == "step" and value.is_cpu and not 0 <= value.item() < math.inf:
            raise ValueError(f"step of {name} is {value.item()}, which counts nothing; {_ANEW}")


def memory(name: str, param: Tensor, state: Mapping[Any, Any]) -> Iterator[Named]:
    """What a step reads and writes for a parameter."""
    yield name, local(param), True
    if param.grad is not None:
        yield f"the gradient of {name}", local(param.grad), False
    for key, value in state.items():
        if is_own(key):
            yield f"{key} of {name}", local(value), True


def _check_spread(name: str, value: Any, param: Any) -> None:
    """Raise unless state that lies as its parameter is spread over the same ranks."""
    check_layout(name, value, param)
    if is_sharded(param) and value.placements != param.placements:
        raise ValueError(
            f"{name} is laid out as {value.placements} but the parameter as {param.placements}; "
            f"redistribute it as the parameter is, or {_ANEW}"
        )


def check_squares(
    squares: Mapping[Tensor, Tensor], params: Sequence[Tensor], kinds: Sequence[str | None]
) -> None:
    """Raise unless these are mean squares of some of the parameters, each of its kind."""
    if squares and "signs" in kinds:
        raise ValueError("squares were given to an optimizer that takes signs; leave them out")
    known = set(map(id, params))
    for param, square in squares.items():
        if id(param) not in known:
            raise ValueError(
                f"squares has a parameter of shape {tuple(param.shape)} that is not among those "
                "with a gradient; leave it out"
            )
        if square.shape != param.shape or square.device != param.device:
            raise ValueError(
                f"squares has {tuple(square.shape)} on {square.device} for a parameter of shape "
                f"{tuple(param.shape)} on {param.device}; pass one mean square an element"
            )
        if not square.is_floating_point() or is_sharded(square) != is_sharded(param):
            raise TypeError(
                f"squares has a {type(square).__name__} of {square.dtype} for a "
                f"{type(param).__name__}; pass a floating tensor that is laid out as it"
            )


def check_terms(terms: Any, parts: Any) -> None:
    """Raise unless a micro-batch may count by these numbers."""
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts is {parts!r}; pass how many there are, a whole number >= 1")
    if terms is not None and (isinstance(terms, bool) or not isinstance(terms, Real)):
        raise TypeError(
            f"terms is a {type(terms).__name__}; pass the number of loss terms that the "
            "micro-batch averages, as a number: of a tensor its item()"
        )
    if terms is not None and not 1 / _MOST_TERMS <= terms <= _MOST_TERMS:  # type: ignore[operator]
        raise ValueError(
            f"terms is {terms!r}; pass how many there are, from 1e-12 to 1e12, so that their "
            "squares stay within float32"
        )
