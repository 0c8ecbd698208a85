"""Batched products by the vendor's library, with sums in float32 whatever the user's setting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_lock = threading.Lock()  # two threads would each restore what the other has set


def bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b for stacks of bfloat16 matrices; partial sums are never rounded to bfloat16."""
    with _wide_reductions():
        torch.bmm(a, b, out=out)


@contextmanager
def _wide_reductions() -> Iterator[None]:
    # PyTorch lets cuBLAS add up parts of a sum in bfloat16, unless a global setting forbids it.
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    with _lock:
        allowed = getattr(settings, name)
        split = getattr(settings, name + "_split_k", None)  # torch < 2.10 has one setting
        setattr(settings, name, False)
        try:
            yield
        finally:
            setattr(settings, name, allowed if split is None else (allowed, split))
