"""`python -m bench diag` at sizes that do not fit in memory, or not in the time of a check."""

from __future__ import annotations

import pytest
import torch
from helpers.bench import CPU, needs_extras, row

from bench import diag
from bench.__main__ import main
from bench.measuring import common, rows
from bench.optimizers.diagonal import ALLOWED_ERROR, PROVIDERS, replayed
from bench.report import tables


def test_sizes_go_up_by_tens_and_many_tensors_are_mixed():
    found = diag.cases(CPU, quick=False)
    sizes = [shapes[0][0] for name, (shapes, _) in found.items() if "0 in one tensor" in name]
    assert sizes == [10**i for i in range(3, 9)]
    on_gpu = diag.cases(torch.device("cuda"), quick=False)
    assert on_gpu["1,000,000,000 in one tensor, float32"][0] == [(10**9,)]
    for cases in (found, on_gpu):
        shapes, _ = cases["2,000 mixed tensors, float32"]
        assert len(shapes) == 2000
        assert len(set(shapes)) > 500
    dtypes = {dtype for _, dtype in found.values()}
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}


def test_of_very_many_elements_spaced_pieces_and_the_last_are_compared(monkeypatch):
    monkeypatch.setitem(diag.CHECK_CHUNK, "cpu", 10)
    tensors = [torch.arange(35.0), torch.arange(35.0, 95.0).view(6, 10)]
    assert torch.cat(diag._chunks(tensors)).sort().values.tolist() == list(range(95))
    monkeypatch.setitem(diag.CHECK_ELEMENTS, "cpu", 50)
    pieces = diag._chunks([torch.arange(95.0)])
    assert [(p[0].item(), len(p)) for p in pieces] == [
        (90, 5),
        (70, 10),
        (50, 10),
        (30, 10),
        (10, 10),
    ]


def test_numbers_of_a_very_large_tensor_repeat(monkeypatch):
    monkeypatch.setattr(common, "DRAWN", 4)
    draw = {"scale": 2.0, "dtype": torch.float32, "device": CPU, "seed": 3}
    small, large = common.random_tensors([(2, 2), (2, 5)], **draw)
    again = common.random_tensors([(4,), (4,)], **draw)
    assert torch.equal(small.view(4), again[0])
    assert torch.equal(large.view(10), again[1].repeat(3)[:10])


@pytest.mark.parametrize(
    ("dtype", "bytes_of_all", "each"), [(torch.float32, 32, 12), (torch.bfloat16, 24, 10)]
)
def test_as_many_providers_are_timed_as_memory_has_room_for(dtype, bytes_of_all, each, monkeypatch):
    names = list(PROVIDERS)
    for count in (0, 1, 3):
        available = 1000 * (bytes_of_all + each * (count + 0.5)) / 0.9
        monkeypatch.setattr(diag, "available_memory", lambda _, free=available: free)
        assert list(diag.fitting(PROVIDERS, 1000, dtype, CPU)) == names[:count]


@pytest.mark.gpu
def test_replayed_steps_are_right():
    params = [torch.randn(n, device="cuda") / 10 for n in (300, 2, 1024)]
    for provider in replayed().values():
        optimizer = diag.built(provider, params, params)
        assert diag.check(provider, optimizer, params, params) <= ALLOWED_ERROR


@needs_extras
def test_providers_without_room_are_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(diag, "cases", lambda *_: {"c": ([(300,), (200,)], torch.float32)})
    monkeypatch.setattr(diag, "available_memory", lambda _: 500 * (32 + 12 * 1.5) / 0.9)
    assert main(["diag", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    written = rows.read_rows(tmp_path / "diag.jsonl")
    first, *others = PROVIDERS
    assert rows.unique(rows.select(written, metric="absent"), "provider") == others
    assert first in rows.unique(rows.select(written, metric="time"), "provider")
    assert f"| {others[0]} | absent: no memory |" in (tmp_path / "diag.md").read_text()


def test_an_absent_provider_has_a_line_without_numbers():
    shown = tables.diag([row("A", "absent", None, why="no memory")])
    assert "| A | absent: no memory |  |  |  |  |  |" in shown
