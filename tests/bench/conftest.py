"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _committed(monkeypatch):
    """Rows name a commit, whatever the working tree is like."""
    monkeypatch.setenv("BENCH_COMMIT", "abc")
