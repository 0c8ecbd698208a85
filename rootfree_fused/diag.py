"""RootFreeRMSprop and RootFreeAdamW: a diagonal second moment divides, without its root."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import ops
from .ops.checks import gradients_suit
from .optimizer.amp_and_graphs import Scaling
from .optimizer.base import RootFreeOptimizer, Work
from .optimizer.diagonal import rmsprop_settings, rmsprop_state, update_rmsprop_
from .optimizer.groups import Group
from .optimizer.known_tensors import Launch, on_gradients
from .optimizer.starts import declared_start
from .optimizer.state import Initial, State, full_like, unused_momentum


def _adamw_settings(group: Group) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "beta1": beta1,
        "beta2": beta2,
        "damping": group["damping"],
        "weight_decay": group["weight_decay"],
        "maximize": group["maximize"],
    }


def _launch_lr(group: Group) -> float | Tensor:
    """The learning rate as a prepared launch takes it: a number needs no tensor there."""
    lr: float | Tensor = group["lr"]
    return ops.as_scalar_tensor(lr) if isinstance(lr, Tensor) else lr


def _adamw_state(states: list[State]) -> tuple[list[Tensor], list[Tensor]]:
    return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]


def _update_adamw_(
    group: Group,
    scaling: Scaling,
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: Tensor,
) -> None:
    torch.ops.rootfree_fused.adamw_(
        params,
        grads,
        averages,
        squares,
        steps if group["bias_correction"] else None,
        ops.as_scalar_tensor(group["lr"]),
        **_adamw_settings(group),
        batch_size=ops.as_scalar_tensor(group["batch_size"]),
        **scaling,
    )


class RootFreeRMSprop(RootFreeOptimizer):
    r"""RMSProp without the square root (root-free RMSProp).

    With gradient g, batch size B and s starting at the first gradient's mean of B g^2::

        s   <- s + (1 - alpha) (B g^2 - s)
        u    = g / (s + damping)
        buf <- momentum buf + u
        p   <- (1 - lr weight_decay) p - lr buf

    or, with ``weight_decay_mode="momentum"``, as in the paper's released code::

        buf <- momentum buf + u + weight_decay p
        p   <- p - lr buf

    With ``alpha=1``, ``damping=0`` and ``initial_square_avg=1`` it is :class:`torch.optim.SGD`.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``: float64,
            float32, bfloat16 or float16. Every hyperparameter can be set per group and changed
            between steps.
        lr: step size. A 0-d tensor is read, never written.
        alpha: decay of s per step, in [0, 1]. The paper's ``1 - lr_cov``.
        damping: added to s. Without the root its unit is that of s, a squared gradient times the
            batch size: not the ``eps`` of RMSProp.
        weight_decay: per unit of lr.
        momentum: heavy-ball coefficient on the preconditioned gradient. With 0 no buffer is kept.
        batch_size: the number B of loss terms that the gradient averages: the global batch size
            for a loss averaged over examples, the number of tokens for one averaged over tokens, 1
            for a summed loss. Required here or in every group.
        weight_decay_mode: "decoupled" or "momentum".
        initial_square_avg: where s starts: a number above 0 (1 as released), or "auto", the mean of
            B g^2 over a tensor's first gradient. Until that is neither zero nor non-finite s is 0,
            and nothing moves. It cannot change once there is state.
        maximize: ascend instead of descend.
        capturable: keep ``step`` on the parameter's device, so that a CUDA graph can capture a
            step.
        amp_scaling: let :class:`torch.amp.GradScaler` leave its work to the kernel, which divides
            by the scale and, where there were infs, changes nothing. The host then waits for
            nothing, float16 parameters are served, and ``step`` is on the parameter's device. To
            clip gradients call ``scaler.unscale_`` first; Lightning's clipping needs False.

    State of a parameter: ``step`` (0-d float32), ``square_avg`` (s) and, with momentum,
    ``momentum_buffer``, both of the parameter's shape, in float32 (float64 for float64
    parameters), so that s moves even where alpha is within a bfloat16 rounding of 1.

    Raises:
        ValueError: a hyperparameter out of its range, or no batch_size.
        TypeError: a parameter that is not dense and floating, a DTensor, a sparse gradient, or an
            argument that torch.optim has and this class has not.

    Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024,
    Fig. 4 and Fig. 7.
    """

    _shaping = ("initial_square_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        alpha: float = 0.9,
        *,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        batch_size: float | None = None,
        weight_decay_mode: ops.WeightDecayMode = "decoupled",
        initial_square_avg: float | Literal["auto"] = "auto",
        maximize: bool = False,
        capturable: bool = False,
        amp_scaling: bool = False,
        **unknown: NoReturn,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "damping": damping,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "batch_size": batch_size,
            "weight_decay_mode": weight_decay_mode,
            "initial_square_avg": initial_square_avg,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
        }
        super().__init__(params, defaults, unknown)

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        start = declared_start(group)
        return {"square_avg": full_like(param, start), "momentum_buffer": full_like(param, 0.0)}

    def _unused_state(self, group: Group) -> frozenset[str]:
        return unused_momentum(group)

    def _update(self, index: int, work: Work) -> None:
        group = self.param_groups[index]
        lists = rmsprop_state(work.states, group)
        update_rmsprop_(group, work.scaling, work.params, work.grads, *lists)

    def _prepare(self, index: int, work: Work) -> Launch:
        params = work.params  # and not the work, which would keep the gradients
        square_avgs, buffers = rmsprop_state(work.states, self.param_groups[index])
        kernels: Any = ops.launcher(params) if gradients_suit(params) else None
        lists = [params, work.grads, square_avgs, buffers]
        plan = kernels and kernels.prepare(lists if buffers else lists[:3])

        def launch(plan: Any, group: Group, scaling: Scaling) -> None:
            settings = {**rmsprop_settings(group), "batch_size": group["batch_size"]}
            kernels.launch_rmsprop(plan, _launch_lr(group), **settings, **scaling)

        def update(grads: list[Tensor], group: Group, scaling: Scaling) -> None:
            update_rmsprop_(group, scaling, params, grads, square_avgs, buffers)

        return Launch(plan, launch, kernels.move_grads) if plan else on_gradients(params, update)


class RootFreeAdamW(RootFreeOptimizer):
    r"""AdamW without the square root (root-free AdamW).

    With gradient g, batch size B, m starting at 0 and s at the first gradient's mean of B g^2::

        p <- (1 - lr weight_decay) p
        m <- m + (1 - beta1) (g - m)
        s <- s + (1 - beta2) (B g^2 - s)
        p <- p - (lr / bc1) m / (s / bc2 + damping)

    where bc1 = 1 - beta1^t and bc2 = 1 - beta2^t at step t with ``bias_correction=True``, and 1
    without. s does not start at 0, so that no correction is needed.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``: float64,
            float32, bfloat16 or float16. Every hyperparameter can be set per group and changed
            between steps.
        lr: step size. A 0-d tensor is read, never written.
        betas: decay per step of the gradient's average and of s, each in [0, 1).
        damping: added to s. Without the root its unit is that of s, a squared gradient times the
            batch size: not the ``eps`` of AdamW.
        weight_decay: decoupled, per unit of lr.
        batch_size: the number B of loss terms that the gradient averages: the global batch size
            for a loss averaged over examples, the number of tokens for one averaged over tokens, 1
            for a summed loss. Required here or in every group.
        bias_correction: divide m and s by 1 - beta^t, as AdamW does. It makes early steps smaller,
            since s does not start at 0: from ``initial_square_avg=1``, at lr 1e-3 and beta2 0.99, a
            digits MLP ended at 23 % of the images with it and at 25 % without, a CNN with BatchNorm
            at 73 % and 87 %.
        initial_square_avg: where s starts: a number above 0 (1 as released), or "auto", the mean of
            B g^2 over a tensor's first gradient. Until that is neither zero nor non-finite s is 0,
            and nothing moves. It cannot change once there is state.
        maximize: ascend instead of descend.
        capturable: keep ``step`` on the parameter's device, so that a CUDA graph can capture a
            step.
        amp_scaling: let :class:`torch.amp.GradScaler` leave its work to the kernel, which divides
            by the scale and, where there were infs, changes nothing. The host then waits for
            nothing, float16 parameters are served, and ``step`` is on the parameter's device. To
            clip gradients call ``scaler.unscale_`` first; Lightning's clipping needs False.

    State of a parameter: ``step`` (0-d float32), ``exp_avg`` (m) and ``exp_avg_sq`` (s), both of
    the parameter's shape, in float32 (float64 for float64 parameters).

    Raises:
        ValueError: a hyperparameter out of its range, or no batch_size.
        TypeError: a parameter that is not dense and floating, a DTensor, a sparse gradient, or an
            argument that torch.optim has and this class has not.

    Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024,
    and its released code.
    """

    _shaping = ("initial_square_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        damping: float = 3e-4,
        weight_decay: float = 1e-2,
        batch_size: float | None = None,
        bias_correction: bool = False,
        initial_square_avg: float | Literal["auto"] = "auto",
        maximize: bool = False,
        capturable: bool = False,
        amp_scaling: bool = False,
        **unknown: NoReturn,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "damping": damping,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "bias_correction": bias_correction,
            "initial_square_avg": initial_square_avg,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
        }
        super().__init__(params, defaults, unknown)

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        start = declared_start(group)
        return {"exp_avg": full_like(param, 0.0), "exp_avg_sq": full_like(param, start)}

    def _update(self, index: int, work: Work) -> None:
        group = self.param_groups[index]
        lists = _adamw_state(work.states)
        _update_adamw_(group, work.scaling, work.params, work.grads, *lists, work.steps)

    def _prepare(self, index: int, work: Work) -> Launch:
        params, steps = work.params, work.steps  # and not the work, which would keep the gradients
        averages, squares = _adamw_state(work.states)
        kernels: Any = ops.launcher(params) if gradients_suit(params) else None
        plan = kernels and kernels.prepare([params, work.grads, squares, averages])

        def launch(plan: Any, group: Group, scaling: Scaling) -> None:
            counts = steps if group["bias_correction"] else None
            settings = {**_adamw_settings(group), "batch_size": group["batch_size"]}
            kernels.launch_adamw(plan, counts, _launch_lr(group), **settings, **scaling)

        def update(grads: list[Tensor], group: Group, scaling: Scaling) -> None:
            _update_adamw_(group, scaling, params, grads, averages, squares, steps)

        return Launch(plan, launch, kernels.move_grads) if plan else on_gradients(params, update)
