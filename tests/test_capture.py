"""CapturedStep: with graphs on a GPU, and on the CPU with steps that stand for their replays."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.optimizers import SETTINGS, assert_identical, build, parameters, run, snapshot

import rootfree_fused.optimizer.base
from rootfree_fused import CapturedStep, IFShampoo, RootFreeRMSprop

SHAPES = [(7, 5), (11,), (), (3, 4, 2), (16, 8)]


def twin(schedule):
    """What counts apart from then on, on the same tensors."""
    if schedule is None:
        return None
    own = copy.copy(schedule)
    own._counts = dict(schedule._counts)
    return own


class Emulated(CapturedStep):
    """Records on the CPU: a replay takes the step that was captured, whatever the host counts."""

    replays = 0

    def _run(self):
        return self._train_step()

    def _record(self):
        optimizer = self._optimizer
        schedule = twin(getattr(optimizer, "_schedule", None))
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [t for state in optimizer.state.values() for t in state.values()]
        before = [t.detach().clone() for t in tensors]
        output = self._train_step()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)  # through .data nothing looks written

        def replay():
            self.replays += 1
            counted = getattr(optimizer, "_schedule", None)
            optimizer._schedule = twin(schedule)
            output.copy_(self._train_step())
            optimizer._schedule = counted

        return replay, output


class Training:
    """A problem whose data change from step to step, and how often its step ran as it is."""

    def __init__(self, name, device, **overrides):
        self.device, self.ran = device, 0
        self.params = parameters(*SHAPES, device=device)
        self.lr = torch.tensor(0.05, device=device)
        settings = {"capturable": True, "lr": self.lr, **overrides}
        self.optimizer = build(name, self.params, **settings)
        self.targets = [torch.zeros_like(p) for p in self.params]

    def train_step(self):
        self.ran += 1
        self.optimizer.zero_grad()
        losses = [(p - t).square().mean() for p, t in zip(self.params, self.targets, strict=True)]
        loss = torch.stack(losses).sum()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def captured(self, **options):
        cls = Emulated if self.device.type == "cpu" else CapturedStep
        return cls(self.train_step, self.optimizer, **options)

    def next_data(self, t):
        generator = torch.Generator().manual_seed(100 + t)  # of no parameter
        for target in self.targets:
            target.copy_(torch.randn(target.shape, generator=generator))
        self.lr.fill_(0.05 / (1 + t % 4))

    def snapshot(self):
        return snapshot(self.optimizer, self.params)


def ran_as_it_is(step, training):
    """How often the step ran without a replay; a capture is one of them."""
    return training.ran - getattr(step, "replays", 0)


def follow(step, training, twin, steps):
    for t in steps:
        for each in (training, twin):
            each.next_data(t)
        loss, expected = step(), twin.train_step()
        assert torch.equal(loss, expected)
        grads = [p.grad for p in training.params]
        assert_identical(grads, [p.grad for p in twin.params])
    assert_identical(training.snapshot(), twin.snapshot())


@pytest.mark.parametrize("name", SETTINGS)
def test_replays_are_the_steps_that_the_schedule_asks_for(name, device):
    training, twin = (Training(name, device) for _ in range(2))
    step = training.captured(warmup=2)
    follow(step, training, twin, range(24))
    kinds = 2 if name.endswith(("-interval", "-axes")) else 1
    assert len(step._recordings) == kinds
    unknown = 1  # the first step makes the plan, and learns what has started
    assert training.optimizer.state[training.params[0]]["step"] == 24
    assert ran_as_it_is(step, training) == unknown + 3 * kinds


def test_groups_with_schedules_of_their_own(device):
    training, twin = (Training("ifshampoo", device, momentum=0.5) for _ in range(2))
    for each in (training, twin):
        each.optimizer.param_groups[0]["update_interval"] = 2
        extra = parameters((6, 4), device=device, seed=9)
        group = {"params": extra, "update_interval": 3, "lr": each.lr}
        each.optimizer.add_param_group(group)
        each.params += extra
        each.targets += [torch.zeros_like(p) for p in extra]
    step = training.captured(warmup=1)
    follow(step, training, twin, range(20))
    assert len(step._recordings) == 4


def test_a_loaded_checkpoint_is_followed(device):
    """Of another phase of the schedule: what the host had counted is wrong, K K^T stale."""
    training, twin = (Training("ifshampoo-interval", device) for _ in range(2))
    step = training.captured(warmup=1)
    follow(step, training, twin, range(10))
    other = Training("ifshampoo-interval", device)
    for t in range(2):
        other.next_data(t)
        other.train_step()
    for each in (training, twin):
        each.optimizer.load_state_dict(other.optimizer.state_dict())
        each.optimizer.param_groups[0]["lr"] = each.lr
    ran = ran_as_it_is(step, training)
    follow(step, training, twin, range(10, 20))
    assert ran_as_it_is(step, training) == ran + 1


def test_steps_between_replays_count(device):
    training, twin = (Training("ifshampoo-interval", device) for _ in range(2))
    step = training.captured(warmup=1)
    follow(step, training, twin, range(10))
    follow(training.train_step, training, twin, range(10, 14))
    follow(step, training, twin, range(14, 20))


@pytest.mark.parametrize("name", ["rmsprop-momentum", "ifshampoo-interval"])
@pytest.mark.parametrize("setting", ["damping", "lr", "a group"])
def test_a_setting_that_the_graphs_hold_must_stay(name, setting, device):
    training = Training(name, device)
    step = training.captured(warmup=1)
    for t in range(8):
        training.next_data(t)
        step()
    words = {"damping": "damping of group 0 was 0.0.* is 0.5; make a new CapturedStep"}
    if setting == "a group":
        training.optimizer.add_param_group({"params": parameters((3,), device=device)})
    else:
        training.optimizer.param_groups[0][setting] = 0.5
    before = training.snapshot()
    words |= {"lr": "lr of group 0 .* is 0.5; keep lr in a tensor", "a group": "a group was added"}
    with pytest.raises(RuntimeError, match=words[setting]):
        step()
    assert_identical(training.snapshot(), before)


def test_a_step_that_fails_while_it_is_captured_is_not_counted(device):
    training, twin = (Training("ifshampoo-interval", device) for _ in range(2))
    step = training.captured(warmup=1)
    follow(step, training, twin, range(3))
    record = step._record

    def failing():
        training.optimizer._count_replay()  # as the step did before it failed
        raise ValueError("out of memory, say")

    step._record = failing
    follow(step, training, twin, range(3, 6))
    with pytest.raises(ValueError, match="out of memory"):
        step()
    step._record = record
    follow(step, training, twin, range(6, 16))


def test_bad_input():
    params = parameters((3,))
    theirs = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(TypeError, match="optimizer is a SGD; pass one of rootfree_fused"):
        CapturedStep(int, theirs)
    with pytest.raises(ValueError, match="capturable=False; build it with capturable=True"):
        CapturedStep(int, RootFreeRMSprop(params, batch_size=1))
    elsewhere = [*params, torch.nn.Parameter(torch.ones(3, device="meta"))]
    optimizer = RootFreeRMSprop(elsewhere, batch_size=1, capturable=True)
    with pytest.raises(ValueError, match=r"parameters are on cpu, meta, .* an optimizer a device"):
        CapturedStep(int, optimizer)
    optimizer = RootFreeRMSprop(params, batch_size=1, capturable=True)
    for warmup in (0, True, 1.5):
        with pytest.raises(ValueError, match="pass a whole number >= 1"):
            CapturedStep(int, optimizer, warmup=warmup)


# What a capture refuses


def set_capturing(monkeypatch):
    monkeypatch.setattr(rootfree_fused.optimizer.base, "is_capturing", lambda _: True)


def refused(monkeypatch, optimizer, params, words):
    set_capturing(monkeypatch)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert_identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_parameter_without_gradient_is_refused(name, monkeypatch):
    params = parameters(*SHAPES)
    optimizer = build(name, params, capturable=True)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    words = r"1 of 5 parameters have no gradient \(shapes \[\(7, 5\)\]\).*requires_grad_\(False\)"
    refused(monkeypatch, optimizer, params, words)
    params[0].requires_grad_(False)
    if "update_interval" not in SETTINGS[name][1]:
        optimizer.step()


def test_a_schedule_is_refused_but_by_captured_step(monkeypatch):
    params = parameters((4, 3))
    params[0].grad = torch.ones_like(params[0])
    optimizer = IFShampoo(params, batch_size=1, update_interval=3, capturable=True)
    refused(monkeypatch, optimizer, params, "update_interval=3.*rootfree_fused.CapturedStep")
    optimizer = IFShampoo(params, batch_size=1, capturable=True)
    optimizer.step()
    settings = {"update_interval": 3, "amp_scaling": True, "capturable": True}
    optimizer = IFShampoo(params, batch_size=1, **settings)
    optimizer._captured_by_kind = True
    refused(monkeypatch, optimizer, params, "amp_scaling=True.*which steps were skipped")


def test_a_step_that_counts_on_the_host_is_refused(monkeypatch):
    params = parameters((4, 3))
    params[0].grad = torch.ones_like(params[0])
    optimizer = RootFreeRMSprop(params, batch_size=1)
    refused(monkeypatch, optimizer, params, "capturable=False")


@pytest.mark.parametrize("known", [True, False])
def test_counts_on_the_device_are_read_once_for_each_set_of_gradients(monkeypatch, known):
    """What is due next is counted on the host: under a capture nothing may wait for the device."""
    if not known:
        monkeypatch.setattr(rootfree_fused.optimizer.base, "fingerprint", lambda *_: None)
    params = parameters((4, 3), (4, 3))
    optimizer = build("ifshampoo-interval", params, capturable=True, initial_square_avg=1.0)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    run(optimizer, params, 7)
    assert sum(reads) <= 2
