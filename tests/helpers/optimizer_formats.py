"""Optimizers of every class on parameters in every format."""

from __future__ import annotations

import io

import torch

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop, RootFreeShampoo
from rootfree_fused.reference.formats import decoded

BF16, F32 = torch.bfloat16, torch.float32
RESIDUALS = (None, "stochastic", 8, 16)
STATES = ("float32", "bfloat16", "8bit")
CLASSES = {"adamw": RootFreeAdamW, "rmsprop": RootFreeRMSprop}
MATRICES = {"ifshampoo": IFShampoo, "shampoo": RootFreeShampoo}
EVERY = {**CLASSES, **MATRICES}
SECOND = {"adamw": "exp_avg_sq", "rmsprop": "square_avg"}
FIRST = {"adamw": "exp_avg", "rmsprop": "momentum_buffer"}
# A matrix of whole blocks, one whose last block is short, one with few elements, a vector.
SHAPES = ((64, 256), (67, 101), (8, 8), (5000,))


def parameters(shapes=SHAPES, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def optimizer_of(name, params, residual=None, state="float32", **settings):
    settings = {"param_residual": residual, "state_format": state, **settings}
    if name != "shampoo":
        settings["batch_size"] = 1
    return EVERY[name](params, **settings)


def run(optimizer, params, steps, first=0):
    """Steps on gradients that are the same for every run."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def bits(optimizer, params):
    """All that a step writes, as bytes."""
    tensors = [p.detach() for p in params]
    tensors += [v for p in params for _, v in sorted(optimizer.state[p].items())]
    return [t.contiguous().view(-1).view(torch.uint8).clone() for t in tensors]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def average(state, key):
    return decoded(state[key], state.get(f"{key}_scale"))


def saved(optimizer):
    """A state_dict that went through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
