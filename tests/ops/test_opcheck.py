"""`torch.library.opcheck` of the operators on other lists than parameters in one plain format.

The others' stand with their tests: test_operators.py, test_rootfree_shampoo.py, test_accumulate.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.lowbit import BF16, E5M3, F32, S8, Problem
from helpers.operators import ADAMW, RMSPROP, SIGN, VECTOR_ADAM, VECTOR_ROOTFREE

SHAPES = [(5,), (3, 100)]
IFSHAMPOO = {
    "axes": [2],
    "factor_lr": 0.3,
    "factor_momentum": 0.4,
    "damping": 1e-2,
    "batch_size": 3.0,
    "momentum": 0.8,
    "weight_decay": 0.05,
    "decoupled": True,
    "maximize": False,
}
DIAGONAL = {
    "lowbit_rmsprop_": (RMSPROP, (S8, E5M3)),
    "lowbit_adamw_": (ADAMW, (S8, E5M3)),
    "lowbit_sign_": (SIGN, (S8,)),
    "lowbit_vector_adam_": (VECTOR_ADAM, (S8, E5M3)),
    "lowbit_vector_rootfree_": (VECTOR_ROOTFREE, (S8, E5M3)),
}


def lowbit(name, weight, states=None):
    """The arguments of an operator on lists in fewer bytes."""
    scalars, eight_bits = DIAGONAL[name]
    states = eight_bits if states is None else len(eight_bits) * (states,)
    given = []
    problem = Problem(name, SHAPES, weight, states, scalars=scalars)
    problem._call(lambda *args, **kwargs: given.append((args, kwargs)))
    return given[0]


def ifshampoo(dtype, *, momentum=0.8, update=True):
    """Two matrices of one bucket."""
    params, grads, buffers = ([torch.randn(6, 4) for _ in range(2)] for _ in range(3))
    factors = [torch.eye(d).repeat(2, 1, 1).to(dtype) for d in (6, 4)]
    residuals = [f.new_zeros(f.shape if dtype == BF16 else 0, dtype=torch.int16) for f in factors]
    momenta, products = ([torch.zeros_like(f) for f in factors] for _ in range(2))
    lists = params, grads, factors, residuals, momenta, products, buffers if momentum else []
    switches = {"update_factors": update, "refresh_products": True}
    lr = torch.tensor(0.1, dtype=torch.float64)
    return (*lists, lr), IFSHAMPOO | switches | {"momentum": momentum}


def stored(dtype, beside):
    """Values, where they are kept, and what lies beside them."""
    values = [torch.randn(shape) for shape in SHAPES]
    kept = [torch.zeros(v.shape, dtype=dtype) for v in values]
    if beside is None:
        return values, kept, []
    shapes = [v.shape if dtype == BF16 else (-(-v.numel() // 256),) for v in values]
    return values, kept, [torch.zeros(shape, dtype=beside) for shape in shapes]


def pack(dtype, beside):
    values, kept, others = stored(dtype, beside)
    rounding = {"seeds": [7, 0], "firsts": [0, 100], "stream": 2}
    return (kept, others, values, torch.tensor([1.0, 2.0])), rounding


def unpack(dtype, beside):
    return stored(dtype, beside), {}


CALLS = {
    **{
        f"{name} {weight}": partial(lowbit, name, weight)
        for name in DIAGONAL
        for weight in ("bfloat16 + 8", "bfloat16 stochastic")
    },
    **{f"{name} of float32": partial(lowbit, name, "float32", F32) for name in DIAGONAL},
    "ifshampoo_": partial(ifshampoo, F32),
    "ifshampoo_ bfloat16": partial(ifshampoo, BF16),
    "ifshampoo_ without momentum": partial(ifshampoo, F32, momentum=0.0),
    "ifshampoo_ between": partial(ifshampoo, F32, update=False),
    "pack_ bfloat16": partial(pack, BF16, torch.int8),
    "pack_ stochastic": partial(pack, BF16, None),
    "pack_ codes": partial(pack, S8, F32),
    "unpack_ bfloat16": partial(unpack, BF16, torch.int8),
    "unpack_ codes": partial(unpack, E5M3, E5M3),
}
ELSEWHERE = {"rmsprop_", "adamw_", "sign_", "vector_adam_", "vector_rootfree_"} | {
    "rootfree_shampoo_",
    "accumulate_",
}


def on(device, value):
    if isinstance(value, list):
        return [on(device, v) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call, device):
    args, kwargs = CALLS[call]()
    operator = getattr(torch.ops.rootfree_fused, call.split()[0]).default
    torch.library.opcheck(operator, tuple(on(device, list(args))), kwargs)


def test_every_operator_is_checked():
    """But for the private ones, and for what tests of new methods register."""
    names = torch._C._dispatch_get_all_op_names()
    own = {name.removeprefix("rootfree_fused::") for name in names if "rootfree_fused" in name}
    public = {name for name in own if name[0] != "_" and name[-1] == "_" and "adagrad" not in name}
    assert public == {call.split()[0] for call in CALLS} | ELSEWHERE
