"""Hugging Face accelerate: `accelerator.prepare`, checked first and with the batch size counted."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.optim import Optimizer

from .. import BatchSizeCounter
from ..optimizer.base import RootFreeOptimizer
from ..optimizer.matrix import MatrixOptimizer
from . import has_batch_size, refuse_micro_batches

_FLATTENING = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *others: Any,
    count: Any = None,
) -> tuple[Any, ...]:
    """`accelerator.prepare(model, optimizer, *others)`, whose steps know their batch size.

        model, optimizer, loader = prepare(accelerator, model, optimizer, loader)

    A BatchSizeCounter is attached to what it returns. It counts all micro-batches of
    `accelerator.accumulate(model)`, over all ranks; `accelerator.backward` divides each loss by
    their number, so give it the mean of a micro-batch. RootFreeShampoo counts nothing.

    Args:
        accelerator: on one process or several, with DistributedDataParallel or FSDP2; FSDP1 with
            the diagonal classes alone.
        model: what the loop calls once for every loss.
        optimizer: one of rootfree_fused, not prepared yet.
        others: loaders and schedulers.
        count: as in BatchSizeCounter; a model of tokens needs it.

    Returns:
        What `accelerator.prepare` returns, in the order of the arguments.

    Raises:
        TypeError: another optimizer, or one that was prepared.
        ValueError: DeepSpeed, Megatron-LM; FSDP1 with a Shampoo; with FSDP2 an optimizer that has
            taken steps or gradients, or was loaded; tensor, context or sequence parallelism with a
            batch size; a second moment of micro-batches that are accumulated by the accelerator; an
            unknown `count`. Nothing is prepared then.
    """
    if not isinstance(optimizer, RootFreeOptimizer):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}; pass one of rootfree_fused, before "
            "accelerator.prepare"
        )
    check(accelerator, type(optimizer))
    if accelerator.is_fsdp2:
        _check_new(optimizer)
    if accelerator.gradient_accumulation_steps > 1:
        for group in optimizer.param_groups:
            refuse_micro_batches(group, "accelerator.accumulate")
    if not has_batch_size(type(optimizer)):
        return tuple(accelerator.prepare(model, optimizer, *others))
    BatchSizeCounter(model, optimizer, count=count).remove()  # which refuses an unknown count
    prepared_model, prepared, *rest = accelerator.prepare(model, optimizer, *others)
    ranks = torch.distributed.group.WORLD
    BatchSizeCounter(prepared_model, optimizer, count=count, process_group=ranks)
    return prepared_model, prepared, *rest


def _check_new(optimizer: RootFreeOptimizer) -> None:
    """Raise a ValueError where there is state of parameters that are exchanged for others."""
    # Not by reading the state, which would allocate that of whole parameters.
    stepped = any("step" in state and state["step"] > 0 for state in dict.values(optimizer.state))
    if stepped or optimizer._accumulated.count:
        raise ValueError(
            "the optimizer has taken steps or gradients, or was loaded, and accelerate does not "
            "carry its state to the parameters of FSDP2; prepare it before its first step, and "
            "load by accelerator.load_state"
        )


def check(accelerator: Accelerator, optimizer_class: type[Optimizer]) -> None:
    """Raise a ValueError where the method would be another one, or its batch size unknown."""
    name, kind = optimizer_class.__name__, accelerator.distributed_type
    has_factors = issubclass(optimizer_class, MatrixOptimizer)
    fsdp1 = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if has_factors and (fsdp1 or kind in _FLATTENING):
        raise ValueError(
            f"{name} steps matrices, and {'FSDP1' if fsdp1 else kind.value} flattens parameters; "
            "use FSDP2 (fsdp_version=2), DistributedDataParallel, or RootFreeAdamW"
        )
    if kind in _FLATTENING and has_batch_size(optimizer_class):
        raise ValueError(
            f"the batch size cannot be counted under {kind.value}; give {name} its batch_size "
            "(loss terms of all micro-batches and ranks), and prepare or train without "
            "rootfree_fused.integrations"
        )
    parallelism = accelerator.parallelism_config
    if parallelism is None or not has_batch_size(optimizer_class):
        return
    if parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled:
        raise ValueError(
            f"{name} needs a batch size, and ranks of tensor, context or sequence parallelism "
            "share their batch, so that it cannot be counted over all ranks; attach a "
            "BatchSizeCounter with process_group= the data-parallel ranks after "
            "accelerator.prepare, or take RootFreeShampoo, which needs no batch size"
        )
