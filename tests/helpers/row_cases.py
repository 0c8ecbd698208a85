"""What each of four ranks does with matrices whose rows stay on the ranks that have them."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.optimizers import SETTINGS, accepted
from helpers.rank_cases import F32, F64, far, full, laid_out, mesh, takes_part
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from rootfree_fused.optimizer.shards import local

# Over four ranks 16, 16, 16, 13 rows; 3, 3, 3, 0; and a matrix of dense factors; a vector.
SHAPES = (61, 4), (9, 2), (2, 3), (5,)
DIAGONAL_ROWS = {"structures": "dense_or_diagonal", "max_dense_dim": 4}
LAYOUTS = {
    "FSDP2 of 4": ((4,), [Shard(0)]),
    "FSDP2 of 2": ((2,), [Shard(0)]),
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "rows over both axes": ((2, 2), [Shard(0), Shard(0)]),
    "tensor parallel and FSDP2": (
        (2, 2),
        [_StridedShard(0, split_factor=2), Shard(0)],
    ),
    "columns": ((4,), [Shard(1)]),
}
STAYING = [name for name in LAYOUTS if name != "columns"]


class Tall(torch.nn.Module):
    def __init__(self, dtype=F64, shapes=SHAPES):
        super().__init__()
        torch.manual_seed(0)
        values = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        self.values = torch.nn.ParameterList(values)


def tall(layout="one process", dtype=F64, shapes=SHAPES):
    """On the ranks of a layout, as `fully_shard` or as placements lay it."""
    model = Tall(dtype, shapes)
    if layout == "one process":
        return model
    sizes, placements = LAYOUTS[layout]
    if layout in ("FSDP2 of 4", "HSDP"):
        return fully_shard(model, mesh=mesh(*sizes))
    for i, value in enumerate(model.values):
        own = placements if value.dim() > 1 or layout != "columns" else [Replicate()]
        spread = distribute_tensor(value.detach(), mesh(*sizes), own, src_data_rank=None)
        model.values[i] = torch.nn.Parameter(spread)
    return model


def optimizer_of(name, model, **changes):
    cls, settings = SETTINGS[name]
    changes = {"factor_dtype": F64, **DIAGONAL_ROWS, **changes}
    return cls(model.parameters(), **accepted(name, {"batch_size": 8, **settings, **changes}))


def set_gradients(models, seed, dtype=F64):
    torch.manual_seed(seed)
    for params in zip(*(model.parameters() for model in models), strict=True):
        grad = 0.1 * torch.randn(params[0].shape, dtype=F64).to(dtype)
        for p in params:
            p.grad = laid_out(grad, p)


def which_stay(optimizer):
    return [optimizer._stays(p, group) for group in optimizer.param_groups for p in group["params"]]


def everything(model, optimizer):
    """Parameters and states by the order of keys, whole.

    Of the momenta of IFShampoo's factors, averages of differences to I / 2, what that is taken of.
    """
    found = [full(p.detach()) for p in model.parameters()]
    for state in optimizer.state_dict()["state"].values():
        for key in sorted(state):
            value = full(state[key])
            if key.startswith("factor_momentum"):
                dense = value.dim() > 1 and value.shape[-2] == value.shape[-1]
                value = value + 0.5 * (torch.eye(value.shape[-1]) if dense else 1)
            found.append(value)
    return found


def alike_on_ranks(param, state):
    """Whether what no rank has a part of has the same bits on all."""
    mesh_ = param.device_mesh
    group = mesh_.get_group() if mesh_.ndim == 1 else dist.group.WORLD
    plain = [value for value in state.values() if not isinstance(value, DTensor)]
    assert len(plain) > 1
    for value in plain:
        every = [torch.empty_like(value) for _ in range(mesh_.size())]
        dist.all_gather(every, value, group=group)
        if not all(torch.equal(value, other) for other in every):
            return False
    return True


def rows_follow_the_whole(name, layout, changes, steps=5):
    """The largest error beside one process, and which rows stay."""
    if not takes_part(layout):
        return None
    shapes = changes.pop("shapes", SHAPES)
    dtype = changes.pop("dtype", F64)
    models = [tall(of, dtype, shapes) for of in ("one process", layout)]
    plain, spread = (optimizer_of(name, model, **changes) for model in models)
    for seed in range(steps):
        set_gradients(models, seed, dtype)
        for optimizer in (plain, spread):
            optimizer.step()
    assert all(bool(o._prepared._steps) for o in (plain, spread)), "steps are prepared"
    stay = which_stay(spread)
    for p, stays in zip(models[1].parameters(), stay, strict=True):
        assert not stays or alike_on_ranks(p, spread.state[p])
    found = everything(models[1], spread), everything(models[0], plain)
    return far(*found), stay


def gathered_by_torch(name):
    """Whether torch gathers what lies on a mesh rightly before and after steps on it."""
    value = torch.arange(61 * 4.0).view(61, 4)
    on = mesh(2, 2), [Shard(0), Shard(0)]
    other = distribute_tensor(value, *on, src_data_rank=None)
    found = [torch.equal(other.full_tensor(), value)]
    for layout in ("rows over both axes", "HSDP"):
        model = tall(layout)
        optimizer = optimizer_of(name, model)
        set_gradients([model], 0)
        optimizer.step()
        optimizer.state_dict()
        found.append(torch.equal(other.full_tensor(), value))
    return found


def two_of_four(name):
    """The error of matrices of two ranks, on a mesh of two axes without names; others have none.

    One of the ranks reads its state before; all make a group afterwards.
    """
    two, rank = DeviceMesh("cpu", [[0], [1]]), dist.get_rank()
    error = 0.0
    if rank < 2:
        models = [tall(), tall()]
        for i, value in enumerate(models[1].values):
            on = two, [Shard(0), Replicate()]
            spread = distribute_tensor(value.detach(), *on, src_data_rank=None)
            models[1].values[i] = torch.nn.Parameter(spread)
        optimizers = [optimizer_of(name, model) for model in models]
        assert rank == 0 or len(optimizers[1].state) == len(SHAPES)
        dist.barrier(two.get_group(0))
        for seed in range(3):
            set_gradients(models, seed)
            for optimizer in optimizers:
                optimizer.step()
        error = far(*(everything(*pair) for pair in zip(models, optimizers, strict=True)))
    own = torch.ones(())
    dist.all_reduce(own, group=dist.new_group())
    return error, own.item()


def rows_send(name, interval, shapes=SHAPES):
    """What this rank gives to each collective of an update step, and of one between; its state."""
    model = tall("FSDP2 of 4", shapes=shapes)
    optimizer = optimizer_of(name, model, update_interval=interval)
    given = []
    original = {
        key: getattr(dist, key)
        for key in ("all_to_all_single", "all_reduce", "all_gather_into_tensor")
    }

    def counted(key):
        def call(*args, **kwargs):
            given.append((key, args[0 if key == "all_reduce" else 1].nbytes))
            return original[key](*args, **kwargs)

        return call

    found = []
    for seed in range(3):
        set_gradients([model], seed)
        given.clear()
        if seed:  # the first agrees on a plan
            for key in original:
                setattr(dist, key, counted(key))
        try:
            optimizer.step()
        finally:
            for key, function in original.items():
                setattr(dist, key, function)
        found.append(list(given))
    (wave,) = optimizer._sharing.waves(0)
    held = [
        sum(local(value).nbytes for value in optimizer.state[p].values())
        for p in model.parameters()
    ]
    me = dist.get_rank()
    others = sum(wave._grads_sent.sizes) - wave._grads_sent.sizes[me]
    return found[1:], held, (wave.bytes_sent, others)


def rows_go_on(name, before, after, how, folder, changes=None):
    """The largest error of going on elsewhere beside going on, and whether all loaded alike."""
    changes = changes or {}
    model, optimizer = None, None
    values = [None]
    if before == "one process" or takes_part(before):
        model = tall(before)
        optimizer = optimizer_of(name, model, **changes)
        for seed in range(3):
            set_gradients([model], seed)
            optimizer.step()
        values = [[full(p.detach()).clone() for p in model.parameters()]]
    dist.broadcast_object_list(values, 0)
    options = StateDictOptions(full_state_dict=how == "full")
    groups = {"FSDP2 of 2": lambda: mesh(2).get_group()}
    saved = [None]
    if model is not None and before == "one process":
        saved = [optimizer.state_dict()]
    elif model is not None:
        saved = [get_optimizer_state_dict(model, optimizer, options=options)]
        if how == "sharded":
            group = groups.get(before, lambda: None)()
            dcp.save({"optimizer": saved[0]}, checkpoint_id=folder, process_group=group)
    dist.barrier()
    if how == "full":
        dist.broadcast_object_list(saved, 0)
    other, resumed = None, None
    if after == "one process" or takes_part(after):
        other = tall(after)
        resumed = optimizer_of(name, other, **changes)
        with torch.no_grad():
            for p, q in zip(values[0], other.parameters(), strict=True):
                q.copy_(laid_out(p, q))
        if before == "one process":
            resumed.load_state_dict(saved[0])
        elif how == "full":
            set_optimizer_state_dict(other, resumed, saved[0], options=options)
        else:
            into = {"optimizer": get_optimizer_state_dict(other, resumed)}
            group = groups.get(after, lambda: None)()
            dcp.load(into, checkpoint_id=folder, process_group=group)
            set_optimizer_state_dict(other, resumed, into["optimizer"])
    pairs = [(m, o) for m, o in ((model, optimizer), (other, resumed)) if m is not None]
    found = [everything(*pair) for pair in pairs]
    loaded = len(found) < 2 or all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for seed in range(3, 5):
        for m, o in pairs:
            set_gradients([m], seed)
            o.step()
    found = [everything(*pair) for pair in pairs]
    return loaded, far(*found) if len(found) == 2 else 0.0


def rows_disagree(name, case):
    """What a rank raises where another steps on other things; nothing moves on any."""
    model = tall("FSDP2 of 4")
    interval = 1 if "anew" in case else 3
    optimizer = optimizer_of(name, model, update_interval=interval)
    set_gradients([model], 0)
    optimizer.step()
    set_gradients([model], 1)
    first, rank = model.values[0], dist.get_rank()
    if (case == "no gradient on one" and rank == 2) or case == "no gradient on all":
        first.grad = None
    elif case == "another lr" and rank == 1:
        optimizer.param_groups[0]["lr"] = 0.125
    elif case == "a setting out of range" and rank == 1:
        optimizer.param_groups[0]["damping"] = -1.0
    elif case == "another count" and rank == 3:
        optimizer.state[first]["step"].add_(2)
    elif case == "a lost state" and rank == 3:
        del optimizer.state[first]["factor_1"]
    elif case == "a matrix anew on all" or (case == "a matrix anew on one" and rank == 1):
        optimizer.state.pop(first)
    before = [local(p.detach()).clone() for p in model.parameters()]
    kept = [local(v).clone() for s in optimizer.state.values() for v in s.values()]
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        states = [local(v) for s in optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, [local(p.detach()) for p in model.parameters()], before))
        assert "anew" in case or all(map(torch.equal, states, kept))
        return f"{type(error).__name__}: {error}"
    after = [local(p.detach()) for p in model.parameters()]
    return [torch.equal(a, b) for a, b in zip(after, before, strict=True)]


def rows_are_skipped_at_an_inf(name):
    """Whether a step that a scaler skips moves nothing, and the largest error after others."""
    models = [tall("one process", F32), tall("FSDP2 of 4", F32)]
    optimizers = [optimizer_of(name, m, factor_dtype=F32, amp_scaling=True) for m in models]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in models]
    for seed in range(4):
        set_gradients(models, seed, F32)
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            scaler.scale(torch.ones(()))
            for p in model.parameters():
                p.grad.mul_(64.0 if seed < 3 else 32.0)
            if seed == 2 and model is models[0]:
                model.values[0].grad[-1, 0] = torch.inf
            elif seed == 2 and dist.get_rank() == 3:
                model.values[0].grad.to_local()[-1, 0] = torch.inf
            before = [full(p.detach()).clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            after = [full(p.detach()) for p in model.parameters()]
            assert any(map(torch.equal, after, before)) == (seed == 2)
    return far(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))


def rows_start_again(name, changes):
    """Whether state that has not started starts, loaded where it had; the largest error."""
    shapes = changes.pop("shapes", SHAPES)
    models = [tall("one process", shapes=shapes), tall("FSDP2 of 4", shapes=shapes)]
    changes = {"initial_square_avg": "auto", "weight_decay": 0.0, **changes}
    optimizers = [optimizer_of(name, m, **changes) for m in models]
    fresh = [optimizer.state_dict() for optimizer in optimizers]
    for seed in range(4):
        if seed == 2:
            for optimizer, saved in zip(optimizers, fresh, strict=True):
                optimizer.load_state_dict(saved)
        set_gradients(models, seed)
        if seed in (0, 2):  # which start nothing
            for p in (p for model in models for p in model.parameters()):
                p.grad.mul_(0)
        before = [local(p.detach()).clone() for p in models[1].parameters()]
        for optimizer in optimizers:
            optimizer.step()
        after = [local(p.detach()) for p in models[1].parameters()]
        moved = [not torch.equal(a, b) for a, b in zip(after, before, strict=True) if b.numel()]
        assert moved == [seed in (1, 3)] * len(moved)
    return far(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))


def rows_get_an_owner(name):
    """The largest error where a load brings settings with which rows have dense factors."""
    models = [tall("one process"), tall("FSDP2 of 4")]
    dense = {"max_dense_dim": 64}
    optimizers = [
        optimizer_of(name, model, **own) for model, own in zip(models, (dense, {}), strict=True)
    ]
    set_gradients(models, 0)
    for optimizer in optimizers:
        optimizer.step()
    assert which_stay(optimizers[1])[0]
    with torch.no_grad():
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.copy_(laid_out(p.detach(), q))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert not any(which_stay(optimizers[1]))
    for seed in range(1, 4):
        set_gradients(models, seed)
        for optimizer in optimizers:
            optimizer.step()
    return far(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))


def rows_refuse_what_does_not_fit(name):
    """What a load says of state that is none of this matrix; nothing moves."""
    model = tall("FSDP2 of 4")
    optimizer = optimizer_of(name, model)
    set_gradients([model], 0)
    optimizer.step()
    kept = [local(v).clone() for s in optimizer.state.values() for v in s.values()]
    said = []
    for key, value in (
        ("factor_0", torch.ones((), dtype=F64)),
        ("factor_0", torch.ones(7, dtype=F64)),
        ("factor_0", "none"),
        ("factor_0", torch.ones(61, dtype=F64, device="meta")),
        ("factor_1", torch.ones(3, 3, dtype=F64)),
        ("momentum_buffer", torch.ones(61, 3, dtype=F64)),
    ):
        saved = optimizer.state_dict()
        saved["state"][0][key] = value
        try:
            optimizer.load_state_dict(saved)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
        states = [local(v) for s in optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, states, kept))
    return said
