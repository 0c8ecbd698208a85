"""A wheel works where it was not built, and an installation without a compiler succeeds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import rootfree_fused
from rootfree_fused import ops
from rootfree_fused.ops import extensions

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rootfree_fused"
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "rootfree_fused",
    "kernels",
    "csrc",
)
SCRIPT = """
    import importlib.metadata, json, warnings
    import rootfree_fused, torch
    from rootfree_fused import RootFreeAdamW, ops
    p = torch.nn.Parameter(torch.ones(3))
    start = {'damping': 0.0, 'initial_square_avg': 1.0}
    p.grad = torch.ones(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RootFreeAdamW([p], lr=0.1, weight_decay=0.0, batch_size=1, **start).step()
    assert (p - 0.99).abs().max() < 1e-6, p
    said = [str(warning.message) for warning in caught if "rootfree" in str(warning.message)]
    print(json.dumps([rootfree_fused.__file__, ops.backends()["cpu"], said]))
"""


def test_where_one_extension_is_built_so_is_the_other():
    """Without it test_known_tensors.py is skipped, which must not hide a failed build."""
    if ops.backends()["cpu"].startswith("C++"):
        assert extensions.known_tensors() is not None


def copy_sources(folder):
    folder.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_without_extension.txt")
            shutil.copytree(path, folder / name, ignore=ignored)
        else:
            shutil.copy(path, folder)
    return folder


def pip(*arguments, **environment):
    """What pip printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def backend(source, hook, folder, **environment):
    """What a hook of the build backend made, as pip and `python -m build` call it."""
    script = "import sys; from setuptools import build_meta; getattr(build_meta, *sys.argv[1:2])"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", f"{script}(sys.argv[2])", hook, folder],
        cwd=source,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    (built,) = folder.iterdir()
    return built


def build_wheel(folder, **environment):
    """A wheel of a copy of the sources, and what the build printed."""
    source, output = copy_sources(folder / "source"), folder / "wheel"
    command = ["wheel", "--no-deps", "--no-build-isolation", "-v", "--wheel-dir", output, source]
    printed = pip(*command, **environment)
    (wheel,) = output.glob("*.whl")
    return wheel, printed


def run_beside(site, folder):
    """File, backend and warnings of SCRIPT in a folder, with `site` first on the path."""
    # -S: an editable installation in this environment would lend its extension.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, runs, said = json.loads(done.stdout)
    assert Path(file).is_relative_to(site)
    return runs, said


def install(wheel, folder):
    site = folder / "site"
    pip("install", "--quiet", "--no-deps", "--target", site, wheel)
    return site


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_wheel_runs_its_kernels_where_it_was_not_built(tmp_path):
    compiler = tmp_path / "g++"  # a fast one: `make release-check` builds the wheel as it is
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    wheel, _ = build_wheel(
        tmp_path, ROOTFREE_FUSED_STABLE_ABI="1", CC=str(compiler), CXX=str(compiler)
    )
    version = re.escape(rootfree_fused.__version__)
    assert re.fullmatch(rf"rootfree_fused-{version}-cp310-abi3-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"rootfree_fused/py.typed", "rootfree_fused/kernels/diag.py"} <= names
    sources = {f"rootfree_fused/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    assert sources <= names
    assert [name for name in names if name.endswith(".so")] == ["rootfree_fused/_C.abi3.so"]
    assert "rootfree_fused/_without_extension.txt" not in names
    assert not {name.split("/")[0] for name in names} - {
        "rootfree_fused",
        *(name.split("/")[0] for name in names if ".dist-info/" in name),
    }
    runs, said = run_beside(install(wheel, tmp_path), tmp_path)
    assert runs.startswith("C++ (")
    assert said == []


NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
NOT_WANTED = {"ROOTFREE_FUSED_NO_EXTENSION": "1"}


@pytest.mark.parametrize(
    ("environment", "cure"),
    [(NO_COMPILER, "install a C++"), (NOT_WANTED, "unset ROOTFREE_FUSED_NO_EXTENSION")],
)
def test_without_the_extension_the_install_succeeds_and_says_so(tmp_path, environment, cure):
    """In pip's list too; at runtime with the line that cures, unless it was on purpose."""
    wheel, printed = build_wheel(tmp_path, **environment)
    assert "several times slower" in printed
    assert cure in printed
    assert re.fullmatch(r"rootfree_fused-[\d.]+\+reference-py3-none-any\.whl", wheel.name)
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    site = install(wheel, tmp_path)
    assert "rootfree-fused" in (listed := pip("list", "--path", site))
    assert "+reference" in listed
    runs, said = run_beside(site, tmp_path)
    if environment is NOT_WANTED:
        assert runs == "reference: ROOTFREE_FUSED_NO_EXTENSION was 1 at installation"
        assert said == []
    else:
        assert "no-such-compiler" in runs
        (warning,) = said
        assert "install a C++20 compiler (g++ 11, clang 14), then pip cache remove" in warning
        assert f"--force-reinstall {wheel.as_uri()}" in warning


def test_a_build_that_failed_leaves_no_kernel_of_an_earlier_one(tmp_path):
    """In the folder of an editable installation."""
    source = copy_sources(tmp_path / "source")
    package = source / "rootfree_fused"
    known = f"{extensions.known_tensors_module(torch.__version__)}.so"
    for name in ("_C.abi3.so", known):
        (package / name).write_bytes(b"")
    backend(source, "build_editable", tmp_path / "first", **NO_COMPILER)
    assert not list(package.glob("*.so"))
    marker = package / "_without_extension.txt"
    cause, cure = marker.read_text().splitlines()
    assert "no-such-compiler" in cause
    assert cure.startswith("install a C++20 compiler")
    (package / known).write_bytes(b"")
    backend(source, "build_editable", tmp_path / "second", **NOT_WANTED)
    assert not list(package.glob("*.so"))
    assert marker.read_text().splitlines()[1:] in ([], [""])


def test_sources_that_are_imported_unbuilt_say_so(tmp_path):
    """As where python runs in the root of a clone whose package is installed elsewhere."""
    source = copy_sources(tmp_path / "my source")
    runs, (warning,) = run_beside(source, source)
    assert runs.startswith("reference: No module named 'rootfree_fused._C'")
    assert f"you import the sources in {source}, which were not built" in warning
    assert f"pip install --no-build-isolation --no-deps -e '{source}'" in warning


def test_pip_never_serves_a_build_without_the_extension_from_its_cache(tmp_path):
    backend(copy_sources(tmp_path / "source"), "build_sdist", tmp_path / "index", **NOT_WANTED)
    command = ["install", "--no-index", "--find-links", tmp_path / "index", "--no-deps"]
    command += ["--no-build-isolation", "--ignore-installed"]
    cache = {"PIP_CACHE_DIR": str(tmp_path / "cache")}
    pip(*command, "--target", tmp_path / "first", "rootfree-fused", **cache, **NOT_WANTED)
    assert "+reference" in pip("cache", "list", **cache)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        pip(*command, "--target", tmp_path / "second", "rootfree-fused", **cache, **NO_COMPILER)
    assert re.search(r"rootfree_fused-[\d.]+%2Breference.*inconsistent", refused.value.stdout)
    pip("cache", "remove", "rootfree_fused", **cache)
    pip(*command, "--target", tmp_path / "third", "rootfree-fused", **cache, **NO_COMPILER)


def tracked_files():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("needs the repository")
    return set(done.stdout.splitlines())


def test_a_source_distribution_has_every_file_of_the_repository(tmp_path):
    """So its tests run, and README's links lead somewhere."""
    tracked = tracked_files()
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    with tarfile.open(backend(source, "build_sdist", tmp_path / "sdist", **NOT_WANTED)) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - found <= {".gitignore"}
    assert not [name for name in found if name.endswith((".so", ".pyc"))]
