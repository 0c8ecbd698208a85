"""Hugging Face's Trainer: the batch size is the number by which it divides the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from .. import BatchSizeCounter
from ..optimizer.base import RootFreeOptimizer
from ..optimizer.checks import COUNTED
from . import has_batch_size, refuse_micro_batches
from .accelerate import check


class RootFreeTrainer(Trainer):
    """Hugging Face's Trainer, whose steps know their batch size.

        RootFreeTrainer(model, args, ..., optimizer_cls_and_kwargs=(RootFreeAdamW, {"lr": 1e-2}))

    A BatchSizeCounter is attached for the time of `train()`. Where the Trainer divides the loss by
    a number of labels, which it counts over all micro-batches and ranks, that is the batch size;
    elsewhere the leading dimension of a call's tensors is counted, or what `count` says.
    RootFreeShampoo has none, and counts nothing.

    The Trainer gives biases and norms no decay, and others `weight_decay` of its arguments,
    whatever the default of the class. It clips gradients to `max_grad_norm`, 1 by default. With
    another Trainer: `class MyTrainer(RootFreeTrainer, trl.SFTTrainer)`.

    Args:
        args, kwargs: as of the Trainer.
        count: as in BatchSizeCounter, in place of the Trainer's number.

    Raises:
        TypeError: no optimizer of rootfree_fused.
        ValueError: `batch_size` or `weight_decay` in `optimizer_cls_and_kwargs`, or another `lr`
            there than a `learning_rate` of the arguments; a second moment of micro-batches;
            DeepSpeed; FSDP1 with a Shampoo; with a batch size tensor, context or sequence
            parallelism, or several GPUs in a process.
    """

    optimizer_cls_and_kwargs: Any

    def __init__(self, *args: Any, count: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._count = count
        self._counter: BatchSizeCounter | None = None
        self._attached: tuple[nn.Module, Optimizer] | None = None
        self._items: Any = None  # the number that the Trainer divides this step's loss by
        self._counted_items: Any = None
        own = None if self.optimizer is None else type(self.optimizer)
        chosen, settings = self.optimizer_cls_and_kwargs or (own, None)
        if not (isinstance(chosen, type) and issubclass(chosen, RootFreeOptimizer)):
            raise TypeError(
                f"the optimizer is {chosen or 'left to the Trainer'}; pass "
                'optimizer_cls_and_kwargs=(RootFreeShampoo, {"lr": 5e-3}), or '
                "optimizers=(optimizer, None)"
            )
        check(self.accelerator, chosen)
        if settings is not None:
            _check_settings(settings, self.args)
        for group in self.optimizer.param_groups if settings is None else [settings]:
            refuse_micro_batches(group, "the Trainer")
        if has_batch_size(chosen):
            _check_gpus(self.args.n_gpu)
            if settings is not None:
                self.optimizer_cls_and_kwargs = chosen, {**settings, "batch_size": COUNTED}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer; groups of the tuple's "params" are refused as its settings are."""
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in optimizer.param_groups:
            refuse_micro_batches(group, "the Trainer")
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer, with a BatchSizeCounter as long as it runs."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach()

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """As of the Trainer."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wraps
        if has_batch_size(type(optimizer)) and self._attached != (model, optimizer):
            self._detach()
            divides = num_items_in_batch is not None and self._count is None
            self._counter = BatchSizeCounter(
                model,
                optimizer,
                count=self._divisor if divides else self._count,
                process_group=torch.distributed.group.WORLD,
            )
            self._attached = model, optimizer
        self._items = num_items_in_batch
        return super().training_step(model, inputs, num_items_in_batch, **kwargs)

    def _divisor(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | Tensor:
        """The Trainer's number at the first call of a step, on one rank if it is that of all."""
        is_counted = self._items is self._counted_items
        self._counted_items = self._items
        if is_counted or (self.args.average_tokens_across_devices and self.args.process_index > 0):
            return 0
        return self._items  # type: ignore[no-any-return]

    def _detach(self) -> None:
        if self._counter is not None:
            self._counter.remove()
        self._counter = self._attached = None


def _check_settings(settings: dict[str, Any], args: TrainingArguments) -> None:
    """Raise a ValueError for what the Trainer would overwrite, or not pass on."""
    if "batch_size" in settings:
        raise ValueError(
            "batch_size is in optimizer_cls_and_kwargs; leave it out, since the Trainer's batches "
            "are counted, or take transformers' own Trainer to keep it fixed"
        )
    if "weight_decay" in settings:
        raise ValueError(
            f"weight_decay is {settings['weight_decay']} in optimizer_cls_and_kwargs, but the "
            f"Trainer's groups take {args.weight_decay}, of its arguments; pass "
            f"TrainingArguments(weight_decay={settings['weight_decay']})"
        )
    default = TrainingArguments.__dataclass_fields__["learning_rate"].default
    lr = settings.get("lr")
    if args.learning_rate not in (default, lr):
        raise ValueError(
            f"learning_rate of the arguments is {args.learning_rate}, which the Trainer does not "
            f"pass on, and lr in optimizer_cls_and_kwargs is {lr}; put 'lr': {args.learning_rate} "
            "there, or leave learning_rate out"
        )


def _check_gpus(number: int) -> None:
    if number > 1:
        raise ValueError(
            f"this process has {number} GPUs, which DataParallel would share; start one process a "
            "GPU with torchrun, or let it see one by CUDA_VISIBLE_DEVICES"
        )
