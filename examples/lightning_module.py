"""Lightning: a callback counts what the network is called with by training_step.

pip install lightning && python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rootfree_fused import RootFreeAdamW
from rootfree_fused.integrations.lightning import BatchSizeCallback


class Classifier(lightning.LightningModule):
    """A small network and its training, with the batch sizes and the losses seen."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.batch_sizes: list[float] = []
        self.losses: list[float] = []

    def configure_optimizers(self):
        """The batch size is overwritten before the first step."""
        return RootFreeAdamW(self.network.parameters(), batch_size="counted")

    def training_step(self, batch, batch_idx):
        """The mean loss of a micro-batch; Lightning divides it by accumulate_grad_batches."""
        x, labels = batch
        return nn.functional.cross_entropy(self.network(x), labels)

    def validation_step(self, batch, batch_idx):
        """Does not count."""
        x, labels = batch
        loss = nn.functional.cross_entropy(self.network(x), labels)
        self.log("val_loss", loss)
        if not self.trainer.sanity_checking:
            self.losses.append(loss.item())

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        """Keep the batch size that the step was taken with."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.batch_sizes.append(optimizer.param_groups[0]["batch_size"])


def main() -> tuple[list[float], list[float]]:
    """Train for ten epochs of 2 x 16 + 2 x 16 + 4 samples.

    Returns the batch size of each step and the loss after each epoch.
    """
    torch.manual_seed(0)
    x = torch.randn(68, 8)
    data = TensorDataset(x, x[:, :3].argmax(1))
    module = Classifier()
    lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=10,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[BatchSizeCallback("network")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(data, batch_size=16), DataLoader(data, batch_size=68))
    return module.batch_sizes, module.losses


if __name__ == "__main__":
    for name, values in zip(("batch sizes:", "loss after each epoch:"), main(), strict=True):
        print(name, *(f"{value:.3g}" for value in values))
