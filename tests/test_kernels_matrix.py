"""IF-Shampoo's launcher against the specification: on a GPU where there is one, or interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from _comparison import assert_no_worse_than

pytest.importorskip("triton")

from _kernels_diag import assert_guards_untouched, place
from _offline import Recorder, interpreted, needs_cuda
from triton.runtime.interpreter import InterpretedFunction

from rootfree_fused.kernels import common, gemm, gram, matrix
from rootfree_fused.reference import join, split
from rootfree_fused.reference import matrix as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DENSE, LEFT, RIGHT, NEITHER = (True, True), (True, False), (False, True), (False, False)
KERNELS = [name for name in vars(matrix) if name.endswith("_kernel")]

SCALARS = {
    "factor_lr": 0.3,
    "factor_momentum": 0.5,
    "damping": 0.2,
    "batch_size": 4.0,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
}
CASES = {
    "momentum": SCALARS,
    "momentum coupled maximize": {**SCALARS, "decoupled": False, "maximize": True},
    "plain": {**SCALARS, "momentum": 0.0},
    "plain coupled": {**SCALARS, "momentum": 0.0, "decoupled": False},
}
# Parameter shape, which axes are dense, how many. Rows of 8 n are aligned, others are ragged; 66 is
# more than a tile.
BUCKETS = [
    ((7, 63), DENSE, 1),
    ((66, 8), DENSE, 1),
    ((24, 40), DENSE, 2),
    ((16, 72), LEFT, 1),
    ((9, 10), LEFT, 1),
    ((66, 8), RIGHT, 1),
    ((11, 7), RIGHT, 1),
    ((8, 70), NEITHER, 1),
    ((66, 24), NEITHER, 1),
]
FEW = [((7, 9), DENSE, 1), ((24, 16), DENSE, 2), ((9, 16), LEFT, 1), ((8, 7), NEITHER, 1)]


@pytest.fixture(autouse=True)
def _interpreter(request):
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else ""
    if device != "cpu":
        if isinstance(gemm._product_kernel, InterpretedFunction):
            pytest.skip("TRITON_INTERPRET keeps kernels off the GPU")
        yield
        return
    with interpreted(common, gram, gemm, matrix):
        yield


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """What nobody wrote is NaN in every floating dtype."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


# One optimizer, three ways -------------------------------------------------------------------


def squeezed(shape):
    sizes = [d for d in shape if d != 1]
    return sizes[0], math.prod(sizes[1:])


def eager_step(grad, factors, momenta, products, *, update, scalars):
    """The kernels' computation in plain torch: their dtypes, their roundings, their order.

    Factors are float32 values; returns P. `products` are updated where they are due.
    """
    wide = [f.dim() == 1 for f in factors]
    low = next((p.dtype for p in products if p is not None), F32)
    operands = [
        f if d else (split(f)[0] if low == BF16 else f) for f, d in zip(factors, wide, strict=True)
    ]
    g = grad.to(low) if not all(wide) else grad.float()

    def mul(a, b):
        return a.float() @ b.float()

    def along(tensor, operand, axis, keep):
        if operand.dim() == 1:
            return tensor.float() * (operand[:, None] if axis == 0 else operand)
        product = mul(operand.T, tensor) if axis == 0 else mul(tensor, operand)
        return product.to(low) if keep else product

    if update:
        transformed = along(g, operands[0], 0, keep=not wide[1])
        transformed = along(transformed, operands[1], 1, keep=False)
        stored = transformed.to(low)
        traces = [operand.float().square().sum() / len(operand) for operand in operands]
        for axis, (operand, m) in enumerate(zip(operands, momenta, strict=True)):
            others = grad.numel() // grad.shape[axis]
            c1 = scalars["batch_size"] / others
            c2 = scalars["damping"] * traces[1 - axis]
            if wide[axis]:
                h = c1 * transformed.square().sum(1 - axis) + c2 * operand.square() - 1
            else:
                unfolded = stored if axis == 0 else stored.T
                h = c1 * mul(unfolded, unfolded.T) + c2 * mul(operand.T, operand)
                h = h - torch.eye(len(operand), device=h.device)
            m.copy_(torch.lerp(m.float(), h / 2, 1 - scalars["factor_momentum"]))
        for axis, (factor, operand, m) in enumerate(zip(factors, operands, momenta, strict=True)):
            step = scalars["factor_lr"] / m.float().norm().clamp_min(1)
            factor.sub_(step * (factor * m if wide[axis] else mul(operand, m)))
            if not wide[axis]:
                new = split(factor)[0] if low == BF16 else factor
                products[axis].copy_(mul(new, new.T))
    squares = [f.square() if d else p for f, p, d in zip(factors, products, wide, strict=True)]
    result = along(g, squares[0], 0, keep=not wide[1])
    return along(result, squares[1], 1, keep=False)


class Model:
    """Parameters and state, three times.

    The launcher updates `actual`, plain torch in the same dtypes `eager`, the specification in
    float64 `truth`.
    """

    def __init__(
        self, device, case="momentum", dtype=F32, buckets=BUCKETS, param_dtype=F32, grad_dtype=None,
        layout="contiguous",
    ):  # fmt: skip
        self.scalars, self.dtype, self.buckets, self.device = CASES[case], dtype, buckets, device
        self.param_dtype, self.grad_dtype = param_dtype, grad_dtype or param_dtype
        self.layout, self.placed = layout, []
        self.shapes = [shape for shape, _, count in buckets for _ in range(count)]
        self.dense = [dense for _, dense, count in buckets for _ in range(count)]
        params = [torch.randn(shape).to(device, param_dtype) for shape in self.shapes]
        buffers = [torch.randn(shape).to(device) for shape in self.shapes]
        buffers = buffers if self.scalars["momentum"] else []
        self.params = [self.place(p, layout) for p in params]
        self.buffers = [self.place(b, layout) for b in buffers]
        self.factors, self.residuals, self.momenta, self.products = [], [], [], []
        for shape, dense, count in buckets:
            for size, is_dense in zip(squeezed(shape), dense, strict=True):
                self.add_axis(count, size, is_dense)
        self.eager = self.copies(params, buffers, F32)
        self.truth = self.copies(params, buffers, torch.float64)
        self.eager["products"] = [
            [None if not p.numel() else p[i].clone() for p in self.products[2 * b : 2 * b + 2]]
            for b, (_, _, count) in enumerate(buckets)
            for i in range(count)
        ]

    def place(self, values, layout="contiguous"):
        view, memory = place(values, layout)
        self.placed.append((view, memory))
        return view

    def add_axis(self, count, size, dense):
        if dense:
            factor = 1.2 * torch.eye(size) + 0.3 * torch.randn(count, size, size) / size**0.5
            momentum = torch.randn(count, size, size) / size
            momentum = (momentum + momentum.mT).to(self.dtype)
        else:
            factor = 1.2 + 0.3 * torch.randn(count, size)
            momentum = torch.randn(count, size) / size
        residual = product = torch.empty(0, device=self.device)
        if dense and self.dtype == BF16:
            factor, residual = split(factor)
            residual = self.place(residual.to(self.device))
        if dense:
            product = self.place(torch.full_like(factor, math.nan).to(self.device))
        self.factors.append(self.place(factor.to(self.device)))
        self.residuals.append(residual)
        self.momenta.append(self.place(momentum.to(self.device)))
        self.products.append(product)

    def copies(self, params, buffers, dtype):
        keep = {F32: lambda t: t.clone(), torch.float64: lambda t: t.double()}[dtype]
        return {
            "params": [keep(p) for p in params],
            "buffers": [keep(b) for b in buffers],
            "factors": [[keep(t) for t in row] for row in self.rows(self.values())],
            "momenta": [[keep(t) for t in row] for row in self.rows(self.momenta)],
        }

    def values(self):
        """The factors as float32 values."""
        pairs = zip(self.factors, self.residuals, strict=True)
        return [join(f, r) if f.dtype == BF16 else f for f, r in pairs]

    def rows(self, stacks):
        """For each parameter, its tensor of each axis."""
        return [
            [stacks[2 * b][i], stacks[2 * b + 1][i]]
            for b, (_, _, count) in enumerate(self.buckets)
            for i in range(count)
        ]

    def fresh_grads(self):
        return [torch.randn(shape).to(self.device, self.grad_dtype) for shape in self.shapes]

    def launch(self, grads, lr, *, update, refresh=False):
        return matrix.ifshampoo_(
            self.params, grads, self.factors, self.residuals, self.momenta, self.products,
            self.buffers, lr, axes=[2] * len(self.buckets), update_factors=update,
            refresh_products=refresh, **self.scalars,
        )  # fmt: skip

    def step(self, *, update=True, refresh=False, grads=None, lr=0.1):
        grads = self.fresh_grads() if grads is None else grads
        lr = torch.tensor(lr) if isinstance(lr, float) else lr
        placed = [place(grad, self.layout) for grad in grads]
        assert self.launch([view for view, _ in placed], lr, update=update, refresh=refresh) == []
        for (view, memory), grad in zip(placed, grads, strict=True):
            assert_guards_untouched(view, memory)
            assert torch.equal(view.nan_to_num(), grad.nan_to_num()), "the gradient was written"
        for kind in ("eager", "truth"):
            self.specify(kind, grads, lr.double().item(), update, refresh)

    def specify(self, kind, grads, lr, update, refresh):
        lists, scalars = getattr(self, kind), self.scalars
        names = ("factor_lr", "factor_momentum", "damping", "batch_size")
        for i, (param, grad) in enumerate(zip(lists["params"], grads, strict=True)):
            factors, momenta = lists["factors"][i], lists["momenta"][i]
            g = grad.reshape(squeezed(grad.shape))
            if kind == "truth":
                g = g.double()
                if update:
                    chosen = {name: scalars[name] for name in names}
                    reference.update_factors_(g, factors, momenta, **chosen)
                update_ = reference.precondition(g, factors)
            else:
                products = lists["products"][i]
                if refresh:
                    refresh_products(factors, products)
                update_ = eager_step(g, factors, momenta, products, update=update, scalars=scalars)
            reference.apply_(
                param,
                (-update_ if scalars["maximize"] else update_).reshape(param.shape),
                lists["buffers"][i] if lists["buffers"] else None,
                lr=lr,
                **{name: scalars[name] for name in ("momentum", "weight_decay", "decoupled")},
            )

    def check(self, factor=2.0):
        """Scales every tensor to 1 by a power of 2 and compares errors over all of a kind."""
        for view, memory in self.placed:
            assert_guards_untouched(view, memory)
        actual = {
            "params": self.params,
            "buffers": self.buffers,
            "factors": [t for row in self.rows(self.values()) for t in row],
            "momenta": [t for row in self.rows(self.momenta) for t in row],
        }
        for key, tensors in actual.items():
            eager, truth = self.eager[key], self.truth[key]
            if key in ("factors", "momenta"):
                eager, truth = ([t for row in rows for t in row] for rows in (eager, truth))
            for dtype in {t.dtype for t in tensors}:
                rows = [
                    row for row in zip(tensors, eager, truth, strict=True) if row[0].dtype == dtype
                ]
                scales = [0.5 ** truth.abs().max().log2().ceil() for _, _, truth in rows]
                joined = [
                    torch.cat(
                        [
                            (row[n] * s.to(row[n])).flatten()
                            for row, s in zip(rows, scales, strict=True)
                        ]
                    )
                    for n in range(3)
                ]
                assert_no_worse_than(*joined, factor=factor)


def refresh_products(factors, products):
    for factor, product in zip(factors, products, strict=True):
        if product is not None:
            new = split(factor)[0].float() if product.dtype == BF16 else factor
            product.copy_(new @ new.T)


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
    monkeypatch.setattr(matrix, "ENOUGH_LARGE_TILES", 0)
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
    left = matrix.ifshampoo_(
        lists[0], lists[1], factors, [empty] * 10,
        [torch.zeros_like(vector), *model.momenta, *map(torch.zeros_like, factors[3:])],
        [empty, *model.products, *[empty] * 3, *map(torch.zeros_like, wide), empty, empty],
        lists[2], torch.tensor(0.1), axes=[1, 2, 3, 2, 2], update_factors=True,
        refresh_products=True, **SCALARS,
    )  # fmt: skip
    assert left == [0, 2, 3, 4]
    assert [torch.equal(a, b) for a, b in zip(before, lists[0], strict=True)] == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_nothing_to_do(device):
    left = matrix.ifshampoo_(
        [], [], [], [], [], [], [], torch.tensor(0.1), axes=[], update_factors=True,
        refresh_products=True, **SCALARS,
    )  # fmt: skip
    assert left == []


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
    for _ in range(matrix._MAX_PLANS + 3):
        kept.append(model.factors[0].clone())
        model.factors[0] = kept[-1]
        model.launch(model.fresh_grads(), torch.tensor(0.1), update=False)
    assert len(matrix._plans) == matrix._MAX_PLANS


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
