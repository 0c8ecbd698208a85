"""IFShampoo: inverse-free, root-free Shampoo, whose factors products alone learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .ops import SecondMoment, WeightDecayMode, structure_names
from .optimizer import formats
from .optimizer.factor_state import batched, default_dtype, factor_state
from .optimizer.formats import ParamResidual, StateFormat
from .optimizer.groups import Group
from .optimizer.joint import unit_of
from .optimizer.layouts import BLOCK_SIZE, HIERARCHICAL_SIZES
from .optimizer.matrix import MatrixOptimizer
from .optimizer.matrix_calls import IFSHAMPOO
from .optimizer.starts import declared_start
from .optimizer.state import MOMENTUM, Initial, full_like

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Structure = structure_names.Name | str
MergeAxes = bool | tuple[tuple[int, ...], ...]
Combine = Literal["none", "module"] | tuple[tuple[int, ...], ...]


class IFShampoo(MatrixOptimizer):
    r"""Inverse-free Shampoo without roots (IF-Shampoo).

    A parameter of N axes of sizes d_1 .. d_N has a factor K_n an axis, starting at a multiple of
    the identity, so that K_n K_n^T learns the inverse of Shampoo's preconditioner by matrix
    products alone. With the gradient G of a loss averaged over B terms and M_n the mode-n unfolding
    of G x_1 K_1^T ... x_N K_N^T, an update step makes, from the old factors:

        H_n  = 1/2 { B / prod_{j!=n} d_j  M_n M_n^T
                     + damping prod_{j!=n} (tr(K_j^T K_j) / d_j) K_n^T K_n  -  I }
        m_n <- factor_momentum m_n + (1 - factor_momentum) H_n
        K_n <- K_n - factor_lr / max(1, ||m_n||_F) K_n m_n

    and every step, with the newest factors:

        P    = G x_1 (K_1 K_1^T) ... x_N (K_N K_N^T), every entry within
               max_update / sqrt(B damping)
        buf <- momentum buf + P
        p   <- (1 - lr weight_decay) p - lr buf

    or, with ``weight_decay_mode="momentum"``, as released, ``buf <- momentum buf + P +
    weight_decay p``. Axes of size 1 are dropped. Vectors and scalars take the update of
    ``RootFreeRMSprop``, or a factor as released with ``vector_method="factor"``. A gradient
    that is exactly zero leaves K_n and m_n alone: an expert without tokens learns nothing.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``: float64,
            float32, bfloat16 or float16. Every hyperparameter can be set per group; all but
            ``factor_dtype``, ``structures``, ``max_dense_dim``, ``block_size``,
            ``hierarchical_sizes``, ``merge_axes``, ``batch_axes``, ``combine``, ``vector_method``
            and ``initial_square_avg``, which decide what state there is, may change between steps.
        lr: step size. A tensor of one number is read, never written. The paper's beta_1.
        momentum: heavy-ball coefficient on the preconditioned gradient; sirfshampoo's alpha1.
        damping: weight of the identity, above 0, in the unit of a squared gradient times the batch
            size; sirfshampoo's lam. Without it a factor grows for ever where there is no gradient.
        weight_decay: per unit of lr; sirfshampoo's kappa.
        batch_size: the number B of loss terms that the gradient averages: the global batch size
            for a loss averaged over examples, the number of tokens for one averaged over tokens, 1
            for a summed loss. Required here or in every group. "counted" is for a
            BatchSizeCounter to overwrite: a step that finds it raises.
        factor_lr: step size of the factors; sirfshampoo's beta2, the released code's lr_cov. A
            factor grows by at most factor_lr / sqrt(d) an update, so warm-up takes about
            sqrt(d) / factor_lr updates.
        factor_momentum: decay of m_n, in [0, 1); sirfshampoo's alpha2, the released code's beta2.
        update_interval: update the factors every so many steps.
        update_schedule: "constant", or "log4", as released: after an update at step k wait
            min(max(floor(log4(k + 1)), 1), update_interval) steps.
        structures: of the factors: "auto" (dense up to max_dense_dim, blocks up to 16 times it,
            diagonal above), "dense", "diagonal", "dense_or_diagonal" (diagonal above
            max_dense_dim), "block", "hierarchical", "lower_toeplitz", "upper_toeplitz", or singd's
            name for one; or a tuple of them, one an axis. The last three have no kernels: the
            PyTorch reference steps them, in float32.
        max_dense_dim: the largest axis that may have a dense factor. Larger ones have blocks of
            equal sizes, multiples of 32 or 16 and at most this, each bounded by its own ||m_n||_F.
        block_size: of "block", at most max_dense_dim, whose blocks are bounded by ||m_n||_F of the
            factor, as released.
        hierarchical_sizes: of "hierarchical", of how many of the first and of the last rows the
            factor is dense among each other; the others are scaled.
        merge_axes: see a tensor of three axes or more as the matrix (first axis, all others), or
            which axes are seen as one, as ((0, 1), (2, 3)). ((0, 1),) makes a vector of a matrix.
        batch_axes: how many of the first axes of every parameter number independent ones, as the
            first of a stack (experts, outputs, inputs) does: each member is stepped as a parameter
            of its own, in one bucket with those of its shape.
        combine: "module" steps a weight (o, ...) and its bias (o,) as the matrix (o, ... + 1), and
            tensors of one shape (d,), as a normalisation's, as (d, 2), where they are all that a
            module has by its own name; it needs named parameters. Or which of the group's
            parameters are stepped so, as ((0, 1), (2, 3)), by their positions.
        vector_method: "rmsprop" or "factor".
        second_moment: of groups of vectors, as in ``RootFreeRMSprop``; matrices have "batch" alone.
        alpha: decay of root-free RMSProp's s for vectors.
        max_update: bound of the entries of P, in units of 1 / sqrt(batch_size damping), near which
            those of a root-free diagonal step stay by themselves: P is linear in G, and one
            corrupt sample would move the weights as far as it likes. None means no bound.
        factor_dtype: dtype of the products: torch.bfloat16, torch.float32 or torch.float64. None
            chooses bfloat16 where the device multiplies it natively, float64 for float64
            parameters, and float32 elsewhere; the group then shows which.
        initial_square_avg: as in ``RootFreeRMSprop``, for vectors. Factors start at c I: for a
            number with c^(2N) = 1 / number (the identity for 1, as released), for "auto" with
            c^(2N) = 1 / (mean of B G^2 + damping), which is where their update comes to rest.
        weight_decay_mode: "decoupled" or "momentum".
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

    State of a parameter: ``step`` (0-d float32), ``momentum_buffer`` (with momentum; the
    parameter's shape, float32, or float64 for float64 parameters), and per axis ``factor_N`` and
    ``factor_momentum_N``, of shape (d, d), (n, b, b) for n blocks, of which the last is zero beyond
    d, or (d,) in float32 where diagonal. A bfloat16 factor has the bits that its products do not
    read in ``factor_N_residual`` (int16), so that steps below a bfloat16 rounding are not lost.
    Vectors have ``square_avg`` instead.
    The batch axes come first in all of them but ``step``. Of joined parameters the first has
    them all, the others ``step`` and ``momentum_buffer``.

    Raises:
        ValueError: a hyperparameter out of its range, no batch_size, a structure that is not
            supported or does not fit a shape, an axis too large for a dense factor, batch_axes
            that leave no axis.
        TypeError: a parameter that is not dense and floating, a flat shard of
            FullyShardedDataParallel, a sparse gradient, or an argument that torch.optim has and
            this class has not.

    Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024,
    Fig. 3, and its released code.
    """

    _matrix_method = IFSHAMPOO
    _added_later: Mapping[str, Any] = {
        **MatrixOptimizer._added_later,
        "second_moment": "batch",
        "hierarchical_sizes": HIERARCHICAL_SIZES,
    }
    _converters = (
        "convert.from_sirfshampoo and convert.from_released_code make one of sirfshampoo's and of "
        "the released code's"
    )
    _shaping = (
        "factor_dtype",
        "structures",
        "max_dense_dim",
        "block_size",
        "hierarchical_sizes",
        "merge_axes",
        "batch_axes",
        "combine",
        "vector_method",
        "initial_square_avg",
        *formats.BEFORE,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.2e-2,
        *,
        momentum: float = 0.5,
        damping: float = 3e-3,
        weight_decay: float = 0.0,
        batch_size: float | Literal["counted"] | None = None,
        factor_lr: float = 0.8,
        factor_momentum: float = 0.5,
        update_interval: int = 1,
        update_schedule: Literal["constant", "log4"] = "constant",
        structures: Structure | tuple[Structure, ...] = "auto",
        max_dense_dim: int = 2048,
        block_size: int = BLOCK_SIZE,
        hierarchical_sizes: tuple[int, int] = HIERARCHICAL_SIZES,
        merge_axes: MergeAxes = True,
        batch_axes: int = 0,
        combine: Combine = "none",
        vector_method: Literal["rmsprop", "factor"] = "rmsprop",
        second_moment: SecondMoment = "batch",
        alpha: float = 0.9,
        max_update: float | None = 8.0,
        factor_dtype: torch.dtype | None = None,
        initial_square_avg: float | Literal["auto"] = "auto",
        weight_decay_mode: WeightDecayMode = "decoupled",
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
            "block_size": block_size,
            "hierarchical_sizes": hierarchical_sizes,
            "merge_axes": merge_axes,
            "batch_axes": batch_axes,
            "combine": combine,
            "vector_method": vector_method,
            "second_moment": second_moment,
            "alpha": alpha,
            "max_update": max_update,
            "factor_dtype": factor_dtype,
            "initial_square_avg": initial_square_avg,
            "weight_decay_mode": weight_decay_mode,
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
        start, own = declared_start(group), {}
        averages = {MOMENTUM: full_like(param, 0.0, optional=True)}
        if layout is None:
            averages = {"square_avg": full_like(param, start), **averages}
        elif owner is param:
            dtype = group["factor_dtype"] or default_dtype(param)  # unresolved on meta
            own = batched(factor_state(layout, dtype, start), param.shape, group)
        return {**own, **formats.in_formats(param, group, averages)}
