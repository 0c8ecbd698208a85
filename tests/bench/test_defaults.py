"""Training at the defaults: `python -m bench defaults`, and what it must come to."""

from __future__ import annotations

import argparse

import pytest
import torch

from bench import defaults
from bench.measuring.rows import read_rows
from bench.report import training as tables


@pytest.mark.parametrize("name", ["RootFreeRMSprop", "RootFreeAdamW", "IFShampoo"])
def test_the_defaults_learn(name):
    """The digits' MLP, 330 steps at the constructor's defaults: 90 % of images it has not seen."""
    pytest.importorskip("sklearn")
    problem, steps = defaults.PROBLEMS["digits, MLP"]
    build = defaults.PROVIDERS[name]
    found, settings = defaults.trained(problem, build, torch.device("cpu"), seed=0, steps=steps)
    assert settings["initial_square_avg"] == "auto"
    assert found["accuracy"] >= 0.9


def test_the_command_writes_rows_of_every_problem(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    few = {"digits, MLP": defaults.PROBLEMS["digits, MLP"]}
    few["GPT, 2,048 tokens"] = (defaults.Language(), 2)
    monkeypatch.setattr(defaults, "PROBLEMS", few)
    parser = argparse.ArgumentParser()
    defaults.add_arguments(parser)
    args = parser.parse_args(["--out", str(tmp_path), "--quick", "--device", "cpu"])
    monkeypatch.setattr(defaults, "QUICK_STEPS", 2)
    assert defaults.run(args) == 0
    rows = read_rows(tmp_path / "defaults.jsonl")
    assert len(rows) == len(defaults.PROVIDERS) * (3 + 2)
    assert {row["detail"]["steps"] for row in rows} == {2}
    shown = tables.defaults(rows)
    assert "| optimizer | digits, MLP: 2 steps | GPT, 2,048 tokens: 2 steps |" in shown
    for row in rows:
        text = f"{row['value']:.3f}" if row["unit"] == "nat" else f"{row['value']:.1%}"
        assert text in shown or row["metric"] == "training loss"
