"""The Trainer's steps have the batch size that its losses were divided by, on several ranks too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeShampoo, Sign, param_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from rootfree_fused.integrations import huggingface  # noqa: E402
from rootfree_fused.integrations.huggingface import RootFreeTrainer  # noqa: E402

RANK = Path(__file__).parents[1] / "helpers" / "trainer_rank.py"


class Log(transformers.TrainerCallback):
    def __init__(self):
        self.batch_sizes = []

    def on_step_end(self, args, state, control, *, optimizer, **kwargs):
        self.batch_sizes.append(optimizer.param_groups[0].get("batch_size"))


class Classifier(nn.Module):
    """Its loss is the mean of a call's samples, whatever the Trainer counts."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Divided(Classifier):
    """The Trainer divides the sum of its losses by the labels of a step."""

    accepts_loss_kwargs = True

    def forward(self, x, labels=None, num_items_in_batch=None):
        logits = self.linear(x)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss / num_items_in_batch, "logits": logits}


def arguments(folder, **settings):
    return transformers.TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def build(folder, chosen=(RootFreeAdamW, {}), *, model=None, trainer=RootFreeTrainer, **settings):
    samples = [
        {"x": torch.randn(3), "labels": torch.tensor(i % 2 if i % 3 else -100)} for i in range(19)
    ]
    log = Log()
    of_trainer = {"optimizer_cls_and_kwargs": chosen, "callbacks": [log], **settings}
    model = model or Classifier()
    return trainer(model, arguments(folder), train_dataset=samples, **of_trainer), log


@pytest.mark.parametrize("optimizer_class", [RootFreeAdamW, IFShampoo])
def test_samples_are_counted_where_the_loss_is_a_mean_of_them(tmp_path, optimizer_class):
    trainer, log = build(tmp_path, (optimizer_class, {"lr": 1e-3}))
    trainer.train()
    assert log.batch_sizes == [8, 8, 3]
    assert not trainer.model._forward_hooks
    trainer.train()
    assert log.batch_sizes == [8, 8, 3] * 2


def test_labels_are_counted_where_the_loss_is_divided_by_them(tmp_path):
    divisors = []

    class Recording(RootFreeTrainer):
        def compute_loss(self, *args, num_items_in_batch=None, **kwargs):
            divisors.append(int(num_items_in_batch))
            return super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer, log = build(tmp_path, model=Divided(), trainer=Recording)
    trainer.train()
    assert log.batch_sizes == divisors[::2]
    assert sum(log.batch_sizes) == 12  # 19 samples without the seven of label -100


def test_another_trainer_can_be_its_base(tmp_path):
    class Other(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    class Both(RootFreeTrainer, Other):
        pass

    trainer, log = build(tmp_path, trainer=Both)
    trainer.train()
    assert trainer.called
    assert log.batch_sizes == [8, 8, 3]


def test_a_loss_of_its_own_is_divided_by_them_too(tmp_path):
    def loss(outputs, labels, num_items_in_batch):
        total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return total / num_items_in_batch

    trainer, log = build(tmp_path, compute_loss_func=loss)
    trainer.train()
    assert sum(log.batch_sizes) == 12


def test_what_counts_can_be_said(tmp_path):
    trainer, log = build(tmp_path, model=Divided(), count=lambda args, kwargs: 5)
    trainer.train()
    assert log.batch_sizes == [10, 10, 5]


@pytest.mark.parametrize("optimizer_class", [RootFreeShampoo, Sign])
def test_without_a_batch_size_nothing_is_counted(tmp_path, optimizer_class):
    trainer, log = build(tmp_path, (optimizer_class, {"lr": 5e-3}))
    trainer.train()
    assert log.batch_sizes == [None] * 3


def test_an_optimizer_can_be_given(tmp_path):
    model = Classifier()
    optimizer = RootFreeAdamW(model.parameters(), batch_size="counted")
    trainer, log = build(tmp_path, None, model=model, optimizers=(optimizer, None))
    trainer.train()
    assert log.batch_sizes == [8, 8, 3]


def test_groups_can_be_given(tmp_path):
    model = Classifier()
    groups = param_groups(model, weight_decay=0.1)
    trainer, log = build(tmp_path, (RootFreeAdamW, {"lr": 1e-3, "params": groups}), model=model)
    trainer.train()
    found = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in found] == [g["weight_decay"] for g in groups]
    assert log.batch_sizes == [8, 8, 3]


@pytest.mark.parametrize("given", [list, iter])
def test_groups_are_refused_as_settings_are(tmp_path, given):
    model = Classifier()
    groups = given([{"params": list(model.parameters()), "second_moment": "micro"}])
    trainer, _ = build(tmp_path, (RootFreeAdamW, {"lr": 1e-3, "params": groups}), model=model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="the Trainer adds them up in"):
        trainer.train()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("chosen", "settings", "error", "cure"),
    [
        ((RootFreeAdamW, {"batch_size": 4}), {}, ValueError, "leave it out"),
        (
            (RootFreeShampoo, {"weight_decay": 0.1}),
            {},
            ValueError,
            r"pass TrainingArguments\(weight_decay=0.1\)",
        ),
        (
            (RootFreeShampoo, {}),
            {"learning_rate": 5e-3},
            ValueError,
            "put 'lr': 0.005 there",
        ),
        (
            (RootFreeShampoo, {"lr": 1e-2}),
            {"learning_rate": 5e-3},
            ValueError,
            "lr in optimizer_cls_and_kwargs is 0.01; put 'lr': 0.005 there, or leave",
        ),
        ((Sign, {"sign": "micro"}), {}, ValueError, "the Trainer adds them up in .grad"),
        ((torch.optim.AdamW, {}), {}, TypeError, r"\(RootFreeShampoo, "),
        (None, {}, TypeError, r"\(RootFreeShampoo, "),
    ],
)
def test_what_the_trainer_would_lose_is_refused(tmp_path, chosen, settings, error, cure):
    with pytest.raises(error, match=cure):
        RootFreeTrainer(
            Classifier(), arguments(tmp_path, **settings), optimizer_cls_and_kwargs=chosen
        )


def test_what_the_accelerator_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "check", lambda accelerator, chosen: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path)


def test_several_gpus_in_a_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process a GPU with torchrun"):
        build(tmp_path)


def test_two_ranks():
    """The Trainer's number is that of all ranks, accelerate's counts are summed over them."""
    command = [sys.executable, str(RANK)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["trainer"] == found["divisors"]
    assert sum(found["trainer"]) == 16  # 24 samples without the eight of label -100
    assert found["accelerate"] == [[16, 8]] * 2
    fsdp2 = found["fsdp2"]
    assert fsdp2["batch sizes"] == found["divisors"]
    assert fsdp2["sharded"]
    assert fsdp2["off"] < 1e-6  # from DDP's weights of 0.1 to 1: a few roundings of float32
    assert fsdp2["resumed"]
