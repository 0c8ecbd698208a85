"""A graph network: the digits as nodes, each joined to those that look most like it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...measuring.common import optional
from .workload import Workload

NEIGHBOURS = 8
LABELLED = 180  # of 1,797 nodes
STEPS_A_ROUND = 10


@dataclass(frozen=True)
class Nodes:
    """The whole graph, and the nodes that the loss is on."""

    pixels: Tensor  # (n, 64)
    edges: Tensor  # (n, n), sparse, normalised
    chosen: Tensor  # indices
    labels: Tensor  # of the chosen


class GraphNetwork(nn.Module):
    """Two graph convolutions: of a node's neighbours the mean, weighted, then a linear layer.

    Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, hidden), nn.Linear(hidden, 10)

    def forward(self, pixels: Tensor, edges: Tensor) -> Tensor:
        """(n, 10) logits of all nodes."""
        hidden = functional.relu(torch.sparse.mm(edges, self.first(pixels)))
        return torch.sparse.mm(edges, self.second(hidden))


class Graph(Workload):
    """A tenth of the nodes have labels that are trained on, the same in tuning and comparison.

    A step sees the whole graph; a round is ten of them.
    """

    name = "graph"
    batch_size = LABELLED
    rounds = 60
    needs = ("sklearn",)

    def load(self, device: torch.device, *, tuning: bool) -> tuple[Nodes, Nodes]:
        """Labelled nodes; and 252 others for tuning, the 540 that the digits problem tests on."""
        images, labels = optional("sklearn.datasets").load_digits(return_X_y=True)
        split = optional("sklearn.model_selection").train_test_split
        kept, test = split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
        kept, tuned = split(kept, test_size=0.2, stratify=labels[kept], random_state=0)
        labelled, _ = split(kept, train_size=LABELLED, stratify=labels[kept], random_state=0)
        pixels = torch.tensor(images, dtype=torch.float32) / 16
        edges, pixels = normalised(neighbours(pixels)).to(device), pixels.to(device)

        def nodes(of: list[int]) -> Nodes:
            right = torch.tensor(labels[of], device=device)
            return Nodes(pixels, edges, torch.tensor(of, device=device), right)

        return nodes(labelled), nodes(tuned if tuning else test)

    def build_model(self) -> nn.Module:
        """4,810 parameters in 4 tensors."""
        return GraphNetwork()

    def batches(self, data: Nodes, generator: torch.Generator) -> Iterator[Nodes]:
        """The whole graph, ten times."""
        return iter([data] * STEPS_A_ROUND)

    def loss(self, model: nn.Module, batch: Nodes) -> Tensor:
        """Cross-entropy, mean over the labelled nodes."""
        logits = model(batch.pixels, batch.edges)[batch.chosen]
        return functional.cross_entropy(logits, batch.labels)

    def evaluate(self, model: nn.Module, held_out: Nodes) -> dict[str, float]:
        """Loss in nat, and accuracy as a share of the nodes."""
        logits = model(held_out.pixels, held_out.edges)[held_out.chosen]
        accuracy = (logits.argmax(dim=1) == held_out.labels).double().mean().item()
        return {
            "loss": functional.cross_entropy(logits, held_out.labels).item(),
            "accuracy": accuracy,
        }


def neighbours(points: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """(n, n) zeros, and ones where either of two points is among the other's `count` nearest."""
    distances = torch.cdist(points, points).fill_diagonal_(float("inf"))
    nearest = distances.topk(count, largest=False).indices
    found = torch.zeros_like(distances).scatter_(1, nearest, 1.0)
    return torch.maximum(found, found.mT)


def normalised(edges: Tensor) -> Tensor:
    """D^(-1/2) (A + I) D^(-1/2), sparse, of edges A (n, n) and the degrees D of A + I."""
    looped = edges + torch.eye(len(edges))
    scale = looped.sum(1).rsqrt()
    return (scale.unsqueeze(1) * looped * scale).to_sparse()


WORKLOADS = [Graph()]
