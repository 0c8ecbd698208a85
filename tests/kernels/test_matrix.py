"""IF-Shampoo's launcher against the specification: on a GPU where there is one, or interpreted."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels_matrix import (
    BF16,
    BUCKETS,
    CASES,
    DENSE,
    F16,
    F32,
    FEW,
    KERNELS,
    LEFT,
    NEITHER,
    RIGHT,
    SCALARS,
    Model,
    _interpreter,
    _poisoned_scratch,
)
from helpers.offline import needs_cuda

from bench.machine_code.offline import Recorder
from rootfree_fused.kernels import matrix, matrix_plan
from rootfree_fused.ops.axes import bucket_sizes

__all__ = ["_interpreter", "_poisoned_scratch"]  # fixtures


# The update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_steps_follow_the_specification(case, dtype, device):
    """Updates and steps between them, on aligned and ragged, dense and diagonal axes."""
    model = Model(device, case, dtype, BUCKETS if case == "momentum" else FEW)
    for update in (True, False, True):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_products_are_refreshed_where_factors_were_loaded(dtype, device):
    model = Model(device, "momentum", dtype, [((24, 9), DENSE, 1), ((16, 8), RIGHT, 1)])
    model.step(update=False, refresh=True)
    model.step(update=False)
    model.check()


def test_large_tiles(device, monkeypatch):
    """The tiling of large models, on matrices of one tile and of several."""
    monkeypatch.setattr(matrix, "tiling_of", lambda *_: matrix.LARGE)
    buckets = [((136, 8), DENSE, 1), ((7, 130), RIGHT, 1), ((8, 200), LEFT, 1)]
    model = Model(device, "momentum", BF16, buckets)
    for update in (True, False):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
def test_parameters_of_16_bits(dtypes, device):
    buckets = [((10, 24), DENSE, 1), ((7, 9), DENSE, 1), ((9, 16), NEITHER, 1)]
    model = Model(device, "momentum", BF16, buckets, *dtypes)
    for update in (True, False):
        model.step(update=update)
    model.check()


def test_dtypes_may_mix(device):
    """Members of one bucket may differ; the launches that read them are one a dtype."""
    model = Model(device, "momentum", F32, [((10, 24), DENSE, 2), ((7, 9), NEITHER, 1)])
    grads = model.fresh_grads()
    model.params[0] = model.params[0].bfloat16()
    grads[0] = grads[0].bfloat16()
    for kind in (model.eager, model.truth):
        kind["params"][0] = model.params[0].to(kind["params"][0], copy=True)
    model.eager["params"][0] = model.params[0].clone()
    model.step(grads=grads)
    model.check()


@pytest.mark.parametrize("layout", ["transposed", "gapped", "misaligned"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_layouts(layout, dtype, device):
    model = Model(
        device, "momentum", dtype, [((10, 24), DENSE, 1), ((7, 9), LEFT, 1)], layout=layout
    )
    for update in (True, False):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolutions_are_matrices(layout, device):
    buckets = [((6, 3, 3, 3), DENSE, 2), ((8, 4, 2, 1), RIGHT, 1)]
    model = Model(device, "momentum", F32, buckets, layout=layout)
    for update in (True, False):
        model.step(update=update)
    model.check()


def test_dozens_of_matrices(device):
    sizes = 8 * torch.randint(1, 9, (24, 2))
    sizes[::4] -= 1
    kinds = [DENSE, DENSE, LEFT, RIGHT, NEITHER]
    buckets = [(tuple(size), kinds[i % 5], 1) for i, size in enumerate(sizes.tolist())]
    model = Model(device, "momentum", F32, buckets)
    for update in (True, False):
        model.step(update=update)
    model.check()


@pytest.mark.parametrize("place_of_lr", ["cpu", "device"])
@pytest.mark.parametrize("lr_dtype", [F32, torch.float64])
def test_lr_is_a_tensor_that_changes(lr_dtype, place_of_lr, device):
    model = Model(device, "momentum", F32, [((7, 16), DENSE, 1)])
    lr = torch.tensor(0.3, dtype=lr_dtype, device="cpu" if place_of_lr == "cpu" else device)
    for factor in (1.0, 0.0, 0.5):
        lr = lr * factor if factor else lr
        model.step(lr=lr)
    model.check()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_runs_agree_bit_for_bit(dtype, device):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = Model(device, "momentum", dtype, [((66, 16), DENSE, 1), ((9, 24), LEFT, 1)])
        for update in (True, False):
            model.launch(model.fresh_grads(), torch.tensor(0.1), update=update)
        models.append(model)
    for name in ("params", "buffers", "factors", "residuals", "momenta", "products"):
        for a, b in zip(getattr(models[0], name), getattr(models[1], name), strict=True):
            assert torch.equal(a, b), name


def test_products_and_momenta_are_symmetric(device):
    model = Model(device, "momentum", BF16, [((66, 24), DENSE, 1)])
    model.step()
    for tensor in (*model.products, *model.momenta):
        assert torch.equal(tensor, tensor.mT)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_factor_step_below_the_bound_is_not_lengthened(dtype, device):
    """max(1, ||m||) is 1: everywhere else ||m|| is above it."""
    model = Model(device, "momentum", dtype, [((9, 16), DENSE, 1), ((8, 5), NEITHER, 1)])
    kinds = [model.momenta, *model.eager["momenta"], *model.truth["momenta"]]
    for m in (m for momenta in kinds for m in momenta):
        m.mul_(2**-10)
    model.step(grads=[grad / 64 for grad in model.fresh_grads()])
    assert all(m.norm() < 0.9 for momenta in model.truth["momenta"] for m in momenta)
    model.check()


@pytest.mark.parametrize("size", [9, 16])
def test_factors_never_freeze(size, device):
    """Steps far below the last place of bfloat16 add up in the residual."""
    model = Model(device, "plain", BF16, [((size, size), DENSE, 1)])
    model.scalars = {**model.scalars, "factor_lr": 1e-5}
    start = [f.clone() for f in model.factors], [v.clone() for v in model.values()]
    for _ in range(3):
        model.step()
    for before, after in zip(start[0], model.factors, strict=True):
        assert (before == after).float().mean() > 0.9
    for before, after, truth in zip(
        start[1], model.values(), model.truth["factors"][0], strict=True
    ):
        moved, expected = (after - before).double(), truth - before.double()
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_a_nonfinite_gradient_stays_in_its_matrix(device):
    model = Model(device, "momentum", BF16, [((9, 16), DENSE, 2), ((9, 8), RIGHT, 1)])
    grads = model.fresh_grads()
    grads[1][3, 4] = math.nan
    grads[2][3, 4] = math.inf
    model.launch(grads, torch.tensor(0.1), update=True)
    model.launch(model.fresh_grads(), torch.tensor(0.1), update=False)
    finite = [param.isfinite().all().item() for param in model.params]
    assert finite == [True, False, False]
    rows = zip(model.rows(model.factors), model.rows(model.values()), strict=True)
    finite = [[f.isfinite().all().item() for f in (*high, *value)] for high, value in rows]
    assert finite[0] == [True] * 4
    assert finite[1] == [False] * 4
    assert not finite[2][1]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_zero_gradient_leaves_factors_alone(dtype, device):
    model = Model(device, "momentum", dtype, [(shape, dense, 2) for shape, dense, _ in FEW])
    grads = model.fresh_grads()
    for gradient in grads[::2]:
        gradient.zero_()
    before = [t.clone() for t in (*model.factors, *model.residuals, *model.momenta)]
    model.step(grads=grads)
    model.check()
    after = [*model.factors, *model.residuals, *model.momenta]
    for old, new in zip(before, after, strict=True):
        if new.numel():
            assert torch.equal(old[0], new[0])
            assert not torch.equal(old[1], new[1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [1e-40, 1e9, 1e13, 1e30])
def test_gradients_of_any_finite_size(size, dtype, device):
    model = Model(device, "momentum", dtype, FEW)
    model.scalars = {**model.scalars, "batch_size": 256.0, "bound": 10.0}
    before = [t.clone() for t in model.factors]
    for _ in range(3):
        grads = [size * g for g in model.fresh_grads()]
        model.launch(grads, torch.tensor(0.1), update=True)
    for tensors in (model.params, model.buffers, model.values(), model.momenta):
        assert all(t.isfinite().all() for t in tensors)
    assert not any(map(torch.equal, before, model.factors))


def test_the_nan_of_a_gpu_keeps_its_sign_and_stays_a_nan(device):
    """All bits set but the sign: rounded like a number it would become -0 in bfloat16."""
    model = Model(device, "plain", BF16, [((8, 8), DENSE, 1)])
    model.factors[0][0, 2, 3] = -0.0
    model.residuals[0][0, 2, 3] = -1
    assert model.values()[0][0, 2, 3].isnan()
    model.launch(model.fresh_grads(), torch.tensor(0.1), update=True)
    assert model.factors[0][0, 2, 3].isnan()


# Launches and tables -------------------------------------------------------------------------


def test_the_number_of_launches(device, monkeypatch):
    """However many buckets; one more where parameters or gradients have one more dtype."""
    recorder = Recorder()
    for name in KERNELS:
        monkeypatch.setattr(matrix, name, recorder)
    found = []
    for dtype in (BF16, F32):
        model = Model(device, "momentum", dtype)
        grads, lr = model.fresh_grads(), torch.tensor(0.1)
        for update, refresh in [(True, True), (True, False), (False, False), (False, True)]:
            model.launch(grads, lr, update=update, refresh=refresh)
            found.append(len(recorder.calls))
            recorder.calls.clear()
    assert found == [8, 8, 3, 4] * 2


def test_buckets_that_are_left_to_the_caller(device):
    model = Model(device, "momentum", F32, [((8, 8), DENSE, 1)])
    vector = torch.ones(1, 5, device=device)
    cube = [torch.ones(1, d, device=device) for d in (2, 3, 4)]
    wide = [torch.eye(3, dtype=torch.float64, device=device)[None] for _ in range(2)]
    empty = torch.empty(0, device=device)
    bare = [torch.eye(2, device=device)[None] for _ in range(2)]
    shapes = [(5,), (8, 8), (2, 3, 4), (3, 3), (2, 2)]
    lists = [[torch.ones(s, device=device, dtype=F32) for s in shapes] for _ in range(3)]
    for tensors in lists:
        tensors[3] = tensors[3].double()
    lists[0][1] = model.params[0]
    before = [p.clone() for p in lists[0]]
    factors = [vector, *model.factors, *cube, *wide, *bare]
    momenta = [torch.zeros_like(vector), *model.momenta, *map(torch.zeros_like, factors[3:])]
    products = [empty, *model.products, *[empty] * 3, *map(torch.zeros_like, wide), empty, empty]
    state = factors, [empty] * 10, momenta, products
    axes = [1, 2, 3, 2, 2]
    sizes = bucket_sizes(lists[0], factors, axes)
    buckets = matrix.buckets_of(*lists[:2], *state, axes=axes, sizes=sizes)
    assert [bucket is None for bucket in buckets] == [True, False, True, True, True]
    settings = {**SCALARS, "update_factors": True, "refresh_products": True}
    matrix.ifshampoo_(buckets[1:2], *lists, torch.tensor(0.1), **settings)
    assert [torch.equal(a, b) for a, b in zip(before, lists[0], strict=True)] == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_nothing_to_do(device):
    assert matrix.buckets_of([], [], [], [], [], [], axes=[], sizes=[]) == []
    settings = {**SCALARS, "update_factors": True, "refresh_products": True}
    matrix.ifshampoo_([], [], [], [], torch.tensor(0.1), **settings)


def test_tables_are_never_stale(device):
    """Parameters that move make no new plan; factors that move do, and the new ones are updated."""
    model = Model(device, "momentum", F32, [((8, 8), DENSE, 1)])
    matrix._plans.clear()
    for update in (True, False, True):
        model.params[0] = model.params[0].clone()
        model.buffers[0] = model.buffers[0].clone()
        model.step(update=update)
    assert len(matrix._plans) == 2
    kept = model.factors[0].clone(), model.factors
    model.factors = [factor.clone() for factor in model.factors]
    model.step()
    model.check()
    assert len(matrix._plans) == 3
    assert torch.equal(kept[0], kept[1][0])


def test_few_plans_are_kept(device):
    model = Model(device, "momentum", F32, [((1, 2, 2), NEITHER, 1)])
    kept = []
    for _ in range(matrix_plan.MAX_PLANS + 3):
        kept.append(model.factors[0].clone())
        model.factors[0] = kept[-1]
        model.launch(model.fresh_grads(), torch.tensor(0.1), update=False)
    assert len(matrix._plans) == matrix_plan.MAX_PLANS


# Only on a GPU -------------------------------------------------------------------------------


@needs_cuda
def test_no_synchronization():
    model = Model(torch.device("cuda"), "momentum", BF16)
    model.step()
    model.step(update=False)
    grads = model.fresh_grads()
    lrs = [torch.tensor(0.3 / n) for n in range(1, 4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in lrs:
            model.launch(grads, lr, update=True)
            model.launch([grad.clone() for grad in grads], lr, update=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("layout", ["contiguous", "gapped"])
def test_graph_replays_read_lr_and_gradients(layout):
    device = torch.device("cuda")
    model = Model(device, "momentum", BF16, layout=layout)
    lr = torch.tensor(0.3, device=device)
    sources = model.fresh_grads()
    model.step(grads=sources, lr=lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.launch([source * 1.0 for source in sources], lr, update=True)
    matrix._plans.clear()
    for n in range(3):
        lr.fill_(0.3 / (n + 1))
        grads = model.fresh_grads()
        for source, grad in zip(sources, grads, strict=True):
            source.copy_(grad)
        for kind in ("eager", "truth"):
            model.specify(kind, grads, lr.item(), True, False)
        graph.replay()
    model.check()
