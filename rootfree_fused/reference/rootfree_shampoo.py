"""Root-free Shampoo on one parameter: the specification.

Shampoo's preconditioner without a root, an inverse or a decomposition: averaged grams S, of which
Newton-Schulz steps keep K with K K^T near (S + lam I)^-1, by matrix products alone, at every step.

From IF-Shampoo (Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML
2024): the root-free exponent -1, K learned by products, its start at the gradient's scale. From the
Kullback-Leibler form of Shampoo (Lin et al., arXiv 2509.03378): each gram is taken through the
other axis's K. Ours: the bounded Newton-Schulz step in place of a decomposition; gradients and
updates of a scale that the shape alone sets, so that neither a batch size nor a loss scale enters;
rows that are balanced, as NorMuon balances those of Muon's update.

A gradient is seen as a matrix G (m, n), axis A its rows and axis B its columns; S and K of an axis
of d entries are dense, (d, d), diagonal, (d,), or blocks, (n, b, b); both start at `start_values`
times the identity, M and v at zero. Everything is computed in the dtype of the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .diag import bias_correction
from .rows import ALL_ROWS, Rows, Scale, scale_of
from .structures import structure_of

# Added to the mean square of a row before it divides: no row grows by more than 0.1^(-1/2).
ROW_DAMPING = 0.1
# The sides of the square matrix whose update has the RMS `update_rms`.
REFERENCE_SIDE = 256


def start_values(damping: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """What times the identity S and K start at, of axis A and of axis B.

    S_A = I, K_A = I / sqrt(1 + damping);  S_B = I / (1 + damping), K_B = I: the fixed points for a
    gradient of mean square 1 without structure, where A was seen first and B through that K_A.
    """
    return (1.0, (1 + damping) ** -0.5), (1 / (1 + damping), 1.0)


def scaled(x: Tensor, rms: float, scale: Scale | None = None) -> Tensor:
    """x at this root mean square; zero stays zero. scale: of x, if it is of more than its rows."""
    largest, square = scale or scale_of(x)
    tiny = torch.finfo(x.dtype).tiny
    return x / largest.clamp_min(tiny) * (rms / square.sqrt().clamp_min(tiny**0.5))


def shape_scale(m: int, n: int) -> float:
    """RMS of the update of an (m, n) matrix in units of that of a 256 x 256 one.

    2 sqrt(256) sqrt(m / n) / (sqrt(m) + sqrt(n))

    A matrix of independent entries of RMS r has a spectral norm near r (sqrt(m) + sqrt(n)). So the
    update's is in proportion to sqrt(m / n): whatever the width, it moves the m outputs of n inputs
    of RMS 1 by as much (the spectral condition of Yang, Simon and Bernstein, arXiv 2310.17813).
    """
    return 2 * math.sqrt(REFERENCE_SIDE * m / n) / (math.sqrt(m) + math.sqrt(n))


def update_roots_(
    grad: Tensor,
    grams: Sequence[Tensor],
    roots: Sequence[Tensor],
    *,
    beta2: float,
    damping: float,
    over: Rows = ALL_ROWS,
) -> None:
    """One update of S and K of both axes, for a G of mean square 1, each from the old K's.

    S_hat_A = Y Y^T / n with Y = G K_B,     S_hat_B = Z^T Z / m with Z = K_A^T G
    S      <- S + (1 - beta2) (S_hat - S),  lam = damping mean(diag S)
    E       = K^T (S + lam I) K - I
    K      <- K - (b / 2) K E,              b = 1 / max(1, min(||E||_F, sqrt(||E^2||_F)))

    ||E||_2 is at most either norm, so the eigenvalues of I - b E / 2 lie in [1/2, 3/2] whatever the
    gradient; each block has its own b. A diagonal K is (s + lam)^(-1/2) itself. Where G is exactly
    zero nothing changes.
    """
    if not over.learns(grad):
        return
    a, b = map(structure_of, roots)
    sizes = over.count(grad), grad.shape[1]
    through_columns = b.right(grad, roots[1])
    through_rows = a.left(roots[0], grad, transposed=True).mT
    grams[0].lerp_(a.gram(through_columns) / sizes[1], 1 - beta2)
    trace, gram_b = over.total(a.diagonal(grams[0]).sum(), b.gram(through_rows))
    grams[1].lerp_(gram_b / sizes[0], 1 - beta2)
    traces = trace, b.diagonal(grams[1]).sum()
    axes = zip((a, b), grams, roots, traces, sizes, strict=True)
    for structure, gram, root, trace, size in axes:
        lam = damping * trace / size
        if not structure.is_dense:
            root.copy_((gram + lam).rsqrt())
            continue
        residual = root.mT @ (gram @ root + lam * root)
        structure.add_identity_(residual, -1, size)
        # A NaN of the second, whose squares overflow before those of the first, is ignored.
        bound = torch.fmin(structure.norms(residual), structure.norms(residual @ residual).sqrt())
        root.sub_(root @ residual * (0.5 / bound.clamp_min(1)))


def direction(ahead: Tensor, roots: Sequence[Tensor]) -> Tensor:
    """P = K_A K_A^T N K_B K_B^T, with the newest K."""
    a, b = map(structure_of, roots)
    through_rows = a.left(roots[0], a.left(roots[0], ahead, transposed=True))
    return b.right(b.right(through_rows, roots[1]), roots[1], transposed=True)


def balance_rows_(
    update: Tensor,
    row_square_avg: Tensor,
    step: float,
    row_beta: float,
    over: Rows = ALL_ROWS,
) -> Tensor:
    """P with its rows divided by the root of the average of their mean squares.

    P  <- P / rms(P)
    v  <- v + max(1 - row_beta, 1 / step) (r - v),   r_i = mean_j P_ij^2
    P_i / sqrt(v_i + 0.1)
    """
    update = scaled(update, 1.0, over.scale(update))
    row_square_avg.lerp_(update.square().mean(1), max(1 - row_beta, 1 / step))
    return update / (row_square_avg + ROW_DAMPING).sqrt().unsqueeze(1)


def rootfree_shampoo_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    grams: Sequence[Tensor],
    roots: Sequence[Tensor],
    row_square_avg: Tensor | None,
    step: float,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    damping: float,
    weight_decay: float,
    update_rms: float,
    row_beta: float | None,
    maximize: bool = False,
    update_factors: bool = True,
    over: Rows = ALL_ROWS,
) -> None:
    """One step of one matrix, in place; `step` counts this one.

    G <- G / rms(G);  S and K as in `update_roots_`, unless update_factors is False
    M <- beta1 M + (1 - beta1) G,   N = beta1 M + (1 - beta1) G
    P = K_A K_A^T N K_B K_B^T, rows balanced unless row_beta is None, at an RMS of update_rms times
    `shape_scale`
    p <- (1 - lr weight_decay) p - lr P

    param: of any shape with the elements of the momentum buffer, which is (m, n), as is G.
    over: whose rows these are, if there are more than here; then axis A has diagonal S and K.
    """
    g = grad.reshape(momentum_buffer.shape).to(momentum_buffer.dtype)
    g = scaled(g, 1.0, over.scale_of_gradient(g))
    g = -g if maximize else g
    momentum_buffer.lerp_(g, 1 - beta1)
    if update_factors:
        update_roots_(g, grams, roots, beta2=beta2, damping=damping, over=over)
    update = direction(_ahead(momentum_buffer, g, beta1), roots)
    if row_square_avg is not None and row_beta is not None:
        update = balance_rows_(update, row_square_avg, step, row_beta, over)
    sizes = over.count(update), update.shape[1]
    rms = update_rms * shape_scale(*sizes) if all(sizes) else 0.0
    _descend_(param, scaled(update, rms, over.scale(update)), lr, weight_decay)


def vector_adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float | Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    vector_beta2: float,
    weight_decay: float,
    vector_rms: float,
    maximize: bool = False,
) -> None:
    """One step of a vector by Adam with Nesterov's momentum, of RMS about `vector_rms`.

    m <- beta1 m + (1 - beta1) g,   v <- vector_beta2 v + (1 - vector_beta2) g^2
    p <- (1 - lr weight_decay) p - lr vector_rms
         (beta1 m + (1 - beta1) g) / (1 - beta1^(t+1)) / sqrt(v / (1 - vector_beta2^t))

    Finite entries of g end where their squares would be infinite, and the root that divides where
    a square has no bits left.
    """
    g = grad.to(exp_avg.dtype)
    g = -g if maximize else g
    smallest, largest = (
        (1 - 1e-6) * getattr(torch.finfo(g.dtype), end) ** 0.5 for end in ("tiny", "max")
    )
    g = torch.where(g.isinf(), g, g.clamp(-largest, largest))
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.lerp_(g.square(), 1 - vector_beta2)
    root = (exp_avg_sq / bias_correction(vector_beta2, step)).sqrt().clamp_min(smallest)
    update = _ahead(exp_avg, g, beta1) / bias_correction(beta1, step + 1) / root
    _descend_(param, vector_rms * update, lr, weight_decay)


def vector_rootfree_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float | Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    vector_beta2: float,
    weight_decay: float,
    update_rms: float,
    maximize: bool = False,
) -> None:
    """One step of a vector by the diagonal case of the matrices' update.

    g <- g / rms(g),   m <- beta1 m + (1 - beta1) g
    v <- v + max(1 - vector_beta2, 1 / t) (g^2 - v)
    u  = (beta1 m + (1 - beta1) g) / (v + mean(v)),   at RMS update_rms
    p <- (1 - lr weight_decay) p - lr u
    """
    g = scaled(grad.to(exp_avg.dtype), 1.0)
    g = -g if maximize else g
    exp_avg.lerp_(g, 1 - beta1)
    weight: float | Tensor
    if isinstance(step, Tensor) and not step.is_cpu:  # a count is float32
        weight = step.to(g.dtype).reciprocal().clamp_min(1 - vector_beta2)
    else:  # a number, as a copy to the device would make the host wait
        weight = max(1 - vector_beta2, 1 / float(step))
    exp_avg_sq.lerp_(g.square(), weight)
    divisor = exp_avg_sq + exp_avg_sq.mean()
    update = _ahead(exp_avg, g, beta1) / divisor.clamp_min(torch.finfo(g.dtype).tiny)
    _descend_(param, scaled(update, update_rms), lr, weight_decay)


def _ahead(momentum: Tensor, g: Tensor, beta1: float) -> Tensor:
    """The momentum of the next step if its gradient were this one's (Nesterov)."""
    return momentum * beta1 + g * (1 - beta1)


def _descend_(param: Tensor, update: Tensor, lr: float | Tensor, weight_decay: float) -> None:
    p = param.to(update.dtype)
    param.copy_(p - lr * weight_decay * p - lr * update.reshape(param.shape))
