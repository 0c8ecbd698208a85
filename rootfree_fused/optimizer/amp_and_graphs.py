"""What torch.amp.GradScaler leaves to a step, and what a step must be for a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .shards import local

# "grad_scale", by which the gradients were multiplied, and "found_inf", 0 unless the step is to be
# skipped: each one float32 number on the device of a scaler, or missing.
Scaling = dict[str, Tensor]


def scaling_of(optimizer: Optimizer) -> Scaling:
    """GradScaler sets these attributes for the time of a step."""
    found = {key: getattr(optimizer, key, None) for key in ("grad_scale", "found_inf")}
    return {key: local(value) for key, value in found.items() if value is not None}


def on_host(scaling: Scaling) -> Scaling:
    """For parameters there: one scaler serves all devices."""
    return {key: value.cpu() for key, value in scaling.items()}


def steps_taken(scaling: Scaling, device: torch.device) -> int | Tensor:
    """How many steps a step is: 0 where the scaler found infs."""
    found_inf = scaling.get("found_inf")
    return 1 if found_inf is None else (found_inf == 0).to(device).reshape(())


def is_capturing(groups: list[dict[str, Any]]) -> bool:
    """Whether the current stream of the parameters' device is being captured."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return False
    indices = (p.get_device() for group in groups for p in group["params"] if p.is_cuda)
    with torch.cuda.device(next(indices, -1)):  # which changes nothing for -1
        return torch.cuda.is_current_stream_capturing()


def check_capturable(groups: list[dict[str, Any]]) -> None:
    """Raise a RuntimeError where replays would not be steps."""
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "step() was called under CUDA graph capture with capturable=False; "
            "pass capturable=True so that the step count lives on the device"
        )
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    if missing := [tuple(p.shape) for p in params if p.grad is None]:
        raise RuntimeError(
            f"step() was called under CUDA graph capture, but {len(missing)} of {len(params)} "
            f"parameters have no gradient (shapes {missing[:3]}), and no replay would update them; "
            "capture the backward too, or requires_grad_(False) what is not trained"
        )
