"""A rank of torchtitan's own Trainer on a CPU: torchrun torchtitan_rank.py FOLDER CLASS.

It trains, and again from a checkpoint; the first rank prints what it found.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

STEPS = 4


def put_a_cpu_in_its_place():
    """What torchtitan 0.3.0 asks of a device and of a torch that torch.cpu, or 2.13, has not."""
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu = torch.cpu
    cpu.current_device = lambda: 0  # torch's own is "cpu", which barrier(device_ids=) refuses
    cpu.get_device_name = lambda device=None: "cpu"
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=1)
    cpu.memory_stats = lambda device=None: {}
    cpu.reset_peak_memory_stats = cpu.empty_cache = lambda: None
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout


def sum_gradients(model):
    """gloo has no PREMUL_SUM, by which FSDP2 multiplies gradients with torchtitan's factor of 1."""
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)


def write_assets(folder):
    """A tokenizer of bytes, and documents of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    (folder / "data").mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    words = ["root", "free", "optimizers", "step", "whole", "matrices", "by", "factors", "of"]
    chosen = torch.randint(len(words), (60, 20), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"text": " ".join(words[i] for i in line)}) for line in chosen.tolist()]
    (folder / "data" / "data.json").write_text("\n".join(lines))


def config_of(folder, name):
    """torchtitan's debug model with what a CPU cannot do taken out of it."""
    from torchtitan.components.optimizer import ParamGroupConfig
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from rootfree_fused.integrations.torchtitan import RootFreeOptimizersContainer

    config = llama3_debugmodel()
    del config.model_spec.model.layers[1:]
    for layer in config.model_spec.model.layers:  # FlexAttention has no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.parallelism.spmd_backend = "partial_dtensor"  # "spmd_types" wants a later torch
    config.hf_assets_path, config.dump_folder = str(folder), str(folder)
    config.dataloader.dataset_path = str(folder / "data")
    config.training.seq_len, config.training.local_batch_size = 32, 2
    config.training.global_batch_size = 8
    config.training.steps = STEPS
    config.checkpoint.enable, config.checkpoint.interval = True, 2
    config.debug.seed = 0
    settings = {"lr": 5e-3} | ({} if name == "RootFreeShampoo" else {"batch_size": 8 * 32})
    chosen = [
        ("tok_embeddings", "AdamW", {"lr": 1e-3}),
        ("norm|bias", name, settings),
        (".*", name, {**settings, "weight_decay": 0.1}),
    ]
    config.optimizer = RootFreeOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name=of, optimizer_kwargs=kwargs)
            for pattern, of, kwargs in chosen
        ]
    )
    return config


def train(folder, name):
    """Losses, the tensors of parts and state of this rank, and its optimizers."""
    trainer = config_of(folder, name).build()
    sum_gradients(trainer.model_parts[0])
    losses = []
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(loss)
    trainer.train()
    found = {**trainer.model_parts[0].state_dict(), **trainer.optimizers.state_dict()}
    tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
    own = {k: getattr(v, "_local_tensor", v).clone() for k, v in tensors.items()}
    optimizers = [type(optimizer).__name__ for optimizer in trainer.optimizers]
    trainer.close()
    return losses, own, optimizers


def main(folder, name):
    torch.set_num_threads(1)
    put_a_cpu_in_its_place()
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        write_assets(folder)
    dist.barrier()
    losses, once, optimizers = train(folder, name)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "checkpoint" / f"step-{STEPS}")
    dist.barrier()
    later, twice, _ = train(folder, name)
    equal = once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    resumed = [None] * dist.get_world_size()
    dist.all_gather_object(resumed, equal)
    if dist.get_rank() == 0:
        found = {"losses": losses, "later": later, "optimizers": optimizers, "resumed": resumed}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), sys.argv[2])
