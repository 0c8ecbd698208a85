"""A pool of processes that are the ranks of a gloo group, and stay for many cases."""

from __future__ import annotations

import importlib
import multiprocessing
import traceback

import torch
import torch.distributed as dist

CASES = (
    "helpers.rank_cases",
    "helpers.format_cases",
    "helpers.shared_cases",
    "helpers.shared_faults",
    "helpers.row_cases",
    "helpers.shared_formats",
    "helpers.micro_rank_cases",
)
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "rootfree_fused",
]
TIMEOUT = 60.0  # seconds for a case, beyond which a rank hangs
START = 300.0  # for what ranks import, on a machine that does other things


class Ranks:
    """`run` has every rank call a function of CASES with the same arguments."""

    def __init__(self, world, folder):
        # One process imports for all of them; what it has imported no fork changes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = rank, world, str(folder / "store"), theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(START):
                self.close()
                raise TimeoutError(f"rank {rank} has not started")
            pipe.recv()

    def run(self, case, *arguments, dead=()):
        """What each rank returned that is not to end in it; what one raised is raised."""
        for pipe in self._pipes:
            pipe.send((case, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if rank in dead:
                self._processes[rank].join(TIMEOUT)
                continue
            if not pipe.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} has not ended {case}{arguments}")
            answers.append(pipe.recv())
        faults = [f"rank {i}:\n{fault}" for i, (_, fault) in enumerate(answers) if fault]
        assert not faults, "\n".join(faults)
        return [value for value, _ in answers]

    def close(self):
        for process in self._processes:
            process.kill()


def _serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    modules = list(map(importlib.import_module, CASES))
    pipe.send("started")
    while True:
        case, arguments = pipe.recv()
        try:
            of = next(module for module in modules if hasattr(module, case))
            answer = getattr(of, case)(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)
