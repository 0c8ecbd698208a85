"""What torch.amp.GradScaler leaves to a step that supports it: the scale, and whether to skip."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

# "grad_scale", by which the gradients were multiplied, and "found_inf", 0 unless the step is to be
# skipped: each one float32 number on the device of a scaler, or missing.
Scaling = dict[str, Tensor]


def scaling_of(optimizer: Optimizer) -> Scaling:
    """GradScaler sets these attributes for the time of a step."""
    found = {key: getattr(optimizer, key, None) for key in ("grad_scale", "found_inf")}
    return {key: value for key, value in found.items() if value is not None}


def on_host(scaling: Scaling) -> Scaling:
    """For parameters there: one scaler serves all devices."""
    return {key: value.cpu() for key, value in scaling.items()}


def skips(found_inf: Tensor | None) -> bool:
    """Whether the scaler found infs; the host waits for the device that counted them."""
    return found_inf is not None and bool(found_inf.item())


def steps_taken(scaling: Scaling, device: torch.device) -> int | Tensor:
    """How many steps a step is: 0 where the scaler found infs."""
    found_inf = scaling.get("found_inf")
    return 1 if found_inf is None else (found_inf == 0).to(device).reshape(())
