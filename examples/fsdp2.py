"""FSDP2: each rank has a part of every parameter, and one of them the factors of each matrix.

python examples/fsdp2.py                               two processes of this machine's CPU
torchrun --nproc-per-node 8 examples/fsdp2.py FOLDER    FOLDER takes checkpoints, of all nodes
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rootfree_fused import RootFreeShampoo

STEPS = 20


def build(device: str) -> tuple[nn.Module, RootFreeShampoo]:
    """The model first, sharded layer by layer, then the optimizer of its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, RootFreeShampoo(model.parameters(), lr=5e-3)


def train(model: nn.Module, optimizer: RootFreeShampoo, device: str, steps: range) -> list[float]:
    """Each rank on samples of its own; the loss of each step, mean over the ranks."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(16, 32, generator=generator).to(device)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def run(folder: str) -> tuple[list[float], list[float]]:
    """Train at once, and again from a checkpoint that is made half way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    model, optimizer = build(device)
    losses = train(model, optimizer, device, range(STEPS // 2))
    # All ranks call it: each has a part of the state.
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    losses += train(model, optimizer, device, range(STEPS // 2, STEPS))

    model, optimizer = build(device)  # of as many ranks, or of others
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
    )
    resumed = train(model, optimizer, device, range(STEPS // 2, STEPS))
    dist.destroy_process_group()
    return losses, resumed


def _rank(rank: int, world: int, port: int, folder: str, results: object) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = run(folder)
    if rank == 0:
        results.put(found)


def main(world: int = 2) -> tuple[list[float], list[float]]:
    """Two processes on this machine; the losses of the first, at once and resumed."""
    import socket

    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(_rank, (world, port, folder, results), nprocs=world)
        return results.get()


if __name__ == "__main__":
    by_torchrun = "RANK" in os.environ
    if by_torchrun != (len(sys.argv) == 2):
        sys.exit(__doc__)
    at_once, resumed = run(sys.argv[1]) if by_torchrun else main()
    if os.environ.get("RANK", "0") == "0":
        print("loss of each step:", *(f"{loss:.3f}" for loss in at_once))
        print("resumed half way: ", *(f"{loss:.3f}" for loss in resumed))
