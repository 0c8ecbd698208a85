"""Two processes that train by the Trainer and by accelerate; the first prints batch sizes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.fsdp2_rank import allow_fsdp2_on_a_cpu, whole

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


def by_the_trainer(folder, *, resume=None, **settings):
    """The divisors and batch sizes of its steps, and its model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    labels = [i % 2 if i % 3 else -100 for i in range(24)]
    samples = [{"x": torch.randn(3), "labels": torch.tensor(label)} for label in labels]
    model = Model()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=samples,
        optimizer_cls_and_kwargs=(RootFreeAdamW, {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    last = trainer.optimizer.param_groups[0]["batch_size"]
    return model.divisors[::2], [*trainer.batch_sizes[2::2], last], trainer.model


def by_the_trainer_with_fsdp2(folder, expected):
    """Batch sizes, how far from the weights of DDP, and whether a checkpoint goes on to the bit."""
    fsdp2 = {
        "fsdp": True,
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Linear"]},
    }
    _, batch_sizes, model = by_the_trainer(folder, **fsdp2)
    weights = whole(model)
    _, _, model = by_the_trainer(folder, resume=f"{folder}/checkpoint-2", **fsdp2)
    resumed = whole(model)
    off = max((weights[key] - value).abs().max().item() for key, value in expected.items())
    return {
        "batch sizes": batch_sizes,
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "off": off,
        "resumed": all(torch.equal(weights[key], resumed[key]) for key in weights),
    }


def by_accelerate(*, ddp):
    """Without DDP as under FSDP2: no wrapper that knows its ranks."""
    AcceleratorState._reset_state(reset_partial_state=True)
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


def run(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    with contextlib.redirect_stdout(sys.stderr):
        divisors, of_trainer, model = by_the_trainer(f"{folder}/ddp")
        of_accelerate = [by_accelerate(ddp=True), by_accelerate(ddp=False)]
        allow_fsdp2_on_a_cpu()
        of_fsdp2 = by_the_trainer_with_fsdp2(f"{folder}/fsdp2", whole(model))
    if rank == 0:
        found = {"divisors": divisors, "trainer": of_trainer, "accelerate": of_accelerate}
        sys.stdout.write(json.dumps(found | {"fsdp2": of_fsdp2}) + "\n")
        sys.stdout.flush()
    torch.distributed.destroy_process_group()


def main():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that the trainers are imported once.
        torch.multiprocessing.start_processes(run, (port, folder), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
