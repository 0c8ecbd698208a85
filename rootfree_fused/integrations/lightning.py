"""Lightning: a callback that counts the batch size of every step."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from .. import BatchSizeCounter
from ..optimizer.base import RootFreeOptimizer
from . import has_batch_size, refuse_micro_batches


class BatchSizeCallback(lightning.Callback):
    """Attaches a BatchSizeCounter for the time of `Trainer.fit`.

        Trainer(callbacks=[BatchSizeCallback("network")])

    Lightning calls `training_step` and not the module, so the counter follows what that calls. It
    counts all batches of `accumulate_grad_batches`, over all data-parallel ranks; Lightning divides
    each loss by their number, so return the mean of a batch.

    Args:
        module: what `training_step` calls once for every loss: the name of a submodule, as of
            `get_submodule`, or "" for the LightningModule itself (`self(x)`).
        count: as in BatchSizeCounter; a model of tokens needs it.

    Raises:
        ValueError: (`fit`) no such module, several optimizers, a second moment of micro-batches,
            DeepSpeed. Nothing has moved.
        TypeError: (`fit`) an optimizer that is not of rootfree_fused.
    """

    def __init__(self, module: str = "", *, count: Any = None) -> None:
        self._module = module
        self._count = count
        self._counter: BatchSizeCounter | None = None

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Attach; the optimizer is there by now."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "the batch size cannot be counted under DeepSpeed, whose partitions the Shampoos "
                "do not take; leave this callback out and give a diagonal class its batch_size, "
                "or use ModelParallelStrategy"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"there are {len(trainer.optimizers)} optimizers; attach a BatchSizeCounter to the "
                "module of each in configure_optimizers, and leave this callback out"
            )
        (optimizer,) = trainer.optimizers
        if not isinstance(optimizer, RootFreeOptimizer):
            raise TypeError(
                f"configure_optimizers returned a {type(optimizer).__name__}; return one of "
                "rootfree_fused, and not a wrapper around it"
            )
        for group in optimizer.param_groups:
            refuse_micro_batches(group, "Lightning")
        try:
            module = pl_module.get_submodule(self._module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"{type(pl_module).__name__} has no module {self._module!r}; pass the name of "
                f"what training_step calls: {names}"
            ) from None
        if has_batch_size(type(optimizer)):
            ranks = _data_parallel_ranks(trainer)
            self._counter = BatchSizeCounter(
                module, optimizer, count=self._count, process_group=ranks
            )

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let the module go."""
        self._remove()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """The same where training ended by an error."""
        self._remove()

    def _remove(self) -> None:
        if self._counter is not None:
            self._counter.remove()
            self._counter = None


def _data_parallel_ranks(trainer: lightning.Trainer) -> Any:
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return trainer.strategy.device_mesh["data_parallel"].get_group()
    return torch.distributed.group.WORLD
