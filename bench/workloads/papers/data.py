"""Readers of image data in folders that the user names: CIFAR-100's pickles, ImageWoof's JPEGs.

Images are uint8 (n, 3, height, width), labels (n,).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...measuring.common import optional
from .workload import Set

CLASSES = 100
SIDE = 256  # of ImageWoof's images in memory: their middle, its shorter side of this length
IMAGES = (".jpeg", ".jpg", ".png")
CIFAR = "cifar-100-python/train and test, as www.cs.toronto.edu/~kriz/cifar.html has them"
IMAGEWOOF = "train/CLASS/*.JPEG and val/CLASS/*.JPEG, as github.com/fastai/imagenette has them"


class ArraysOnly(pickle.Unpickler):
    """Builds numbers, text, containers and numpy arrays, and calls nothing else."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name, if it makes arrays; else UnpicklingError."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it calls {module}.{name}; only arrays are read")
        return super().find_class(module, name)


def cifar100(folder: Path, part: str) -> Set:
    """The 32 x 32 images of "train" or "test"; SystemExit where they are missing or another's."""
    path = folder / "cifar-100-python" / part
    if not path.is_file():
        raise SystemExit(f"{path} is missing; pass --data DIR, a folder with {CIFAR}")
    with path.open("rb") as file:
        try:
            read = ArraysOnly(file, encoding="bytes").load()
            images, labels = torch.tensor(read[b"data"]), torch.tensor(read[b"fine_labels"])
        except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError) as error:
            raise SystemExit(f"{path} is not CIFAR-100's: {error}") from error
    sizes_fit = images.dtype == torch.uint8 and images.shape == (len(labels), 3 * 32 * 32)
    if not sizes_fit or labels.min() < 0 or labels.max() >= CLASSES:
        raise SystemExit(
            f"{path} is not CIFAR-100's: {tuple(images.shape)} {images.dtype} and labels from "
            f"{labels.min()} to {labels.max()} instead of (n, 3072) uint8 and 0 to {CLASSES - 1}"
        )
    return images.view(-1, 3, 32, 32), labels


def imagewoof(folder: Path, part: str) -> Set:
    """The images of "train" or "val", 256 x 256; SystemExit where a class has none."""
    classes = sorted(path for path in (folder / part).glob("*") if path.is_dir())
    if not classes:
        raise SystemExit(f"{folder / part} is missing; pass --data DIR, a folder with {IMAGEWOOF}")
    found: list[Tensor] = []
    labels: list[int] = []
    for label, of_class in enumerate(classes):
        paths = sorted(path for path in of_class.iterdir() if path.suffix.lower() in IMAGES)
        if not paths:
            raise SystemExit(f"{of_class} has no image; {folder} is to have {IMAGEWOOF}")
        found += map(image, paths)
        labels += [label] * len(paths)
    return torch.stack(found), torch.tensor(labels)


def image(path: Path) -> Tensor:
    """(3, 256, 256), its shorter side scaled to 256, and the middle of the longer one."""
    with optional("PIL.Image").open(path) as opened:
        opened.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded no larger than needed
        scale = SIDE / min(opened.size)
        wide, high = (max(SIDE, round(scale * side)) for side in opened.size)
        left, top = (wide - SIDE) // 2, (high - SIDE) // 2
        small = opened.convert("RGB").resize((wide, high), resample=2)
        middle = small.crop((left, top, left + SIDE, top + SIDE))
    return (
        torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8)
        .view(SIDE, SIDE, 3)
        .permute(2, 0, 1)
        .contiguous()
    )


def divided(whole: Set, share: float = 0.1) -> tuple[Set, Set]:
    """Images and labels without a share of them, and that share: the same at every call."""
    images, labels = whole
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    last = round(share * len(labels))
    kept, held = order[last:], order[:last]
    return (images[kept], labels[kept]), (images[held], labels[held])
