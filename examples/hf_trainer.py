"""Hugging Face Trainer: a causal language model, whose loss is a mean over tokens.

The Trainer divides the loss of every micro-batch by `num_items_in_batch`, the tokens of the whole
accumulation that count, over all ranks with `average_tokens_across_devices=True` (its default):
RootFreeTrainer makes that number the batch size.

pip install transformers accelerate && python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rootfree_fused import RootFreeAdamW
from rootfree_fused.integrations.huggingface import RootFreeTrainer

LENGTH = 12


class Log(TrainerCallback):
    """Keeps the batch size of every step, and the losses of the evaluations."""

    def __init__(self) -> None:
        self.batch_sizes: list[float] = []
        self.losses: list[float] = []

    def on_evaluate(self, args, state, control, *, metrics, **kwargs):
        """Read the loss on held-out sequences."""
        self.losses.append(metrics["eval_loss"])

    def on_step_end(self, args, state, control, *, optimizer, **kwargs):
        """Read what the counter has written."""
        self.batch_sizes.append(optimizer.param_groups[0]["batch_size"])


def sentences(number: int) -> list[dict[str, torch.Tensor]]:
    """Counting from a random number; the i-th has i % 5 padding labels (-100) that do not count."""
    data = []
    for i in range(number):
        ids = (torch.randint(49, (1,)) + torch.arange(LENGTH)) % 49 + 1
        labels = ids.clone()
        labels[LENGTH - i % 5 :] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def main() -> tuple[list[float], list[float]]:
    """Train for thirty steps of 2 x 4 sequences.

    Returns the batch size of each step, and the loss on held-out sequences after each ten.
    """
    set_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=30,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=10,
            max_grad_norm=1.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        log = Log()
        RootFreeTrainer(  # on several GPUs: torchrun
            model,
            arguments,
            train_dataset=sentences(240),
            eval_dataset=sentences(4),
            optimizer_cls_and_kwargs=(RootFreeAdamW, {"lr": 1e-2}),
            callbacks=[log],
        ).train()
    return log.batch_sizes, log.losses


if __name__ == "__main__":
    for name, values in zip(("batch sizes:", "held-out losses:"), main(), strict=True):
        print(name, *(f"{value:.4g}" for value in values))
