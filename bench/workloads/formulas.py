"""The products of IF-Shampoo as formulas on stacks of n x n matrices, with their FLOPs.

In the products' dtype, with float32 (or wider) parameters, buffers and masters of the factors: what
`bench.products` times by torch.bmm and torch.compile, and in float64 the truth for every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measuring.common import Tensors, random_tensors

LR, MOMENTUM, DAMPING, BATCH, FACTOR_LR, DECAY = 0.1, 0.9, 1e-3, 8, 0.1, 0.5


# Formulas -------------------------------------------------------------------------------------


def gram(c: Tensor) -> Tensors:
    """P = C C^T."""
    return {"pc": torch.bmm(c, c.mT)}


def factor_momentum(m: Tensor, transformed: Tensor, c: Tensor, k: Tensor) -> Tensors:
    """m <- a2 m + (1 - a2)/2 { B/n M M^T + damping tr(K^T K)/n C^T C - I }, with M transformed."""
    n = c.shape[-1]
    mean_square = k.to(_wide(k)).square().sum((1, 2), keepdim=True) / n
    target = BATCH / n * torch.bmm(transformed, transformed.mT).to(_wide(k))
    target = target + DAMPING * mean_square * torch.bmm(c.mT, c)
    target = target - torch.eye(n, dtype=target.dtype, device=c.device)
    return {"m": (DECAY * m + (1 - DECAY) / 2 * target).to(m.dtype)}


def factor_update(master: Tensor, c: Tensor, m: Tensor) -> Tensors:
    """C <- C - factor_lr / max(1, ||m||) C m."""
    norm = m.to(_wide(m)).square().sum((1, 2), keepdim=True).sqrt()
    master = master - FACTOR_LR / norm.clamp_min(1) * torch.bmm(c, m)
    return {"master": master, "c": master.to(c.dtype)}


def apply(p: Tensor, buffer: Tensor, g: Tensor, pc: Tensor, pk: Tensor) -> Tensors:
    """buf <- momentum buf + C C^T G K K^T ; p <- p - lr buf."""
    update = torch.bmm(torch.bmm(pc, g.to(pc.dtype)), pk)
    buffer = MOMENTUM * buffer + update
    return {"buffer": buffer, "p": p - LR * buffer}


def step(
    p: Tensor,
    buffer: Tensor,
    g: Tensor,
    c: Tensor,
    k: Tensor,
    m: Tensor,
    mk: Tensor,
    master: Tensor,
    master_k: Tensor,
) -> Tensors:
    """An update step: both factors from the old ones, their products, the parameter."""
    transformed = torch.bmm(torch.bmm(c.mT, g.to(c.dtype)), k)
    m = factor_momentum(m, transformed, c, k)["m"]
    mk = factor_momentum(mk, transformed.mT, k, c)["m"]
    new = factor_update(master, c, m), factor_update(master_k, k, mk)
    pc, pk = (gram(each["c"])["pc"] for each in new)
    factors = {"master": new[0]["master"], "master_k": new[1]["master"]}
    return {**apply(p, buffer, g, pc, pk), "m": m, "mk": mk, "pc": pc, "pk": pk, **factors}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Kernel:
    """A formula, the tensors that it takes and gives, its FLOPs in n^3: as products, as needed."""

    formula: Callable[..., Tensors]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    products: float
    needed: float


KERNELS = {
    "gram": Kernel(gram, ("c",), ("pc",), 2, 1),
    "factor momentum": Kernel(factor_momentum, ("m", "transformed", "c", "k"), ("m",), 4, 2),
    "factor update": Kernel(factor_update, ("master", "c", "m"), ("master", "c"), 2, 2),
    "apply": Kernel(apply, ("p", "buffer", "g", "pc", "pk"), ("buffer", "p"), 4, 4),
    "step": Kernel(
        step,
        ("p", "buffer", "g", "c", "k", "m", "mk", "master", "master_k"),
        ("p", "buffer", "m", "mk", "pc", "pk", "master", "master_k"),
        24,
        18,
    ),
}
# In float32 or wider whatever the products' dtype.
WIDE = ("p", "buffer", "g", "master", "master_k")
# Compared by what was added; all others by what they are.
MOVED = ("p", "master", "master_k")


def moved(name: str, dtype: torch.dtype) -> int:
    """Bytes an element of n x n that a kernel must move: operands read, results written, once."""
    kernel = KERNELS[name]
    return sum(4 if key in WIDE else dtype.itemsize for key in (*kernel.takes, *kernel.gives))


def stacks(count: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random operands of every formula; factors are near the identity."""
    names = ("g", "p", "buffer", "transformed", "m", "mk", "c", "k")
    normal = {"dtype": torch.float32, "device": device, "seed": 0}
    drawn = random_tensors([(count, n, n)] * len(names), scale=0.1, **normal)
    tensors = dict(zip(names, drawn, strict=True))
    one = torch.eye(n, device=device)
    for factor, master, product in (("c", "master", "pc"), ("k", "master_k", "pk")):
        value = one + tensors[factor] / n**0.5
        tensors[factor] = value.to(dtype)
        tensors[master] = value if dtype == torch.bfloat16 else tensors[factor]
        tensors[product] = torch.bmm(tensors[factor], tensors[factor].mT)
    for name in ("m", "mk"):  # symmetric, as they stay: a kernel may read a triangle
        tensors[name] = (tensors[name] + tensors[name].mT) / 2
    return tensors | {name: tensors[name].to(dtype) for name in ("transformed", "m", "mk")}


def error_of(name: str, before: Tensors, after: Tensors) -> float:
    """The largest error of a kernel's results on the last matrix, each relative to its size.

    Of what moves, relative to the displacement. The truth is the formula in float64.
    """
    kernel = KERNELS[name]
    truth = kernel.formula(*(before[key][-1:].double() for key in kernel.takes))
    worst = torch.zeros((), dtype=torch.float64, device=before["g"].device)
    for key in truth.keys() & after.keys():
        start = before[key][-1:].double() if key in MOVED else torch.zeros_like(truth[key])
        error = (after[key][-1:].double() - truth[key]).norm()
        worst = torch.maximum(worst, error / (truth[key] - start).norm())
    return worst.item()
