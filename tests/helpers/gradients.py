"""Sequences of gradients that an optimizer has to survive, as hypothesis draws them."""

from __future__ import annotations

import hypothesis
import torch
from hypothesis import strategies as st

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def deterministic(examples):
    """The same examples every day."""
    return hypothesis.settings(
        derandomize=True, database=None, deadline=None, max_examples=examples
    )


def _normal(rows, columns, t, seed):
    generator = torch.Generator().manual_seed(1000 * seed + t)
    return torch.randn(rows, columns, generator=generator, dtype=F64)


def _ill_conditioned(g, t):
    """Rows from 1 to 1e-12, in two bases that stay."""
    u, v = (torch.linalg.qr(_normal(d, d, 0, seed=99)).Q for d in g.shape)
    spread = torch.logspace(0, -12, len(g), dtype=F64)[:, None]
    return u @ (spread * g) @ v


def _one_entry(g, t):
    spike = torch.zeros_like(g)
    spike.view(-1)[7 * t % g.numel()] = 1e12
    return 1e-6 * g + spike


# What becomes of a normal matrix at step t.
KINDS = {
    "normal": lambda g, t: g,
    "rank one": lambda g, t: g[:, :1] * g[:1],
    "the same rank one": lambda g, t: torch.ones_like(g),
    "one row": lambda g, t: g * (torch.arange(len(g)) == t % len(g))[:, None],
    "one column": lambda g, t: g * (torch.arange(g.shape[1]) == t % g.shape[1]),
    "ill-conditioned": _ill_conditioned,
    "one huge entry": _one_entry,
    "zero": lambda g, t: torch.zeros_like(g),
}
_SPELLS = st.tuples(
    st.sampled_from(list(KINDS)),
    st.integers(1, 12),  # steps
    st.integers(-30, 18),  # decimal exponents of the first and the last step's scale
    st.integers(-30, 18),
)
SHAPES = [(9, 6), (5, 8), (17, 3), (2, 2)]
SEQUENCES = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "seed": st.integers(0, 999),
        "spells": st.lists(_SPELLS, min_size=1, max_size=6),
    }
)
# What is certain to be tried.
CERTAIN = [
    {"shape": (9, 6), "seed": 1, "spells": [("normal", 12, -30, 18), ("normal", 12, 18, -30)]},
    {"shape": (9, 6), "seed": 2, "spells": [("zero", 12, 0, 0)] * 4 + [("rank one", 12, -30, -30)]},
    {
        "shape": (17, 3),
        "seed": 3,
        "spells": [("one row", 12, 0, 0), ("the same rank one", 12, 9, 9)],
    },
    {"shape": (9, 6), "seed": 4, "spells": [("ill-conditioned", 12, 0, 0)] * 5},
    {
        "shape": (5, 8),
        "seed": 5,
        "spells": [("one huge entry", 12, 0, 0), ("normal", 12, -20, -20)],
    },
    # What was never seen for long has a large K K^T: the next step must not follow all of E.
    {
        "shape": (17, 3),
        "seed": 6,
        "spells": [("the same rank one", 80, 0, 0), ("rank one", 8, 0, 0)],
    },
]


def certainly(**others):
    """Tries each certain sequence, with these other arguments, before those that are drawn."""

    def with_examples(test):
        for sequence in CERTAIN:
            test = hypothesis.example(sequence=sequence, **others)(test)
        return test

    return with_examples


def gradients_of(sequence, dtype=F32):
    """The gradients of a drawn sequence, in float32's or bfloat16's range and bits."""
    rows, columns = sequence["shape"]
    t = 0
    for kind, steps, first, last in sequence["spells"]:
        for n in range(steps):
            exponent = first + (last - first) * n / max(steps - 1, 1)
            g = KINDS[kind](_normal(rows, columns, t, sequence["seed"]), t)
            yield (g * 10.0**exponent).clamp(-3e38, 3e38).to(dtype)
            t += 1
