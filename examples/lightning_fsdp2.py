"""Lightning's ModelParallelStrategy shards by FSDP2; ranks share the matrices' work.

python examples/lightning_fsdp2.py    two processes of this machine's CPU
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from rootfree_fused import RootFreeShampoo

RANKS = 2


class Classifier(lightning.LightningModule):
    """An MLP on made-up data."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.model[0], self.model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, labels = batch
        loss = nn.functional.cross_entropy(self.model(x), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> RootFreeShampoo:
        return RootFreeShampoo(self.parameters(), lr=5e-3)


def main() -> list[float]:
    """Train for ten epochs of four batches a rank; the loss of each on this rank."""
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(128, 8)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)
    # Both sizes: Lightning's own choice is tensor parallelism over the devices of a node.
    strategy = ModelParallelStrategy(
        data_parallel_size=RANKS, tensor_parallel_size=1, process_group_backend="gloo"
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, data)
    assert sum(p.to_local().numel() < p.numel() for p in module.parameters()) == 4
    return module.losses


if __name__ == "__main__":
    losses = main()
    if torch.distributed.get_rank() == 0:
        print("losses:", *(f"{loss:.3f}" for loss in losses))
