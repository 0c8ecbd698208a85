"""What each of four ranks does: a model in some layout beside the same one whole."""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed.checkpoint as dcp
from helpers.optimizers import SETTINGS, accepted
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

F64, F32 = torch.float64, torch.float32
TENSOR_PARALLEL = {"0": ColwiseParallel(), "2": RowwiseParallel()}


@functools.cache
def mesh(*sizes):
    """Over all four ranks, or over the first two."""
    if sizes == (2,):
        return DeviceMesh("cpu", [0, 1])
    names = ("outer", "inner")[-len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def whole(dtype=F64):
    """Rows of 8, 8, 5, 5, 5, 5: over four ranks some shards are uneven, or empty."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5), torch.nn.LayerNorm(5)
    return torch.nn.Sequential(*layers).to(dtype)


def _parallel_and_sharded(model):
    parallelize_module(model, mesh(2, 2)["inner"], TENSOR_PARALLEL)
    return fully_shard(model, mesh=mesh(2, 2)["outer"])


def _frozen(model):
    model[0].weight.requires_grad_(False)
    return fully_shard(model, mesh=mesh(4))


def _on_two_meshes(model):
    for layer, of in ((model[0], mesh(4)), (model[2], mesh(2, 2)), (model[3], mesh(4))):
        fully_shard(layer, mesh=of)
    return model


LAYOUTS = {
    "FSDP2 on two meshes": _on_two_meshes,
    "FSDP2 of 4": lambda model: fully_shard(model, mesh=mesh(4)),
    "FSDP2 of 2": lambda model: fully_shard(model, mesh=mesh(2)),
    "FSDP2, one frozen": _frozen,
    "HSDP": lambda model: fully_shard(model, mesh=mesh(2, 2)),
    "tensor parallel": lambda model: parallelize_module(model, mesh(4), TENSOR_PARALLEL),
    "tensor parallel and FSDP2": _parallel_and_sharded,
    "replicated": lambda model: distribute_module(model, mesh(4)),
}


def takes_part(layout):
    mesh(2)  # which all ranks have to make
    return layout != "FSDP2 of 2" or torch.distributed.get_rank() < 2


def optimizer_of(name, model, **changes):
    cls, settings = SETTINGS[name]
    settings = accepted(name, {"batch_size": 8, **settings, **changes})
    return cls([p for p in model.parameters() if p.requires_grad], **settings)


def backward(model, seed, dtype=F64, scale=1.0):
    torch.manual_seed(seed)
    x = torch.randn(4, 6, dtype=dtype)
    weight = model[0].weight
    if isinstance(weight, DTensor) and all(p.is_replicate() for p in weight.placements):
        x = DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)
    out = model(x)
    out = out.full_tensor() if isinstance(out, DTensor) else out
    (scale * out.square().mean()).backward()


def take_gradients(model, of):
    """Those of another model, whole or as this one is laid out."""
    for p, q in zip(model.parameters(), of.parameters(), strict=True):
        if q.grad is None:
            p.grad = None
            continue
        p.grad = laid_out(full(q.grad), p)


def laid_out(value, like):
    """A copy of a whole tensor, as another is laid out."""
    if not isinstance(like, DTensor):
        return value.clone()
    every = [Replicate()] * len(like.placements)
    spread = DTensor.from_local(value.clone(), like.device_mesh, every, run_check=False)
    return spread.redistribute(like.device_mesh, like.placements)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(model, optimizer):
    """Parameters and states, whole."""
    found = [full(p.detach()) for p in model.parameters()]
    for state in optimizer.state_dict()["state"].values():
        found += [full(state[key]) for key in sorted(state)]
    return found


def far(found, expected):
    """The largest relative error of any tensor."""
    assert len(found) == len(expected)
    errors = [
        ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors)


def follows_the_whole_model(name, layout, changes, steps=5):
    """The largest error beside one process, over ranks that take part."""
    if not takes_part(layout):
        return 0.0
    plain, spread = whole(), LAYOUTS[layout](whole())
    if layout == "FSDP2, one frozen":
        plain[0].weight.requires_grad_(False)
    optimizers = [optimizer_of(name, model, **changes) for model in (plain, spread)]
    for seed in range(steps):
        optimizers[1].zero_grad()
        backward(spread, seed)
        take_gradients(plain, spread)
        for optimizer in optimizers:
            optimizer.step()
    assert all(bool(o._prepared._steps) for o in optimizers), "steps are prepared"
    return far(everything(spread, optimizers[1]), everything(plain, optimizers[0]))


def gradients_in_another_layout(name):
    """Sums that the ranks have parts of, and shards, of a parameter that all have."""
    start = torch.arange(12, dtype=F64).view(4, 3) / 7
    plain = torch.nn.Parameter(start.clone())
    spread = torch.nn.Parameter(
        DTensor.from_local(start.clone(), mesh(4), [Replicate()], run_check=False)
    )
    optimizers = [
        SETTINGS[name][0]([p], **accepted(name, {"batch_size": 8, **SETTINGS[name][1]}))
        for p in (plain, spread)
    ]
    rank = torch.distributed.get_rank()
    for seed in range(4):
        torch.manual_seed(seed)
        parts = torch.randn(4, 4, 3, dtype=F64)
        plain.grad = parts.sum(0)
        if seed % 2:
            spread.grad = DTensor.from_local(parts[rank], mesh(4), [Partial()], run_check=False)
        else:
            own = plain.grad[rank : rank + 1]
            spread.grad = DTensor.from_local(own, mesh(4), [Shard(0)], run_check=False)
        for optimizer in optimizers:
            optimizer.step()
    return far([full(spread.detach())], [plain.detach()])


def an_inf_on_one_rank_skips_all(name, changes=None):
    """Whether nothing moved, and the step after it does as in one process."""
    plain, spread = whole(F32), LAYOUTS["FSDP2 of 4"](whole(F32))
    found = []
    for model in (plain, spread):
        optimizer = optimizer_of(name, model, amp_scaling=True, **(changes or {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for seed in range(4):
            optimizer.zero_grad()
            backward(model, seed, F32, scaler.scale(torch.ones(())).item())
            before = [full(p.detach()).clone() for p in model.parameters()]
            if seed == 2:  # of the last rank that has a row, in the sharded model
                first = next(model.parameters())
                grad = first.grad
                if model is plain:
                    grad[-1, 0] = torch.inf
                elif torch.distributed.get_rank() == 3:
                    grad.to_local()[-1, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            moved = [
                not torch.equal(full(p.detach()), old)
                for p, old in zip(model.parameters(), before, strict=True)
            ]
            assert any(moved) == (seed != 2), (seed, moved)
        assert scaler.get_scale() == 32.0
        found.append(everything(model, optimizer))
    return far(found[1], found[0])


def goes_on_in_another_layout(name, before, after, how, folder, changes=None, nearly=0.0):
    """Whether a checkpoint of one layout goes on in another, to the bit; in one process nearly.

    One process rounds once where it updates a parameter, ranks twice.
    """
    model, changes = LAYOUTS[before](whole()), changes or {}
    optimizer = optimizer_of(name, model, **changes)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    other = whole() if after == "one process" else LAYOUTS[after](whole())
    resumed = optimizer_of(name, other, **changes)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(laid_out(full(p.detach()), q))
    options = StateDictOptions(
        flatten_optimizer_state_dict=how == "flat", full_state_dict=how == "full"
    )
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if how == "full":
        set_optimizer_state_dict(other, resumed, saved, options=options)
    else:
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        into = {"optimizer": get_optimizer_state_dict(other, resumed, options=options)}
        dcp.load(into, checkpoint_id=folder)
        set_optimizer_state_dict(other, resumed, into["optimizer"], options=options)
    loaded = _equal(everything(other, resumed), everything(model, optimizer))
    for seed in range(3, 6):
        optimizer.zero_grad()
        backward(model, seed)
        take_gradients(other, model)
        for stepped in (optimizer, resumed):
            stepped.step()
    found = everything(other, resumed), everything(model, optimizer)
    return loaded and (_equal(*found) or (after == "one process" and far(*found) < nearly))


def _equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def bad_input(name, case):
    """The error, after a check that nothing moved."""
    model = LAYOUTS["FSDP2 of 4"](whole())
    optimizer = optimizer_of(name, model)
    backward(model, 0)
    optimizer.step()
    first = next(model.parameters())
    if case == "a plain gradient":
        grad = first.grad.full_tensor()
        first.grad = None
        torch.Tensor.grad.__set__(first, grad)
    elif case == "a state of another layout":
        key = next(k for k in optimizer.state[first] if k != "step")
        value = optimizer.state[first][key]
        optimizer.state[first][key] = value.redistribute(first.device_mesh, [Replicate()])
    elif case == "a plain state":
        key = next(k for k in optimizer.state[first] if k != "step")
        optimizer.state[first][key] = optimizer.state[first][key].full_tensor()
    before = copy.deepcopy([p.detach().to_local() for p in model.parameters()])
    counts = [s["step"].item() for s in optimizer.state.values()]
    try:
        optimizer.step()
    except (TypeError, ValueError) as error:
        after = [p.detach().to_local() for p in model.parameters()]
        assert all(map(torch.equal, after, before))
        assert counts == [s["step"].item() for s in optimizer.state.values()]
        return f"{type(error).__name__}: {error}"
    return "no error"
