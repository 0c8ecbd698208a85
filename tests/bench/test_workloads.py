"""The small workloads of the papers, and what training does for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.bench import CPU, needs_extras
from torch import nn

from bench.measuring.common import threads
from bench.workloads import text, training
from bench.workloads.papers import WORKLOADS
from bench.workloads.papers.graph import LABELLED, neighbours, normalised
from bench.workloads.papers.sequences import scan
from bench.workloads.papers.workload import squared_loss
from rootfree_fused import IFShampoo

# Elements and tensors of the parameters.
SIZES = {
    "digits_vgg": (17_754, 14),
    "digits_resnet": (38_266, 26),
    "digits_resnet_squared": (38_266, 26),
    "digits_densenet": (21_018, 32),
    "digits_convmixer": (6_570, 38),
    "digits_vit": (86_410, 43),
    "digits_focal": (91_747, 55),
    "text_ssm": (242_593, 29),
    "text_lstm": (242_209, 15),
    "graph": (4_810, 4),
}


# Stand-ins ------------------------------------------------------------------------------------


def test_the_stand_ins_need_no_data():
    assert {name for name, of in WORKLOADS.items() if of.needs_data is None} == SIZES.keys()
    assert WORKLOADS["digits_vgg"].with_data("anywhere") is WORKLOADS["digits_vgg"]
    assert all(name == of.name for name, of in WORKLOADS.items())


@needs_extras
@pytest.mark.parametrize("name", SIZES)
def test_two_rounds_lower_the_loss(name, monkeypatch):
    monkeypatch.setattr(text, "STEPS_A_ROUND", 4)
    monkeypatch.setattr(text, "HELD_OUT", 1024)
    workload = WORKLOADS[name]
    assert workload.missing() is None
    train_set, held_out = workload.load(CPU, tuning=True)
    if name.startswith("digits"):
        train_set = tuple(part[:448] for part in train_set)
    methods = {
        "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
        "IFShampoo": lambda model: IFShampoo(
            model.parameters(), lr=3e-4, batch_size=workload.batch_size
        ),
    }
    sets = train_set, held_out
    with threads(workload.threads):
        runs = list(training.train(workload, methods, sets, CPU, seed=0, rounds=2))[-1]
    for run in runs.values():
        assert run.training_loss[1] < run.training_loss[0]
        assert run.held_out.keys() == {"loss", "accuracy"}
        assert run.model.training
        parameters = list(run.model.parameters())
        assert (sum(p.numel() for p in parameters), len(parameters)) == SIZES[name]
        learnt = training.measured(workload, run.model, workload.training_part(train_set))
        assert 0 < learnt["accuracy"] <= 1
        assert learnt["loss"] == pytest.approx(run.held_out["loss"][-1], rel=0.2)


@needs_extras
@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("digits")])
def test_logits_of_digits_are_ten_an_image(name):
    workload = WORKLOADS[name]
    assert workload.build_model()(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    batch = next(iter(workload.batches(workload.load(CPU, tuning=True)[0], torch.Generator())))
    assert batch[0].shape == (workload.batch_size, 1, 8, 8)


@pytest.mark.parametrize("name", ["text_ssm", "text_lstm"])
def test_a_character_is_predicted_from_those_before(name):
    torch.manual_seed(0)
    model = WORKLOADS[name].build_model()
    first = torch.randint(text.VOCABULARY, (2, text.CONTEXT))
    second = first.clone()
    second[:, 40:] = 0
    change = (model(first) - model(second)).abs().amax(dim=(0, 2))
    assert change[:40].max() < 1e-6
    assert change[40:].min() > 0


@pytest.mark.parametrize("length", [1, 2, 13, 64])
def test_the_scan_is_the_recurrence(length):
    keep, enter = torch.rand(2, length, 5), torch.randn(2, length, 5)
    state, expected = torch.zeros(2, 5), []
    for t in range(length):
        state = keep[:, t] * state + enter[:, t]
        expected.append(state)
    torch.testing.assert_close(scan(keep, enter), torch.stack(expected, dim=1))


def test_the_squared_loss_is_rescaled_at_the_right_class():
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 1])
    total = 0.0
    for image, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for c, logit in enumerate(image):
            total += 15 * (logit - 30) ** 2 if c == label else logit**2
    assert float(squared_loss(logits, labels)) == pytest.approx(total / 12, rel=1e-12)


def test_a_node_is_joined_to_its_nearest_and_its_edges_are_normalised():
    points = torch.tensor([[0.0], [1.0], [2.5], [7.0]])
    edges = neighbours(points, 1)
    assert edges.nonzero().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]
    dense = normalised(edges).to_dense()
    degrees = [2, 3, 3, 2]
    for i in range(4):
        for j in range(4):
            expected = (edges[i, j] or i == j) / (degrees[i] * degrees[j]) ** 0.5
            assert float(dense[i, j]) == pytest.approx(float(expected), rel=1e-6)


@needs_extras
def test_labels_of_the_graph_are_trained_on_or_held_out():
    graph = WORKLOADS["graph"]
    (labelled, tuned), (again, test) = (graph.load(CPU, tuning=tuning) for tuning in (True, False))
    assert labelled.chosen.tolist() == again.chosen.tolist()
    assert len(labelled.chosen) == LABELLED == graph.batch_size
    assert labelled.labels.bincount().min() >= 17
    parts = [set(nodes.chosen.tolist()) for nodes in (labelled, tuned, test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 180 + 252 + 540


# Training -------------------------------------------------------------------------------------


class Toy(training.Problem):
    """One weight, 10 steps, a gradient of 3."""

    name, metric, unit, needs, threads = "toy", "test loss", "nat", (), 1
    batch_size, rounds, warm_up = 1, 2, 0.0

    def load(self, device, *, tuning):
        return None, None

    def build_model(self):
        return nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1, bias=False))

    def batches(self, data, generator):
        return range(5)

    def loss(self, model, batch):
        assert model.training
        return 3 * model[1].weight.sum()

    def evaluate(self, model, held_out):
        assert not model.training
        assert not torch.is_grad_enabled()
        model(torch.full((4, 1), 7.0))
        return {"loss": 0.0}


def _steps(problem):
    """The lengths of the steps of SGD at lr 1, and the run."""
    lengths = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            before = [p.detach().clone() for p in self.param_groups[0]["params"]]
            super().step(closure)
            pairs = zip(before, self.param_groups[0]["params"], strict=True)
            lengths.append(sum(float((a - b).detach().norm()) for a, b in pairs))

    methods = {"SGD": lambda model: Watched(model.parameters(), lr=1.0)}
    (run,) = list(training.train(problem, methods, (None, None), CPU, seed=0, rounds=2))[
        -1
    ].values()
    return lengths, run


def test_a_schedule_of_steps_lowers_the_learning_rate_at_each_of_them():
    toy = Toy()
    toy.schedule = ("steps", (0.3, 0.6), 0.1)
    assert _steps(toy)[0] == pytest.approx([3.0] * 3 + [0.3] * 3 + [0.03] * 4, rel=1e-4)
    toy.warm_up = 0.2
    assert _steps(toy)[0][:4] == pytest.approx([1.5, 3.0, 3.0, 0.3], rel=1e-4)


def test_steps_of_the_published_epochs_are_where_they_were():
    rate = partial(training.learning_rate, warm_up=0, schedule=WORKLOADS["cifar_vgg16_bn"].schedule)
    for epochs, first in ((210, 70), (120, 40)):
        steps = epochs * 390
        for drop, before, after in ((first, 1, 0.1), (2 * first, 0.1, 0.01)):
            assert rate(drop * 390 - 1, steps=steps) == pytest.approx(before)
            assert rate(drop * 390, steps=steps) == pytest.approx(after)


@pytest.mark.parametrize(("clip", "length"), [(None, 3.0), (2.0, 2.0), (5.0, 3.0)])
def test_gradients_are_clipped_to_a_norm(clip, length):
    toy = Toy()
    toy.schedule, toy.clip = ("steps", (), 1.0), clip
    assert _steps(toy)[0] == pytest.approx([length] * 10, rel=1e-4)


def test_evaluation_leaves_batch_norm_and_the_mode_alone():
    _, run = _steps(Toy())
    assert run.model.training
    assert run.model[0].running_mean == 0
    assert run.model[0].num_batches_tracked == 0
