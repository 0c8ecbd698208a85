"""Parts of a gradient by other ways than hooks, and an optimizer that notes what it is given."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from rootfree_fused.micro import TokenSquares


class Recorder(torch.optim.SGD):
    """Notes what `accumulate` is called with, and takes the gradients."""

    def __init__(self, params, second_moment="micro", **settings):
        super().__init__(params, lr=0.1)
        self.calls = []
        for group in self.param_groups:
            group.setdefault("second_moment", second_moment)
            group.update(settings)

    def accumulate(self, **given):
        self.calls.append(given)
        self.zero_grad()


def squares_of(model, run):
    """What the optimizer is given after one backward of the loss: by parameter, and of how many."""
    optimizer = Recorder(model.parameters())
    with TokenSquares(model, optimizer) as squares:
        run().backward()
        squares.accumulate()
    (call,) = optimizer.calls
    return call["squares"], call["parts"]


def by_example(model, loss, x, y):
    """Of each parameter by name the gradient of each example's own loss, stacked."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(params, a, b):
        return loss(functional_call(model, params, (a[None],)), b[None])

    return vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)


class _Copies:
    """Calls of modules in which each row has its own copy of the parameters."""

    def __init__(self):
        self.made = []  # of each call and parameter: the parameter, and its copies by rows

    def of(self, param, rows):
        if param is None:
            return None
        copies = param.detach().expand(rows, *param.shape).clone().requires_grad_()
        self.made.append((param, copies))
        return copies

    def forward(self, module, x):
        features = {nn.Linear: 1, nn.Embedding: 0}.get(type(module))
        if features is None:
            features = len(module.normalized_shape)
        flat = x.flatten(0, x.ndim - features - 1) if x.ndim > features else x[None]
        weight = self.of(module.weight, len(flat))
        bias = self.of(getattr(module, "bias", None), len(flat))
        if isinstance(module, nn.Linear):
            y = torch.einsum("roi,ri->ro", weight, flat)
        elif isinstance(module, nn.Embedding):
            y = weight[torch.arange(len(flat)), flat]
            if module.padding_idx is not None:
                y = torch.where((flat == module.padding_idx)[:, None], y.detach(), y)
        else:
            norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
            y = weight * norm(flat, module.normalized_shape, eps=module.eps)
        y = y if bias is None else y + bias
        rows = x.shape[: x.ndim - features]
        return y.unflatten(0, rows) if rows else y[0]


def by_row(model, run):
    """Of each parameter a list of tensors, one a call: each row's part of its gradient.

    run: computes the loss; parameters that no module calls have no entry.
    """
    copies = _Copies()
    modules = [m for m in model.modules() if m._parameters and not list(m.children())]
    with contextlib.ExitStack() as stack:
        for module in modules:
            module.forward = lambda x, module=module: copies.forward(module, x)
            stack.callback(module.__dict__.pop, "forward")
        run().backward()
    found = {}
    for param, made in copies.made:
        found.setdefault(param, []).append(
            torch.zeros_like(made) if made.grad is None else made.grad
        )
    return found


class Block(nn.Module):
    """A causal transformer block on tokens, of which all parameters are in known modules."""

    def __init__(self, vocab=11, dim=8, *, bias=True, norm=nn.LayerNorm, tied=False, padding=None):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, padding_idx=padding)
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.up, self.down = nn.Linear(dim, 2 * dim, bias=bias), nn.Linear(2 * dim, dim, bias=bias)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        x = x + self.out(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v)
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


def token_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def assert_near(got, want, tolerance):
    """Within a fraction of the largest entry."""
    assert got.shape == want.shape
    error, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert size > 0
    assert error <= tolerance * size, f"{float(error / size):.1e}"


def setup(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    return model, Recorder(model.parameters()), torch.randn(8, 3)


def loss(model, x):
    return model(x).pow(3).mean()


def plain_squares():
    """What is right for `setup`, by position."""
    model, _, x = setup()
    parts = by_row(model, lambda: loss(model, x))
    return [8 * parts[p][0].square().sum(0) for p in model.parameters()]


def assert_squares(optimizer, plain, call=0, factor=1):
    params = optimizer.param_groups[0]["params"]
    assert len(params) == len(plain)
    for p, want in zip(params, plain, strict=True):
        assert_near(optimizer.calls[call]["squares"][p], factor * want, 1e-6)
