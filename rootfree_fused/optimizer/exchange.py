"""Gradients to the ranks that own their matrices, and updates back: packed bytes, all to all.

A message has 16 bytes that say what its sender steps on, and 16 of each matrix whose rows stay
where they are; then what a rank has of each other matrix in one order. Sizes depend on the plan
alone and never on which gradients there are, so that no rank waits for another that has none: it
sends zeros, and says so.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import usable_gradients
from .ranks import Ranks
from .staying import RowsOfRanks

ALIGNMENT = 16  # bytes of a header, and where each part of a message begins
WAVE_BYTES = 64 * 2**20  # of gradients that an owner takes at a time


class Box(NamedTuple):
    """What a rank has of a matrix: where it begins and how long it is along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor, as a view."""
        ends = map(operator.add, self.offsets, self.sizes)
        return whole[tuple(map(slice, self.offsets, ends))]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass
class Matrix:
    """A parameter whose factors one rank has for all.

    boxes: what each rank has of it. senders: who sends its part of the gradient to the owner, one
        rank for every part of it. wire: the dtype in which the update travels; gradients do in that
        of `grad`. grad, moved: on the owner the whole gradient, and what the parameter moves by at
        lr=1 without weight decay.
    """

    param: Tensor
    dtype: torch.dtype
    wire: torch.dtype
    owner: int
    boxes: list[Box] = field(default_factory=list)
    senders: list[int] = field(default_factory=list)
    grad: Tensor | None = None
    moved: Tensor | None = None


class _Part(NamedTuple):
    """Where a matrix' part lies in the messages from, or to, a rank."""

    matrix: Matrix
    first: int
    bytes: int
    dtype: torch.dtype
    box: Box

    def view(self, messages: Tensor) -> Tensor:
        part = messages[self.first : self.first + self.bytes]
        return part.view(self.dtype).view(self.box.sizes)


class Messages:
    """The sizes of messages between this rank and all others, and where the parts lie in them."""

    def __init__(
        self, parts: Sequence[tuple[int, Matrix, torch.dtype, Box]], ranks: int, header: int
    ) -> None:
        """parts: the other rank, in the order that both know."""
        self.sizes = [header] * ranks
        placed: list[tuple[int, int, Matrix, torch.dtype, Box]] = []
        for rank, matrix, dtype, box in parts:
            placed.append((rank, self.sizes[rank], matrix, dtype, box))
            self.sizes[rank] += -(-box.numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.starts = [sum(self.sizes[:rank]) for rank in range(ranks)]
        self.parts = [
            _Part(m, self.starts[rank] + at, box.numel * dtype.itemsize, dtype, box)
            for rank, at, m, dtype, box in placed
        ]

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(sum(self.sizes), dtype=torch.uint8, device=device)


class Wave:
    """Some matrices of each owner, whose gradients and updates travel together.

    staying: of the first wave all matrices of a group whose rows stay where they are.
    """

    def __init__(
        self, matrices: Sequence[Matrix], ranks: Ranks, staying: Sequence[RowsOfRanks] = ()
    ) -> None:
        self.matrices, self.ranks, self.staying = list(matrices), ranks, list(staying)
        self.is_first = False  # of those that its ranks exchange in a step of a group
        me, count = ranks.rank, ranks.size
        to_owner = [
            (m.owner, m, m.dtype, m.boxes[me])
            for m in matrices
            if me in m.senders and m.boxes[me].numel
        ]
        at_owner = [
            (rank, m, m.dtype, m.boxes[rank])
            for m in matrices
            if m.owner == me
            for rank in m.senders
            if m.boxes[rank].numel
        ]
        self._header = ALIGNMENT * (1 + len(self.staying))
        self._grads_sent = Messages(to_owner, count, self._header)
        self._grads_received = Messages(at_owner, count, self._header)
        from_owner = [
            (rank, m, m.wire, m.boxes[rank])
            for m in matrices
            if m.owner == me
            for rank in range(count)
            if m.boxes[rank].numel
        ]
        at_rank = [(m.owner, m, m.wire, m.boxes[me]) for m in matrices if m.boxes[me].numel]
        self._moved_sent = Messages(from_owner, count, 0)
        self._moved_received = Messages(at_rank, count, 0)

    def owned(self) -> list[Matrix]:
        """Those that this rank owns."""
        return [matrix for matrix in self.matrices if matrix.owner == self.ranks.rank]

    def counts(self) -> dict[tuple[torch.dtype, torch.device], int]:
        """How many elements those have."""
        found: dict[tuple[torch.dtype, torch.device], int] = {}
        for matrix in self.owned():
            key = matrix.dtype, self.ranks.device
            found[key] = found.get(key, 0) + matrix.param.numel()
        return found

    def own_gradients(self) -> dict[int, Tensor]:
        """This rank's parts of the gradients, by the id of the matrix."""
        stepped: list[Matrix | RowsOfRanks] = [*self.matrices, *self.staying]
        return {
            id(one): usable_gradients([one.param])[0]
            for one in stepped
            if one.param.grad is not None
        }

    @property
    def bytes_sent(self) -> int:
        """What a step sends to other ranks."""
        me = self.ranks.rank
        both = (self._grads_sent.sizes, self._moved_sent.sizes)
        return sum(sum(sizes) - sizes[me] for sizes in both)

    def gather(self, grads: dict[int, Tensor], header: tuple[int, int]) -> Tensor:
        """Bring the gradients to their owners; the headers (ranks, 2) of all, int64.

        grads: this rank's parts by the id of the matrix; zeros are sent for others.
        """
        device = self.ranks.device
        sent, received = self._grads_sent.empty(device), self._grads_received.empty(device)
        words = torch.tensor(header, dtype=torch.int64, device="cpu").view(torch.uint8).to(device)
        own_scales = [
            rows.own_scale(grads.get(id(rows))).view(torch.uint8) for rows in self.staying
        ]
        words = torch.cat([words, *own_scales])
        for start in self._grads_sent.starts:
            sent[start : start + self._header] = words
        for part in self._grads_sent.parts:
            grad = grads.get(id(part.matrix))
            view = part.view(sent)
            view.zero_() if grad is None else view.copy_(grad)
        self.ranks.exchange(received, sent, self._grads_received.sizes, self._grads_sent.sizes)
        for part in self._grads_received.parts:
            assert part.matrix.grad is not None
            part.box.of(part.matrix.grad).copy_(part.view(received))
        starts = self._grads_received.starts
        heads = torch.stack([received[start : start + self._header] for start in starts])
        if self.staying:
            heads = heads.cpu()
            scales = (
                heads[:, ALIGNMENT:].contiguous().view(torch.float64).chunk(len(self.staying), 1)
            )
            for rows, own in zip(self.staying, scales, strict=True):
                rows.hear(own)
        return heads[:, :ALIGNMENT].contiguous().view(torch.int64)

    def scatter(self) -> Iterator[tuple[Matrix, Tensor]]:
        """Each matrix, and what this rank's part of it moves by."""
        if not self.matrices:
            return
        device = self.ranks.device
        sent, received = self._moved_sent.empty(device), self._moved_received.empty(device)
        for part in self._moved_sent.parts:
            assert part.matrix.moved is not None
            part.view(sent).copy_(part.box.of(part.matrix.moved))
        self.ranks.exchange(received, sent, self._moved_received.sizes, self._moved_sent.sizes)
        for part in self._moved_received.parts:
            yield part.matrix, part.view(received)


def senders_of(
    boxes: Sequence[Box],
    owner: int,
    coordinates: Sequence[tuple[int, ...]],
    replicas: Sequence[int],
) -> list[int]:
    """Of ranks that have the same part the owner, or else one in its row of the mesh.

    replicas: the mesh's axes along which ranks have the same.
    """
    chosen: dict[Box, int] = {}

    def row(rank: int) -> tuple[int, ...]:
        return tuple(coordinates[rank][axis] for axis in replicas)

    for rank, box in enumerate(boxes):
        held = chosen.setdefault(box, rank)
        if rank == owner or (held != owner and row(rank) == row(owner) != row(held)):
            chosen[box] = rank
    return sorted(chosen.values())


def waves_of(
    matrices: Sequence[Matrix], ranks: Ranks, staying: Sequence[RowsOfRanks] = ()
) -> list[Wave]:
    """Cut so that no owner takes more than WAVE_BYTES of gradients at a time, or one matrix."""
    pieces: dict[int, list[list[Matrix]]] = {}
    filled: dict[int, int] = {}
    for matrix in matrices:
        size = matrix.param.numel() * matrix.dtype.itemsize
        own = pieces.setdefault(matrix.owner, [])
        if not own or filled[matrix.owner] + size > WAVE_BYTES:
            own.append([])
            filled[matrix.owner] = 0
        own[-1].append(matrix)
        filled[matrix.owner] += size
    count = max(map(len, pieces.values()), default=1 if staying else 0)
    waves = []
    for k in range(count):
        parts = [m for own in pieces.values() if k < len(own) for m in own[k]]
        waves.append(Wave(parts, ranks, () if k else staying))
    return waves


def are_parts_of(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether distinct parts begin apart, lie within a whole and have as many elements."""
    distinct = [box for box in dict.fromkeys(boxes) if box.numel]
    within = all(
        first >= 0 and first + size <= length
        for box in distinct
        for first, size, length in zip(box.offsets, box.sizes, shape, strict=True)
    )
    apart = len({box.offsets for box in distinct}) == len(distinct)
    return within and apart and sum(box.numel for box in distinct) == math.prod(shape)
