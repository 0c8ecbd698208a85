"""The diagonal operators where no kernel is: each tensor takes the specification's step."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from helpers.operators import ADAMW, RMSPROP, SIGN, VECTOR_ADAM, VECTOR_ROOTFREE, for_operators

from rootfree_fused import reference
from rootfree_fused.ops import by_reference
from rootfree_fused.ops.methods import METHODS

SHAPES = ((3,), (2, 5), (4,))
STEPS = torch.tensor([1.0, 7.0, 100.0])
LR = torch.tensor(0.1, dtype=torch.float64)
CASES = {
    "rmsprop_": (RMSPROP, 2),
    "rmsprop_, without momentum": ({**RMSPROP, "momentum": 0.0}, 1),
    "adamw_": (ADAMW, 2),
    "adamw_, without correction": (ADAMW, 2),
    "sign_": (SIGN, 1),
    "vector_adam_": (VECTOR_ADAM, 2),
    "vector_rootfree_": (VECTOR_ROOTFREE, 2),
}


def drawn(case):
    """Parameters, gradients and state, and what the operator takes between them and lr."""
    scalars, states = CASES[case]
    torch.manual_seed(0)
    lists = [
        [torch.rand(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(2 + states)
    ]
    empty = [[]] if case.startswith("rmsprop") and states == 1 else []
    if case.startswith("rmsprop"):
        return scalars, lists, empty
    if case == "sign_":
        return scalars, lists, []
    return scalars, lists, [None if case == "adamw_, without correction" else STEPS]


def call(case, lists, between, scalars, **scaling):
    operator = by_reference.diagonal(METHODS[case.partition(",")[0]])
    operator(*lists, *between, LR, **for_operators(scalars), **scaling)


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_takes_the_step_of_the_specification(case, scale):
    scalars, lists, between = drawn(case)
    wanted = [[tensor.clone() for tensor in tensors] for tensors in lists]
    for i, (param, grad, *state) in enumerate(zip(*wanted, strict=True)):
        if case.startswith(("adamw", "vector")):
            state.append(None if between[-1] is None else STEPS[i])
        elif case.startswith("rmsprop") and len(state) == 1:
            state.append(None)
        specification = getattr(reference, case.partition(",")[0])
        own = {k: scalars[k] for k in scalars.keys() & signature(specification).parameters.keys()}
        specification(param, grad, *state, lr=0.1, **own)
    if scale is not None:
        lists[1] = [grad * scale for grad in lists[1]]
    call(case, lists, between, scalars, grad_scale=scale and torch.tensor(scale))
    for found, tensors in zip([lists[0], *lists[2:]], [wanted[0], *wanted[2:]], strict=True):
        for tensor, right in zip(found, tensors, strict=True):
            torch.testing.assert_close(tensor, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_where_there_were_infs_nothing_changes(case):
    scalars, lists, between = drawn(case)
    before = [[tensor.clone() for tensor in tensors] for tensors in lists]
    call(case, lists, between, scalars, found_inf=torch.ones(()))
    for tensors, olds in zip(lists, before, strict=True):
        assert all(map(torch.equal, tensors, olds))
