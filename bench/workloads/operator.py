"""IFShampoo's operator on bare stacks, and the times of its launches on a GPU."""

from __future__ import annotations

from collections import defaultdict

import torch

from rootfree_fused import reference

from ..measuring.common import Call, Tensors
from .formulas import BATCH, DAMPING, DECAY, FACTOR_LR, LR, MOMENTUM


class Operator:
    """The operator of IFShampoo on copies of the stacks, with everything that it needs."""

    def __init__(self, tensors: Tensors) -> None:
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        self.momenta, self.products = [own["m"], own["mk"]], [own["pc"], own["pk"]]
        self.params, self.grads, self.buffers = (list(own[k]) for k in ("p", "g", "buffer"))
        masters = [own["master"], own["master_k"]]
        if own["c"].dtype == torch.bfloat16:
            pairs = [reference.split(master) for master in masters]
            self.factors, self.residuals = ([pair[i] for pair in pairs] for i in (0, 1))
        else:
            self.factors, self.residuals = masters, [own["c"].new_empty(0)] * 2
        self.lr = torch.tensor(LR)

    def __call__(self, *, update_factors: bool, refresh_products: bool) -> None:
        torch.ops.rootfree_fused.ifshampoo_(
            self.params,
            self.grads,
            self.factors,
            self.residuals,
            self.momenta,
            self.products,
            self.buffers,
            self.lr,
            axes=[2],
            update_factors=update_factors,
            refresh_products=refresh_products,
            factor_lr=FACTOR_LR,
            factor_momentum=DECAY,
            damping=DAMPING,
            batch_size=BATCH,
            momentum=MOMENTUM,
            weight_decay=0.0,
            decoupled=True,
            maximize=False,
        )

    def results(self) -> Tensors:
        """Everything under the names of the formulas; factors with all their bits."""
        masters = [
            reference.join(factor, residual) if residual.numel() else factor
            for factor, residual in zip(self.factors, self.residuals, strict=True)
        ]
        names = ("m", "mk", "pc", "pk", "master", "master_k")
        found = dict(zip(names, [*self.momenta, *self.products, *masters], strict=True))
        return found | {"p": torch.stack(self.params), "buffer": torch.stack(self.buffers)}


# What the operator does under its flags; gram is that of both factors and applies too.
PARTS = {
    "step": {"update_factors": True, "refresh_products": False},
    "apply": {"update_factors": False, "refresh_products": False},
    "gram": {"update_factors": False, "refresh_products": True},
}
# Kernels on a GPU, by the profiler; each launch serves both factors.
LAUNCHES = {"gram": "products", "factor momentum": "factor_momenta", "factor update": "factors"}
# GEMMs of n x n in each launch, for both factors, at full price.
GEMMS = {"product": 3, "factor_momenta": 4, "factors": 2, "products": 2, "params": 1}
CUBLAS = ("nvjet", "gemm")  # in the names of its kernels, which take `product` for stacks


def launch_of(kernel: str) -> str | None:
    """The launch of a kernel by the name that a profiler shows; None for one that is not ours."""
    if any(part in kernel for part in CUBLAS):
        return "product"
    if not (kernel.startswith("_") and kernel.endswith("_kernel")):
        return None
    return kernel.removeprefix("_").removeprefix("stacked_").removesuffix("_kernel")


def kernel_times(run: Call, rounds: int = 10) -> dict[str, float]:
    """Mean seconds of a run in each of our kernels on a GPU; all launches of one together."""
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if name := launch_of(event.name):
            times[name] += event.time_range.elapsed_us() / 1e6 / rounds
    return dict(times)
