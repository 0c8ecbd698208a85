"""Imports flow one way: matrix -> diag -> _base -> ops -> reference; kernels stand alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "rootfree_fused"
# What each module may import of the package itself.
ALLOWED = {
    "__init__": {"batch_size", "capture", "diag", "matrix"},
    "batch_size": set(),
    "capture": {"_base", "ops"},
    "matrix": {
        *("_base", "_capturing", "_groups", "_matrix_calls", "_planning", "_prepared"),
        *("_scaling", "_starts", "_state", "_stepping", "factors", "ops", "reference"),
    },
    "_matrix_calls": {"_groups", "_scaling", "_state", "_stepping", "diag", "factors", "ops"},
    "factors": {"_stacks", "_state", "reference.matrix"},
    "diag": {
        *("_base", "_checks", "_groups", "_prepared", "_scaling", "_starts", "_state"),
        *("_stepping", "ops"),
    },
    "_capturing": set(),
    "_base": {"_groups", "_loading", "_planning", "_stacks", "_starts", "_state", "_stepping"},
    "_loading": {"_checks", "_state"},
    "_stepping": {
        *("_capturing", "_checks", "_groups", "_overlap", "_planning", "_prepared", "_scaling"),
        *("_stacks", "_starts", "_state", "ops"),
    },
    "_groups": {"_checks", "_planning", "_prepared", "_stacks", "_starts", "_state"},
    "_starts": {"_checks", "_scaling", "_state", "reference"},
    "_planning": {"_checks", "_overlap", "_state"},
    "_overlap": {"_checks"},
    "_compare": {"_checks"},
    "_prepared": {"_checks", "_compare", "_scaling", "_stacks", "_state"},
    "_stacks": {"_scaling", "_state"},
    "_scaling": set(),
    "convert": {"_base", "_groups", "_loading", "_state", "diag", "factors", "matrix", "reference"},
    "_state": {"_checks", "reference.matrix"},
    "ops": {"_checks", "_dispatch", "_overlap"},
    "_dispatch": {"_cpu_matrix", "_fallback", "_install", "_prepared"},
    "_install": set(),
    "_cpu_matrix": {"_fallback", "_scaling", "reference", "reference.matrix"},
    "_fallback": {"_scaling", "reference", "reference.diag", "reference.matrix"},
    "_checks": set(),
    "reference.__init__": {"reference.diag", "reference.matrix"},
    "reference.diag": set(),
    "reference.matrix": set(),
}


def module_files():
    return {
        ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    }


def imports(path, package):
    """Absolute names of what a file imports anywhere, `from x import y` as both x and x.y."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [parent, node.module]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_of(name):
    parts = [PACKAGE, *name.split(".")[:-1]]
    return ".".join(parts)


def test_every_module_has_a_place():
    assert set(module_files()) == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_package_imports_flow_one_way(name):
    path = module_files()[name]
    modules = set(ALLOWED) | {"reference"}
    for target in imports(path, package_of(name)):
        top = target.split(".")[0]
        assert top not in {"tests", "bench", "kernels", "triton"}, target
        inside = target.removeprefix(PACKAGE + ".")
        if target.startswith(PACKAGE + ".") and inside in modules:
            assert inside in ALLOWED[name], f"{name} imports {inside}"


def test_the_specification_imports_only_torch():
    for name in ("reference.diag", "reference.matrix"):
        for target in imports(module_files()[name], f"{PACKAGE}.reference"):
            assert target.split(".")[0] in {"__future__", "collections", "math", "torch"}


def test_kernels_import_only_torch_and_triton():
    files = sorted((ROOT / "kernels").glob("*.py"))
    assert files
    library = {
        "__future__",
        "collections",
        "contextlib",
        "contextvars",
        "functools",
        "math",
        "threading",
        "typing",
    }
    allowed = library | {"torch", "triton"}
    for path in files:
        for target in imports(path, f"{PACKAGE}.kernels"):
            assert target.split(".")[0] in allowed | {PACKAGE}, f"{path.name} imports {target}"
            if target.startswith(PACKAGE):
                assert target.startswith(f"{PACKAGE}.kernels"), f"{path.name} imports {target}"


def test_bench_imports_no_tests():
    for path in sorted((ROOT / "bench").rglob("*.py")):
        for target in imports(path, "bench"):
            top = target.split(".")[0]
            assert top not in {"tests", "helpers", "pytest"}, f"{path.name} imports {target}"
