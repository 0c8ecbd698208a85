"""Training steps as CUDA graphs, with or without a factor update, as the schedule asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .ops.dispatch import captured_tables
from .optimizer.base import RootFreeOptimizer

T = TypeVar("T")


class _Recording(NamedTuple):
    """A captured step, what it returns, the gradients that its replays write, what they read."""

    replay: Callable[[], None]
    output: Any
    grads: list[Tensor | None]
    tables: list[Tensor]


def _settings(optimizer: RootFreeOptimizer) -> list[dict[str, Any]]:
    """What a graph holds of each group: numbers, and where tensors on the device lie."""
    return [
        {name: _held(value, group["params"]) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _held(value: Any, params: list[Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if params and value.device == params[0].device:
        return f"a tensor at {value.data_ptr():#x}"
    return value.item()


class CapturedStep(Generic[T]):
    """A whole training step, captured in CUDA graphs and replayed.

    A graph repeats one sequence of kernels, but ``IFShampoo`` with an ``update_interval``
    above 1 has two: with a factor update, and without. Each kind of step runs ``warmup`` times as
    it is, is then captured, and replayed from there on. Every call is one training step:

        x, y = torch.empty(...), torch.empty(...)      # on the device; filled before every call
        lr = torch.tensor(1e-3, device="cuda")
        optimizer = IFShampoo(model.parameters(), lr=lr, batch_size=128, update_interval=10,
                              capturable=True)

        def train_step():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        step = CapturedStep(train_step, optimizer)
        for batch_x, batch_y in loader:
            x.copy_(batch_x), y.copy_(batch_y)
            lr.fill_(schedule(t))
            loss = step()

    Args:
        train_step: zero_grad, forward, backward and one ``optimizer.step()``, on tensors that stay
            where they are, with nothing that waits for the device. What it returns is returned;
            tensors in it, and gradients, hold their values until the next call.
        optimizer: one of this package, with ``capturable=True`` in every group.
        warmup: how often each kind of step runs before it is captured, at least 1.

    A replay reads lr from its tensor on the device, and every other setting as it was when the step
    was captured. Steps run as they are where a replay would be wrong: after
    ``load_state_dict``, until the step counts are known and K K^T is made anew. (Loading also puts
    another tensor in the place of a tensor lr, as in torch.optim: put yours back.)

    Raises:
        TypeError: the optimizer is none of this package.
        ValueError: not capturable, parameters on several devices, or a warmup below 1.
        RuntimeError: from a call, if a setting changed that the graphs hold, or from the capture
            itself: a parameter without gradient, a step that waits for the device.
    """

    def __init__(
        self, train_step: Callable[[], T], optimizer: RootFreeOptimizer, *, warmup: int = 3
    ) -> None:
        if not isinstance(optimizer, RootFreeOptimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; pass one of rootfree_fused, and "
                "capture others with torch.cuda.graph"
            )
        if not all(group["capturable"] for group in optimizer.param_groups):
            raise ValueError("optimizer has capturable=False; build it with capturable=True")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup is {warmup!r}; pass a whole number >= 1")
        self._train_step, self._optimizer, self._warmup = train_step, optimizer, warmup
        devices = {param.device for param in self._params()}
        if len(devices) > 1:
            raise ValueError(
                f"parameters are on {', '.join(sorted(map(str, devices)))}, but a CUDA graph is of "
                "one device; capture an optimizer a device"
            )
        (self._device,) = devices
        self._runs: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._last: _Recording | None = None
        self._settings: list[dict[str, Any]] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self) -> T:
        """One training step; returns what `train_step` returns."""
        self._check_settings()
        kind = self._optimizer._kind_of_next_step()
        if kind is None or self._runs[kind] < self._warmup:
            self._runs[kind] += 1
            self._last = None
            return self._run()
        recording = self._recordings.get(kind)
        if recording is None:
            recording = self._recordings[kind] = self._capture()
            self._settings = self._settings or _settings(self._optimizer)
        else:
            self._optimizer._count_replay()
        if recording is not self._last:
            for param, grad in zip(self._params(), recording.grads, strict=True):
                param.grad = grad
            self._last = recording
        recording.replay()
        output: T = recording.output
        return output

    def _capture(self) -> _Recording:
        self._optimizer._captured_by_kind = True
        try:
            with captured_tables() as tables:
                replay, output = self._record()
        except BaseException:
            self._optimizer._forget()  # it may have counted a step that is not taken
            raise
        finally:
            self._optimizer._captured_by_kind = False
        return _Recording(replay, output, [param.grad for param in self._params()], tables)

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _check_settings(self) -> None:
        if self._settings is None:
            return
        settings = _settings(self._optimizer)
        if len(settings) != len(self._settings):
            raise RuntimeError("a group was added after the capture; make a new CapturedStep")
        for index, (old, new) in enumerate(zip(self._settings, settings, strict=True)):
            for name in old.keys() | new.keys():
                if old.get(name) != new.get(name):
                    cure = "keep lr in a tensor on the device and fill_ it, or " * (name == "lr")
                    raise RuntimeError(
                        f"{name} of group {index} was {old.get(name)} when the step was captured "
                        f"and is {new.get(name)}; {cure}make a new CapturedStep"
                    )

    # On the device -----------------------------------------------------------------------------

    def _run(self) -> T:
        """As it is, on the stream of the captures: autograd remembers on which it accumulated."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            output = self._train_step()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return output

    def _record(self) -> tuple[Callable[[], None], T]:
        """A graph of the next step. All share their memory, since none runs beside another."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            output = self._train_step()
        self._pool = self._pool or graph.pool()
        return graph.replay, output
