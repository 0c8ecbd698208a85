"""RootFreeRMSprop and RootFreeAdamW: a diagonal second moment divides, without its root. Sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .ops import SecondMoment, WeightDecayMode
from .ops.methods import ADAMW, RMSPROP, SIGN
from .optimizer.diagonal import DiagonalOptimizer
from .optimizer.formats import BEFORE, ParamResidual, StateFormat


class RootFreeRMSprop(DiagonalOptimizer):
    r"""RMSProp without the square root (root-free RMSProp).

    With gradient g, batch size B and s starting at the first gradient's mean of B g^2:

        s   <- s + (1 - alpha) (B g^2 - s)
        u    = g / (s + damping)
        buf <- momentum buf + u
        p   <- (1 - lr weight_decay) p - lr buf

    or, with ``weight_decay_mode="momentum"``, as in the paper's released code:

        buf <- momentum buf + u + weight_decay p
        p   <- p - lr buf

    With ``alpha=1``, ``damping=0`` and ``initial_square_avg=1`` it is ``torch.optim.SGD``.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``: float64,
            float32, bfloat16 or float16. Every hyperparameter can be set per group and changed
            between steps.
        lr: step size. A tensor of one number is read, never written.
        alpha: decay of s per step, in [0, 1]. The paper's ``1 - lr_cov``.
        damping: added to s. Without the root its unit is that of s, a squared gradient times the
            batch size: not the ``eps`` of RMSProp.
        weight_decay: per unit of lr.
        momentum: heavy-ball coefficient on the preconditioned gradient. With 0 no buffer is kept.
        batch_size: the number B of loss terms that the gradient averages: the global batch size
            for a loss averaged over examples, the number of tokens for one averaged over tokens, 1
            for a summed loss. Required here or in every group. "counted" is for a
            BatchSizeCounter to overwrite: a step that finds it raises.
        weight_decay_mode: "decoupled" or "momentum".
        initial_square_avg: where s starts: a number above 0 (1 as released), or "auto", the mean of
            B g^2 over a tensor's first gradient. Until that is neither zero nor non-finite s is 0,
            and nothing moves. It cannot change once there is state.
        second_moment: what s follows where `accumulate` took several micro-batches: "batch", B g^2
            as without; "micro", the mean over them of b g_j^2, of b terms each; "variance", their
            variance, in the same unit; "mean", B times the squared mean without its noise. See
            docs/micro_batches.md.
        maximize: ascend instead of descend.
        capturable: keep ``step`` on the parameter's device, so that a CUDA graph can capture a
            step.
        amp_scaling: let ``torch.amp.GradScaler`` leave its work to the kernel, which divides
            by the scale and, where there were infs, changes nothing. The host then waits for
            nothing, float16 parameters are served, and ``step`` is on the parameter's device. To
            clip gradients call ``scaler.unscale_`` first; Lightning's clipping needs False.
        param_residual: what is kept of a bfloat16 weight's update beyond its rounding: None,
            nothing, so that small updates are lost; 8 or 16 bits beside the weight, of which 16 are
            all that float32 has; "stochastic", nothing, but the weight is rounded at random.
        state_format: "float32"; "bfloat16", rounded stochastically, in half the memory; or "8bit",
            codes with a scale for 256 of them, in a quarter. Vectors and tensors of fewer than 4096
            elements keep float32. docs/memory.md says when to take which.
        rounding_seed: of the random numbers, which depend on step and place alone: a run that
            resumes rounds as one that goes on.

    State of a parameter: ``step`` (0-d float32), ``square_avg`` (s) and, with momentum,
    ``momentum_buffer``, both of the parameter's shape, in float32 (float64 for float64
    parameters), so that s moves even where alpha is within a bfloat16 rounding of 1.

    Raises:
        ValueError: a hyperparameter out of its range, or no batch_size.
        TypeError: a parameter that is not dense and floating, a sparse gradient, an argument that
            torch.optim has and this class has not, or ``param_residual`` for other weights than
            bfloat16.
        ValueError: at a step, a second moment of micro-batches of which there was one.
        NotImplementedError: "8bit" for a DTensor whose shards cut blocks of 256.

    Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024,
    Fig. 4 and Fig. 7.
    """

    _method = RMSPROP
    _added_later: Mapping[str, Any] = {**BEFORE, "second_moment": "batch"}
    _converters = "convert.from_released_code makes one of the released code's"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        alpha: float = 0.9,
        *,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        batch_size: float | Literal["counted"] | None = None,
        weight_decay_mode: WeightDecayMode = "decoupled",
        initial_square_avg: float | Literal["auto"] = "auto",
        second_moment: SecondMoment = "batch",
        maximize: bool = False,
        capturable: bool = False,
        amp_scaling: bool = False,
        param_residual: ParamResidual = None,
        state_format: StateFormat = "float32",
        rounding_seed: int = 0,
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
            "second_moment": second_moment,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
            "param_residual": param_residual,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults, unknown)


class RootFreeAdamW(DiagonalOptimizer):
    r"""AdamW without the square root (root-free AdamW).

    With gradient g, batch size B, m starting at 0 and s at the first gradient's mean of B g^2:

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
        lr: step size. A tensor of one number is read, never written.
        betas: decay per step of the gradient's average and of s, each in [0, 1).
        damping: added to s. Without the root its unit is that of s, a squared gradient times the
            batch size: not the ``eps`` of AdamW.
        weight_decay: decoupled, per unit of lr.
        batch_size: the number B of loss terms that the gradient averages: the global batch size
            for a loss averaged over examples, the number of tokens for one averaged over tokens, 1
            for a summed loss. Required here or in every group. "counted" is for a
            BatchSizeCounter to overwrite: a step that finds it raises.
        bias_correction: divide m and s by 1 - beta^t, as AdamW does. It makes early steps smaller,
            since s does not start at 0: from ``initial_square_avg=1``, at lr 1e-3 and beta2 0.99, a
            digits MLP ended at 23 % of the images with it and at 25 % without, a CNN with BatchNorm
            at 73 % and 87 %.
        initial_square_avg: where s starts: a number above 0 (1 as released), or "auto", the mean of
            B g^2 over a tensor's first gradient. Until that is neither zero nor non-finite s is 0,
            and nothing moves. It cannot change once there is state.
        second_moment: what s follows where `accumulate` took several micro-batches: "batch", B g^2
            as without; "micro", the mean over them of b g_j^2, of b terms each; "variance", their
            variance, in the same unit; "mean", B times the squared mean without its noise. See
            docs/micro_batches.md.
        maximize: ascend instead of descend.
        capturable: keep ``step`` on the parameter's device, so that a CUDA graph can capture a
            step.
        amp_scaling: let ``torch.amp.GradScaler`` leave its work to the kernel, which divides
            by the scale and, where there were infs, changes nothing. The host then waits for
            nothing, float16 parameters are served, and ``step`` is on the parameter's device. To
            clip gradients call ``scaler.unscale_`` first; Lightning's clipping needs False.
        param_residual: what is kept of a bfloat16 weight's update beyond its rounding: None,
            nothing, so that small updates are lost; 8 or 16 bits beside the weight, of which 16 are
            all that float32 has; "stochastic", nothing, but the weight is rounded at random.
        state_format: "float32"; "bfloat16", rounded stochastically, in half the memory; or "8bit",
            codes with a scale for 256 of them, in a quarter. Vectors and tensors of fewer than 4096
            elements keep float32. docs/memory.md says when to take which.
        rounding_seed: of the random numbers, which depend on step and place alone: a run that
            resumes rounds as one that goes on.

    State of a parameter: ``step`` (0-d float32), ``exp_avg`` (m) and ``exp_avg_sq`` (s), both of
    the parameter's shape, in float32 (float64 for float64 parameters).

    Raises:
        ValueError: a hyperparameter out of its range, or no batch_size.
        TypeError: a parameter that is not dense and floating, a sparse gradient, an argument that
            torch.optim has and this class has not, or ``param_residual`` for other weights than
            bfloat16.
        ValueError: at a step, a second moment of micro-batches of which there was one.
        NotImplementedError: "8bit" for a DTensor whose shards cut blocks of 256.

    Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024,
    and its released code.
    """

    _method = ADAMW
    _added_later: Mapping[str, Any] = {**BEFORE, "second_moment": "batch"}
    _converters = "convert.from_released_code makes one of the released code's"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        damping: float = 3e-4,
        weight_decay: float = 1e-2,
        batch_size: float | Literal["counted"] | None = None,
        bias_correction: bool = False,
        initial_square_avg: float | Literal["auto"] = "auto",
        second_moment: SecondMoment = "batch",
        maximize: bool = False,
        capturable: bool = False,
        amp_scaling: bool = False,
        param_residual: ParamResidual = None,
        state_format: StateFormat = "float32",
        rounding_seed: int = 0,
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
            "second_moment": second_moment,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
            "param_residual": param_residual,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults, unknown)


# What users of the other classes and of torch.optim pass to Sign from habit.
_NO_SCALE = "leave it out: nothing divides by damping or a second moment"
_SIGN_REPLACED = {
    **dict.fromkeys(("alpha", "betas"), "pass beta=, the decay of its one average"),
    "momentum": "pass beta=: its momentum is an average",
    **dict.fromkeys(("eps", "damping", "batch_size", "initial_square_avg"), _NO_SCALE),
}


class Sign(DiagonalOptimizer):
    r"""Sign descent with momentum, a baseline: where the sign is taken makes the difference.

    With gradient g and m starting at 0:

        m <- m + (1 - beta) (y - m)
        p <- (1 - lr weight_decay) p - lr z

    where ``sign="ema"`` has y = g and z = sign(m) (signum), ``"batch"`` has y = sign(g) and z = m,
    and ``"micro"`` has the mean over micro-batches of sign(g_j) for y, as `accumulate` took them,
    and z = m. sign(0) = 0, and NaN stays.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``: float64,
            float32, bfloat16 or float16. Every hyperparameter can be set per group and changed
            between steps.
        lr: step size. A tensor of one number is read, never written.
        beta: decay of m per step, in [0, 1).
        weight_decay: decoupled, per unit of lr.
        sign: "ema", "batch" or "micro".
        maximize, capturable, amp_scaling: as in ``RootFreeRMSprop``.
        param_residual, state_format, rounding_seed: as in ``RootFreeRMSprop``.

    State of a parameter: ``step`` (0-d float32) and ``exp_avg`` (m), of the parameter's shape, in
    float32 (float64 for float64 parameters).

    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: as ``RootFreeRMSprop``.

    Source: the placements are those that Roulet and Agarwala compare, "Per-example gradients: a new
    frontier for understanding and improving optimizers", arXiv 2510.00236.
    """

    _method = SIGN
    _shaping = tuple(BEFORE)
    _replaced = _SIGN_REPLACED

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        beta: float = 0.9,
        *,
        weight_decay: float = 0.0,
        sign: Literal["ema", "batch", "micro"] = "ema",
        maximize: bool = False,
        capturable: bool = False,
        amp_scaling: bool = False,
        param_residual: ParamResidual = None,
        state_format: StateFormat = "float32",
        rounding_seed: int = 0,
        **unknown: NoReturn,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "sign": sign,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
            "param_residual": param_residual,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults, unknown)
