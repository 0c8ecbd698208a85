"""RootFreeShampoo: Shampoo without a root or a decomposition, and without a batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .matrix import Combine, MergeAxes, Structure
from .optimizer import formats
from .optimizer.factor_state import batched, default_dtype, gram_state
from .optimizer.formats import ParamResidual, StateFormat
from .optimizer.groups import Group
from .optimizer.joint import unit_of
from .optimizer.layouts import BLOCK_SIZE
from .optimizer.matrix import MatrixOptimizer
from .optimizer.matrix_calls import ROOTFREE_SHAMPOO
from .optimizer.state import MOMENTUM, ROWS, Initial, full_like

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What users of the other classes and of torch.optim pass from habit, and what there is instead.
_REPLACED = {
    "batch_size": "leave it out: it needs none, since no scale of a gradient matters to it",
    "initial_square_avg": "leave it out: no scale of a gradient matters to it",
    "momentum": "pass betas=(momentum, beta2): its momentum is an average, and Nesterov's",
    "nesterov": "leave it out: its momentum is Nesterov's",
    "eps": "leave it out: damping, in units of the mean of S's diagonal, bounds what divides",
    "factor_lr": "pass betas=(beta1, beta2): a factor follows S, whose decay is beta2",
    "factor_momentum": "pass betas=(beta1, beta2): a factor follows S, whose decay is beta2",
    "max_update": "leave it out: every update of a matrix has the RMS update_rms",
}


class RootFreeShampoo(MatrixOptimizer):
    r"""Shampoo without roots or decompositions (root-free Shampoo): the one to train with.

    A parameter is seen as a matrix, its first axis by all others unless ``merge_axes`` says
    otherwise. Each axis of d entries, A the rows and B the columns, has an average S of the
    gradients' second moments and a factor K such that K K^T is near (S + lam I)^-1, which matrix
    products alone keep so, at every step. With the gradient G of a matrix (m, n), brought to a mean
    square of 1:

        S_A <- S_A + (1 - beta2) (G K_B (G K_B)^T / n - S_A)
        S_B <- S_B + (1 - beta2) ((K_A^T G)^T K_A^T G / m - S_B)
        E    = K^T (S + lam I) K - I,   lam = damping mean(diag S)
        K   <- K - (b / 2) K E,         b = 1 / max(1, min(||E||_F, sqrt(||E^2||_F)))
        M   <- beta1 M + (1 - beta1) G
        P    = K_A K_A^T (beta1 M + (1 - beta1) G) K_B K_B^T
        p   <- (1 - lr weight_decay) p - lr P,   P with balanced rows, at the RMS
               update_rms 2 sqrt(256 m / n) / (sqrt(m) + sqrt(n))

    The rows of P are balanced by the root of an average of their mean squares (``row_beta``). No
    scale of a matrix' gradient matters: it needs no batch size, no clipping and no loss scale. lr
    is what an entry of a 256 x 256 matrix moves, in units of update_rms; in another shape as much
    as moves the m outputs of n inputs alike, so that an lr need not change with the width. A
    gradient that is exactly zero leaves S and K alone. Vectors and scalars take Adam's update with
    Nesterov's momentum.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``: float64,
            float32, bfloat16 or float16. Every hyperparameter can be set per group; all but
            ``factor_dtype``, ``structures``, ``max_dense_dim``, ``block_size``, ``merge_axes``,
            ``batch_axes``, ``combine`` and ``vector_method``, which decide what state there is, may
            change between steps.
        lr: step size. A tensor of one number is read, never written.
        betas: decay per step of M and of S, each in [0, 1).
        damping: lam in units of the mean of S's diagonal, above 0.
        weight_decay: decoupled, per unit of lr.
        update_rms: root mean square of the update of a 256 x 256 matrix, above 0.
        update_interval: update S and K every so many steps; what more than 1 costs in
            training is not measured.
        structures: "auto" (dense up to max_dense_dim, blocks up to 16 times it, diagonal above),
            "dense", "diagonal", "dense_or_diagonal" (diagonal above max_dense_dim), "block", or a
            pair of them, of the rows and the columns.
        max_dense_dim: the largest axis that may have a dense factor. Larger ones have blocks of
            equal sizes, multiples of 32 or 16 and at most this; each is bounded by its own E.
        block_size: of "block", at most max_dense_dim.
        merge_axes: see a tensor of three axes or more as the matrix (first axis, all others), or
            which axes are seen as one, as ((0, 1), (2, 3)). ((0, 1),) makes a vector of a matrix.
        batch_axes: how many of the first axes of every parameter number independent ones, as the
            first of a stack (experts, outputs, inputs) does: each member is stepped as a parameter
            of its own, in one bucket with those of its shape.
        combine: "module" steps a weight (o, ...) and its bias (o,) as the matrix (o, ... + 1), and
            tensors of one shape (d,), as a normalisation's, as (d, 2), where they are all that a
            module has by its own name; it needs named parameters. Or which of the group's
            parameters are stepped so, as ((0, 1), (2, 3)), by their positions.
        vector_method: "adam", or "rootfree", the matrices' update with one diagonal factor, which
            plain PyTorch computes.
        vector_beta2: decay of the vectors' second moment, in [0, 1).
        vector_rms: multiplies Adam's update of vectors, above 0.
        row_beta: decay of the average by which rows are balanced, in [0, 1); None leaves the rows
            as they are.
        factor_dtype: dtype of the products: torch.bfloat16, torch.float32 or torch.float64. None
            chooses bfloat16 where the device multiplies it natively, float64 for float64
            parameters, and float32 elsewhere; the group then shows which.
        maximize: ascend instead of descend.
        capturable: keep ``step`` on the parameter's device.
        amp_scaling: as in ``RootFreeRMSprop``. With an update_interval above 1 the host reads
            whether there were infs at every step, since a skipped step leaves the schedule.
        param_residual, rounding_seed: as in ``RootFreeRMSprop``.
        state_format: of the momentum, as in ``RootFreeRMSprop``; factors have their own dtypes.
            With it or a param_residual, matrices are in float32 for the time of a step.
        process_group: of replicas of plain parameters (DistributedDataParallel), which share the
            work and the state of matrices; None: each does all. DTensors need none.
        replicas: "share" the work among all that have a DTensor, or "repeat" it in each replica.
        update_dtype: in which updates of shared matrices travel; None for that of the state.

    State of a matrix: ``step`` (0-d float32), ``momentum_buffer`` (M, of the parameter's shape),
    ``row_square_avg`` (of length m), and per axis ``gram_N`` (S) and ``factor_N`` (K), of shape
    (d, d), (n, b, b) for n blocks, of which the last is zero beyond d, or (d,) where diagonal. M, S
    and the averages of rows are float32, or float64 for float64 parameters. A bfloat16 factor has
    the bits that its products do not read in ``factor_N_residual`` (int16). Vectors have
    ``exp_avg`` and ``exp_avg_sq``. The batch axes come first in all of them but ``step``. Of joined
    parameters the first has them all, the others ``step`` and ``momentum_buffer``.

    Raises:
        ValueError: a hyperparameter out of its range, a structure that is not supported or does
            not fit a shape, an axis too large for a dense factor, batch_axes that leave no axis.
        TypeError: a parameter that is not dense and floating, a flat shard of
            FullyShardedDataParallel, a sparse gradient, or an argument that this class has not.

    Source: ours, on the root-free factors of Lin et al., "Can We Remove the Square-Root in Adaptive
    Gradient Methods?", ICML 2024, and the Kullback-Leibler form of Shampoo, arXiv 2509.03378;
    docs/interface.md has what follows from the equations, bench/HISTORY.md what was measured.
    """

    _matrix_method = ROOTFREE_SHAMPOO
    _added_later: Mapping[str, Any] = {**MatrixOptimizer._added_later, "merge_axes": True}
    _replaced = _REPLACED
    _converters = "convert.from_ifshampoo makes one of an IFShampoo's"
    _shaping = (
        "factor_dtype",
        "structures",
        "max_dense_dim",
        "block_size",
        "merge_axes",
        "batch_axes",
        "combine",
        "vector_method",
        *formats.BEFORE,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        damping: float = 0.1,
        weight_decay: float = 0.0,
        update_rms: float = 0.3,
        update_interval: int = 1,
        structures: Structure | tuple[Structure, Structure] = "auto",
        max_dense_dim: int = 2048,
        block_size: int = BLOCK_SIZE,
        merge_axes: MergeAxes = True,
        batch_axes: int = 0,
        combine: Combine = "none",
        vector_method: Literal["adam", "rootfree"] = "adam",
        vector_beta2: float = 0.95,
        vector_rms: float = 1.0,
        row_beta: float | None = 0.95,
        factor_dtype: torch.dtype | None = None,
        maximize: bool = False,
        capturable: bool = False,
        amp_scaling: bool = False,
        param_residual: ParamResidual = None,
        state_format: StateFormat = "float32",
        rounding_seed: int = 0,
        process_group: ProcessGroup | None = None,
        replicas: Literal["share", "repeat"] = "share",
        update_dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "damping": damping,
            "weight_decay": weight_decay,
            "update_rms": update_rms,
            "update_interval": update_interval,
            "structures": structures,
            "max_dense_dim": max_dense_dim,
            "block_size": block_size,
            "merge_axes": merge_axes,
            "batch_axes": batch_axes,
            "combine": combine,
            "vector_method": vector_method,
            "vector_beta2": vector_beta2,
            "vector_rms": vector_rms,
            "row_beta": row_beta,
            "factor_dtype": factor_dtype,
            "maximize": maximize,
            "capturable": capturable,
            "amp_scaling": amp_scaling,
            "param_residual": param_residual,
            "state_format": state_format,
            "rounding_seed": rounding_seed,
        }
        super().__init__(
            params,
            defaults,
            unknown,
            process_group=process_group,
            replicas=replicas,
            update_dtype=update_dtype,
        )

    def _state_spec(self, param: Tensor, group: Group) -> dict[str, Initial]:
        (owner, *_), layout = unit_of(param, group)
        if layout is None:
            averages = {key: full_like(param, 0.0) for key in ("exp_avg", "exp_avg_sq")}
            return formats.in_formats(param, group, averages)
        if len(layout.sizes) > 2:
            raise ValueError(
                f"merge_axes is {group['merge_axes']!r} and leaves a parameter of shape "
                f"{tuple(param.shape)} the axes {layout.sizes}; RootFreeShampoo sees matrices: "
                "pass True, or merge them into two"
            )
        momentum = full_like(param, 0.0)
        if owner is not param:
            return {MOMENTUM: momentum}
        dtype = group["factor_dtype"] or default_dtype(param)  # unresolved on meta
        rows = Initial(layout.sizes[:1], momentum.dtype)
        own = {ROWS: rows, **gram_state(layout, dtype, group["damping"])}
        averages = formats.in_formats(param, group, {MOMENTUM: momentum})
        return {**averages, **batched(own, param.shape, group)}
