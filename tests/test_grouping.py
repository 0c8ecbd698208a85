"""param_groups: each parameter once, in a group that its module and shape call for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeShampoo, param_groups


class Conv1D(nn.Module):
    """As of transformers: known by its name, its weight is (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.up = Conv1D(4, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 4)
        self.kept = nn.Linear(4, 4, bias=False)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = nn.Linear(4, 12, bias=False)
        self.head.weight = self.table.weight

    def no_weight_decay(self):
        return {"kept.weight"}

    def forward(self, x):
        x = self.down(self.norm(self.up(self.table(x) + self.token[0])))
        return self.head(self.kept(x))


VECTORS = ["token", "norm.weight", "norm.bias", "down.bias"]


def chosen(groups):
    """Of each group what it is: its parameters' names and its settings."""
    return [
        ([name for name, _ in group["params"]], {k: v for k, v in group.items() if k != "params"})
        for group in groups
    ]


def test_what_each_parameter_gets():
    groups = param_groups(Model(), 0.1)
    assert chosen(groups) == [
        (VECTORS, {"weight_decay": 0.0}),
        (["table.weight"], {"weight_decay": 0.1}),
        (["up.weight"], {"weight_decay": 0.1, "update_rms": 0.6, "row_beta": None}),
        (["down.weight"], {"weight_decay": 0.1}),
        (["kept.weight"], {"weight_decay": 0.0}),
    ]
    RootFreeShampoo(groups)  # which names them in place
    assert str(groups).splitlines() == [
        "4 vectors, 24 entries: weight_decay 0 (token, norm.weight, norm.bias, 1 more)",
        "1 tables, 48 entries: weight_decay 0.1 (table.weight)",
        "1 matrices of (inputs, outputs), 32 entries: weight_decay 0.1, update_rms 0.6, "
        "row_beta None (up.weight)",
        "1 matrices, 32 entries: weight_decay 0.1 (down.weight)",
        "1 matrices, 16 entries: weight_decay 0 (kept.weight)",
    ]


def test_tables_as_vectors():
    for optimizer_class in (RootFreeShampoo, IFShampoo):
        groups = param_groups(Model(), optimizer_class=optimizer_class, tables="vector")
        settings = {"weight_decay": 0.0, "merge_axes": ((0, 1),)}
        assert chosen(groups)[1] == (["table.weight"], settings)


def test_other_classes_have_no_setting_for_how_a_weight_is_stored():
    for optimizer_class in (IFShampoo, RootFreeAdamW):
        for _, settings in chosen(param_groups(Model(), optimizer_class=optimizer_class)):
            assert settings.keys() == {"weight_decay"}


def test_a_transposed_convolution_is_stored_inputs_first_too():
    (group, *_) = param_groups(nn.ConvTranspose2d(4, 2, 3), update_rms=0.1)
    assert group["update_rms"] == pytest.approx(0.1 * 2 * 9 / 4)


@pytest.mark.parametrize("tables", ["matrix", "vector"])
def test_an_optimizer_trains_on_them(tables):
    torch.manual_seed(0)
    model = Model()
    optimizer = RootFreeShampoo(param_groups(model, 0.1, tables=tables), lr=2e-2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 8
    x = torch.arange(12)
    losses = []
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(x), (x + 1) % 12)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "error", "cure"),
    [
        ((list(Model().parameters()),), TypeError, "pass a torch.nn.Module"),
        ((Model(), 0.1, {"tables": "rows"}), ValueError, "pass 'matrix' or 'vector'"),
        (
            (Model(), 0.1, {"tables": "vector", "optimizer_class": RootFreeAdamW}),
            ValueError,
            "leave tables out",
        ),
    ],
)
def test_bad_input(arguments, error, cure):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=cure):
        param_groups(*positional, **keywords)
