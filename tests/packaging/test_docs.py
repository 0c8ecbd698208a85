"""What README and docs/ name exists: paths, links, commands; every source file has its tests."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import rootfree_fused
from bench.__main__ import SUBCOMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [
    *(page for page in map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md")) if page.exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "bench" / "HISTORY.md",
]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "bench" / "results").rglob("*.md"))]

FENCE = re.compile(r"^```.*?^```\n", re.DOTALL | re.MULTILINE)
# In backticks, without spaces: with a folder, or a file of a kind that the repository has.
PATH = re.compile(
    r"(?:\.?[\w*-]+/)+[\w.*-]*|[\w*-]+\.(?:py|h|cpp|cu|md|jsonl|png|svg|toml|yaml|yml|cff|in)|Makefile"
)
ABSENT = {"bench/out"}  # where a run leaves its rows
GUARDS = "## Which test guards which file"


def named(page):
    return page.relative_to(ROOT).as_posix()


def text_of(page):
    return FENCE.sub("", page.read_text())


def quoted_paths(text):
    return [path for path in re.findall(r"`([^`\n]+)`", text) if PATH.fullmatch(path)]


def exists(path):
    """From the root of the repository; `*` stands for any name."""
    return any(ROOT.glob(path.rstrip("/"))) or path.rstrip("/") in ABSENT


def slug(heading):
    """As GitHub and mkdocs make an anchor of a heading."""
    heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    github = re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-")
    return github if "--" not in github else None  # which mkdocs shortens


def anchors(page):
    return {slug(found) for found in re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)}


def sources():
    files = (
        file for room in ("rootfree_fused", "kernels", "csrc") for file in (ROOT / room).rglob("*")
    )
    return sorted(named(file) for file in files if file.suffix in {".py", ".h", ".cpp", ".cu"})


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_in_backticks_exist(page):
    assert [path for path in quoted_paths(text_of(page)) if not exists(path)] == []


@pytest.mark.parametrize("page", LINKING, ids=named)
def test_relative_links_resolve(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist(page):
    text = page.read_text()
    assert set(re.findall(r"python -m bench ([a-z]\w*)", text)) <= set(SUBCOMMANDS)
    made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^ *)make ([a-z][\w-]*)", text, re.MULTILINE)) <= set(made)


def test_readme_is_one_screen():
    page = (ROOT / "README.md").read_text()
    lines = page.splitlines()
    assert len(page.split()) <= 900
    assert any("pip install" in line for line in lines[:20])
    assert "```python" in lines[:35]
    assert {"make test", "make bench"} <= set(re.findall(r"make \w+", page))


def test_every_source_file_is_guarded():
    """Each row of the table names a source file, and tests that fail when it breaks."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition(GUARDS)[2].partition("\n## ")[0]
    rows = [[quoted_paths(cell) for cell in row.split("|")] for row in table.splitlines()]
    assert sorted(source for row in rows if len(row) > 3 for source in row[1]) == sources()
    for row in rows:
        if len(row) > 3 and row[1]:
            assert row[-2], f"{row[1]} has no test"
            assert all(test.startswith("tests/") for test in row[-2])


def test_names_beside_a_file_are_in_it():
    """In the rows and the numbered steps of architecture.md."""
    page = text_of(ROOT / "docs" / "architecture.md")
    missing = []
    for line in re.findall(r"^(?:\||\d\. ).*(?:\n   .*)*", page, re.MULTILINE):
        paths = [ROOT / path for path in quoted_paths(line)]
        code = "".join(path.read_text() for path in paths if path.is_file())
        names = re.findall(r"`[\w.]*?(\w+)(?:\(\))?`", line)
        missing += [
            f"{name}: {line}" for name in names if code and not re.search(rf"\b{name}\b", code)
        ]
    assert missing == []


@pytest.mark.parametrize(
    "name", ["RootFreeShampoo", "RootFreeRMSprop", "RootFreeAdamW", "IFShampoo", "Sign"]
)
def test_the_signatures_of_interface_are_those_of_the_code(name):
    page = (ROOT / "docs" / "interface.md").read_text()
    shown = re.search(rf"^    ({name}\(.*?\))$", page, re.DOTALL | re.MULTILINE)[1]
    (function,) = ast.parse(f"def {shown}: pass").body
    written = function.args
    names = [argument.arg for argument in (*written.args, *written.kwonlyargs)]
    parameters = dict(inspect.signature(getattr(rootfree_fused, name)).parameters)
    del parameters["unknown"]
    assert names == list(parameters)
    keyword_only = [argument.arg for argument in written.kwonlyargs]
    assert keyword_only == [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    defaults = [*written.defaults, *(d for d in written.kw_defaults if d is not None)]
    required = {"params", "batch_size"}  # the latter here or in every group
    found = [p.default for n, p in parameters.items() if n not in required]
    assert [ast.literal_eval(default) for default in defaults] == found


def test_the_lines_of_readme_train():
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    torch.manual_seed(0)
    x = torch.randn(128, 8)
    y = (x[:, 0] > 0).long()
    model, loss_fn = torch.nn.Linear(8, 2), torch.nn.functional.cross_entropy
    before = loss_fn(model(x), y).item()
    exec(code, {"model": model, "loss_fn": loss_fn, "loader": [(x, y)] * 200})
    assert loss_fn(model(x), y).item() < 0.9 * before
