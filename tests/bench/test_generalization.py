"""The table and the plot of training beside test accuracy, from rows."""

from __future__ import annotations

import pytest

from bench.report import generalization
from bench.report.plots import PLOTS


def rows(**accuracies):
    """By the method the training and test accuracy of each seed."""
    found = []
    for name, seeds in accuracies.items():
        for seed, pair in enumerate(seeds):
            metrics = "training accuracy", "test accuracy", "test loss"
            for metric, value in zip(metrics, (*pair, 1 - pair[1]), strict=True):
                about = {"case": "digits_resnet", "provider": name, "metric": metric}
                found.append({**about, "value": value, "detail": {"seed": seed}})
    return found


MEASURED = rows(SGD=[(1.0, 0.9), (1.0, 0.92)], AdamW=[(0.99, 0.95), (0.97, 0.97)])


def test_the_best_on_test_data_comes_first_with_its_spread():
    *_, first, second = generalization.table(MEASURED).splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == ["AdamW", "98.00 ± 1.41", "96.00 ± 1.41", "0.0400 ± 0.0141"]
    assert second.split("|")[1].strip() == "SGD"


def test_methods_whose_training_accuracy_is_not_known_are_left_out():
    others = [row for row in rows(SOAP=[(1.0, 0.9)]) if row["metric"] != "training accuracy"]
    kept = PLOTS["generalization"].rows([*MEASURED, *others])
    assert {row["provider"] for row in kept} == {"SGD", "AdamW"}
    assert {row["metric"] for row in kept} == {"training accuracy", "test accuracy"}
    assert PLOTS["generalization"].rows(others) == []


def test_a_point_is_the_mean_of_the_seeds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(generalization, "save", lambda figure, *_: figures.append(figure))
    generalization.plot(generalization.rows_of(MEASURED), tmp_path / "plot.png")
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SGD", "AdamW"]
    means = [c.lines[0].get_xydata()[0] for c in axis.containers]
    found = [(round(line), pytest.approx(x)) for x, line in means]
    assert found == [(0, 100.0), (0, 91.0), (1, 98.0), (1, 96.0)]
