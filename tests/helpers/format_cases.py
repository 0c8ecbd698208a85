"""What each of four ranks does with weights and state in fewer bytes, beside one process."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from helpers.rank_cases import LAYOUTS, everything, full, laid_out, take_gradients
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from rootfree_fused import RootFreeAdamW


class Wide(torch.nn.Module):
    """Rows of one block each, over four ranks 10 and 9, or 10, 10, 10 and 7; and vectors."""

    def __init__(self, width=256):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(width, 38), torch.nn.Linear(width, 37)
        self.to(torch.bfloat16)

    def forward(self, x):
        return self.first(x).float().square().mean() + self.second(x).float().square().mean()


def _optimizer_of(model, residual, state):
    formats = {"param_residual": residual, "state_format": state, "initial_square_avg": 1.0}
    return RootFreeAdamW(model.parameters(), batch_size=8, lr=1e-2, **formats)


def _step(seed, model, optimizer, others=()):
    """A step of the model, and of others on its gradients."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(4, 256).bfloat16()).backward()
    for other, stepped in others:
        take_gradients(other, model)
        stepped.step()
    optimizer.step()


def _equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def formats_have_the_bits_of_the_whole(layout, residual, state):
    plain, spread = Wide(), LAYOUTS[layout](Wide())
    optimizers = [_optimizer_of(model, residual, state) for model in (plain, spread)]
    for seed in range(4):
        _step(seed, spread, optimizers[1], [(plain, optimizers[0])])
    return _equal(everything(spread, optimizers[1]), everything(plain, optimizers[0]))


def formats_go_on_in_another_layout(before, after, how, residual, state, folder):
    """Whether a checkpoint of one layout goes on in another, or in one process, to the bit."""
    model = LAYOUTS[before](Wide())
    other = Wide() if after == "one process" else LAYOUTS[after](Wide())
    optimizer, resumed = (_optimizer_of(m, residual, state) for m in (model, other))
    for seed in range(2):
        _step(seed, model, optimizer)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(laid_out(full(p.detach()), q))
    options = StateDictOptions(
        flatten_optimizer_state_dict=how == "flat", full_state_dict=how == "full"
    )
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if how != "full":
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        into = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
        dcp.load(into, checkpoint_id=folder)
        saved = into["optimizer"]
    set_optimizer_state_dict(other, resumed, saved, options=options)
    for seed in range(2, 4):
        _step(seed, model, optimizer, [(other, resumed)])
    return _equal(everything(other, resumed), everything(model, optimizer))


def cut_blocks():
    """What is said of rows that are no whole blocks."""
    try:
        _optimizer_of(LAYOUTS["FSDP2 of 4"](Wide(200)), 8, "8bit")
    except NotImplementedError as error:
        return str(error)
    return "no error"
