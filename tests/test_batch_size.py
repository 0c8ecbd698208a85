"""BatchSizeCounter: what it counts, and that training equals a batch_size set by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.batch_size import Net, batch, batch_sizes, setup
from helpers.optimizers import SCALED, assert_identical, build, snapshot
from torch import nn

from rootfree_fused import BatchSizeCounter, RootFreeAdamW

IGNORED = -100


class Anything(nn.Module):
    """Returns its first argument."""

    def forward(self, x, unused=None):
        return x


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_training_equals_a_batch_size_set_by_hand(name, micro_batches):
    """Batches that vary, with evaluations between: every bit of parameters and state."""
    results = []
    for by_hand in (False, True):
        model, optimizer, counter = setup(name)
        if by_hand:
            counter.remove()
        for t in range(4):
            samples = 5 + t
            for k in range(micro_batches):
                loss = model(batch(samples, seed=10 * t + k)).square().mean() / micro_batches
                loss.backward()
            model.eval()
            model(batch(50))
            model.train()
            if by_hand:
                optimizer.param_groups[0]["batch_size"] = samples * micro_batches
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(optimizer, list(model.parameters())))
        assert batch_sizes(optimizer) == [8 * micro_batches]
    assert_identical(*results)


COUNTED = {"batch_size": "counted"}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_size_that_nothing_counted_is_refused(name, compiled):
    """With a counter it trains, and its checkpoints hold the number."""
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    optimizer, by_hand = (build(name, list(m.parameters()), **COUNTED) for m in (model, plain))
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    optimizer.state_dict()  # allocates state
    model(batch(6)).square().mean().backward()
    before = snapshot(optimizer, list(model.parameters()))
    for _ in range(2):
        with pytest.raises(ValueError, match="batch_size of group 0 is 'counted', but nothing"):
            step()
    assert_identical(snapshot(optimizer, list(model.parameters())), before)
    optimizer.zero_grad()
    with BatchSizeCounter(model, optimizer):
        for m, o in ((model, optimizer), (plain, by_hand)):
            by_hand.param_groups[0]["batch_size"] = 6
            m(batch(6)).square().mean().backward()
            o.step()
    assert_identical(
        snapshot(optimizer, list(model.parameters())), snapshot(by_hand, list(plain.parameters()))
    )
    assert optimizer.state_dict()["param_groups"][0]["batch_size"] == 6
    other = build(name, list(model.parameters()), **COUNTED)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["batch_size"] == 6


@pytest.mark.parametrize("name", SCALED)
def test_a_compiled_step_looks_at_every_group_before_it_moves_one(name):
    """State that was emptied breaks the graph between groups, as an update of matrices does."""
    model = Net()
    first, *others = model.parameters()
    groups = [{"params": [first], "batch_size": 6}, {"params": others, "batch_size": 6}]
    optimizer = build(name, groups)
    step = torch.compile(optimizer.step, backend="eager")
    model(batch(6)).square().mean().backward()
    step()
    optimizer.state[first].clear()
    optimizer.param_groups[1].update(COUNTED)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="batch_size of group 1 is 'counted'"):
        step()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_checkpoint_before_the_first_step_is_counted_still():
    model, optimizer, _ = setup()
    other = RootFreeAdamW(model.parameters(), batch_size="counted")
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["batch_size"] == "counted"


def test_only_what_reaches_the_gradients_counts():
    model, optimizer, _ = setup()
    with torch.no_grad():
        model(batch(100))
    with torch.inference_mode():
        model(batch(100))
    model.eval()
    model(batch(100)).sum().backward()
    model.train()
    model(batch(100))  # no backward
    model(batch(5)).mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [5]


def test_keyword_and_nested_inputs_have_samples():
    class Nested(nn.Linear):
        def forward(self, inputs, *, scale):
            return super().forward(inputs["x"][0]) * scale

    model = Nested(4, 2)
    optimizer = build("adamw", model.parameters())
    with BatchSizeCounter(model, optimizer):
        model(inputs={"x": [batch(5)]}, scale=torch.tensor(2.0)).mean().backward()
        optimizer.step()
    assert batch_sizes(optimizer) == [5]


def test_one_backward_over_two_calls_and_two_over_one():
    model, optimizer, _ = setup()
    (model(batch(5)).mean() + model(batch(3)).mean()).backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [8]
    optimizer.zero_grad()
    out = model(batch(4))
    out.mean().backward(retain_graph=True)
    out.square().mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [4]


@pytest.mark.parametrize(("count", "expected"), [("tokens", 9), ("next_tokens", 7)])
def test_tokens_are_labels_that_are_not_ignored(count, expected):
    rows = [[0, 1, 2, IGNORED, IGNORED], [IGNORED, 1, 2, 0, 1], [2, 0, *[IGNORED] * 3]]
    labels = torch.tensor(rows)
    model, optimizer, _ = setup(count=count)
    x = torch.randn(3, 5, 4)
    for _ in range(2):
        model(x, labels=labels)["loss"].backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [2 * expected]


def test_what_does_not_count_is_not_asked_for_a_count():
    model, _, _ = setup(count="tokens")
    with torch.no_grad():
        model(batch(5))
    model.eval()
    model(batch(5))


def test_ignore_index_and_a_function():
    labels = torch.tensor([0, 1, 2, 2])
    model, optimizer, _ = setup(count="tokens", ignore_index=2)
    model(batch(4), labels=labels)["logits"].mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [2]
    model, optimizer, _ = setup(count=lambda args, kwargs: args[0].abs().sum())
    model(torch.full((2, 4), 0.5)).mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [4]


def test_every_group_of_every_optimizer():
    model = Net()
    optimizers = [
        build("adamw", [{"params": [p], "batch_size": 2} for p in model.hidden.parameters()]),
        build("rmsprop", model.last.parameters()),
    ]
    for optimizer in optimizers:
        BatchSizeCounter(model, optimizer)
    model(batch(5)).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [batch_sizes(o) for o in optimizers] == [[5, 5], [5]]


def test_a_closure_is_counted():
    """As Lightning steps: forward, zero_grad and backward inside step."""
    model, optimizer, _ = setup()

    def closure():
        loss = model(batch(samples)).mean()
        optimizer.zero_grad()
        loss.backward()
        return loss

    for samples in (5, 3):
        assert torch.is_tensor(optimizer.step(closure))
        assert batch_sizes(optimizer) == [samples]
        samples -= 2
        optimizer.step(closure=closure)
        assert batch_sizes(optimizer) == [samples]


@pytest.mark.parametrize("zero_grad_first", [False, True])
def test_a_skipped_step_drops_its_counts_with_the_gradients(zero_grad_first):
    model, optimizer, _ = setup()
    scaler = torch.amp.GradScaler("cpu")
    sizes = []
    for t, samples in enumerate((5, 3, 4)):
        if zero_grad_first:
            optimizer.zero_grad()
        loss = model(batch(samples)).mean()
        if not zero_grad_first:
            model.zero_grad()
        scaler.scale(loss * (torch.inf if t == 1 else 1)).backward()
        before = snapshot(optimizer, list(model.parameters()))
        scaler.step(optimizer)
        scaler.update()
        sizes += batch_sizes(optimizer)
        if t == 1:
            assert_identical(snapshot(optimizer, list(model.parameters())), before)
    assert sizes == [5, 5, 4]


def test_a_backward_that_fails_is_dropped_with_its_gradients():
    model, optimizer, _ = setup()
    handle = model.hidden.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch(50)).mean().backward()
    handle.remove()
    optimizer.zero_grad()
    model(batch(5)).mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [5]


def test_reset_forgets_gradients_that_were_set_to_zero():
    model, optimizer, counter = setup()
    model(batch(50)).mean().backward()
    optimizer.zero_grad(set_to_none=False)
    counter.reset()
    model(batch(5)).mean().backward()
    optimizer.step()
    assert batch_sizes(optimizer) == [5]


def test_step_without_a_count_changes_nothing():
    model, optimizer, counter = setup()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer, list(model.parameters()))
    with pytest.raises(RuntimeError, match="no call of Net in training mode was followed by"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="attach the counter to the module that is called"):
        optimizer.step(lambda: 0.0)
    assert_identical(snapshot(optimizer, list(model.parameters())), before)
    model(batch(5)).mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="cannot know its batch size"):
        optimizer.step()
    counter.remove()
    optimizer.step()
    assert batch_sizes(optimizer) == [5]


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="group 0 of SGD has no batch_size; pass an optimizer of"):
        BatchSizeCounter(Net(), torch.optim.SGD(Net().parameters()))
    with pytest.raises(ValueError, match="count is 'words'; pass 'samples', 'tokens', 'next_tok"):
        setup(count="words")
    model = Anything()
    BatchSizeCounter(model, build("adamw", Net().parameters()))
    with pytest.raises(ValueError, match=r"shapes \(5, 4\), \(3,\), whose leading dimensions"):
        model(torch.ones(5, 4), unused=torch.ones(3))
    with pytest.raises(TypeError, match="without a tensor that has an axis"):
        model(3)
    with pytest.raises(TypeError, match="returned a set without tensors"):
        model({1}, unused=torch.ones(3))
    with pytest.raises(TypeError, match="without a tensor labels="):
        setup(count="tokens")[0](batch(5))
    with pytest.raises(TypeError, match="count returned None; return a number"):
        setup(count=lambda args, kwargs: None)[0](batch(5))
    model, optimizer, _ = setup(count="tokens")
    model(batch(2), labels=torch.full((2,), IGNORED))["logits"].mean().backward()
    with pytest.raises(ValueError, match="has a batch size of 0"):
        optimizer.step()


def test_tokens_are_not_counted_as_samples_unasked():
    """A language model called as model(ids): both numbers are named, either can be asked for."""
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    ids = torch.arange(24).reshape(3, 8) % 10

    def step(**options):
        optimizer = build("adamw", model.parameters(), batch_size=1)
        with BatchSizeCounter(model, optimizer, **options):
            model(ids).square().mean().backward()
            optimizer.step()
        return batch_sizes(optimizer)

    with pytest.raises(
        ValueError, match=r"\(3, 8\).* over tokens has 24 terms, one over samples 3"
    ):
        step()
    assert step(count="samples") == [3]
    assert step(count=lambda args, kwargs: args[0].numel()) == [24]


def test_integers_that_are_no_tokens_are_samples():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    optimizer = build("adamw", model.parameters(), batch_size=1)
    with BatchSizeCounter(model, optimizer):
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
    assert batch_sizes(optimizer) == [7]


def test_a_model_in_eval_mode_is_told_the_cure():
    model, optimizer, _ = setup()
    model.eval()
    model(batch(4)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"Call train\(\) on it, and eval\(\) only on the layers"
    ):
        optimizer.step()


@pytest.mark.parametrize("in_backward", [False, True])
def test_micro_batches_that_were_taken_are_counted_together(in_backward):
    model = torch.nn.Linear(4, 2)
    optimizer = RootFreeAdamW(model.parameters(), batch_size=1)
    BatchSizeCounter(model, optimizer)
    if in_backward:
        optimizer.accumulate_in_backward()
    for dropped in (False, True):
        for samples in (3, 5):
            model(torch.ones(samples, 4)).sum().backward()
            if not in_backward:
                optimizer.accumulate()
            if dropped and samples == 3:
                optimizer.zero_grad()
        optimizer.step()
        assert optimizer.param_groups[0]["batch_size"] == (5 if dropped else 8)
