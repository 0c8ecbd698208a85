"""Weights and state in fewer bytes: what state a parameter has for them, saved and loaded.

Beside a bfloat16 weight lies `param_residual`, beside the codes of an average its `<key>_scale`.
reference/formats.py has the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..ops.checks import check_hyperparameters, is_sharded
from ..ops.methods import second_moments
from ..reference.formats import BLOCK, decoded, encoded
from .shards import as_laid_out, as_part_of, local
from .state import RESIDUAL, STACKED, Initial, is_own

ParamResidual = Literal["stochastic", 8, 16] | None
StateFormat = Literal["float32", "bfloat16", "8bit"]
# The settings of formats, and what checkpoints that lack them were stepped with.
SETTINGS: Mapping[str, Any] = {"param_residual": None, "state_format": "float32"}
BEFORE: Mapping[str, Any] = {**SETTINGS, "rounding_seed": 0}
# State of fewer elements, and of vectors, keeps float32: a thousandth of the memory.
SMALLEST = 4096

RESIDUALS = {8: torch.int8, 16: torch.int16}


def check_formats(name: str, param: Tensor, group: Mapping[str, Any], in_parts: bool) -> None:
    """Raise where a parameter has not what the settings ask for.

    in_parts: whether its state lies on ranks as it does.
    """
    if is_lazy(param):
        return
    residual, state = group["param_residual"], group["state_format"]
    if residual is not None and param.dtype != torch.bfloat16:
        raise TypeError(
            f"{name} is {param.dtype} but param_residual is {residual!r}, which is what bfloat16 "
            "weights round away; give it a group with param_residual=None, or make the model "
            "bfloat16 with rootfree_fused.to_bfloat16_(model, optimizer)"
        )
    if state != "float32" and param.dtype == torch.float64:
        raise TypeError(
            f"{name} is float64 but state_format is {state!r}; give it a group with "
            "state_format='float32', which keeps float64 for it"
        )
    if in_parts and not has_whole_blocks(param, group):
        raise NotImplementedError(
            f"{name}, of shape {tuple(param.shape)}, lies on ranks as {param.placements}, which "  # type: ignore[attr-defined]
            f"cuts the blocks of {BLOCK} that state_format='8bit' has a scale of; give it a group "
            f"with state_format='bfloat16', or shard its first axis alone and have the others "
            f"multiply to a multiple of {BLOCK}"
        )


def have_settings(group: Mapping[str, Any]) -> bool:
    """Whether an optimizer with these settings has formats to choose."""
    return group.keys() >= SETTINGS.keys()


def formats_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of formats of a group, if it has any."""
    return {name: group[name] for name in SETTINGS if name in group}


def are_used(group: Mapping[str, Any]) -> bool:
    """Whether a group's state is in other formats than float32 throughout."""
    return any(group[name] != value for name, value in SETTINGS.items())


def is_kept(key: str) -> bool:
    """Whether a state tensor has a format: all but counts."""
    return is_own(key) and key != "step"


def _format_of(param: Tensor, group: Mapping[str, Any]) -> str:
    """The format of a parameter's state."""
    small = param.dim() - group.get("batch_axes", 0) < 2 or param.numel() < SMALLEST
    return "float32" if small else group["state_format"]


def has_whole_blocks(param: Any, group: Mapping[str, Any]) -> bool:
    """Whether no block that has a scale has elements of two ranks, of a DTensor."""
    if _format_of(param, group) != "8bit":
        return True
    whole_rows = all(p.is_replicate() or getattr(p, "dim", None) == 0 for p in param.placements)
    return whole_rows and param[0].numel() % BLOCK == 0


def in_formats(
    param: Tensor, group: Mapping[str, Any], spec: Mapping[str, Initial]
) -> dict[str, Initial]:
    """Declared averages of a parameter in the formats of its group, with what lies beside them."""
    found = dict(spec)
    name = _format_of(param, group)
    for key, initial in spec.items():
        if name == "bfloat16":
            found[key] = replace(initial, dtype=torch.bfloat16)
        elif name == "8bit":
            dtype = torch.uint8 if key in second_moments() else torch.int8
            code, scale = encoded(torch.tensor([initial.value], device="cpu"), dtype)
            assert scale is not None
            found[key] = replace(initial, dtype=dtype, value=code.item())
            found[scale_of(key)] = Initial(
                _scale_shape(param), scale.dtype, scale.item(), optional=initial.optional
            )
            if is_sharded(param):
                found[scale_of(key)] = replace(found[scale_of(key)], spread=param)
    if (residual := group["param_residual"]) in RESIDUALS:
        found[RESIDUAL] = Initial(tuple(param.shape), RESIDUALS[residual], like=param)
    return found


def scale_of(key: str) -> str:
    return f"{key}_scale"


def _scale_shape(param: Tensor) -> tuple[int, ...]:
    """One scale a block: by rows of the parameter where its blocks do not run over them."""
    blocks = -(-param.numel() // BLOCK)
    rows = param.shape[0]
    return (rows, blocks // rows) if param.numel() % (rows * BLOCK) == 0 else (blocks,)


# Random numbers -----------------------------------------------------------------------------------


class Place(NamedTuple):
    """What random numbers are told by: the seed of a parameter, and where in it a part begins."""

    seed: int
    first: int


def places_of(index: int, group: Mapping[str, Any], params: Sequence[Tensor]) -> list[Place]:
    """Of this rank's parts of some parameters of a group; index: of the group."""
    positions = {id(param): i for i, param in enumerate(group["params"])}
    return [Place(seed_of(index, positions[id(p)], group), first_of(p)) for p in params]


def seed_of(index: int, position: int, group: Mapping[str, Any]) -> int:
    """Of a parameter, by its place, so that a run that resumes has the same."""
    spread: int = group["rounding_seed"] * 0x9E3779B1
    return (position + (index << 20) + spread) % 2**32


def first_of(param: Any) -> int:
    """The index of the first element of this rank's part.

    Of rows it is that in the whole parameter, whose bits a step gives then; of other parts such
    that ranks round by other numbers.
    """
    if not is_sharded(param) or not param.numel():
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    sizes = zip(offsets, param.shape, strict=True)
    return sum(offset * (param.numel() // size) for offset, size in sizes)


# Checkpoints --------------------------------------------------------------------------------------


def sent(state: Mapping[str, Any]) -> dict[str, Any]:
    """Saved state without int16, which torch.distributed cannot send: as bytes, (..., 2)."""
    residual = state.get(RESIDUAL)
    if residual is None or residual.dtype != torch.int16:
        return dict(state)
    bytes_of = local(residual).unsqueeze(-1).view(torch.uint8)
    return {**state, RESIDUAL: as_part_of(residual, bytes_of, (*residual.shape, 2))}


def received(
    saved: Mapping[str, Any], spec: Mapping[str, Initial], device: torch.device
) -> dict[str, Any]:
    """Saved state in the formats that are declared, where these lose nothing of it."""
    found = dict(saved)
    if RESIDUAL in spec:
        found[RESIDUAL] = _residual(saved.get(RESIDUAL), spec[RESIDUAL], device)
    for key in spec:
        scale = saved.get(scale_of(key))
        if isinstance(scale, Tensor) and scale_of(key) not in spec:
            del found[scale_of(key)]
            value = decoded(local(saved[key]), local(scale))
            found[key] = as_part_of(saved[key], value, tuple(saved[key].shape))
    return found


def converted(
    saved: Mapping[str, Any], spec: Mapping[str, Initial], device: torch.device
) -> dict[str, Any]:
    """Saved state in the formats that are declared, to nearest where these hold less.

    Factors, which are bfloat16 and 16 bits beside it in every format, stay as they are.
    """
    averages = {
        key: initial
        for key, initial in spec.items()
        if key != RESIDUAL and not key.endswith("_scale") and not key.startswith(STACKED)
    }
    found = received(saved, averages, device)
    for key in averages.keys() & found.keys():
        value, dtype = found[key], averages[key].dtype
        if dtype in (torch.bfloat16, torch.int8, torch.uint8):
            codes, scale = encoded(local(value).float(), dtype)
            found[key] = as_part_of(value, codes)
            if scale is not None:
                shape = spec[scale_of(key)].shape
                own = (len(codes), *shape[1:]) if is_sharded(value) else shape
                found[scale_of(key)] = as_part_of(value, scale.view(own), shape)
    residual = found.pop(RESIDUAL, None)
    if declared := spec.get(RESIDUAL):
        narrow = declared.dtype == torch.int8
        found[RESIDUAL] = _residual(_narrowed(residual) if narrow else residual, declared, device)
    return found


def _narrowed(saved: Any) -> Any:
    """A saved residual in 8 bits."""
    if saved is None or saved.dtype == torch.int8:
        return saved
    whole = saved.shape[:-1] if saved.dtype == torch.uint8 else saved.shape
    own = (_as_int16(local(saved)).int() + 0x80) >> 8
    return as_part_of(saved, own.clamp(-128, 127).to(torch.int8), tuple(whole))


def _as_int16(own: Tensor) -> Tensor:
    """A residual of 16 bits as it is kept, of one as it was sent."""
    was_sent = own.dtype == torch.uint8 and own.shape[-1:] == (2,)
    return own.contiguous().view(torch.int16).squeeze(-1) if was_sent else own


def _residual(saved: Any, declared: Initial, device: torch.device) -> Any:
    """A saved residual as the declared one; zeros where none was saved."""
    if saved is None:
        return declared(device)
    if not isinstance(saved, Tensor):
        return saved
    if is_sharded(saved) and is_sharded(declared.like):
        saved = as_laid_out(saved, declared.like)  # as bytes
    own = _as_int16(local(saved))
    if own.dtype == torch.int8 and declared.dtype == torch.int16:
        own = own.to(torch.int16) << 8
    return as_part_of(saved, own, declared.shape)


_INCOMPLETE = (
    "the checkpoint is damaged, or was read by torch.distributed.checkpoint for an optimizer in "
    "other formats, which leaves out what that one has not; read it for one in the saved formats, "
    "then convert.to_format"
)


def check_in_formats(
    where: str, group: Mapping[str, Any], spec: Mapping[str, Initial], state: Mapping[str, Any]
) -> None:
    """Raise where saved state has not what the formats of its group have.

    group: the saved one. spec: what a parameter declares with that group's formats.
    """
    if RESIDUAL in spec and not isinstance(state.get(RESIDUAL), Tensor):
        raise ValueError(
            f"{where} has no {RESIDUAL} but its group has param_residual="
            f"{group['param_residual']!r}: {_INCOMPLETE}; or set param_residual=None in that "
            "group, which takes the weights for what they are"
        )
    for key in [key for key in spec if scale_of(key) in spec]:
        codes, scale = state.get(key), state.get(scale_of(key))
        if codes is None and scale is None and spec[key].optional:
            continue
        for name, found, dtype in (
            (key, codes, spec[key].dtype),
            (scale_of(key), scale, spec[scale_of(key)].dtype),
        ):
            if not isinstance(found, Tensor) or found.dtype != dtype:
                kind = found.dtype if isinstance(found, Tensor) else "missing"
                raise ValueError(
                    f"{where}: {name} is {kind} but its group has state_format='8bit', which keeps "
                    f"{dtype}: {_INCOMPLETE}"
                )
        assert codes is not None
        assert scale is not None
        if scale.numel() != -(-codes.numel() // BLOCK):
            raise ValueError(
                f"{where}: {scale_of(key)} has {scale.numel()} scales for {codes.numel()} codes, "
                f"and not one for {BLOCK}: {_INCOMPLETE}"
            )


# Whether a format keeps every bit of what was saved in another.
_KEEPS: Mapping[str, Callable[[Any, Any], bool]] = {
    "param_residual": lambda own, saved: saved in (own, None, "stochastic") or own == 16,
    "state_format": lambda own, saved: own in (saved, "float32"),
}


def check_kept(index: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of formats that a group keeps over a load.

    Raises:
        ValueError: the saved state has bits that these formats would lose.
    """
    own = formats_of(group)
    try:
        check_hyperparameters({name: saved[name] for name in own})
    except (TypeError, ValueError) as error:
        raise ValueError(f"state_dict group {index}: {error}") from None
    for name, value in own.items():
        if not _KEEPS[name](value, saved[name]):
            raise ValueError(
                f"{name} of group {index} is {value!r} but the state_dict has {saved[name]!r}, of "
                f"which bits would be lost; build the optimizer with {name}={saved[name]!r}, or "
                "lose them on purpose: load convert.to_format(state_dict, optimizer)"
            )
    return own
