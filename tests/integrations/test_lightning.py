"""Lightning's callback counts, and lets go of the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rootfree_fused import RootFreeAdamW, RootFreeShampoo, Sign

lightning = pytest.importorskip("lightning")
from rootfree_fused.integrations.lightning import BatchSizeCallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, build):
        super().__init__()
        self.network = nn.Linear(3, 2)
        self.build = build
        self.batch_sizes = []

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        return self.build(self.parameters())

    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.batch_sizes.append(optimizer.param_groups[0].get("batch_size"))


def fit(module, *callbacks, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(11, 3)), batch_size=4))
    return module.batch_sizes


def diagonal(params):
    return RootFreeAdamW(params, batch_size="counted")


def of_micro_batches(params):
    return RootFreeAdamW(params, batch_size="counted", second_moment="variance")


def two(params):
    return [diagonal([param]) for param in params]


@pytest.mark.parametrize("name", ["", "network"])
def test_batches_are_counted_and_the_module_let_go(name):
    module = Module(diagonal)
    assert fit(module, BatchSizeCallback(name), accumulate_grad_batches=2) == [8, 3]
    assert not module._forward_hooks
    assert not module.network._forward_hooks


def test_after_an_error_it_is_let_go_too():
    module = Module(diagonal)
    module.training_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(module, BatchSizeCallback())
    assert not module._forward_hooks


@pytest.mark.parametrize("optimizer_class", [RootFreeShampoo, Sign])
def test_without_a_batch_size_nothing_is_counted(optimizer_class):
    assert fit(Module(optimizer_class), BatchSizeCallback()) == [None] * 3


@pytest.mark.parametrize(
    ("build", "name", "error", "cure"),
    [
        (diagonal, "net", ValueError, "no module 'net'.*calls: network"),
        (of_micro_batches, "", ValueError, "Lightning adds them up in .grad; leave second_moment"),
        (torch.optim.AdamW, "", TypeError, "a AdamW; return one of rootfree_fused"),
        (two, "", ValueError, "2 optimizers.*in configure_optimizers"),
    ],
)
def test_what_it_cannot_count_is_refused_before_a_step(build, name, error, cure):
    module = Module(build)
    module.automatic_optimization = build is not two
    before = module.network.weight.detach().clone()
    with pytest.raises(error, match=cure):
        fit(module, BatchSizeCallback(name))
    assert torch.equal(module.network.weight, before)


def test_a_module_that_is_not_called_is_an_error_at_the_first_step():
    module = Module(diagonal)
    module.forward = lambda x: nn.functional.linear(x, module.network.weight)
    before = module.network.weight.detach().clone()
    with pytest.raises(RuntimeError, match="attach the counter to the module that is called"):
        fit(module, BatchSizeCallback("network"))
    assert torch.equal(module.network.weight, before)
