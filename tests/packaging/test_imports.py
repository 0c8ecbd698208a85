"""Imports flow one way: rooms import only downwards, and nothing runs in a circle."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The rooms of each house from the lowest floor up, by the folder; "" is the house itself.
ROOMS = {
    "rootfree_fused": ["reference", "ops", "optimizer", "", "integrations"],
    "kernels": [""],
    "bench": [
        "measuring",
        "workloads/papers",
        "workloads",
        "optimizers",
        "report",
        "machine_code",
        "",
    ],
}
# As Python knows them: kernels/ is installed inside the package.
PACKAGES = {"kernels": "rootfree_fused.kernels"}
# Which trainer a file of integrations/ is for; nothing else in the package may import one.
TRAINERS = {
    "rootfree_fused.integrations.accelerate": "accelerate",
    "rootfree_fused.integrations.huggingface": "transformers",
    "rootfree_fused.integrations.lightning": "lightning",
    "rootfree_fused.integrations.timm": "timm",
    "rootfree_fused.integrations.torchtitan": "torchtitan",
}


def module_files(house):
    """The files of a house by the dotted names of their modules."""
    package = PACKAGES.get(house, house)
    files = sorted((ROOT / house).rglob("*.py"))
    assert files, house
    found = {}
    for path in files:
        parts = path.relative_to(ROOT / house).with_suffix("").parts
        found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports(name, path):
    """Absolute names of what a module imports anywhere, `from x import y` as both x and x.y."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [parent, node.module]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def arrows(house):
    """Of each module the modules of the same house that it imports.

    `from room import module` takes the module; the room's own file is taken where a name of it is.
    """
    files = module_files(house)
    found = {}
    for name, path in files.items():
        targets = list(imports(name, path))
        inside = {target for target in targets if target in files}
        packages = {target for target in inside if files[target].name == "__init__.py"}
        for package in packages:
            names = [t for t in targets if t.rpartition(".")[0] == package]
            if names and all(t in files for t in names):
                inside.discard(package)
        found[name] = inside - {name}
    return found


def floor(house, name):
    room = name.removeprefix(PACKAGES.get(house, house)).strip(".")
    rooms = ROOMS[house]
    inside = [r for r in rooms if r and (room == r or room.startswith(r + "."))]
    return rooms.index(inside[0] if inside else "")


@pytest.mark.parametrize("house", ROOMS)
def test_every_folder_is_a_room(house):
    folders = {p.parent.relative_to(ROOT / house).as_posix() for p in module_files(house).values()}
    assert {"" if folder == "." else folder for folder in folders} == set(ROOMS[house])


@pytest.mark.parametrize("house", ROOMS)
def test_rooms_import_only_downwards(house):
    for name, targets in arrows(house).items():
        for target in targets:
            assert floor(house, target) <= floor(house, name), f"{name} imports {target}"


@pytest.mark.parametrize("house", ROOMS)
def test_no_imports_run_in_a_circle(house):
    graphlib.TopologicalSorter(arrows(house)).prepare()  # raises CycleError, which names them


def test_the_package_imports_nothing_above_it():
    for name, path in module_files("rootfree_fused").items():
        for target in imports(name, path):
            assert target.split(".")[0] not in {"tests", "helpers", "bench", "kernels", "triton"}, (
                f"{name} imports {target}"
            )


def test_a_trainer_is_imported_by_its_own_integration_alone():
    files = module_files("rootfree_fused")
    integrations = {name for name in files if name.startswith("rootfree_fused.integrations.")}
    assert integrations == TRAINERS.keys()
    for name, path in files.items():
        tops = {target.split(".")[0] for target in imports(name, path)}
        assert tops & set(TRAINERS.values()) == set(filter(None, [TRAINERS.get(name)])), name
    others = sys.stdlib_module_names | {"torch", "rootfree_fused", *TRAINERS.values()}
    for name in integrations:
        assert {target.split(".")[0] for target in imports(name, files[name])} <= others, name


def test_no_module_is_private_to_its_package():
    for house in ROOMS:
        for name in module_files(house):
            assert "._" not in name.removesuffix(".__main__"), f"{name}: name it by what it does"


@pytest.mark.parametrize("house", ROOMS)
def test_files_stay_short_enough_to_read(house):
    for name, path in module_files(house).items():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{name} has {lines} lines"


def test_the_specification_imports_only_torch():
    for name, path in module_files("rootfree_fused").items():
        if name.startswith("rootfree_fused.reference"):
            for target in imports(name, path):
                library = {"__future__", "collections", "dataclasses", "math", "torch"}
                assert target.split(".")[0] in library or target.startswith(
                    "rootfree_fused.reference"
                )


def test_kernels_import_only_torch_and_triton():
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for name, path in module_files("kernels").items():
        for target in imports(name, path):
            assert target.split(".")[0] in allowed or target.startswith("rootfree_fused.kernels"), (
                f"{name} imports {target}"
            )


def test_bench_imports_no_tests():
    for name, path in module_files("bench").items():
        for target in imports(name, path):
            top = target.split(".")[0]
            assert top not in {"tests", "helpers", "pytest"}, f"{name} imports {target}"
