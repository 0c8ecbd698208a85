"""Train small networks at the constructors' defaults, without a schedule: what nobody tuned.

Held-out data are those that no search of `bench train` looked at. The networks of a seed start from
the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop

from .measuring.common import add_measurement_arguments, optional, pick_device, threads
from .measuring.rows import Rows
from .report import training as tables
from .workloads.digits import Digits
from .workloads.text import CONTEXT, VOCABULARY, Text, Transformer
from .workloads.training import Problem

Build = Callable[..., Optimizer]
PROVIDERS: dict[str, Build] = {
    "RootFreeRMSprop": RootFreeRMSprop,
    "RootFreeAdamW": RootFreeAdamW,
    "IFShampoo": IFShampoo,
    "torch AdamW": AdamW,
}
QUICK_STEPS = 20
AVERAGED = 20  # last steps that the training loss is a mean of


class Mlp(Digits):
    """64-128-64-10."""

    def build_model(self) -> nn.Module:
        """17,226 parameters in 6 tensors."""
        sizes = ((64, 128), (128, 64), (64, 10))
        layers = chain.from_iterable((nn.Linear(*size), nn.ReLU()) for size in sizes)
        return nn.Sequential(nn.Flatten(), *islice(layers, 5))


class Normalized(Digits):
    """The CNN of `bench train` with a BatchNorm behind each convolution."""

    def build_model(self) -> nn.Module:
        """21,642 parameters in 12 tensors."""
        layers = list(super().build_model())
        layers.insert(3, nn.BatchNorm2d(32))
        layers.insert(1, nn.BatchNorm2d(16))
        return nn.Sequential(*layers)


class Language:
    """A small GPT on a made-up language: each word has four that may follow, some more often."""

    batch_size = 32 * CONTEXT  # the loss is a mean over tokens

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Tensor, Tensor]:
        """What may follow each word, and held-out sequences."""
        drawn = torch.Generator().manual_seed(1 if tuning else 2)
        followers = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=drawn)
        return followers, _sequences(followers, 64, drawn).to(device)

    def build_model(self) -> nn.Module:
        """248,737 parameters in 30 tensors."""
        return Transformer()

    def batches(self, data: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Sequences from random words on."""
        while True:
            yield _sequences(data, 32, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Cross-entropy of every next word, mean over them."""
        return Text().loss(model, batch)

    def evaluate(self, model: nn.Module, held_out: Tensor) -> dict[str, float]:
        """Loss in nat a word."""
        return Text().evaluate(model, held_out)


# By name: what is trained, and for how many steps.
PROBLEMS: dict[str, tuple[Any, int]] = {
    "digits, MLP": (Mlp(), 330),
    "digits, CNN": (Digits(), 132),
    "digits, CNN with BatchNorm": (Normalized(), 132),
    "text, 1,536 tokens": (Text(), 200),
    "GPT, 2,048 tokens": (Language(), 200),
}


def _sequences(followers: Tensor, count: int, generator: torch.Generator) -> Tensor:
    words = [torch.randint(len(followers), (count,), generator=generator)]
    first, second = torch.randint(4, (2, count, CONTEXT), generator=generator)
    for choice in torch.minimum(first, second).unbind(1):
        words.append(followers[words[-1], choice])
    return torch.stack(words, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench defaults`."""
    add_measurement_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to train")


def run(args: argparse.Namespace) -> int:
    """Train every problem with every optimizer as its constructor builds it."""
    optional("sklearn")
    device = pick_device(args.device)
    seeds = range(1 if args.quick else args.seeds)
    cases = {f"{name}, seed {seed}": (name, seed) for name in PROBLEMS for seed in seeds}
    with threads(1):
        rows = Rows(args.out / "defaults.jsonl", "defaults", device, arguments=args)
        for case in rows.remaining(cases):
            name, seed = cases[case]
            problem, steps = PROBLEMS[name]
            steps = QUICK_STEPS if args.quick else steps
            for provider, build in PROVIDERS.items():
                found, settings = trained(problem, build, device, seed=seed, steps=steps)
                for metric, value in found.items():
                    unit = "of all" if metric == "accuracy" else "nat"
                    detail = {"seed": seed, "steps": steps, "settings": settings}
                    rows.add(name, provider, metric, value, unit, **detail)
    rows.finish(tables.defaults)
    return 0


def trained(
    problem: Problem, build: Build, device: torch.device, *, seed: int, steps: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """What the network ends at, and the settings that its optimizer has by itself."""
    data, held_out = problem.load(device, tuning=False)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = problem.build_model().to(device)
    required = {} if build is AdamW else {"batch_size": problem.batch_size}
    optimizer = build(model.parameters(), **required)
    losses = []
    rounds: Iterable[Any] = (problem.batches(data, generator) for _ in repeat(None))
    for batch in islice(chain.from_iterable(rounds), steps):
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        found = problem.evaluate(model, held_out)
    last = losses[-AVERAGED:]
    settings = {key: value for key, value in optimizer.defaults.items() if _is_plain(value)}
    return {**found, "training loss": fmean(last)}, settings


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple))
