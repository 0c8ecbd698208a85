"""Two processes that train by accelerate with FSDP2, and one; the first prints what differs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.distributed.tensor import DTensor

from rootfree_fused import RootFreeAdamW, RootFreeShampoo
from rootfree_fused.integrations.accelerate import prepare

MICRO_BATCHES = 2
SETTINGS = {
    RootFreeShampoo: {"factor_dtype": torch.float64},
    RootFreeAdamW: {"batch_size": "counted"},
}


def allow_fsdp2_on_a_cpu():
    """accelerate takes its plugin on any device but a CPU; there is nothing else against it."""
    init = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin


def whole(model):
    """The weights, of all ranks' parts."""
    state = model.state_dict()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in state.items()}


def build(optimizer_class, *, ranks, seed=0):
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = None
    if ranks > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
        )
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO_BATCHES, fsdp_plugin=plugin
    )
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 5)).double()
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1]},
    ]
    optimizer = optimizer_class(groups, lr=1e-2, **SETTINGS[optimizer_class])
    return accelerator, *prepare(accelerator, model, optimizer)


def train(accelerator, model, optimizer, steps):
    """The losses of steps on batches of 16, of which each rank takes a part; and batch sizes."""
    ranks, losses, sizes = accelerator.num_processes, [], []
    for step in steps:
        for micro in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(MICRO_BATCHES * step + micro)
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            x = x.chunk(ranks)[accelerator.process_index]
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        sizes.append(optimizer.param_groups[0].get("batch_size"))
    return losses, sizes


def of_one(optimizer_class):
    accelerator, model, optimizer = build(optimizer_class, ranks=1)
    return *train(accelerator, model, optimizer, range(6)), whole(model)


def of_two(optimizer_class, one, folder):
    """What ranks found beside what one process did, and after a checkpoint."""
    accelerator, model, optimizer = build(optimizer_class, ranks=2)
    losses, sizes = train(accelerator, model, optimizer, range(3))
    accelerator.save_state(folder)
    later = train(accelerator, model, optimizer, range(3, 6))[0]
    weights = whole(model)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())

    accelerator, model, optimizer = build(optimizer_class, ranks=2, seed=1)
    accelerator.load_state(folder)
    again = train(accelerator, model, optimizer, range(3, 6))[0]
    resumed = whole(model)
    one_losses, one_sizes, one_weights = one
    off = [abs(a - b) for a, b in zip(losses + later, one_losses, strict=True)]
    off += [(weights[key] - one_weights[key]).abs().max().item() for key in one_weights]
    return {
        "sharded": sharded,
        "batch sizes": [sizes, one_sizes[:3]],
        "off": max(off),
        "resumed": later == again and all(torch.equal(weights[k], resumed[k]) for k in weights),
    }


def run(rank, port, folder, ones):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    allow_fsdp2_on_a_cpu()
    with contextlib.redirect_stdout(sys.stderr):
        found = {
            chosen.__name__: of_two(chosen, ones[chosen], os.path.join(folder, chosen.__name__))
            for chosen in SETTINGS
        }
    if rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


def main():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.set_num_threads(1)
    ones = {chosen: of_one(chosen) for chosen in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        # Forked, so that accelerate is imported once.
        arguments = port, folder, ones
        torch.multiprocessing.start_processes(run, arguments, nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
