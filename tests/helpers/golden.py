"""The released codes' trajectories (tests/golden), and our optimizers with their settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from rootfree_fused import IFShampoo, RootFreeAdamW, RootFreeRMSprop
from rootfree_fused.reference import shape_scale

GOLDEN = Path(__file__).parents[1] / "golden"
MATRIX = sorted(path.stem for path in GOLDEN.glob("ifshampoo_*.npz"))
DIAGONAL = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem not in MATRIX)
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def load(case):
    arrays = np.load(GOLDEN / f"{case}.npz")
    meta = json.loads(bytes(arrays["meta"]).decode())
    return {k: torch.from_numpy(arrays[k].copy()) for k in arrays.files if k != "meta"}, meta


def factor(data, i, axis, axes):
    for key in (f"factor.{i}.axis{axis}", f"factor.w{i}_dim-{axes - axis}"):
        if key in data:
            return data[key]
    return None  # of those that singd made


def diagonal_optimizer(params, meta):
    settings = {key: meta[key] for key in ("lr", "damping", "weight_decay", "batch_size")}
    settings["initial_square_avg"] = 1.0
    if meta["optimizer"] == "root-free AdamW":
        return RootFreeAdamW(
            params, betas=meta["betas"], bias_correction=meta["bias_correction"], **settings
        )
    settings |= {key: meta[key] for key in ("alpha", "momentum", "weight_decay_mode")}
    return RootFreeRMSprop(params, **settings)


def matrix_optimizer(params, meta):
    logarithmic = isinstance(meta["update_interval"], str)
    structure = meta["structure"]
    keys = ("lr", "momentum", "damping", "weight_decay", "weight_decay_mode", "batch_size")
    return IFShampoo(
        params,
        **{key: meta[key] for key in (*keys, "factor_lr", "factor_momentum")},
        update_interval=3 if logarithmic else meta["update_interval"],
        update_schedule="log4" if logarithmic else "constant",
        structures=structure if isinstance(structure, str) else tuple(structure),
        merge_axes=False,
        vector_method="factor",
        initial_square_avg=1.0,
    )


def rootfree_update_rms(shape, meta):
    """What gives an update the RMS of the trajectory, which followed no shape."""
    size = as_matrix(shape)
    return meta["update_rms"] / (shape_scale(*size) if size else 1.0)


def as_matrix(shape):
    """(first axis, all others), or None for a vector."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 1)
    return None if 1 in (rows, columns) else (rows, columns)
