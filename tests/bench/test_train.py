"""`python -m bench train`: its problems, loop, methods, tables and plots."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise

import pytest
import torch
from helpers.bench import CPU, RESULTS, needs_extras, row

from bench import plan, train
from bench.__main__ import main
from bench.measuring import rows
from bench.optimizers import tuned
from bench.report import plots
from bench.report import training as tables
from bench.workloads import text, training
from bench.workloads.autoencoder import Autoencoder
from bench.workloads.digits import Digits
from bench.workloads.problems import PROBLEMS
from bench.workloads.text import Text

# Problems -------------------------------------------------------------------------------------


def test_the_text_is_split_by_modules_and_the_test_is_not_seen_in_tuning(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_text(chr(ord("a") + i) * 200)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path))

    def letters(windows):
        return {text.CHARACTERS[i] for i in windows.unique().tolist()}

    tuning, validation = (letters(part) for part in Text().load(CPU, tuning=True))
    training_, test = (letters(part) for part in Text().load(CPU, tuning=False))
    assert validation == {"i", "s"}
    assert test == {"j", "t"}
    assert tuning == set("abcdefghklmnopqr")
    assert training_ == tuning | validation


def test_characters_outside_ascii_share_one_number():
    assert text._encode("a\té\n".encode()).tolist() == [66, 96, 96, 96, 0]
    assert text.CHARACTERS[66] == "a"
    assert text.VOCABULARY == 97


def test_a_python_without_library_files_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(SystemExit, match="use a Python whose library is not zipped"):
        Text().load(CPU, tuning=False)


def test_the_transformer_predicts_the_next_character_from_those_before():
    torch.manual_seed(0)
    model = Text().build_model()
    assert sum(p.numel() for p in model.parameters()) == 248_737
    assert len(list(model.parameters())) == 30
    for p in model.parameters():
        p.data.normal_(std=0.3)
    first = torch.randint(text.VOCABULARY, (2, text.CONTEXT))
    second = first.clone()
    second[:, 40:] = 0
    change = (model(first) - model(second)).abs().amax(dim=(0, 2))
    assert change[:40].max() == 0
    assert change[40:].min() > 0


@needs_extras
def test_the_autoencoder_is_trained_and_evaluated_on_all_images():
    problem = Autoencoder()
    torch.manual_seed(0)
    model = problem.build_model()
    assert [layer.out_features for layer in model[::2]] == [48, 24, 8, 24, 48, 64]
    assert {type(layer) for layer in model[1::2]} == {torch.nn.Tanh}
    images, held_out = problem.load(CPU, tuning=False)
    assert images.shape == (1797, 64)
    assert images is held_out
    batches = list(problem.batches(images, torch.Generator().manual_seed(0)))
    assert problem.rounds * len(batches) == 600
    assert {batch.shape for batch in batches} == {(problem.batch_size, 64)}
    with torch.no_grad():
        by_hand = sum(((model(x) - x) ** 2).sum() for x in images) / len(images)
        assert problem.evaluate(model, held_out)["loss"] == pytest.approx(float(by_hand), rel=1e-4)


def test_text_is_trained_for_longer_and_at_width_256():
    long, wide = PROBLEMS["long text"], PROBLEMS["wide text"]
    assert text.STEPS_A_ROUND * long.rounds == 1500
    assert text.STEPS_A_ROUND * wide.rounds == 300
    model = wide.build_model()
    assert len(model.blocks) == 4
    assert model.head.in_features == 256
    assert {len(p) for p in model.blocks.parameters() if p.ndim == 2} == {256, 768, 1024}


def test_large_text_is_trained_when_it_is_named():
    parser = argparse.ArgumentParser()
    train.add_tasks(parser)
    assert "large text" not in parser.parse_args([]).tasks
    assert parser.parse_args(["--tasks", "large text"]).tasks == ["large text"]
    large = PROBLEMS["large text"]
    train_set, held_out = large.load(CPU, tuning=True)
    batch = next(iter(large.batches(train_set, torch.Generator().manual_seed(0))))
    assert batch.shape == (32, 257)
    assert large.batch_size == 32 * 256
    assert held_out.shape == (64, 257)
    model = large.build_model()
    assert sum(p.numel() for p in model.parameters()) == 25_450_593
    assert large.loss(model, batch[:1]).dtype == torch.float32


@pytest.mark.parametrize("problem", [Digits(), Text()], ids=lambda p: p.name)
@needs_extras
def test_batch_size_is_the_number_of_terms_that_the_loss_averages(problem):
    torch.manual_seed(0)
    train_set, _ = problem.load(CPU, tuning=True)
    batches = list(problem.batches(train_set, torch.Generator().manual_seed(0)))
    model = problem.build_model()
    shapes = []
    original = torch.nn.functional.cross_entropy

    def spy(logits, target):
        shapes.append(len(target))
        return original(logits, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", spy)
        for batch in batches:
            problem.loss(model, batch)
    assert set(shapes) == {problem.batch_size}


# Loop -----------------------------------------------------------------------------------------


def test_the_learning_rate_rises_by_a_line_and_falls_by_a_cosine():
    factor = [training.learning_rate(i, steps=10, warm_up=2) for i in range(10)]
    assert factor[:3] == [0.5, 1.0, 1.0]
    assert factor[6] == pytest.approx(0.5)
    assert all(later < before for before, later in pairwise(factor[2:]))
    assert training.learning_rate(0, steps=10, warm_up=0) == 1.0


@needs_extras
def test_optimizers_of_a_seed_start_alike_and_see_the_same_batches():
    sets = Digits().load(CPU, tuning=True)
    twins = {
        name: lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for name in ("first", "second")
    }
    (runs,) = training.train(Digits(), twins, sets, CPU, seed=0, rounds=1)
    assert runs["first"].training_loss == runs["second"].training_loss
    assert runs["first"].held_out == runs["second"].held_out
    assert runs["first"].held_out.keys() == {"loss", "accuracy"}


def test_state_is_counted_in_lists_and_dicts_too():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {
        "exp_avg": torch.zeros(3),
        "GG": [torch.zeros(2, 2), []],
        "cache": {"Q": torch.zeros(5, dtype=torch.bfloat16)},
        "count": 7,
    }
    assert training.state_bytes(optimizer) == 12 + 16 + 10


# Methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tuned.BASE)
@needs_extras
def test_the_defaults_are_those_of_the_constructor(name):
    method = tuned.BASE[name]
    build = {tuned.soap: "SOAP", tuned.muon: "Muon"}.get(method.build)
    build = getattr(pytest.importorskip("pytorch_optimizer"), build) if build else method.build
    taken = inspect.signature(build).parameters
    assert {key: taken[key].default for key in method.defaults} == method.defaults
    assert set(method.search) == set(method.defaults)


def test_muon_gets_the_hidden_matrices():
    model = Text().build_model()
    muon, others = (group["params"] for group in tuned.hidden_apart(model))
    assert {id(p) for p in muon} == {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert len(muon) + len(others) == 30


def test_searches_are_of_equal_size():
    sizes = {
        task: {len(method.grid()) for method in methods.values()}
        for task, methods in tuned.METHODS.items()
    }
    assert sizes.pop("wide text") == sizes.pop("large text") == {5}
    assert sizes.pop("long text") == {0}
    assert sizes == {task: {25} for task in sizes}


def stored_searches():
    for path in RESULTS.glob("*/train_*_tuning.jsonl"):
        stored = rows.read_rows(path)
        for name in rows.unique(stored, "provider"):
            yield pytest.param(rows.select(stored, provider=name), id=f"{path.stem}, {name}")


@pytest.mark.parametrize("stored", list(stored_searches()))
def test_the_settings_in_use_are_the_best_of_a_stored_search(stored):
    """The lowest mean of those that were trained with every seed."""
    method = tuned.METHODS[stored[0]["case"]][stored[0]["provider"]]
    seeds = max(len(r["detail"]["seeds"]) for r in stored)
    whole = [r for r in stored if r["value"] and len(r["detail"]["seeds"]) == seeds]
    best = min(whole, key=lambda r: r["value"])["detail"]["settings"]
    assert json.loads(json.dumps(method.tuned)) == best
    searched = [{**r["detail"]["settings"], **method.fixed} for r in stored]
    assert json.loads(json.dumps(method.grid())) == searched
    assert len(searched) == 25


def test_the_settings_in_use_are_the_best_of_stored_sweeps():
    found = {}
    for path in RESULTS.glob("*/sweep.jsonl"):
        found |= plan.all_best(rows.read_rows(path))
    assert len(found) >= 12
    for (task, name), best in found.items():
        assert tuned.METHODS[task][name].tuned == best, (task, name)


# Tables and subcommands -----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/train_*.jsonl")), ids=lambda p: p.stem)
def test_the_stored_comparison_used_the_settings_in_use(path):
    stored = [r for r in rows.read_rows(path) if r["metric"] in tables.GOALS]
    for trained in stored:
        method = tuned.METHODS[trained["case"]][trained["provider"].removesuffix(train.DEFAULTS)]
        of = method.defaults if trained["provider"].endswith(train.DEFAULTS) else method.tuned
        used = {key: trained["detail"]["settings"][key] for key in of}
        assert used == json.loads(json.dumps(of))


def test_a_method_without_a_search_is_trained_at_its_defaults(monkeypatch):
    unsearched = dataclasses.replace(tuned.METHODS["text"]["KL-SOAP"], tuned=None)
    monkeypatch.setitem(tuned.METHODS["text"], "KL-SOAP", unsearched)
    chosen = train.chosen("text", None)
    assert chosen["SOAP"] == ("SOAP", {"lr": 1e-2, "betas": (0.8, 0.95)})
    assert chosen["KL-SOAP, defaults"] == ("KL-SOAP", None)
    assert list(train.chosen("text", ["Muon, defaults", "Muon"])) == ["Muon, defaults", "Muon"]
    with pytest.raises(SystemExit, match="KL-SOAP has no settings for text; take 'KL-SOAP, def"):
        train.chosen("text", ["KL-SOAP"])


def test_the_table_shows_mean_and_deviation_over_seeds():
    settings = {"lr": 0.1, "betas": [0.9, 0.99]}
    of_row = partial(row, "A", case="digits")
    of_seed = [
        [
            of_row("test accuracy", accuracy, seed=s),
            of_row("test loss", 0.1, seed=s, settings=settings, steps=[5, 10]),
            of_row("training loss", 1e-3, seed=s),
            of_row("optimizer step", 0.02 + s, seed=s, p20=0.02 + s, p80=0.02 + s),
            of_row("training step", 1.0 + s, seed=s, p20=0.9 + s, p80=1.05 + s + (s == 1)),
            of_row("state", 8.0),
        ]
        for s, accuracy in enumerate((0.9, 0.8, 1.0))
    ]
    shown = tables.train(list(chain.from_iterable(of_seed)))
    line = "| A | lr 0.1, betas (0.9, 0.99) | 90.00 ± 10.00 | 0.100 ± 0.000 | 0.001 ± 0 |"
    assert f"{line} 1.02 | 2ⁿ | 8 |" in shown
    assert "over 3 seeds after 10 steps" in shown


@needs_extras
@pytest.mark.parametrize("problem", ["autoencoder", "digits", "text"])
def test_train_end_to_end(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "STEPS_A_ROUND", 2)
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", "--tasks", problem, *options]) == 0
    written = rows.read_rows(tmp_path / f"train_{problem}.jsonl")
    names = list(train.chosen(problem, None))
    assert set(rows.unique(written, "provider")) == set(names)
    of_loss = [r["detail"] for r in written if r["metric"] in tables.GOALS]
    assert len(of_loss) == len(names)
    for detail in of_loss:
        assert len(detail["curve"]) == len(detail["steps"]) == len(detail["seconds"]) == 2
        assert detail["steps"][1] == 2 * detail["steps"][0]
        assert 0 < detail["seconds"][0] < detail["seconds"][1]
    assert (tmp_path / f"train_{problem}.md").read_text() == tables.train(written) + "\n"
    plots.loss(plots.loss_rows(written), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


@needs_extras
def test_an_optimizer_with_a_wrong_step_is_red_and_not_trained(tmp_path, monkeypatch):
    right = train.PEERS["RootFreeAdamW"]
    off = replace(
        right, displacement=lambda p, g, interval: 1.1 * right.displacement(p, g, interval)
    )
    monkeypatch.setitem(train.PEERS, "RootFreeAdamW", off)
    names = ["RootFreeAdamW", "IFShampoo", "torch AdamW", "torch SGD"]
    options = ["--tasks", "digits", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", *options, "--methods", *names]) == 1
    written = rows.read_rows(tmp_path / "train_digits.jsonl")
    (error,) = rows.select(written, provider="RootFreeAdamW")
    assert (error["metric"], error["detail"]["right"]) == ("error", False)
    assert "| RootFreeAdamW | **WRONG**, error" in (tmp_path / "train_digits.md").read_text()
    checked = rows.unique(rows.select(written, metric="error"), "provider")
    assert checked == ["RootFreeAdamW", "IFShampoo", "torch AdamW"]
    trained = rows.unique(rows.select(written, metric="test loss"), "provider")
    assert trained == ["IFShampoo", "torch AdamW", "torch SGD"]
