"""Axes that are seen as one: the steps are those of a parameter that has one axis there."""

from __future__ import annotations

import io
import re

import pytest
import torch
from helpers.optimizers import set_grads
from helpers.stacks import CLASSES, SETTINGS

from rootfree_fused import RootFreeShampoo

by_name = pytest.mark.parametrize("name", CLASSES)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "sets", "merged"),
    [
        ((4, 3, 3, 2), ((0, 1), (2, 3)), (12, 6)),
        ((4, 3, 2), ((0, 1), (2,)), (12, 2)),
        ((8, 5), ((0, 1),), (40,)),
        ((4, 3, 2), ((0, 1, 2),), (24,)),
    ],
)
@by_name
def test_steps_are_those_of_a_parameter_of_fewer_axes(
    name, shape, sets, merged, factor_dtype, device
):
    """To the bit, whatever the strides, also where a vector is what remains."""
    param = torch.nn.Parameter(torch.randn(shape, device=device))
    twin = torch.nn.Parameter(param.detach().clone().view(merged))
    param.data = param.detach().mT.contiguous().mT
    settings = {**SETTINGS[name], "factor_dtype": factor_dtype}
    optimizer = CLASSES[name]([param], merge_axes=sets, **settings)
    other = CLASSES[name]([twin], **settings)
    for step in range(4):
        set_grads([param], step)
        twin.grad = param.grad.reshape(merged)
        optimizer.step()
        other.step()
        if step == 1:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = CLASSES[name]([param], **settings)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            assert optimizer.param_groups[0]["merge_axes"] == sets
    assert torch.equal(param.reshape(merged), twin)
    for key, value in other.state[twin].items():
        assert torch.equal(optimizer.state[param][key].reshape(value.shape), value), key


def test_rootfree_shampoo_sees_matrices():
    param = torch.nn.Parameter(torch.ones(4, 3, 2))
    message = (
        "shape (4, 3, 2) the axes (4, 3, 2); RootFreeShampoo sees matrices: pass True, or merge"
    )
    for sets in (False, ((0,), (1,), (2,))):
        with pytest.raises(ValueError, match=re.escape(message)):
            RootFreeShampoo([param], merge_axes=sets)
