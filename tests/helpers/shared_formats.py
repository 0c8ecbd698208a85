"""What each of four ranks does with matrices that they share, in fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.rank_cases import full, laid_out, mesh, takes_part
from helpers.row_cases import everything, optimizer_of, set_gradients, tall, which_stay
from helpers.shared_cases import alone
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rootfree_fused import convert, to_bfloat16_
from rootfree_fused.optimizer.shards import local
from rootfree_fused.reference.formats import join_weight

BF16, F32 = torch.bfloat16, torch.float32
# Whole blocks of 256 a row, blocks that run over rows, state in float32, a vector.
SHAPES = (38, 256), (67, 101), (6, 4), (5,)
DENSE = {"structures": "dense", "max_dense_dim": 2048, "factor_dtype": F32, "lr": 1e-2}


def _model(layout, dtype=BF16):
    if layout == "one rank":
        return alone(tall(dtype=dtype, shapes=SHAPES))
    return tall("one process" if layout == "process group" else layout, dtype, SHAPES)


def _optimizer_of(name, layout, model, residual, state, **changes):
    if layout == "process group":
        changes = {**changes, "process_group": dist.group.WORLD}
    formats = {"param_residual": residual, "state_format": state}
    return optimizer_of(name, model, **DENSE, **formats, **changes)


def _run(pairs, seeds, dtype=BF16):
    """Steps on the same gradients."""
    for seed in seeds:
        set_gradients([model for model, _ in pairs], seed, dtype)
        for _, optimizer in pairs:
            optimizer.step()


def _equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def _copy(values, model):
    with torch.no_grad():
        for value, q in zip(values, model.parameters(), strict=True):
            q.copy_(laid_out(value, q))


def _values(model):
    return [full(p.detach()) for p in model.parameters()]


def shared_formats_have_the_bits_of_one_rank(name, layout, residual, state):
    """And what of the state is here: of which dtypes, and how many bytes of residuals."""
    mesh(4, 1)
    if not takes_part(layout):
        return True, None
    pairs = []
    for where in ("one rank", layout):
        model = _model(where)
        pairs.append((model, _optimizer_of(name, where, model, residual, state)))
    _run(pairs, range(4))
    (one, first), (model, optimizer) = pairs
    assert not any(which_stay(optimizer))
    found = {}
    for p in model.parameters():
        kept = optimizer.state[p].get("param_residual", torch.empty(0))
        assert local(kept).shape == (local(p).shape if residual in (8, 16) else (0,))
        for key, value in optimizer.state[p].items():
            found.setdefault(key, set()).add(local(value).dtype)
    return _equal(everything(model, optimizer), everything(one, first)), found


def shared_formats_go_on(name, before, after, how, residual, state, folder):
    """Whether a checkpoint in the middle goes on in another layout to the bit."""
    mesh(4, 1)
    model = optimizer = saved = values = None
    options = StateDictOptions(full_state_dict=how == "full")
    if takes_part(before):
        model = _model(before)
        optimizer = _optimizer_of(name, before, model, residual, state)
        _run([(model, optimizer)], range(2))
        values = _values(model)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        if how == "saved":
            dcp.save({"optimizer": saved}, checkpoint_id=folder)
    parts = [values, saved if how == "full" else None]
    dist.broadcast_object_list(parts, 0)
    values, saved = parts
    other = _model(after)
    resumed = _optimizer_of(name, after, other, residual, state)
    _copy(values, other)
    if how == "saved":
        into = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
        dcp.load(into, checkpoint_id=folder)
        saved = into["optimizer"]
    set_optimizer_state_dict(other, resumed, saved, options=options)
    _run([(other, resumed)], range(2, 4))
    if model is None:
        everything(other, resumed)
        return True
    _run([(model, optimizer)], range(2, 4))
    return _equal(everything(other, resumed), everything(model, optimizer))


def shared_formats_widen_and_narrow(name):
    """Whether wider formats keep all of a checkpoint, and narrower ones take it on purpose."""
    model, wide, narrow = _model("FSDP2 of 4"), _model("HSDP"), _model("FSDP2 of 4")
    optimizer = _optimizer_of(name, "FSDP2 of 4", model, 8, "8bit")
    other = _optimizer_of(name, "HSDP", wide, 16, "float32")
    back = _optimizer_of(name, "FSDP2 of 4", narrow, 8, "8bit")
    _run([(model, optimizer)], range(3))
    other.load_state_dict(optimizer.state_dict())
    saved = other.state_dict()
    with pytest.raises(ValueError, match=r"convert\.to_format"):
        back.load_state_dict(saved)
    back.load_state_dict(convert.to_format(saved, back))
    kept = everything(narrow, back), everything(model, optimizer)
    return _equal(*(values[len(SHAPES) :] for values in kept))  # of the state


def a_shared_model_becomes_bfloat16(name):
    """Whether nothing is lost of float32 weights, and a step goes on from them."""
    plain, model = _model("one rank", F32), _model("FSDP2 of 4", F32)
    optimizers = [_optimizer_of(name, "", m, None, "float32") for m in (plain, model)]
    _run([*zip((plain, model), optimizers, strict=True)], range(2), F32)
    to_bfloat16_(model, optimizers[1], 16)
    for seed in range(2, 4):
        set_gradients([model], seed, BF16)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = laid_out(full(p.grad).float(), q)
        for optimizer in optimizers:
            optimizer.step()
    joined, own = [], []
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        residual = local(optimizers[1].state[p]["param_residual"])
        joined.append(join_weight(local(p.detach()), residual))
        own.append(local(laid_out(full(q.detach()), p)))
    return _equal(joined, own)


def a_skipped_step_leaves_shared_formats(name, layout):
    """Whether a step that a scaler skips leaves every bit, and the next does not."""
    model = _model(layout)
    optimizer = _optimizer_of(name, layout, model, 8, "8bit", amp_scaling=True)
    optimizer.grad_scale, found = torch.tensor(1.0), []
    for seed, inf in enumerate((0.0, 1.0, 0.0)):
        optimizer.found_inf = torch.tensor(inf)
        _run([(model, optimizer)], [seed])
        found.append([value.clone() for value in everything(model, optimizer)])
    return _equal(found[0], found[1]) and not _equal(found[1], found[2])


def rows_that_stay_in_formats(name, layout, residual, state):
    """How far the weights are from one process, after a load in the middle.

    Whether that kept every bit, and whether replicas have equal ones.
    """
    changes = {"structures": "diagonal"}
    plain, model, other = _model("one process"), _model(layout), _model(layout)
    pairs = []
    for one in (plain, model, other):
        own = {**DENSE, **changes, "param_residual": residual, "state_format": state}
        pairs.append((one, optimizer_of(name, one, **own)))
    _run(pairs[:2], range(2))
    assert which_stay(pairs[1][1])[0]
    _copy(_values(model), other)
    pairs[2][1].load_state_dict(pairs[1][1].state_dict())
    _run(pairs, range(2, 4))
    kept = _equal(everything(*pairs[1]), everything(*pairs[2]))
    errors = [
        (a.float() - b.float()).norm() / b.float().norm()
        for a, b in zip(_values(model), _values(plain), strict=True)
    ]
    return max(errors).item(), kept


def experts_in_formats(name, residual, state):
    """Whether a stack goes by way of other cuts and on, to the bit, and rounds as one process."""
    torch.manual_seed(0)
    start = torch.randn(8, 32, 16).to(BF16)
    cuts = {"by member": [Shard(0)], "by row": [Shard(1)], "whole": [Replicate()]}
    own = {**DENSE, "batch_axes": 1, "param_residual": residual, "state_format": state}

    def made(how, value):
        if how != "plain":
            value = distribute_tensor(value.clone(), mesh(4), cuts[how], src_data_rank=None)
        spread = torch.nn.Parameter(value.clone())
        return spread, optimizer_of(name, torch.nn.ParameterList([spread]), **own)

    def bits(spread, optimizer):
        (saved,) = optimizer.state_dict()["state"].values()
        return [full(spread.detach()), *(full(saved[key]) for key in sorted(saved))]

    def run(pairs, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            grad = 0.1 * torch.randn(8, 32, 16).to(BF16)
            for spread, optimizer in pairs:
                spread.grad = laid_out(grad, spread)
                optimizer.step()

    plain, kept = made("plain", start), made("by member", start)
    run([plain, kept], range(2))
    same = _equal(bits(*plain), bits(*kept))
    last = kept
    for how in ("by row", "by member", "whole", "by member"):
        following = made(how, full(kept[0].detach()))
        following[1].load_state_dict(last[1].state_dict())
        last = following
    run([kept, last], range(2, 4))
    assert isinstance(last[0], DTensor)
    return same, _equal(bits(*kept), bits(*last))
