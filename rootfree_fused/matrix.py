"""IFShampoo: inverse-free, root-free Shampoo, whose factors products alone learn."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from . import ops
from ._base import Group, RootFreeOptimizer
from ._state import Initial, State, full_like, momentum_buffers, unused_momentum
from .factors import Bucket, Plan, build_plan, default_dtype, factor_state, layout_of
from .reference import is_update_step

Structure = Literal["auto", "dense", "diagonal"]


class IFShampoo(RootFreeOptimizer):
    r"""Inverse-free Shampoo without roots (IF-Shampoo).

    TODO
    """

    _fixed = ("factor_dtype",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        batch_size: float | None = None,
        factor_lr: float = 0.1,
        factor_momentum: float = 0.5,
        update_interval: int = 1,
        update_schedule: Literal["constant", "log4"] = "constant",
        structures: Structure | tuple[Structure, ...] = "auto",
        max_dense_dim: int = 2048,
        merge_axes: bool = True,
        vector_method: Literal["rmsprop", "factor"] = "rmsprop",
        alpha: float = 0.99,
        factor_dtype: torch.dtype | None = None,
        weight_decay_mode: ops.WeightDecayMode = "decoupled",
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "factor_lr": factor_lr,
            "factor_momentum": factor_momentum,
            "update_interval": update_interval,
            "update_schedule": update_schedule,
            "structures": structures,
            "max_dense_dim": max_dense_dim,
            "merge_axes": merge_axes,
            "vector_method": vector_method,
            "alpha": alpha,
            "factor_dtype": factor_dtype,
            "weight_decay_mode": weight_decay_mode,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _complete(self, group: Group) -> None:
        if group["factor_dtype"] is None and group["params"]:
            group["factor_dtype"] = default_dtype(group["params"][0])

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        layout = layout_of(param.shape, group)
        own = (
            {"square_avg": full_like(param, 1.0)}
            if layout is None
            else factor_state(layout, group["factor_dtype"])
        )
        return {**own, "momentum_buffer": full_like(param, 0.0)}

    def _unused_state(self, group: Group) -> frozenset[str]:
        return unused_momentum(group)

    def _forget(self) -> None:
        super()._forget()
        self._counts: dict[int, tuple[Tensor, list[int]]] = {}

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._plans: dict[int, Plan] = {}

    @_disable_dynamo
    def _update(
        self,
        index: int,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        steps: Tensor,
    ) -> None:
        group = self.param_groups[index]
        due = self._due(index, group, steps)
        plan = self._plans.get(index)
        if plan is None or not plan.fits(states, due):
            layouts = [layout_of(p.shape, group) for p in params]
            plan = build_plan(layouts, due, states, group["update_interval"], params[0].device)
            self._plans[index] = plan

        lists = params, grads, states
        if plan.vectors:
            _update_vectors(group, *_pick(plan.vectors, *lists))
        for update in (False, True):
            buckets = [bucket for bucket in plan.buckets if due[bucket.members[0]] is update]
            if buckets:
                members = [i for bucket in buckets for i in bucket.members]
                _update_matrices(group, buckets, update, *_pick(members, *lists))

    def _due(self, index: int, group: Group, steps: Tensor) -> list[bool]:
        """Which parameters update their factors at this step."""
        if steps.device.type == "cpu":
            counts = steps.int().tolist()
        else:  # read once, then counted on the host: nothing waits for the device
            source, counts = self._counts.get(index, (None, []))
            counts = [count + 1 for count in counts] if source is steps else steps.int().tolist()
            self._counts[index] = steps, counts
        interval, schedule = group["update_interval"], group["update_schedule"]
        due = {count: is_update_step(count - 1, interval, schedule) for count in set(counts)}
        return [due[count] for count in counts]


def _pick(places: list[int], *lists: list[Any]) -> list[list[Any]]:
    return [[items[i] for i in places] for items in lists]


def _update_vectors(
    group: Group, params: list[Tensor], grads: list[Tensor], states: list[State]
) -> None:
    torch.ops.rootfree_fused.rmsprop_(
        params,
        grads,
        [state["square_avg"] for state in states],
        momentum_buffers(states, group["momentum"]),
        ops.as_scalar_tensor(group["lr"]),
        alpha=group["alpha"],
        damping=group["damping"],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        batch_size=group["batch_size"],
        decoupled=group["weight_decay_mode"] == "decoupled",
        maximize=group["maximize"],
    )


def _update_matrices(
    group: Group,
    buckets: list[Bucket],
    update_factors: bool,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
) -> None:
    stale = [bucket.products_are_stale() for bucket in buckets]
    torch.ops.rootfree_fused.ifshampoo_(
        params,
        grads,
        [factor for bucket in buckets for factor in bucket.factors],
        [residual for bucket in buckets for residual in bucket.residuals],
        [momentum for bucket in buckets for momentum in bucket.momenta],
        [product for bucket in buckets for product in bucket.products],
        momentum_buffers(states, group["momentum"]),
        ops.as_scalar_tensor(group["lr"]),
        axes=[len(bucket.factors) for bucket in buckets],
        update_factors=update_factors,
        refresh_products=any(stale),
        factor_lr=group["factor_lr"],
        factor_momentum=group["factor_momentum"],
        damping=group["damping"],
        batch_size=group["batch_size"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        decoupled=group["weight_decay_mode"] == "decoupled",
        maximize=group["maximize"],
    )
