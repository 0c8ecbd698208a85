"""What a step must be for a CUDA graph to repeat it."""

from __future__ import annotations

from typing import Any

import torch


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


def check_schedules(groups: list[dict[str, Any]], *, by_kind: bool) -> None:
    """Raise a RuntimeError for groups that update their factors at some steps only.

    by_kind: CapturedStep has a graph for each kind of step, and chooses by the count of steps.
    """
    for group in groups:
        interval = "step() was called under CUDA graph capture with update_interval="
        interval += str(group["update_interval"])
        if group["update_interval"] > 1 and not by_kind:
            raise RuntimeError(
                f"{interval}: replays would update the factors always or never; capture the "
                "training step with rootfree_fused.CapturedStep"
            )
        if group["update_interval"] > 1 and group["amp_scaling"]:
            raise RuntimeError(
                f"{interval} and amp_scaling=True: only the device knows which steps were skipped; "
                "use update_interval=1 or amp_scaling=False"
            )
