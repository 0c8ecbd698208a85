"""Which factors large models have: their structures, their bytes, the FLOPs of an update.

Parameters are on the meta device, so nothing is computed and nothing allocated.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rootfree_fused import IFShampoo, RootFreeShampoo
from rootfree_fused.optimizer import owners
from rootfree_fused.optimizer.layouts import Layout, layout_of
from rootfree_fused.optimizer.matrix import MatrixOptimizer
from rootfree_fused.reference.structures import Structure

from .measuring.common import Shape
from .report.cells import markdown
from .workloads.networks import llama_8b, qwen3_30b_a3b_experts, resnet50, vit_l16

# Bytes an entry of a factor that is no diagonal, bfloat16 with a residual, and of what it learns.
BYTES_OF_BLOCKS = {RootFreeShampoo: 2 + 2 + 4, IFShampoo: 2 + 2 + 2}
GIVEN: dict[type[MatrixOptimizer], dict[str, Any]] = {
    RootFreeShampoo: {},
    IFShampoo: {"batch_size": 1},
}


@dataclass(frozen=True)
class Stack:
    """Parameters of one shape; of stacks of matrices the first axes number members."""

    shape: Shape
    count: int = 1
    batch_axes: int = 0


MODELS: dict[str, Callable[[], Iterator[Stack]]] = {
    "Llama-8B": lambda: _counted(layer.shape for layer in llama_8b()),
    "experts of Qwen3-30B-A3B": lambda: (
        Stack(shape, count, batch_axes=1)
        for shape, count in Counter(qwen3_30b_a3b_experts()).items()
    ),
    "ViT-L/16": lambda: _counted(layer.shape for layer in vit_l16()),
    "ResNet-50": lambda: _counted(layer.shape for layer in resnet50()),
}


def _counted(shapes: Iterator[Shape]) -> Iterator[Stack]:
    for shape, count in Counter(shapes).items():
        yield Stack(shape, count)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench layouts`."""
    parser.add_argument("--max-dense-dim", type=int, default=2048, help="as the optimizers' own")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    print(axes_table(args.max_dense_dim), table(args.max_dense_dim), sep="\n\n")
    return 0


def axes_table(limit: int) -> str:
    """Of every size of an axis its structure."""
    lines = []
    for name, stacks in MODELS.items():
        found: Counter[tuple[int, str]] = Counter()
        for stack in stacks():
            if layout := _layout(stack, limit):
                for size, structure in zip(layout.sizes, layout.structures, strict=True):
                    found[size, _text(structure, size)] += stack.count * _members(stack)
        lines += [[name, f"{d:,}", f"{n:,}", of] for (d, of), n in sorted(found.items())]
    return markdown(["model", "axis", "how many", "factor"], lines)


def table(limit: int) -> str:
    """Of every model and optimizer the state and the products of an update."""
    lines = []
    for name, stacks in MODELS.items():
        members = list(stacks())
        elements = sum(math.prod(stack.shape) * stack.count for stack in members)
        for cls in GIVEN:
            factors, whole = state_bytes(cls, members, limit)
            flops = sum(update_flops(cls, stack, limit) for stack in members)
            numbers = factors / elements, whole / elements, flops / elements
            lines.append([name, cls.__name__, f"{elements / 1e6:,.0f}"])
            lines[-1] += [f"{numbers[0]:.2f}", f"{numbers[1]:.2f}", f"{numbers[2]:,.0f}"]
    header = ["model", "optimizer", "million parameters", "bytes of factors a parameter"]
    return markdown([*header, "bytes of all state", "FLOPs of an update a parameter"], lines)


def state_bytes(cls: type[MatrixOptimizer], stacks: list[Stack], limit: int) -> tuple[float, float]:
    """Of factors and what they learn from, and of all state, as an optimizer has it on meta."""
    factors = whole = 0.0
    for stack in stacks:
        state = _state(cls, stack, limit)
        sizes = {key: value.numel() * value.itemsize for key, value in state.items()}
        whole += stack.count * sum(sizes.values())
        of = (size for key, size in sizes.items() if key.startswith(("factor_", "gram_")))
        factors += stack.count * sum(of)
    return factors, whole


def on_meta(cls: type[MatrixOptimizer], stack: Stack, **settings: Any) -> MatrixOptimizer:
    """An optimizer of one parameter of a shape, with bfloat16 factors."""
    param = nn.Parameter(torch.empty(stack.shape, device="meta"))
    settings |= {"batch_axes": stack.batch_axes, **GIVEN[cls]}
    return cls([param], factor_dtype=torch.bfloat16, **settings)


def _state(cls: type[MatrixOptimizer], stack: Stack, limit: int) -> Mapping[str, torch.Tensor]:
    optimizer = on_meta(cls, stack, max_dense_dim=limit)
    (state,) = optimizer.state.values()
    return state


def factor_bytes(cls: type[MatrixOptimizer], stack: Stack, limit: int) -> float:
    """What `state_bytes` is by the formula: of blocks b the bytes of n b^2 entries, else 8 d."""
    layout = _layout(stack, limit)
    if layout is None:
        return 0
    found = 0
    for size, structure in zip(layout.sizes, layout.structures, strict=True):
        each = BYTES_OF_BLOCKS[cls] if structure.is_dense else 8
        found += each * math.prod(structure.shape(size))
    return found * stack.count * _members(stack)


def update_flops(cls: type[MatrixOptimizer], stack: Stack, limit: int) -> float:
    """Of all members of all parameters of a shape."""
    layout = _layout(stack, limit)
    if layout is None:
        return 0
    flops = owners.update_flops(layout, cls._matrix_method.flops_of_blocks)
    return flops * stack.count * _members(stack)


def _members(stack: Stack) -> int:
    return math.prod(stack.shape[: stack.batch_axes])


def _layout(stack: Stack, limit: int) -> Layout | None:
    settings = {"structures": "auto", "max_dense_dim": limit, "vector_method": "adam"}
    return layout_of(stack.shape, {**settings, "batch_axes": stack.batch_axes})


def _text(structure: Structure, size: int) -> str:
    if structure.name != "block":
        return structure.name
    count, block, _ = structure.shape(size)
    missing = count * block - size
    return f"{count} blocks of {block:,}" + (f", {missing} of padding" if missing else "")
