"""Lists for one call of an operator on weights and states in formats of fewer bytes."""

from __future__ import annotations

import torch

from rootfree_fused.ops import by_reference, methods
from rootfree_fused.reference import formats

from .operators import for_operators

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
S8, E5M3 = torch.int8, torch.uint8
# Of a weight: dtype, that of its residual, whether it is rounded stochastically.
WEIGHTS = {
    "float32": (F32, None, False),
    "float16": (F16, None, False),
    "bfloat16": (BF16, None, False),
    "bfloat16 stochastic": (BF16, None, True),
    "bfloat16 + 8": (BF16, torch.int8, False),
    "bfloat16 + 16": (BF16, torch.int16, False),
}
# With these and gradients of 8 bits nothing is rounded that a kernel may contract: every product is
# exact, so that all bodies have the same values to encode.
EXACT = {
    "lowbit_rmsprop_": {
        "alpha": 0.5,
        "damping": 0.125,
        "weight_decay": 0.25,
        "momentum": 0.5,
        "decoupled": False,
        "batch_size": 8.0,
        "maximize": False,
    },
    "lowbit_adamw_": {
        "beta1": 0.5,
        "beta2": 0.5,
        "damping": 0.125,
        "weight_decay": 0.25,
        "batch_size": 8.0,
        "maximize": True,
    },
    "lowbit_sign_": {
        "beta": 0.5,
        "weight_decay": 0.25,
        "batch_size": 1.0,
        "sign_last": True,
        "maximize": True,
    },
    "lowbit_vector_adam_": {
        "beta1": 0.0,
        "vector_beta2": 0.0,
        "weight_decay": 0.0,
        "vector_rms": 0.5,
        "batch_size": 1.0,
        "maximize": False,
    },
}
# By how tests call them: the operator, and how many states it is given.
METHODS = {
    "rmsprop": ("lowbit_rmsprop_", 2),
    "rmsprop without buffer": ("lowbit_rmsprop_", 1),
    "adamw": ("lowbit_adamw_", 2),
    "sign": ("lowbit_sign_", 1),
    "vector_adam": ("lowbit_vector_adam_", 2),
}
SHAPES = [(1,), (255,), (256,), (257,), (5, 300)]
FIRSTS = [0, 100, 2**32 - 5, 2**33 + 7, 1]
SEEDS = [7, 0, 2**32 - 1, 12345, 1]


def eight_bits(shape, dtype, generator):
    """Numbers of 8 significant bits over twelve binades."""
    exponent = torch.randint(-6, 6, shape, generator=generator)
    return (torch.randn(shape, generator=generator).bfloat16() * 2.0**exponent).to(dtype)


class Problem:
    """params, grads, states, residuals and scales; `like` is called for each tensor but scales."""

    def __init__(
        self, name, shapes, weight, states, grad=None, scalars=None, lr=0.125, like=torch.clone
    ):
        self.name, self.scalars, self.lr = name, dict(scalars or EXACT[name]), lr
        generator = torch.Generator().manual_seed(1)
        method = methods.METHODS[name.removeprefix("lowbit_")]
        dtype, residual, self.stochastic = WEIGHTS[weight]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        self.grads = [eight_bits(shape, grad or dtype, generator) for shape in shapes]
        self.residuals = []
        if residual is None:
            self.params = [value.to(dtype) for value in values]
        else:
            parts = [formats.split_weight(value, residual) for value in values]
            self.params, self.residuals = map(list, zip(*parts, strict=True))
        self.states, self.scales = [], []
        for k, state in enumerate(states):
            key = list(method.states)[k]
            start = torch.randn if key in ("exp_avg", "momentum_buffer") else torch.rand
            encoded = [
                formats.encoded(start(shape, generator=generator) + 0.01, state) for shape in shapes
            ]
            self.states.append([codes for codes, _ in encoded])
            self.scales.append([scale for _, scale in encoded if scale is not None])
        if len(states) < len(method.states):
            self.states.append([])
            self.scales.append([])
        count = len(shapes)
        self.seeds, self.firsts = (SEEDS * count)[:count], (FIRSTS * count)[:count]
        self.steps = torch.arange(1.0, count + 1)
        for tensors in (self.params, self.grads, self.residuals, *self.states):
            tensors[:] = [like(t) for t in tensors]
        self.counts, self.more = method.counts, {}

    def written(self):
        return [t for ts in (self.params, *self.states, self.residuals, *self.scales) for t in ts]

    def copy(self):
        other = object.__new__(Problem)
        other.__dict__ = dict(self.__dict__)
        for key in ("params", "grads", "residuals"):
            setattr(other, key, [t.clone() for t in getattr(self, key)])
        for key in ("states", "scales"):
            setattr(other, key, [[t.clone() for t in ts] for ts in getattr(self, key)])
        return other

    def _call(self, operator):
        counted = {"bias_correction": "vector" in self.name} if self.counts else {}
        with torch.no_grad():
            operator(
                self.params,
                self.grads,
                *self.states,
                self.residuals,
                *self.scales,
                self.steps,
                torch.tensor(self.lr, dtype=torch.float64),
                seeds=self.seeds,
                firsts=self.firsts,
                stochastic=self.stochastic,
                **counted,
                **self.more,
                **for_operators(self.scalars),
            )
        return self

    def run(self):
        """By the operator, in place."""
        return self._call(getattr(torch.ops.rootfree_fused, self.name))

    def specified(self):
        """By the specification, in place."""
        return self._call(by_reference.lowbit(methods.METHODS[self.name.removeprefix("lowbit_")]))

    def decoded_states(self):
        """Every state in float32, and its stored form."""
        for states, scales in zip(self.states, self.scales, strict=True):
            for i, state in enumerate(states):
                yield formats.decoded(state, scales[i] if scales else None), state


def problem(method, shapes=SHAPES, weight="bfloat16 + 8", states=(S8, E5M3), **options):
    name, count = METHODS[method]
    return Problem(name, shapes, weight, states[:count], **options)


def assert_stored_equal(actual, expected):
    """To the bit, but for which NaN a number that is stored as it is has."""
    for a, e in zip(actual.written(), expected.written(), strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        if a.is_floating_point():
            assert torch.equal(a.isnan(), e.isnan())
            a, e = a.nan_to_num(0, torch.inf, -torch.inf), e.nan_to_num(0, torch.inf, -torch.inf)
            integer = torch.int16 if a.element_size() == 2 else torch.int32
            a, e = a.contiguous().view(integer), e.contiguous().view(integer)
        assert torch.equal(a, e)
