"""CapturedStep where the parameters are not on the current device, without a GPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from helpers.optimizers import parameters

from rootfree_fused import CapturedStep, RootFreeRMSprop
from rootfree_fused.optimizer import amp_and_graphs


class TwoDevices:
    """torch.cuda with two devices, of which 0 is current, as far as captures ask it."""

    def __init__(self, monkeypatch):
        self.current, self.made = 0, []
        for name in ("Stream", "CUDAGraph", "graph", "stream", "device", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(self.current))

    def Stream(self, device=None):
        self.made.append(("stream", self.index(device)))
        return SimpleNamespace(wait_stream=lambda _: None)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None, pool=lambda: 1)

    def current_stream(self, device=None):
        self.made.append(("current stream", self.index(device)))
        return SimpleNamespace(wait_stream=lambda _: None)

    @contextmanager
    def graph(self, *_, **__):
        self.made.append(("graph", self.current))
        yield

    @contextmanager
    def stream(self, _):
        yield

    @contextmanager
    def device(self, device):
        before = self.current
        index = self.index(device)
        self.current = before if index < 0 else index
        yield
        self.current = before

    def index(self, device):
        if device is None:
            return self.current
        return device if isinstance(device, int) else device.index


def second_device():
    return SimpleNamespace(
        device=torch.device("cuda", 1), grad=None, is_cuda=True, get_device=lambda: 1
    )


def test_streams_and_graphs_are_of_the_parameters_device(monkeypatch):
    """Which need not be the current one."""
    optimizer = RootFreeRMSprop(parameters((3,)), batch_size=1, capturable=True)
    monkeypatch.setattr(CapturedStep, "_params", lambda _: [second_device()])
    monkeypatch.setattr(optimizer, "_kind_of_next_step", tuple)
    devices = TwoDevices(monkeypatch)
    step = CapturedStep(int, optimizer, warmup=1)
    for _ in range(2):
        step()
    assert {what for what, _ in devices.made} == {"stream", "current stream", "graph"}
    assert {index for _, index in devices.made} == {1}
    assert devices.current == 0


def test_a_capture_is_seen_on_the_parameters_device(monkeypatch):
    TwoDevices(monkeypatch)
    assert not amp_and_graphs.is_capturing([{"params": parameters((3,))}])
    assert amp_and_graphs.is_capturing([{"params": [second_device()]}])
