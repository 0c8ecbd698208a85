"""The text problem: a character-level transformer on the source of Python's standard library.

Real data that is on every machine: the modules in the standard library's folder, about 4.7 million
characters. Numbers of two Python versions are not comparable, since their text differs.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .training import Problem

CONTEXT, SEQUENCES = 64, 24  # characters that are seen, sequences a batch
STEPS_A_ROUND = 25
HELD_OUT = 16_384  # characters
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # all others are one more
VOCABULARY = len(CHARACTERS) + 1


class Text(Problem):
    """Every tenth module is held out for the test, every tenth for tuning."""

    warm_up = 0.1
    metric = "test loss"
    unit = "nat"
    needs = ("pytorch_optimizer",)
    threads = 2

    def __init__(
        self,
        name: str = "text",
        *,
        width: int = 96,
        layers: int = 2,
        rounds: int = 20,
        context: int = CONTEXT,
        sequences: int = SEQUENCES,
        autocast: bool = False,
    ) -> None:
        self.name, self.rounds = name, rounds
        self.batch_size = sequences * context  # the loss is a mean over characters
        self._width, self._layers, self._autocast = width, layers, autocast
        self._context = context

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Tensor, Tensor]:
        """Training text, and held-out windows; the test's modules are not seen in tuning."""
        folder = Path(sysconfig.get_path("stdlib"))
        modules = [_encode(path.read_bytes()) for path in sorted(folder.glob("*.py"))]
        if not modules:
            raise SystemExit(
                f"no module lies in {folder}; use a Python whose library is not zipped"
            )
        validation, test = modules[8::10], modules[9::10]
        rest = [module for i, module in enumerate(modules) if i % 10 < 8]
        text = torch.cat(rest if tuning else rest + validation)
        held_out = torch.cat(validation if tuning else test)
        windows = self._windows(held_out, HELD_OUT, torch.Generator().manual_seed(0))
        return text.to(device), windows.to(device)

    def build_model(self) -> nn.Module:
        """248,737 parameters in 30 tensors at width 96, 2 layers."""
        return Transformer(self._width, self._layers, self._context)

    def batches(self, data: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Windows at random places."""
        for _ in range(STEPS_A_ROUND):
            yield self._windows(data, self.batch_size, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Cross-entropy of every next character, mean over them."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self._autocast):
            logits = model(batch[:, :-1])
            return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module, held_out: Tensor) -> dict[str, float]:
        """Loss in nat a character."""
        return {"loss": self.loss(model, held_out).item()}

    def _windows(self, text: Tensor, characters: int, generator: torch.Generator) -> Tensor:
        """(characters / context, context + 1) characters from random places."""
        length = self._context
        starts = torch.randint(len(text) - length, (characters // length, 1), generator=generator)
        return text[(starts + torch.arange(length + 1)).to(text.device)]


def _encode(source: bytes) -> Tensor:
    table = torch.full((256,), len(CHARACTERS))
    table[[ord(c) for c in CHARACTERS]] = torch.arange(len(CHARACTERS))
    return table[list(source)]


# Model ----------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Pre-norm decoder with learned positions, weights normal with deviation 0.02 as in GPT-2."""

    def __init__(self, width: int = 96, layers: int = 2, context: int = CONTEXT) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """(n, context) characters to (n, context, VOCABULARY) logits."""
        x = self.token(characters) + self.position.weight
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    """Attention and an MLP of four widths, each behind a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(4, width // 64)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3 * self.heads, -1))
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))
