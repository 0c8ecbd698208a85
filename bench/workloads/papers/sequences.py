"""Language models on the text problem: a diagonal linear recurrence, and an LSTM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import text
from ..text import VOCABULARY, Text
from .workload import Workload


class OnText(Text, Workload):
    """Windows of the text problem, under another network."""

    needs = ()
    threads = 1

    def __init__(self, name: str, network: Callable[[], nn.Module], *, rounds: int) -> None:
        super().__init__(name, rounds=rounds)
        self._network = network

    def build_model(self) -> nn.Module:
        """The network, its logits (n, context, VOCABULARY)."""
        return self._network()

    def training_part(self, train_set: Tensor) -> Tensor:
        """As many characters as are held out, always the same ones."""
        return self._windows(train_set, text.HELD_OUT, torch.Generator().manual_seed(1))

    def evaluate(self, model: nn.Module, held_out: Tensor) -> dict[str, float]:
        """Loss in nat a character, and the share of characters that are predicted."""
        logits, right = model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten()
        accuracy = (logits.argmax(dim=1) == right).double().mean().item()
        return {"loss": functional.cross_entropy(logits, right).item(), "accuracy": accuracy}


def scan(keep: Tensor, enter: Tensor) -> Tensor:
    """h_t = keep_t h_(t-1) + enter_t along axis 1, from h = 0, in log2(length) products."""
    shift = 1
    while shift < enter.shape[1]:
        enter = torch.cat(
            [enter[:, :shift], enter[:, shift:] + keep[:, shift:] * enter[:, :-shift]], dim=1
        )
        keep = torch.cat([keep[:, :shift], keep[:, shift:] * keep[:, :-shift]], dim=1)
        shift *= 2
    return enter


class Recurrence(nn.Module):
    """A diagonal linear recurrence in place of attention, its gate of the input, its output gated.

    h_t = a_t h_(t-1) + (1 - a_t) v_t, as in the selective state spaces of Mamba (arXiv 2312.00752)
    with one state a channel.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        with torch.no_grad():  # channels remember from 2 to 64 characters
            lengths = torch.logspace(1, 6, width, base=2)
            self.start.bias[:width] = (lengths - 1).log()

    def forward(self, x: Tensor) -> Tensor:
        keep, value, gate = self.start(x).chunk(3, dim=-1)
        keep = keep.sigmoid()
        return self.projection(scan(keep, (1 - keep) * value) * functional.silu(gate))


class StateSpace(nn.Module):
    """Layers of a recurrence and an MLP of four widths, each behind a layer norm."""

    def __init__(self, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(nn.Sequential(nn.LayerNorm(width), Recurrence(width)))
            self.layers.append(
                nn.Sequential(
                    nn.LayerNorm(width),
                    nn.Linear(width, 4 * width),
                    nn.GELU(),
                    nn.Linear(4 * width, width),
                )
            )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """(n, context) characters to (n, context, VOCABULARY) logits."""
        x = self.token(characters)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class LSTM(nn.Module):
    """Three layers."""

    def __init__(self, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.layers = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        """(n, context) characters to (n, context, VOCABULARY) logits."""
        return self.head(self.layers(self.token(characters))[0])


WORKLOADS = [OnText("text_ssm", StateSpace, rounds=20), OnText("text_lstm", LSTM, rounds=20)]
