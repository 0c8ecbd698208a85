"""Time steps of IFShampoo against peers, factors updated every step.

The models are matrices alone, so that sirfshampoo does the same mathematics on equal settings and
the float64 specification says how far each is from it. Shampoo and SOAP of pytorch-optimizer,
which decompose their factors, are other methods: of them only the time is compared.
`pip install rootfree-fused[peers]` brings them; the table says which of them is absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList
from torch.optim import Optimizer

from rootfree_fused import IFShampoo, reference

from .common import (
    Shape,
    add_measurement_arguments,
    device_timer,
    interleave,
    pick_device,
    random_tensors,
)
from .rows import Row, Rows, markdown, number, provenance, read_rows, select, timed, unique

CHECK_STEPS = 3
LR, MOMENTUM, DAMPING, BATCH = 1e-3, 0.9, 1e-4, 8
FACTOR_LR, FACTOR_MOMENTUM = 0.1, 0.5
# Allowed distance from the float64 displacement: several roundings of the products' dtype.
ALLOWED_ERROR = {torch.bfloat16: 2.0**-5, torch.float32: 2.0**-16}
BASE = "sirfshampoo, bfloat16"


def transformer(width: int, layers: int) -> list[Shape]:
    """The matrices of transformer layers: query-key-value, projection, and an MLP of 4 widths."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return layer * layers


CASES: dict[str, list[Shape]] = {
    "4 layers of width 256": transformer(256, 4),
    "1 layer of width 512": transformer(512, 1),
    "12 of 384 x 384": [(384, 384)] * 12,
    "300 x 130": [(300, 130)],
    "65 x 777": [(65, 777)],
    "513 x 257": [(513, 257)],
    "200 of 64 x 64": [(64, 64)] * 200,
}


class Matrices(Module):
    """A model that is its parameters: sirfshampoo takes a module."""

    def __init__(self, params: list[Tensor], grads: list[Tensor]) -> None:
        super().__init__()
        self.params = ParameterList([Parameter(p.clone()) for p in params])
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.clone()


def ours(model: Matrices, dtype: torch.dtype) -> Optimizer:
    return IFShampoo(
        model.parameters(),
        lr=LR,
        momentum=MOMENTUM,
        damping=DAMPING,
        batch_size=BATCH,
        factor_lr=FACTOR_LR,
        factor_momentum=FACTOR_MOMENTUM,
        factor_dtype=dtype,
    )


def sirfshampoo(model: Matrices, dtype: torch.dtype) -> Optimizer:
    return importlib.import_module("sirfshampoo").SIRFShampoo(
        model,
        lr=LR,
        beta2=FACTOR_LR,
        alpha1=MOMENTUM,
        alpha2=FACTOR_MOMENTUM,
        lam=DAMPING,
        batch_size=BATCH,
        preconditioner_dtypes=dtype,
    )


def shampoo(model: Matrices, dtype: torch.dtype) -> Optimizer:
    # No momentum: with it this Shampoo overwrites p.grad, and the next step's matrices differ.
    build = importlib.import_module("pytorch_optimizer").Shampoo
    return build(model.parameters(), lr=LR, preconditioning_compute_steps=1)


def soap(model: Matrices, dtype: torch.dtype) -> Optimizer:
    build = importlib.import_module("pytorch_optimizer").SOAP
    return build(model.parameters(), lr=LR, precondition_frequency=1)


@dataclass(frozen=True)
class Provider:
    """An optimizer of matrices, the dtype of its products, and the package that it comes from."""

    build: Callable[[Matrices, torch.dtype], Optimizer]
    dtype: torch.dtype
    package: str = "rootfree_fused"
    same_mathematics: bool = True


PROVIDERS = {
    "IFShampoo, bfloat16": Provider(ours, torch.bfloat16),
    "IFShampoo, float32": Provider(ours, torch.float32),
    BASE: Provider(sirfshampoo, torch.bfloat16, "sirfshampoo"),
    "sirfshampoo, float32": Provider(sirfshampoo, torch.float32, "sirfshampoo"),
    "SOAP, float32": Provider(soap, torch.float32, "pytorch_optimizer", same_mathematics=False),
    "Shampoo, float32": Provider(
        shampoo, torch.float32, "pytorch_optimizer", same_mathematics=False
    ),
}


def step_flops(shapes: list[Shape]) -> float:
    """FLOPs of an update step, symmetric products at half price: 18 n^3 a square."""
    return sum(5 * m * n * (m + n) + 4 * (m**3 + n**3) for m, n in shapes)


def displacement(param: Tensor, grad: Tensor) -> Tensor:
    """What CHECK_STEPS steps of the specification add to a parameter, in float64."""
    p, g, buffer = param.double(), grad.double(), torch.zeros_like(param, dtype=torch.float64)
    factors = [torch.eye(d, dtype=torch.float64, device=p.device) for d in p.shape]
    momenta = [torch.zeros_like(factor) for factor in factors]
    for _ in range(CHECK_STEPS):
        reference.update_factors_(
            g,
            factors,
            momenta,
            factor_lr=FACTOR_LR,
            factor_momentum=FACTOR_MOMENTUM,
            damping=DAMPING,
            batch_size=BATCH,
        )
        update = reference.precondition(g, factors)
        reference.apply_(
            p, update, buffer, lr=LR, momentum=MOMENTUM, weight_decay=0.0, decoupled=True
        )
    return p - param.double()


def measure(
    case: str, shapes: list[Shape], rows: Rows, device: torch.device, seconds: float
) -> None:
    """Check and time every provider on one case."""
    params = random_tensors(shapes, scale=0.05, dtype=torch.float32, device=device, seed=0)
    grads = random_tensors(shapes, scale=0.1, dtype=torch.float32, device=device, seed=1)
    truth = [displacement(p, g) for p, g in zip(params, grads, strict=True)]
    size = math.sqrt(sum(t.square().sum() for t in truth))
    steps = {}
    for name, provider in PROVIDERS.items():
        if importlib.util.find_spec(provider.package) is None:
            rows.add(case, name, "absent", None, "")
            continue
        model = Matrices(params, grads)
        optimizer = provider.build(model, provider.dtype)
        for _ in range(CHECK_STEPS):
            optimizer.step()
        if provider.same_mathematics:
            moved = [
                q.detach().double() - p.double() for q, p in zip(model.params, params, strict=True)
            ]
            pairs = zip(moved, truth, strict=True)
            error = float(math.sqrt(sum((m - t).square().sum() for m, t in pairs)) / size)
            right = error <= ALLOWED_ERROR[provider.dtype]
            rows.add(case, name, "error", error, "of the displacement", right=right)
            if not right:
                continue
        steps[name] = optimizer.step
    for name, timing in interleave(steps, device_timer(device), seconds=seconds).items():
        rows.add_time(case, name, "time", timing)
        if PROVIDERS[name].same_mathematics:
            rate = step_flops(shapes) / timing.median / 1e9
            rows.add(case, name, "rate", rate, "GFLOP/s", flops=step_flops(shapes))


def table(rows: list[Row]) -> str:
    """Markdown, a table a case."""
    limits = ", ".join(
        f"{limit:.2g} in {str(dtype).split('.')[1]}" for dtype, limit in ALLOWED_ERROR.items()
    )
    notes = (
        "Rates count 18 n^3 FLOPs for a square, symmetric products at half price, for IFShampoo "
        "and sirfshampoo alike. SOAP and Shampoo are those of pytorch-optimizer: other "
        "mathematics in float32, so of them only the time is given. The error is that of "
        f"{CHECK_STEPS} steps against float64, relative to the way that they went; above {limits} "
        "it is WRONG."
    )
    parts = ["# IF-Shampoo: optimizer.step(), factors updated every step", provenance(rows), notes]
    header = ("provider", "ms a step (20 to 80 %)", "GFLOP/s", "x sirfshampoo, bfloat16", "error")
    for case in unique(rows, "case"):
        of_case = select(rows, case=case)
        base = select(of_case, provider=BASE, metric="time")
        lines = [_line(select(of_case, provider=p), base) for p in unique(of_case, "provider")]
        parts += [f"## {case}", markdown(header, lines)]
    return "\n\n".join(parts) + "\n"


def _line(rows: list[Row], base: list[Row]) -> list[str]:
    name, of = rows[0]["provider"], {row["metric"]: row for row in rows}
    if "absent" in of:
        return [name, "absent", "", "", ""]
    error = number(of["error"]["value"], ".2g") if "error" in of else ""
    if "time" not in of:
        return [name, "**WRONG**", "", "", f"**{error}**"]
    faster = f"{base[0]['value'] / of['time']['value']:.3g}" if base else ""
    rate = number(of["rate"]["value"], ".0f") if "rate" in of else ""
    return [name, timed(of["time"]), rate, faster, error]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench matrix`."""
    add_measurement_arguments(parser)
    parser.add_argument("--seconds", type=float, default=8.0, help="timing budget of a case")


def run(args: argparse.Namespace) -> int:
    """Measure every case; 1 if a step of ours was WRONG."""
    device = pick_device(args.device)
    rows = Rows(args.out / "matrix.jsonl", "matrix", device, arguments=args)
    seconds = 0.1 if args.quick else args.seconds
    cases: dict[str, Any] = dict(list(CASES.items())[3:4]) if args.quick else CASES
    for case in rows.remaining(cases):
        measure(case, cases[case], rows, device, seconds)
    rows.finish()
    written = read_rows(rows.path)
    report = args.out / "matrix.md"
    report.write_text(table(written))
    print(report.read_text())
    print(f"rows   {rows.path}\ntables {report}")
    wrong = [row for row in written if row["metric"] == "error" and not row["detail"]["right"]]
    return int(any(row["provider"].startswith("IFShampoo") for row in wrong))
