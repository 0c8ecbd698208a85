"""What a trainer shards: refused where it would be another method, and saved where it exchanges."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from helpers.optimizers import (
    DIAGONAL,
    SETTINGS,
    accepted,
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rootfree_fused.optimizer.shards import as_laid_out

# torch warns of its own that one process shards nothing, and of its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
MATRICES = [name for name in SETTINGS if name not in DIAGONAL]
ON_WHOLE_ALONE = ("ifshampoo-axes", "shampoo-interval")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def sharded():
    return fully_shard(model(), mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "ifshampoo-axes",
            {},
            r"parameter 0 \(0.weight\) of group 0 is a DTensor and weight_decay",
        ),
        ("shampoo-interval", {}, r"parameter 1 \(0.bias\) of group 0 is a DTensor without factors"),
        ("shampoo", {"combine": "module"}, "parameter 0 .* is a DTensor and combine is 'module'"),
        ("shampoo", {"replicas": "once"}, "replicas is 'once'; pass 'share' or 'repeat'"),
        ("ifshampoo", {"update_dtype": torch.int8}, "update_dtype is torch.int8; pass"),
    ],
    ids=str,
)
def test_what_parts_of_a_matrix_cannot_be_stepped_with_is_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        build(name, sharded().named_parameters(), **changes)


def test_an_optimizer_whose_matrices_ranks_share_is_not_copied():
    optimizer = build("shampoo", sharded().parameters())
    for copy_ in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied, .* save state_dict\(\)"):
            copy_(optimizer)


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_exchanged_for_dtensors_save_and_are_stepped_where_elements_are(name):
    """accelerate builds the optimizer first, and then gives it the parameters of fully_shard."""
    whole = model()
    optimizer = build(name, whole.named_parameters())
    other = sharded()
    optimizer.param_groups[0]["params"] = list(other.parameters())
    saved = optimizer.state_dict()
    assert list(saved["state"]) == [0, 1, 2, 3]
    optimizer.load_state_dict(saved)
    other(torch.randn(2, 6)).sum().backward()
    before = [p.detach().to_local().clone() for p in other.parameters()]
    if name in ON_WHOLE_ALONE:
        with pytest.raises(ValueError, match=r"parameter [01] .* of group 0 is a DTensor"):
            optimizer.step()
        assert_identical([p.detach().to_local() for p in other.parameters()], before)
        assert all(state["step"] == 0 for state in optimizer.state.values())
        return
    optimizer.step()
    assert all(
        (p.detach().to_local() != old).any()
        for p, old in zip(other.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("name", ["adamw", "ifshampoo", "shampoo"])
def test_a_compiled_step_on_dtensors_is_the_same(name):
    (model_of, optimizer), (twin, compiled) = (
        (m := sharded(), build(name, m.parameters(), initial_square_avg=1.0)) for _ in range(2)
    )
    step = torch.compile(compiled.step)
    for seed in range(2):
        for each, take in ((model_of, optimizer.step), (twin, step)):
            torch.manual_seed(seed)
            each.zero_grad()
            each(torch.randn(2, 6)).square().sum().backward()
            take()
    pairs = zip(model_of.parameters(), twin.parameters(), strict=True)
    for p, q in pairs:
        assert torch.equal(p.detach().to_local(), q.detach().to_local())


@pytest.mark.parametrize("name", [*DIAGONAL, "ifshampoo", "shampoo"])
def test_dtensors_and_plain_tensors_share_a_group_and_take_whole_states(name):
    values = [torch.randn(6, 4), torch.randn(5)]

    def mixed():
        whole, vector = (torch.nn.Parameter(value.clone()) for value in values)
        mesh = init_device_mesh("cpu", (1,))
        return [torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)])), vector]

    plain, both = [torch.nn.Parameter(value.clone()) for value in values], mixed()
    optimizers = build(name, plain), build(name, both)
    for seed in range(4):
        set_grads(plain, seed=seed)
        if seed == 2:
            plain[0].grad = None
        for p, q in zip(plain, both, strict=True):
            grad = None if p.grad is None else p.grad.clone()
            q.grad = as_laid_out(grad, q) if isinstance(q, DTensor) and p.grad is not None else grad
        for optimizer in optimizers:
            optimizer.step()
    nearly = 0.0 if name in DIAGONAL else 1e-6  # an owner's update is rounded before it is applied
    torch.testing.assert_close(both[0].full_tensor(), plain[0], rtol=nearly, atol=nearly)
    assert torch.equal(both[1], plain[1])
    taken = mixed()
    resumed = build(name, taken)
    resumed.load_state_dict(optimizers[0].state_dict())
    for key, value in optimizers[0].state[plain[0]].items():
        held = resumed.state[taken[0]][key]
        assert torch.equal(held.full_tensor() if isinstance(held, DTensor) else held, value)


def test_state_of_a_sharded_parameter_is_no_state_of_a_whole_one():
    exchanged, whole = (build("adamw", model().parameters()) for _ in range(2))
    exchanged.param_groups[0]["params"] = list(sharded().parameters())
    saved = exchanged.state_dict()
    with pytest.raises(ValueError, match=r"exp_avg is a DTensor but .* whole; load full_tensor"):
        whole.load_state_dict(saved)
    for state in saved["state"].values():
        state["exp_avg_sq"].to_local().fill_(torch.nan)
    with pytest.raises(ValueError, match="parameter 0: exp_avg_sq holds nan"):
        exchanged.load_state_dict(saved)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_flattened_modules_are_for_the_diagonal_classes(name, use_orig_params):
    flat = FullyShardedDataParallel(
        model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    if name in MATRICES:
        with pytest.raises(TypeError, match=r"flat shard of FullyShardedDataParallel.*; use"):
            build(name, flat.parameters())
        return
    optimizer, twin = build(name, flat.parameters()), model()
    plain = build(name, twin.parameters())
    x = torch.randn(4, 6)
    for _ in range(3):
        for each, stepped in ((flat, optimizer), (twin, plain)):
            stepped.zero_grad()
            each(x).square().mean().backward()
            stepped.step()
    with FullyShardedDataParallel.summon_full_params(flat):
        for p, q in zip(flat.parameters(), twin.parameters(), strict=use_orig_params):
            if use_orig_params:
                torch.testing.assert_close(p.view_as(q), q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_group_exchanged_for_one_vector_is_refused_by_matrices(name):
    """DeepSpeed ZeRO: the group is then one partition of all of its parameters, flattened."""
    params = parameters((4, 3), (5,), (3, 3))
    optimizer = build(name, params)
    (flat,) = parameters((26,))
    optimizer.param_groups[0]["params"] = [flat]
    set_grads([flat], seed=0)
    before = flat.detach().clone()
    if name in MATRICES:
        with pytest.raises(TypeError, match=r"group 0 were exchanged for vectors .*\(26,\).*; use"):
            optimizer.step()
        assert torch.equal(flat, before)
    else:
        optimizer.step()
        assert not torch.equal(flat, before)
    assert list(optimizer.state_dict()["state"]) == [0]


@pytest.mark.parametrize("name", SETTINGS)
def test_exchanged_parameters_are_not_kept_alive(name):
    params = parameters((4, 3), (5,))
    optimizer = build(name, params)
    left = [weakref.ref(p) for p in params]
    optimizer.param_groups[0]["params"] = parameters((4, 3), (5,), seed=1)
    del params
    gc.collect()
    assert [p() for p in left] == [None, None]
    run(optimizer, optimizer.param_groups[0]["params"], 2)
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_zero_redundancy_optimizer_resumes(name):
    """It puts the saved state into `optimizer.state` by itself."""

    def sharing(whole):
        cls, settings = SETTINGS[name]
        settings = accepted(name, {"batch_size": 8, **settings})
        optimizer = ZeroRedundancyOptimizer(whole.parameters(), cls, **settings)
        return optimizer, list(whole.parameters())

    (optimizer, params), (resumed, others) = sharing(model()), sharing(model())
    run(optimizer, params, 4)
    optimizer.consolidate_state_dict(to=0)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(others, params)
    run(optimizer, params, 3, first=4)
    run(resumed, others, 3, first=4)
    assert_identical([p.detach() for p in others], [p.detach() for p in params])


@pytest.mark.parametrize("name", SETTINGS)
def test_rank_zero_broadcasts_a_full_checkpoint(name):
    """int16 travels in no collective."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    whole = model()
    optimizer = build(name, whole.parameters())
    run(optimizer, list(whole.parameters()), 3)
    full = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(whole, optimizer, options=full)
    twin = model()
    resumed = build(name, twin.parameters())
    twin.load_state_dict(whole.state_dict())
    both = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(twin, resumed, saved, options=both)
    run(optimizer, list(whole.parameters()), 2, first=3)
    run(resumed, list(twin.parameters()), 2, first=3)
    assert_identical(
        [p.detach() for p in twin.parameters()], [p.detach() for p in whole.parameters()]
    )
