"""Fixtures: every test that takes `device` runs on each device of the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.ranks import Ranks

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_modifyitems(items):
    """Tests that run on a GPU carry the mark `gpu`, and are skipped where there is none."""
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("device") == "cuda":
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiles_anew():
    """`step` is one code object for all tests: what one compiled, another would guard against."""
    yield
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    if counters:  # something was compiled
        torch._dynamo.reset()
        counters.clear()


@pytest.fixture(params=["baseline", "avx2", "avx512", "amx"])
def isa(request):
    """Every body of a kernel that this machine can run; without it, the one that users get."""
    best = torch.ops.rootfree_fused.cpu_isa()
    try:
        torch.ops.rootfree_fused._use_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.rootfree_fused._use_cpu_isa(best)


@pytest.fixture
def two_threads():
    """Two threads, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four processes that are ranks, of all tests that end none of them."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
