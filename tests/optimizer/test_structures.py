"""Optimizers whose factors are blocks, or of a structure that the released packages have."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.foreign import matrices_of
from helpers.optimizers import (
    assert_identical,
    build,
    parameters,
    run,
    set_grads,
    snapshot,
)
from helpers.truth import start, step_
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from bench.host import as_on_cuda
from rootfree_fused import IFShampoo, RootFreeShampoo
from rootfree_fused.optimizer.layouts import layout_of

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
IN_BLOCKS = {"max_dense_dim": 16}
RELEASED = [
    {"structures": "block", "block_size": 16},
    {"structures": "block30diagonal"},
    {"structures": "hierarchical", "hierarchical_sizes": (5, 3)},
    {"structures": "lower_toeplitz"},
    {"structures": "triutoeplitz"},
    {"structures": ("hierarchical15_15", "auto"), "max_dense_dim": 16, "vector_method": "rmsprop"},
]
SHAPES = [(40, 24), (7, 5), (40, 24), (5,), (33, 24), (3, 20, 2)]
CLASSES = {"ifshampoo": IFShampoo, "shampoo": RootFreeShampoo}
CASES = [("shampoo", IN_BLOCKS), ("shampoo", RELEASED[0]), ("ifshampoo", IN_BLOCKS)]
CASES += [("ifshampoo", settings) for settings in RELEASED]


def settings_of(name, settings):
    own = {"batch_size": 8, "vector_method": "factor", "momentum": 0.0}
    own = {} if name == "shampoo" else own
    return {**own, **settings}


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_every_structure_follows_the_specification(name, settings, device):
    """Also where others have no gradient, between updates, and for a bucket of other true sizes."""
    params = parameters(*SHAPES, dtype=F64, device=device)
    cls = CLASSES[name]
    optimizer = cls(params, update_interval=2, **settings_of(name, settings))
    (group,) = optimizer.param_groups
    twins = [p.detach().cpu().clone() for p in params]
    states = [start(cls, twin, group, F64) for twin in twins]
    for t in range(5):
        set_grads(params, seed=t)
        if t == 2:
            params[0].grad = None
        optimizer.step()
        for p, twin, state in zip(params, twins, states, strict=True):
            if p.grad is not None:
                step_(cls, twin, p.grad.cpu(), state, group)
            torch.testing.assert_close(p.detach().cpu(), twin, rtol=1e-10, atol=1e-10)
    for p, state in zip(params, states, strict=True):
        for key, expected in state.items():
            torch.testing.assert_close(optimizer.state[p][key].cpu(), expected, check_dtype=False)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
@pytest.mark.parametrize("factor_dtype", [F32, BF16], ids=str)
def test_saved_copied_and_pickled_it_goes_on_to_the_bit(name, settings, factor_dtype):
    own = {**settings_of(name, settings), "factor_dtype": factor_dtype}
    params = parameters(*SHAPES)
    optimizer = CLASSES[name](params, **own)
    run(optimizer, params, 3)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = CLASSES[name](others, **own)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    copied, copies = copy.deepcopy((optimizer, params))
    for one, mine in ((optimizer, params), (loaded, others), (copied, copies)):
        run(one, mine, 2, first=3)
        assert_identical(snapshot(one, mine), snapshot(optimizer, params))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_it_passes_through_torch_distributed(name, settings):
    own = {**settings_of(name, settings), "factor_dtype": BF16}
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.ParameterList(parameters(*SHAPES))
    optimizer = CLASSES[name](model.parameters(), **own)
    run(optimizer, list(model), 3)
    other = copy.deepcopy(model)
    resumed = CLASSES[name](other.parameters(), **own)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    for one, mine in ((optimizer, model), (resumed, other)):
        run(one, list(mine), 2, first=3)
    assert_identical(snapshot(resumed, list(other)), snapshot(optimizer, list(model)))


@pytest.mark.parametrize(("dtype", "side"), [(F32, 16), (BF16, 32)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_padding_never_moves(name, dtype, side):
    """By stacks, and in bfloat16 by the C++ kernel, whose sides are multiples of 32."""
    (p,) = parameters((2 * side + 1, 2 * side + 15))
    optimizer = build(name, [p], factor_dtype=dtype, max_dense_dim=side)
    run(optimizer, [p], 1000)
    state = optimizer.state[p]
    for key in ("factor", "factor_momentum", "gram"):
        for suffix in ("", "_residual"):
            for axis, lives in ((0, 1), (1, 15)):
                if (value := state.get(f"{key}_{axis}{suffix}")) is not None:
                    assert value.shape == (3, side, side)
                    assert not value[2, lives:].any()
                    assert not value[2, :, lives:].any()
                    assert value[2, 0, 0] != 0 or suffix


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_triton_is_as_near_to_float64_as_torch(name, dtype):
    """By prepared plans, of blocks beside dense factors and vectors; launches are counted below."""
    offline = pytest.importorskip("helpers.offline")
    found = []
    for factor_dtype, on_cuda in ((F64, False), (dtype, False), (dtype, True)):
        params = parameters(*SHAPES, dtype=F64 if factor_dtype == F64 else F32)
        if on_cuda:
            with offline.interpreted(), as_on_cuda():
                run(build(name, params, factor_dtype=factor_dtype, **IN_BLOCKS), params, 3)
        else:
            run(build(name, params, factor_dtype=factor_dtype, **IN_BLOCKS), params, 3)
        found.append(torch.cat([p.detach().double().flatten() for p in params]))
    truth, by_torch, by_triton = found
    moved = (truth - torch.cat([p.flatten() for p in parameters(*SHAPES)]).double()).norm()
    errors = [((one - truth).norm() / moved).item() for one in (by_torch, by_triton)]
    assert errors[1] <= 2 * errors[0] + 1e-6
    assert errors[1] < (0.1 if dtype == BF16 else 1e-4)


def test_blocks_of_one_shape_and_another_true_size_share_no_bucket():
    params = parameters((40, 24), (33, 24), (40, 24))
    optimizer = build("shampoo", params, **IN_BLOCKS)
    run(optimizer, params, 1)
    assert sorted(b.params for b in optimizer._plans[0].buckets) == [[0, 2], [1]]


def test_released_blocks_are_bounded_by_the_whole_factor_and_automatic_ones_each():
    found = []
    for settings in ({"structures": "block", "block_size": 16}, IN_BLOCKS):
        (p,) = parameters((48, 8), dtype=F64)
        own = {**settings, "factor_momentum": 0.0, "factor_lr": 0.3, "initial_square_avg": 1.0}
        optimizer = IFShampoo([p], batch_size=1000, **own)
        run(optimizer, [p], 1)
        state = optimizer.state[p]
        step = torch.eye(16) - state["factor_0"]
        found.append((step.norm(), step.flatten(1).norm(dim=1), state["factor_momentum_0"]))
    (whole, _, m), (_, each, _) = found
    torch.testing.assert_close(whole, torch.tensor(0.3, dtype=F64))
    torch.testing.assert_close(each, torch.full((3,), 0.3, dtype=F64))
    assert m.flatten(1).norm(dim=1).min() > 1


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_of_another_structure_is_refused_with_the_way_to_load_it(name):
    """Such as one from when a large axis was diagonal by itself."""
    before, now = parameters((40, 8)), parameters((40, 8))
    old = build(name, before, structures=("diagonal", "dense"))
    run(old, before, 2)
    optimizer = build(name, now, **IN_BLOCKS)
    run(optimizer, now, 2)
    untouched = snapshot(optimizer, now)
    saved = old.state_dict()
    saved["param_groups"][0] |= {"structures": "auto", "max_dense_dim": 16}
    with pytest.raises(
        ValueError, match=r"a block factor of an axis of 40; .*\('diagonal', 'dense'"
    ):
        optimizer.load_state_dict(saved)
    assert_identical(snapshot(optimizer, now), untouched)
    saved["param_groups"][0]["structures"] = ("diagonal", "dense")
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        now[0].copy_(before[0])
    for one, mine in ((optimizer, now), (old, before)):
        run(one, mine, 2, first=2)
    assert_identical(snapshot(optimizer, now), snapshot(old, before))


@pytest.mark.parametrize("structures", ["auto", ["auto", "dense"], ("auto", "diagonal")], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_from_before_blocks_goes_on_as_it_was_stepped(name, structures):
    """Then "auto" was diagonal above max_dense_dim; such a group has no block_size."""
    before, now = parameters((40, 8), (8, 12)), parameters((40, 8), (8, 12))
    then = "dense_or_diagonal" if structures == "auto" else ("dense_or_diagonal", structures[1])
    old = build(name, before, structures=then, max_dense_dim=16)
    run(old, before, 2)
    assert old.state[before[0]]["factor_0"].shape == (40,)
    saved = old.state_dict()
    saved["param_groups"][0]["structures"] = structures
    del saved["param_groups"][0]["block_size"]
    resumed = build(name, now, **IN_BLOCKS)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["structures"] == then
    with torch.no_grad():
        torch._foreach_copy_(now, before)
    for one, mine in ((resumed, now), (old, before)):
        run(one, mine, 2, first=2)
    assert_identical(snapshot(resumed, now), snapshot(old, before))


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_without_structures_is_no_old_one(name):
    params = parameters((8, 12))
    optimizer = build(name, params)
    saved = optimizer.state_dict()
    for key in ("structures", "block_size"):
        del saved["param_groups"][0][key]
    with pytest.raises(ValueError, match="has no structures, so it was not saved by"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_with_anything_in_the_padding_is_refused(name):
    params = parameters((40, 33))
    optimizer = build(name, params, **IN_BLOCKS)
    run(optimizer, params, 1)
    saved = optimizer.state_dict()
    untouched = snapshot(optimizer, params)
    own = saved["state"][0]
    for key in [key for key in own if key.startswith(("factor", "gram"))]:
        own[key][-1, 0, -1] = 2.0
        with pytest.raises(ValueError, match=f"{key} is not zero where its last block is padded"):
            optimizer.load_state_dict(saved)
        own[key][-1, 0, -1] = 0.0
    assert_identical(snapshot(optimizer, params), untouched)
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"structures": "blocks"}, ValueError, "'auto', 'dense', .*hierarchical15_15"),
        ({"block_size": 0}, ValueError, "block_size is 0; pass a whole number >= 1"),
        ({"block_size": 16.0}, TypeError, "block_size is 16.0, a float"),
        ({"hierarchical_sizes": (0, 0)}, ValueError, r"\(0, 0\) is 'diagonal'"),
        ({"hierarchical_sizes": (3,)}, ValueError, "pass two whole numbers"),
        ({"hierarchical_sizes": (3, -1)}, ValueError, "pass two whole numbers"),
        ({"hierarchical_sizes": (3.0, 1)}, ValueError, "pass two whole numbers"),
        ({"structures": ("block",) * 3}, ValueError, "pass one structure an axis"),
        (
            {"structures": "block", "block_size": 20},
            ValueError,
            "axis of 40, of which 20 would be dense, above max_dense_dim=16.* a block_size within",
        ),
        ({"structures": "dense"}, ValueError, "above max_dense_dim=16: .*pass 'block', 'auto'"),
    ],
    ids=str,
)
def test_bad_input_and_its_cure(settings, error, message):
    params = parameters((40, 8))
    with pytest.raises(error, match=message):
        IFShampoo(params, batch_size=8, **{"max_dense_dim": 16, **settings})
    optimizer = build("ifshampoo", params)
    run(optimizer, params, 1)
    before = snapshot(optimizer, params)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": parameters((40, 8)), "max_dense_dim": 16, **settings})
    assert_identical(snapshot(optimizer, params), before)


def test_a_group_is_a_structure():
    """A small layer in a group of blocks is dense; toeplitz factors stay in float32."""
    small, large = parameters((7, 5), (64, 30))
    groups = [
        {"params": [small], "structures": "block", "block_size": 30},
        {"params": [large], "structures": ("lower_toeplitz", "block30diagonal")},
    ]
    optimizer = IFShampoo(groups, batch_size=8, factor_dtype=BF16)
    run(optimizer, [small, large], 2)
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[large].items()}
    assert shapes["factor_0"] == ((64,), F32)
    assert shapes["factor_1"] == ((30, 30), BF16)
    assert optimizer.state[small]["factor_0"].shape == (7, 7)
    toeplitz, _ = matrices_of_group(optimizer, large, 1)
    torch.testing.assert_close(toeplitz, toeplitz.tril())


def matrices_of_group(optimizer, param, index):
    alone = copy.copy(optimizer)
    alone.param_groups = [optimizer.param_groups[index]]
    return matrices_of(alone, param)


def test_layouts_of_a_model_on_meta_have_no_factor_above_the_limit():
    """No axis of Llama-8B's but the vocabulary's is diagonal."""
    group = {"structures": "auto", "max_dense_dim": 2048, "vector_method": "adam"}
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)]
    for shape in shapes:
        layout = layout_of(shape, group)
        for size, structure in zip(layout.sizes, layout.structures, strict=True):
            assert structure.name == (
                "diagonal" if size == 128256 else "block" if size > 2048 else "dense"
            )
            assert structure.shape(size)[-1] <= 2048 or structure.name == "diagonal"
