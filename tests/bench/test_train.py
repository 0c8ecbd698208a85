"""`python -m bench train`: its problems, loop, search, tables and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.bench import CPU, RESULTS, needs_extras, row
from torch.optim import SGD

from bench import train
from bench.__main__ import main
from bench.measuring import rows
from bench.optimizers import tuned
from bench.report import training as tables
from bench.workloads import text, training
from bench.workloads.digits import Digits
from bench.workloads.text import Text
from rootfree_fused import RootFreeRMSprop

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
    runs = training.train(Digits(), twins, sets, CPU, seed=0, rounds=1, progress=lambda: None)
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


# Search ---------------------------------------------------------------------------------------


def test_the_best_setting_is_the_lowest_of_those_that_ended_with_every_seed():
    def searched(value, seeds, lr):
        return row("A", "validation loss", value, settings={"lr": lr}, seeds=seeds)

    rows_ = [
        searched(None, [1, 2], 4),
        searched(0.2, [1, 2], 2),
        searched(0.3, [1, 2], 1),
        searched(0.1, [1], 3),
    ]
    assert train.best(rows_) == {"lr": 2}


def test_only_the_best_of_the_first_seed_are_trained_with_the_others(monkeypatch):
    method = tuned.Method(SGD, {"lr": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)}, tuned={}, fixed={})
    losses = {1.0: 0.5, 2.0: float("nan"), 3.0: 0.1, 4.0: 0.4, 5.0: 0.3, 6.0: 0.2}
    trained = []

    def fake_train(problem, optimizers, sets, device, *, seed, rounds, progress):
        of = {i: build.keywords["settings"]["lr"] for i, build in optimizers.items()}
        trained.append((seed, sorted(of.values())))
        held_out = {i: {"loss": [9.0, losses[lr] + seed]} for i, lr in of.items()}
        return {i: SimpleNamespace(held_out=curves) for i, curves in held_out.items()}

    monkeypatch.setattr(train, "train", fake_train)
    monkeypatch.setitem(train.FINALISTS, "text", 3)
    ends = train.search(Text(), method, ((), ()), CPU, (0, 1, 2), rounds=2, progress=int)
    finalists = [3.0, 5.0, 6.0]
    assert trained == [(0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), (1, finalists), (2, finalists)]
    assert [len(end["loss"]) for end in ends] == [1, 1, 3, 1, 3, 3]
    assert ends[2]["loss"] == [0.1, 1.1, 2.1]


def test_interior_means_away_from_both_ends_of_every_range():
    search = {"lr": (1, 2, 3), "betas": ((0.9, 0.8), (0.9, 0.9), (0.9, 0.95))}
    assert train.interior({"lr": 2, "betas": [0.9, 0.9]}, search)
    assert not train.interior({"lr": 1, "betas": [0.9, 0.9]}, search)
    assert not train.interior({"lr": 2, "betas": [0.9, 0.95]}, search)


@pytest.mark.parametrize(
    ("problem", "name"), [(p, name) for p, of in tuned.METHODS.items() for name in of]
)
def test_the_settings_in_use_are_the_best_of_a_stored_search_of_equal_size(problem, name):
    (path,) = RESULTS.glob(f"*/train_{problem}_tuning.jsonl")
    stored = rows.read_rows(path)
    method, own = tuned.METHODS[problem][name], rows.select(stored, provider=name)
    assert json.loads(json.dumps(method.tuned)) == train.best(own)
    searched = [r["detail"]["settings"] for r in own]
    assert json.loads(json.dumps(method.grid())) == searched
    assert len(searched) == 25


# Tables and subcommands -----------------------------------------------------------------------


@pytest.mark.parametrize("problem", train.PROBLEMS)
def test_the_stored_comparison_used_the_settings_in_use(problem):
    (path,) = RESULTS.glob(f"*/train_{problem}.jsonl")
    stored = rows.read_rows(path)
    for name, method in tuned.METHODS[problem].items():
        settings = json.loads(json.dumps({**method.tuned, **method.fixed}))
        trained = rows.select(stored, provider=name, metric="test loss")
        assert [row["detail"]["settings"] for row in trained] == [settings] * 3


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
@pytest.mark.parametrize("problem", train.PROBLEMS)
def test_train_end_to_end(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "STEPS_A_ROUND", 2)
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", "--problem", problem, *options]) == 0
    written = rows.read_rows(tmp_path / f"train_{problem}.jsonl")
    assert rows.unique(written, "provider") == list(tuned.METHODS[problem])
    of_loss = [r["detail"] for r in rows.select(written, metric="test loss")]
    assert len(of_loss) == len(tuned.METHODS[problem])
    for detail in of_loss:
        assert len(detail["curve"]) == len(detail["steps"]) == len(detail["seconds"]) == 2
        assert detail["steps"][1] == 2 * detail["steps"][0]
        assert 0 < detail["seconds"][0] < detail["seconds"][1]
    assert (tmp_path / f"train_{problem}.md").read_text() == tables.train(written) + "\n"


@needs_extras
def test_an_optimizer_with_a_wrong_step_is_red_and_not_trained(tmp_path, monkeypatch):
    right = train.PEERS["RootFreeAdamW"]
    off = replace(
        right, displacement=lambda p, g, interval: 1.1 * right.displacement(p, g, interval)
    )
    monkeypatch.setitem(train.PEERS, "RootFreeAdamW", off)
    options = ["--problem", "digits", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", *options]) == 1
    written = rows.read_rows(tmp_path / "train_digits.jsonl")
    (error,) = rows.select(written, provider="RootFreeAdamW")
    assert (error["metric"], error["detail"]["right"]) == ("error", False)
    assert "| RootFreeAdamW | **WRONG**, error" in (tmp_path / "train_digits.md").read_text()
    checked = rows.unique(rows.select(written, metric="error"), "provider")
    assert checked == ["RootFreeRMSprop", "RootFreeAdamW", "IFShampoo", "torch AdamW"]
    assert len(rows.unique(rows.select(written, metric="test loss"), "provider")) == 4


@needs_extras
def test_tuning_end_to_end(tmp_path, monkeypatch, capsys):
    method = tuned.Method(
        RootFreeRMSprop, {"lr": (1e-3, 1e-2)}, tuned={"lr": 1e-3}, fixed={"batch_size": 64}
    )
    monkeypatch.setitem(tuned.METHODS, "digits", {"RootFreeRMSprop": method})
    options = ["--problem", "digits", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", "--tune", *options]) == 0
    written = rows.read_rows(tmp_path / "train_digits_tuning.jsonl")
    assert [r["detail"]["settings"] for r in written] == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert "on the edge of the search" in capsys.readouterr().out
