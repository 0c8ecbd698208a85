"""`python -m bench sweep`: which runs it makes, how it goes on, its tables and its plot."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from helpers.bench import needs_extras, row

from bench import plan, sweep
from bench.__main__ import main
from bench.measuring.rows import read_rows
from bench.optimizers.tuned import BASE, METHODS
from bench.report import losses

NO_SEARCH = ("text", "KL-SOAP")
STORED = ("text", "SOAP")


@pytest.fixture(autouse=True)
def _no_search(monkeypatch):
    """No search of NO_SEARCH is stored."""
    for task in ("text", "long text"):
        unsearched = dataclasses.replace(METHODS[task]["KL-SOAP"], tuned=None)
        monkeypatch.setitem(METHODS[task], "KL-SOAP", unsearched)


def ended(job, value):
    """The row of a run."""
    about = {"kind": job.kind, "chosen": job.settings, "seed": job.seed, "steps": 5}
    settings = job.chosen or METHODS[job.task][job.method].defaults
    return row(job.method, "loss", value, case=job.task, settings=settings, **about)


def choice(*cases, kinds=tuple(plan.PLANS), again=False):
    return plan.Choice(list(cases), list(kinds), None, again)


# Plan -----------------------------------------------------------------------------------------


def test_the_defaults_come_first_a_seed_after_the_other_and_ended_runs_never_again():
    asked = choice(NO_SEARCH, STORED)
    jobs = plan.planned(asked, [])
    first = [("KL-SOAP", 0), ("SOAP", 0), ("KL-SOAP", 1), ("SOAP", 1), ("KL-SOAP", 2), ("SOAP", 2)]
    assert [(job.method, job.seed) for job in jobs[:6]] == first
    assert {job.kind for job in jobs[:6]} == {"defaults"}
    assert len(set(jobs)) == len(jobs)
    assert plan.planned(asked, [ended(job, 1.0) for job in jobs[:4]]) == jobs[4:]


def test_a_stored_search_is_made_again_only_when_asked_for():
    kinds = ("tuned", "search")
    jobs = plan.planned(choice(STORED, kinds=kinds), [])
    assert [(job.kind, job.seed, job.chosen) for job in jobs] == [
        ("tuned", seed, METHODS["text"]["SOAP"].tuned) for seed in plan.SEEDS
    ]
    again = plan.planned(choice(STORED, kinds=kinds, again=True), [])
    assert [job.kind for job in again] == ["search"] * 25


def test_the_best_of_a_search_is_trained_once_all_of_it_is_known():
    """25 settings with one seed, the best five with two more, then the lowest mean of three."""
    asked = choice(NO_SEARCH, kinds=("tuned", "search"))
    first = plan.planned(asked, [])
    assert {(job.kind, job.seed) for job in first} == {("search", 100)}
    grid = [job.settings for job in first]
    assert len(set(grid)) == 25
    # A diverged run has no value; the fourth of the first seed is the best of all three.
    value = {settings: 1.0 + i for i, settings in enumerate(grid)} | {grid[0]: None}
    done = [ended(job, value[job.settings]) for job in first]
    assert plan.planned(asked, done[:-1]) == first[-1:]
    others = plan.planned(asked, done)
    assert [(job.seed, job.settings) for job in others] == [
        (seed, settings) for seed in (101, 102) for settings in grid[1:6]
    ]
    done += [ended(job, 9.0 if job.settings != grid[3] else 1.0) for job in others]
    assert plan.planned(asked, done[:-1]) == others[-1:]
    best = plan.planned(asked, done)
    assert {(job.kind, job.settings) for job in best} == {("tuned", grid[3])}
    assert [job.seed for job in best] == [0, 1, 2]
    assert plan.all_best(done) == {NO_SEARCH: best[0].chosen}
    assert isinstance(best[0].chosen["betas"], tuple)
    long = plan.planned(choice(("long text", "KL-SOAP"), kinds=("tuned", "search")), done)
    assert {(job.task, job.settings) for job in long} == {("long text", grid[3])}


def test_a_search_in_which_every_run_diverged_has_a_best_all_the_same():
    asked = choice(NO_SEARCH, kinds=("search",))
    done = [ended(job, None) for job in plan.planned(asked, [])]
    done += [ended(job, None) for job in plan.planned(asked, done)]
    assert plan.planned(asked, done) == []
    assert list(plan.all_best(done)) == [NO_SEARCH]


@pytest.mark.parametrize("name", BASE)
def test_a_basin_spans_two_decades(name):
    found = sorted(plan.basin(name), key=lambda settings: settings["lr"])
    lrs = [settings["lr"] for settings in found]
    assert len(lrs) == 9
    assert lrs[-1] / lrs[0] == pytest.approx(100)
    steps = [math.log10(b / a) for a, b in pairwise(lrs)]
    assert steps == pytest.approx([0.25] * 8, abs=0.01)
    assert plan.basin(name)[0]["lr"] == lrs[4]
    if name == "Muon":
        assert [s["adamw_lr"] / s["lr"] for s in found] == pytest.approx([0.015] * 9, rel=0.01)


# Runs -----------------------------------------------------------------------------------------


@needs_extras
def test_a_run_is_that_of_the_comparison(monkeypatch):
    """Equal seeds, equal networks and batches; a run alone ends where one among others does."""
    monkeypatch.setattr(sweep, "QUICK_ROUNDS", 1)
    job = plan.Job("tuned", "autoencoder", "SOAP", json.dumps({"lr": 0.01}), 3)
    found = sweep.train_job(job, device="cpu", quick=True)
    problem = sweep.PROBLEMS["autoencoder"]
    build = METHODS["autoencoder"]["SOAP"].optimizer
    optimizers = {lr: lambda model, lr=lr: build(model, {"lr": lr}) for lr in (0.1, 0.01)}
    cpu = torch.device("cpu")
    sets = problem.load(cpu, tuning=False)
    (runs,) = sweep.train(problem, optimizers, sets, cpu, seed=3, rounds=1)
    assert found["loss"] == runs[0.01].held_out["loss"]
    assert found["steps"] == 30


@needs_extras
@pytest.mark.parametrize(("name", "lr"), [("torch SGD", 1e30), ("KL-Shampoo", 1e30)])
def test_a_run_that_diverges_ends_early_and_has_no_value(name, lr):
    job = plan.Job("search", "digits", name, json.dumps({"lr": lr}), 0)
    found = sweep.train_job(job, device="cpu", quick=True)
    assert math.isnan(found["loss"][-1])
    assert found["steps"] <= 19


@needs_extras
def test_sweep_end_to_end(tmp_path, capsys, monkeypatch):
    """In two processes; the second command goes on, another commit is refused, time ends it."""
    options = ["--quick", "--out", str(tmp_path), "--tasks", "autoencoder", "--methods"]
    names = ["torch AdamW", "RootFreeAdamW"]
    kinds = ["--kinds", "defaults", "basin"]
    command = ["sweep", *options, *names, *kinds, "--jobs", "2"]
    assert main([*command, "--minutes", "0"]) == 0
    assert "20 runs of the plan are left" in capsys.readouterr().out
    assert main([*command, "--kinds", "defaults"]) == 0
    path = tmp_path / "sweep.jsonl"
    before = path.read_text()
    assert before.count("\n") == 2
    assert main(command) == 0
    assert "the plan is whole" in capsys.readouterr().out
    assert path.read_text().startswith(before)
    written = read_rows(path)
    assert len(written) == 20
    for found in written:
        assert found["metric"] == "loss on all images"
        assert found["value"] == pytest.approx(found["detail"]["loss"][-1], rel=1e-3)
        assert found["detail"]["steps"] == 60
    page = (tmp_path / "sweep.md").read_text()
    assert page == losses.sweep(written) + "\n"
    losses.basin(losses.basin_rows(written), tmp_path / "basin.png")
    assert (tmp_path / "basin.png").exists()
    monkeypatch.setenv("BENCH_COMMIT", "another")
    with pytest.raises(SystemExit, match="has rows of abc"):
        main(command)


# Tables ---------------------------------------------------------------------------------------


def test_the_table_shows_both_numbers_and_what_is_missing():
    def of(kind, task, name, value, seed, **chosen):
        return ended(plan.Job(kind, task, name, json.dumps(chosen), seed), value)

    rows = [
        of("tuned", "text", "SOAP", 1.5, 0, lr=0.01),
        *(of("defaults", "text", "SOAP", 1.9 + seed / 10, seed) for seed in (0, 1, 2)),
        of("defaults", "text", "RootFreeShampoo", 1.6, 0),
        of("defaults", "digits", "SOAP", 0.25, 0),
        of("defaults", "digits", "Muon", None, 0),
    ]
    shown = losses.sweep([{**each, "unit": "nat"} for each in rows])
    assert "| optimizer | digits, 5 steps | text, 5 steps |" in shown
    assert "| RootFreeShampoo | not measured | **1.600 (1 of 3 seeds)** |" in shown
    assert "| SOAP | **0.250** | 2.000 ± 0.100 |" in shown
    assert "| Muon | 1 of 1 diverged | not measured |" in shown
    assert shown.index("At the defaults") < shown.index("**1.500**")
    assert "| settings | text |" in shown
    assert "| SOAP | lr 0.01 |" in shown


def test_the_axis_of_a_basin_tells_apart_what_trained():
    margin = 1.2**0.04
    assert losses.edges([[1.0, 1.2], [1.1]]) == pytest.approx((1 / margin, 1.2 * margin))
    margin = 6**0.04
    assert losses.edges([[1.0, 1e9], [], [2.0, 1e9]]) == pytest.approx((1 / margin, 6 * margin))


@needs_extras
def test_the_legend_of_a_basin_names_what_only_one_panel_has(monkeypatch, tmp_path):
    jobs = [("digits", "SOAP"), ("text", "SOAP"), ("text", "Muon")]
    rows = [
        {**ended(plan.Job("basin", task, name, json.dumps({"lr": lr}), 0), 1 + lr), "unit": "nat"}
        for task, name in jobs
        for lr in (0.01, 0.1)
    ]
    figures = []
    monkeypatch.setattr(losses, "save", lambda figure, *_: figures.append(figure))
    losses.basin(losses.basin_rows(rows), tmp_path / "basin.png")
    (legend,) = figures[0].legends
    assert {text.get_text() for text in legend.texts} == {"SOAP", "Muon"}
