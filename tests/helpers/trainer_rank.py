"""Two processes that train by the Trainer and by accelerate; the first prints batch sizes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

from rootfree_fused import RootFreeAdamW
from rootfree_fused.integrations.accelerate import prepare
from rootfree_fused.integrations.huggingface import RootFreeTrainer


class Model(nn.Module):
    """Divides a sum by the Trainer's number, which it keeps."""

    accepts_loss_kwargs = True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.divisors = []

    def forward(self, x, labels, num_items_in_batch):
        self.divisors.append(int(num_items_in_batch))
        loss = nn.functional.cross_entropy(self.linear(x), labels, reduction="sum")
        return {"loss": loss / num_items_in_batch}


class Trainer(RootFreeTrainer):
    batch_sizes = ()

    def training_step(self, *args):
        """Keep the batch size of the step before."""
        loss = super().training_step(*args)
        self.batch_sizes += (self.optimizer.param_groups[0]["batch_size"],)
        return loss


def by_the_trainer():
    labels = [i % 2 if i % 3 else -100 for i in range(24)]
    samples = [{"x": torch.randn(3), "labels": torch.tensor(label)} for label in labels]
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=samples,
            optimizer_cls_and_kwargs=(RootFreeAdamW, {}),
        )
        trainer.train()
    last = trainer.optimizer.param_groups[0]["batch_size"]
    return model.divisors[::2], [*trainer.batch_sizes[2::2], last]


def by_accelerate(*, ddp):
    """Without DDP as under FSDP2: no wrapper that knows its ranks."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if not ddp:
        accelerator.prepare_model = lambda model, **_: model
    model = nn.Linear(3, 2)
    loader = DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=4)
    optimizer = RootFreeAdamW(model.parameters(), batch_size=1)
    model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    found = []
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            found.append(optimizer.param_groups[0]["batch_size"])
    return found


def run(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    with contextlib.redirect_stdout(sys.stderr):
        divisors, of_trainer = by_the_trainer()
        of_accelerate = [by_accelerate(ddp=True), by_accelerate(ddp=False)]
    if rank == 0:
        found = {"divisors": divisors, "trainer": of_trainer, "accelerate": of_accelerate}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def main():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.set_num_threads(1)
    # Forked, so that the trainers are imported once.
    torch.multiprocessing.start_processes(run, (port,), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
