"""What the launches of a step of root-free Shampoo left in the scratch, to explain its update."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch

from rootfree_fused.ops import extensions


@contextmanager
def watched_launches():
    """The launches of the last step, within; an empty list where no kernel ran."""
    kernels, seen = extensions.triton("rootfree_shampoo"), []
    if isinstance(kernels, ImportError):
        yield seen
        return
    launch = kernels._launch

    def watched(launches, *args):
        seen[:] = [launches]
        launch(launches, *args)

    with patch.object(kernels, "_launch", watched):
        yield seen


def told_of_sums(seen):
    """Of the first matrix: RMS of P as stored, and by each of the sums that were kept of it."""
    from rootfree_fused.kernels.rootfree_shampoo_jobs import ROWS as ROWS_A_PROGRAM
    from rootfree_fused.kernels.rootfree_shampoo_slots import DIRECTION, ROWS
    from rootfree_fused.kernels.slots import TILE, padded

    if not seen:
        return "no kernel ran"
    (launches,) = seen
    jobs, tiles = launches.jobs.cpu(), launches.tiles.cpu()
    direction, rows = (
        jobs[tiles[launches.plan.launches[name][-1].start, TILE.job]]
        for name in ("directions", "rows")
    )
    m, n = direction[DIRECTION.m].item(), direction[DIRECTION.n].item()
    wide = direction[DIRECTION.k] == 0

    def kept(address, count, dtype=torch.float32):
        first = -1 - address.item()
        found = launches.scratch[first : first + count * dtype.itemsize].view(dtype)
        return found.double().cpu()

    p = kept(direction[DIRECTION.output], m * padded(n), torch.float32 if wide else launches.dtype)
    squares = p.view(m, padded(n))[:, :n].square()
    by_tile = kept(rows[ROWS.tile_sums], rows[ROWS.tile_sums_count].item()).sum()
    by_row = kept(rows[ROWS.row_sums], rows[ROWS.row_sums_count].item() * m).view(-1, m).sum(0)
    factors = kept(rows[ROWS.factors], m)
    totals = kept(rows[ROWS.totals], -(-m // ROWS_A_PROGRAM)).sum()
    balanced = (squares.sum(1) * factors.square()).sum() / n
    return (
        f"RMS of P as stored {(squares.sum() / (m * n)).sqrt():.8g}, "
        f"by its tiles' sums {(by_tile / (m * n)).sqrt():.8g}, "
        f"by its rows' {(by_row.sum() / (m * n)).sqrt():.8g}; "
        f"of a row at most {(by_row / squares.sum(1)).sub(1).abs().max():.2g} off; "
        f"balanced rows' sum {balanced:.8g}, kept {totals:.8g}"
    )
