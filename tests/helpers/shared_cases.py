"""What each of four ranks does with matrices that they share."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.rank_cases import (
    F32,
    F64,
    LAYOUTS,
    backward,
    everything,
    far,
    full,
    laid_out,
    mesh,
    optimizer_of,
    take_gradients,
    takes_part,
    whole,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rootfree_fused.optimizer import exchange


def alone(model):
    """On a mesh of this rank."""
    return fully_shard(model, mesh=mesh(4, 1)["inner"])


def is_one_rank(name, layout, changes):
    """Whether every bit is that of a world of one, given the same gradients, after five steps."""
    if not takes_part(layout):
        mesh(4, 1)
        return True
    dtype = F64 if changes["factor_dtype"] == F64 else F32
    changes = {**changes, "initial_square_avg": 1.0}  # a sum over ranks, where vectors start
    one, spread = alone(whole(dtype)), LAYOUTS[layout](whole(dtype))
    optimizers = [optimizer_of(name, model, **changes) for model in (one, spread)]
    for seed in range(5):
        optimizers[1].zero_grad()
        backward(spread, seed, dtype)
        take_gradients(one, spread)
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(everything(spread, optimizers[1]), everything(one, optimizers[0]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def sends(name, wave_bytes):
    """How many waves six matrices of 8 x 8 take, the bytes that a step sends, and its results.

    And the bytes of this rank's state.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(6))).to(F64)
    fully_shard(model, mesh=mesh(4))
    original, kept = dist.all_to_all_single, exchange.WAVE_BYTES
    sent = []

    def counted(received, given, sizes, own_sizes, group):
        assert len(given) == sum(own_sizes)
        sent.append(sum(own_sizes) - own_sizes[dist.get_rank(group)])
        return original(received, given, sizes, own_sizes, group=group)

    try:
        exchange.WAVE_BYTES = wave_bytes
        optimizer = optimizer_of(name, model, factor_dtype=F64)
        for seed in range(3):
            torch.manual_seed(seed)
            model(torch.randn(4, 8, dtype=F64)).square().mean().backward()
            dist.all_to_all_single = counted
            sent.clear()
            optimizer.step()
            dist.all_to_all_single = original
            optimizer.zero_grad()
    finally:
        exchange.WAVE_BYTES, dist.all_to_all_single = kept, original
    waves = optimizer._sharing.waves(0)
    assert len(sent) == 2 * len(waves)
    assert sum(sent) == sum(wave.bytes_sent for wave in waves)
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    return len(waves), sum(sent), everything(model, optimizer), held


def follows_with(name, layout, changes):
    """The largest error of the parameters beside one process."""
    plain, spread = whole(), LAYOUTS[layout](whole())
    optimizers = [
        optimizer_of(name, plain, factor_dtype=F64),
        optimizer_of(name, spread, factor_dtype=F64, **changes),
    ]
    for seed in range(5):
        optimizers[1].zero_grad()
        backward(spread, seed)
        take_gradients(plain, spread)
        for optimizer in optimizers:
            optimizer.step()
    values = [[full(p.detach()) for p in model.parameters()] for model in (spread, plain)]
    return far(*values)


def replicas_share(name, dtype):
    """The largest error of a model that every rank has, with the work shared, beside one process.

    And how many of its state's bytes this rank has.
    """
    plain, shared = whole(), whole()
    world = dist.group.WORLD
    optimizers = [
        optimizer_of(name, plain, factor_dtype=dtype),
        optimizer_of(name, shared, factor_dtype=dtype, process_group=world),
    ]
    for seed in range(5):
        plain.zero_grad()
        backward(plain, seed)
        take_gradients(shared, plain)
        for optimizer in optimizers:
            optimizer.step()
    saved = optimizers[1].state_dict()
    # One process takes what they save, and they take what it saved.
    resumed = optimizer_of(name, plain, factor_dtype=dtype)
    resumed.load_state_dict(saved)
    again = optimizer_of(name, shared, factor_dtype=dtype, process_group=world)
    again.load_state_dict(resumed.state_dict())
    for optimizer in (resumed, again):
        for one, other in zip(
            saved["state"].values(), optimizer.state_dict()["state"].values(), strict=True
        ):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    held = [v.nbytes for state in optimizers[1].state.values() for v in state.values()]
    return far(everything(shared, optimizers[1]), everything(plain, optimizers[0])), sum(held)


def goes_on_with_other_ranks(name, before, after, how, folder):
    """Whether a checkpoint of four ranks goes on on two, or the other way, to the bit."""
    changes = {"factor_dtype": torch.bfloat16}
    model, optimizer = LAYOUTS[before](whole(F32)) if takes_part(before) else None, None
    if model is not None:
        optimizer = optimizer_of(name, model, **changes)
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed, F32)
            optimizer.step()
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        group = mesh(2).get_group() if before == "FSDP2 of 2" else None
        if how == "async":
            dcp.async_save(saved, checkpoint_id=folder, process_group=group).result()
        else:
            dcp.save(saved, checkpoint_id=folder, process_group=group)
    dist.barrier()
    # All ranks know parameters and gradients by the first, which takes part in both.
    values = _of_first_rank(lambda: [full(p.detach()) for p in model.parameters()], before)
    other, resumed = None, None
    if takes_part(after):
        other = LAYOUTS[after](whole(F32))
        resumed = optimizer_of(name, other, **changes)
        with torch.no_grad():
            for p, q in zip(values, other.parameters(), strict=True):
                q.copy_(laid_out(p, q))
        into = {"optimizer": get_optimizer_state_dict(other, resumed)}
        group = mesh(2).get_group() if after == "FSDP2 of 2" else None
        dcp.load(into, checkpoint_id=folder, process_group=group)
        set_optimizer_state_dict(other, resumed, into["optimizer"])
    for seed in range(3, 5):
        plain = whole(F32)
        backward(plain, seed, F32)
        for one, of in ((model, optimizer), (other, resumed)):
            if one is not None:
                take_gradients(one, plain)
                of.step()
    found = [everything(*pair) for pair in ((model, optimizer), (other, resumed)) if pair[0]]
    return len(found) == 1 or all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _of_first_rank(value, layout):
    parts = [value() if takes_part(layout) else None]
    dist.broadcast_object_list(parts, 0)
    return parts[0]


def full_state_goes_to_one_process(name, broadcast):
    """A full state on the host goes on in another layout to the bit, of one rank or of each."""
    changes = {"factor_dtype": torch.bfloat16}
    model, other = LAYOUTS["HSDP"](whole(F32)), LAYOUTS["FSDP2 of 4"](whole(F32))
    optimizers = [optimizer_of(name, m, **changes) for m in (model, other)]
    for seed in range(3):
        backward(model, seed, F32)
        take_gradients(other, model)
        for optimizer in optimizers[:1]:
            optimizer.step()
        optimizers[0].zero_grad()
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(laid_out(full(p.detach()), q))
    given = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, optimizers[0], options=given)
    assert bool(saved) == (dist.get_rank() == 0)  # offloaded, torch leaves it on the first rank
    taken = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    if not broadcast:
        parts = [saved]
        dist.broadcast_object_list(parts, 0)
        (saved,) = parts
    assert torch.int16 not in _dtypes(saved)
    set_optimizer_state_dict(other, optimizers[1], saved, options=taken)
    for seed in range(3, 5):
        backward(model, seed, F32)
        take_gradients(other, model)
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad()
    pairs = zip(everything(other, optimizers[1]), everything(model, optimizers[0]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _dtypes(value):
    if isinstance(value, torch.Tensor):
        return {value.dtype}
    if isinstance(value, dict):
        return set().union(*map(_dtypes, value.values()))
    return set()


def experts(name, placement, dtype=F64):
    """The largest error of a stack of matrices beside one process, and the bytes of state here.

    After a save of that, which is loaded where it is cut in another way, and from there back.
    """
    torch.manual_seed(0)
    start = torch.randn(8, 5, 3, dtype=F64)
    plain = torch.nn.Parameter(start.clone())
    placements = {"by member": [Shard(0)], "by row": [Shard(1)], "whole": [Replicate()]}

    def cut(how):
        spread = distribute_tensor(start.clone(), mesh(4), placements[how], src_data_rank=None)
        spread = torch.nn.Parameter(spread)
        return spread, optimizer_of(
            name, torch.nn.ParameterList([spread]), factor_dtype=dtype, batch_axes=1
        )

    spread, optimizer = cut(placement)
    whole_ = optimizer_of(name, torch.nn.ParameterList([plain]), factor_dtype=dtype, batch_axes=1)
    optimizers = [whole_, optimizer]
    for t in range(4):
        if t == 2:  # by way of the others
            for how in ("by row", "by member", placement):
                _, other = cut(how)
                other.load_state_dict(optimizer.state_dict())
                optimizer = other
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].copy_(spread)
            spread = optimizer.param_groups[0]["params"][0]
            optimizers[1] = optimizer
        plain.grad = torch.randn(8, 5, 3, dtype=F64)
        spread.grad = laid_out(plain.grad, spread)
        for optimizer in optimizers:
            optimizer.step()
    held = sum(
        value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes
        for value in optimizers[1].state[spread].values()
    )
    return far([full(spread.detach())], [plain.detach()]), held
