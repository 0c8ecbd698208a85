"""Root-free Adagrad, a method that the package has not: all that one adds beside the kernels."""

from __future__ import annotations

from rootfree_fused.ops.methods import SECOND_MOMENT, DiagonalMethod
from rootfree_fused.optimizer.diagonal import DiagonalOptimizer


def adagrad_(
    param, grad, square_sum, *, lr, damping, weight_decay, batch_size, maximize
):  # s <- s + B g^2;  p <- (1 - lr weight_decay) p - lr g / (s + damping)
    g = (-grad if maximize else grad).to(square_sum.dtype)
    p = param.to(square_sum.dtype)
    square_sum.add_(batch_size * g * g)
    param.copy_((1 - lr * weight_decay) * p - lr * g / (square_sum + damping))


ADAGRAD = DiagonalMethod(
    "adagrad_",
    adagrad_,
    states={"square_sum": SECOND_MOMENT},
    numbers=("damping", "weight_decay"),
    switches=("maximize",),
)


class RootFreeAdagrad(DiagonalOptimizer):
    """Adagrad without the square root."""

    _method = ADAGRAD

    def __init__(
        self,
        params,
        lr=1e-2,
        *,
        damping=1e-3,
        weight_decay=0.0,
        batch_size=None,
        initial_square_avg="auto",
        maximize=False,
        capturable=False,
        amp_scaling=False,
        param_residual=None,
        state_format="float32",
        rounding_seed=0,
        **unknown,
    ):
        defaults = {
            "lr": lr,
            "damping": damping,
            "weight_decay": weight_decay,
            "batch_size": batch_size,
            "initial_square_avg": initial_square_avg,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
            "param_residual": param_residual,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults, unknown)
