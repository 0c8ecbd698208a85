"""`python -m bench search`: its trials, how they are shared and go on, and its results."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import signal
import statistics

import pytest
from helpers.bench import needs_extras, row
from helpers.search import ALL, SPACE, killed_in, search, share, trials_of

from bench import search as command
from bench.__main__ import main
from bench.measuring.rows import read_rows
from bench.optimizers import spaces
from bench.report import searches
from bench.trials import FINAL, NARROW_STAGE, WIDE_STAGE
from bench.workloads.papers import WORKLOADS

pytestmark = needs_extras
pytest.importorskip("optuna")
FORK = multiprocessing.get_context("fork")  # of a child that starts no thread of torch's
FIRST = ("SGD", WIDE_STAGE)


def points(trials, key=FIRST):
    return [run.point for run in trials.ended(key)]


# Trials ---------------------------------------------------------------------------------------


def test_a_search_that_was_killed_goes_on_as_one_that_was_not(tmp_path):
    """The trial that ran is run again, with the same settings."""
    child = FORK.Process(target=killed_in, args=(tmp_path / "a.db", 6, 3))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    resumed = trials_of(tmp_path / "a.db", runs=6)
    assert len(resumed.ended(FIRST)) == 3
    assert [claim.number for claim in search(resumed)] == [3, 4, 5]
    whole = trials_of(tmp_path / "b.db", runs=6)
    search(whole)
    assert points(resumed) == points(whole)
    assert len({point["lr"] for point in points(whole)}) == 6
    assert all(SPACE["lr"].low <= point["lr"] <= SPACE["lr"].high for point in points(whole))


def test_two_processes_share_the_trials_and_none_is_run_twice(tmp_path):
    together, log = FORK.Barrier(2), tmp_path / "log"
    arguments = (tmp_path / "a.db", 16, together, log)
    children = [FORK.Process(target=share, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(16))
    shared = trials_of(tmp_path / "a.db", runs=16)
    assert len({run.kept["process"] for run in shared.ended(FIRST)}) == 2
    alone = trials_of(tmp_path / "b.db", runs=16)
    search(alone)
    assert points(shared) == points(alone)


def test_seeds_and_stages_draw_other_points_and_the_best_is_trained_last(tmp_path):
    trials = trials_of(tmp_path / "a.db", runs=12, stages=ALL)
    taken = search(trials)
    stages = [claim.stage for claim in taken]
    assert stages == sorted(stages)
    assert [stages.count(stage) for stage in ALL] == [12, 12, 2]
    narrow = trials.space(("SGD", NARROW_STAGE))
    assert 1e-4 < narrow["lr"].low < 5e-3 < narrow["lr"].high < 0.1
    first, second = (points(trials, ("SGD", stage)) for stage in (WIDE_STAGE, NARROW_STAGE))
    assert all(narrow["lr"].low <= point["lr"] <= narrow["lr"].high for point in second)
    # Not the same quantiles of another range.
    assert [p["lr"] for p in first] != pytest.approx([p["lr"] for p in second])
    quantiles = [
        [math.log(p["lr"] / r.low) / math.log(r.high / r.low) for p in of]
        for of, r in ((first, SPACE["lr"]), (second, narrow["lr"]))
    ]
    assert abs(statistics.correlation(*quantiles)) < 0.6
    finite = [run.value for stage in ALL[:2] for run in trials.ended(("SGD", stage)) if run.value]
    assert trials.best("SGD").value == min(finite)
    assert [claim.point for claim in taken[-2:]] == [{}, {}]
    other = trials_of(tmp_path / "b.db", runs=3, seed=1)
    search(other)
    assert points(other)[0] != first[0]


def test_what_diverged_is_counted_and_no_exception(tmp_path):
    trials = trials_of(tmp_path / "a.db", runs=12)
    search(trials)
    ended = trials.ended(FIRST)
    failed = [run for run in ended if run.value is None]
    assert failed == [run for run in ended if run.point["lr"] > 0.3]
    assert 0 < len(failed) < 12
    assert len(ended) == 12


def test_where_all_diverged_there_is_no_second_stage(tmp_path):
    trials = trials_of(tmp_path / "a.db", runs=10, stages=ALL)
    assert len(search(trials, lambda point: math.inf)) == 10
    assert trials.best("SGD") is None
    assert [trials.size(key) for key in trials.keys] == [10, 0, 0]


def test_a_database_of_another_search_is_refused(tmp_path):
    search(trials_of(tmp_path / "a.db", runs=10, stages=ALL))
    with pytest.raises(SystemExit, match=r"commit: stored abc; asked for def\n.*--out"):
        trials_of(tmp_path / "a.db", runs=10, commit="def")
    with pytest.raises(SystemExit, match="seed: stored 0; asked for 1"):
        trials_of(tmp_path / "a.db", runs=10, seed=1)
    with pytest.raises(SystemExit, match="stage 2 of SGD by 10 runs of stage 1, not 20"):
        trials_of(tmp_path / "a.db", runs=20)
    assert search(trials_of(tmp_path / "a.db", runs=10, methods=("SGD", "AdamW")))[0].number == 0


# Command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", "graph", "--runs", "5"], "needs at least 30 runs"),
        (
            ["--workload", "graph", "--stage", "1", "--runs", "0"],
            "--runs is 0; pass a number of at least 1",
        ),
        (["--workload", "graph", "--data", "here"], "graph brings its data; leave --data out"),
        (["--workload", "graph", "--jobs", "0"], "--jobs is 0"),
        (["--workload", "graph", "--seed", "-1"], "--seed is -1"),
        (["--workload", "graph", "--stage", "2"], "0 of 30 runs of stage 1 of SGD.*--stage both"),
        (["--workload", "graph", "--space", "published"], "no space was published for graph; for"),
        (["--workload", "graph", "--space", "no.json"], "no.json is no file of spaces"),
        (["--workload", "cifar_resnet34"], "cifar_resnet34: no "),
        ([], "pass --workload, one of digits_vgg"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_cure(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["search", *options, "--reference", "--out", str(tmp_path)])


@pytest.mark.parametrize(("option", "name"), [("--workload", "digits_vgg"), ("--methods", "SOAP")])
def test_unknown_names_list_the_choices(option, name, capsys):
    with pytest.raises(SystemExit):
        main(["search", option, "nothing"])
    assert name in capsys.readouterr().err


def test_published_spaces_are_those_of_the_model_of_a_workload(capsys):
    resnet, swin = (WORKLOADS[name] for name in ("cifar_resnet34", "imagewoof_swin"))
    found, fixed = command.spaces_of("published", None, resnet)
    assert list(found) == ["SGD", "AdamW", "RootFreeRMSprop"]
    assert fixed["RootFreeRMSprop"]["weight_decay_mode"] == "momentum"
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="has none of IFShampoo; it has SGD, AdamW, RootFreeRMS"):
        command.spaces_of("published", ["IFShampoo"], resnet)
    command.spaces_of("published", ["IFShampoo"], swin)
    assert "SwinT, IFShampoo: weight_decay is written from" in capsys.readouterr().out
    found, fixed = command.spaces_of("wide", None, resnet)
    assert list(found) == list(spaces.DEFAULT)
    assert not any(fixed.values())


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path):
    path = tmp_path / "search_graph.db"
    path.write_text("lr,loss\n")
    with pytest.raises(SystemExit, match="is no database; move it"):
        main(["search", "--workload", "graph", "--reference", "--out", str(tmp_path)])
    assert path.read_text() == "lr,loss\n"


def test_uncommitted_code_goes_on_with_no_search(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc-dirty")
    (tmp_path / "search_graph.db").touch()
    with pytest.raises(SystemExit, match=r"uncommitted code, abc-dirty, goes on with no search"):
        main(["search", "--workload", "graph", "--dirty", "--reference", "--out", str(tmp_path)])


def test_a_search_end_to_end(tmp_path, capsys, monkeypatch):
    """Runs that diverge, both stages, final runs, rows, tables and a plot; then nothing is left."""
    for name in ("LEAST_RUNS", "QUICK_RUNS"):
        monkeypatch.setattr(command, name, 4)
    given = {"SGD": {"lr": [1e-3, 1e19]}, "AdamW": {"lr": [1e-4, 1e-1], "eps": [1e-9, 1e-7]}}
    (tmp_path / "spaces.json").write_text(json.dumps(given))
    options = ["--workload", "graph", "--space", str(tmp_path / "spaces.json"), "--quick"]
    asked = ["search", *options, "--reference", "--out", str(tmp_path)]
    assert main(asked) == 0
    assert "settings searched: SGD 1, AdamW 2" in capsys.readouterr().out
    written = read_rows(tmp_path / "search_graph.jsonl")
    runs = [found for found in written if found["metric"] == searches.VALIDATION]
    assert len(runs) == 16
    assert any(found["value"] is None for found in runs)
    for found in runs:
        assert found["detail"]["seconds"] > 0
        assert set(found["detail"]["settings"]) == set(given[found["provider"]])
    assert [f["value"] for f in written if f["metric"] == searches.SEARCHED] == [1, 1, 2, 2]
    last = read_rows(tmp_path / "search_graph_final.jsonl")
    tested = [found for found in last if found["metric"] == "test loss"]
    assert [(found["provider"], found["detail"]["seed"]) for found in tested] == [
        (name, seed) for name in given for seed in (0, 1, 2)
    ]
    best = min((f for f in runs if f["provider"] == "AdamW"), key=lambda f: f["value"])
    assert tested[-1]["detail"]["settings"] == best["detail"]["settings"]
    assert "| AdamW | lr " in (tmp_path / "search_graph_final.md").read_text()
    assert main(["report", "--rows", str(tmp_path)]) == 0
    assert (tmp_path / "search_graph_search.png").exists()
    assert "**Stage 2**" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(command, "work", None)  # nothing is left to run
    assert main(asked) == 0
    assert read_rows(tmp_path / "search_graph.jsonl") == written


# Tables ---------------------------------------------------------------------------------------


def test_the_best_of_n_is_the_mean_over_all_orders():
    values = [3.0, 1.0, 2.5, 8.0]
    orders = list(itertools.permutations(values))
    for n, expected in enumerate(searches.expected_best(values), start=1):
        assert expected == pytest.approx(statistics.fmean(min(order[:n]) for order in orders))
    assert searches.expected_best([2.0]) == [2.0]


def test_what_diverged_counts_as_the_network_before_training():
    def of(metric, value, **detail):
        found = row("SGD", metric, value, case="graph", stage=1, **detail)
        return {**found, "benchmark": "search", "unit": "nat"}

    values = [1.0, None, 1.01, 50.0]
    rows = [
        of(searches.SEARCHED, 3, untrained=2.0),
        *(of(searches.VALIDATION, v, run=i, settings={"lr": i}) for i, v in enumerate(values)),
    ]
    assert searches.curve(rows) == searches.expected_best([1.0, 2.0, 1.01, 2.0])
    assert "| SGD | 3 | 4 | 1 | 1.502 | 1.002 | 1 | 50% |" in searches.table(rows)


def test_final_runs_that_diverged_say_so(tmp_path):
    assert FINAL not in command.STAGES["1"]
    found = row("SGD", "test loss", None, case="graph", seed=0, settings={"lr": 1.0}, steps=[0])
    found["detail"]["diverged"] = True
    assert "| SGD | lr 1.0 | diverged |" in command.tables.train([found])
