"""Stacks of matrices beside their members as parameters; the operators by reference."""

from __future__ import annotations

import math

import torch
from helpers.optimizers import parameters

from rootfree_fused import IFShampoo, RootFreeShampoo
from rootfree_fused.ops import by_reference
from rootfree_fused.optimizer import matrix_calls

CLASSES = {"ifshampoo": IFShampoo, "shampoo": RootFreeShampoo}
OPERATORS = {"ifshampoo": "ifshampoo_", "shampoo": "rootfree_shampoo_"}
SETTINGS = {
    "ifshampoo": {"lr": 0.05, "batch_size": 8, "weight_decay": 0.1},
    "shampoo": {"lr": 0.05, "weight_decay": 0.1},
}


def use_reference(monkeypatch):
    """Have the optimizers take the specification of the operators, on CPU tensors."""
    monkeypatch.setattr(matrix_calls, "matrix_kernel", lambda *_: None)
    for name in OPERATORS.values():
        monkeypatch.setattr(torch.ops.rootfree_fused, name, getattr(by_reference, name))


class Twins:
    """Stacks that one optimizer steps, and their members that another steps one by one."""

    def __init__(self, name, *shapes, batch_axes=1, dtype=torch.float32, device="cpu", **settings):
        self.batch_axes = batch_axes
        self.stacks = parameters(*shapes, dtype=dtype, device=device)
        self.members = [
            [torch.nn.Parameter(member.clone()) for member in self.split(stack.detach())]
            for stack in self.stacks
        ]
        settings = {**SETTINGS[name], **settings}
        self.optimizer = CLASSES[name](self.stacks, batch_axes=batch_axes, **settings)
        self.alone = CLASSES[name]([p for own in self.members for p in own], **settings)

    def split(self, tensor):
        """By member, whatever the strides."""
        shape = tensor.shape[self.batch_axes :]
        return list(tensor.reshape(math.prod(tensor.shape[: self.batch_axes]), *shape))

    def set_grads(self, seed, zero=()):
        """zero: (stack, member) of those whose gradient is zero."""
        generator = torch.Generator().manual_seed(seed)
        for i, (stack, members) in enumerate(zip(self.stacks, self.members, strict=True)):
            grads = 0.1 * torch.randn(len(members), *members[0].shape, generator=generator)
            grads[[member for owner, member in zero if owner == i]] = 0
            stack.grad = grads.view(stack.shape).to(stack.device, stack.dtype)
            for member, grad in zip(members, self.split(stack.grad), strict=True):
                member.grad = grad.clone()

    def step(self, seed, zero=()):
        self.set_grads(seed, zero)
        self.optimizer.step()
        self.alone.step()

    def assert_equal(self):
        """Every bit of the stacks, and of their state, is that of their members."""
        for stack, members in zip(self.stacks, self.members, strict=True):
            state, states = self.optimizer.state[stack], [self.alone.state[p] for p in members]
            assert torch.equal(torch.stack(self.split(stack)), torch.stack(members))
            assert all(own.keys() == state.keys() for own in states)
            for key, value in state.items():
                expected = [own[key] for own in states]
                if key == "step":
                    assert all(torch.equal(value, count) for count in expected)
                else:
                    assert value.shape[: self.batch_axes] == stack.shape[: self.batch_axes]
                    assert value.dtype == expected[0].dtype
                    assert torch.equal(torch.stack(self.split(value)), torch.stack(expected)), key
