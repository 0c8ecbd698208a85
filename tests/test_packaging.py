"""A wheel works where it was not built, and an installation without a compiler succeeds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

from rootfree_fused import _prepared, ops

ROOT = Path(__file__).parent.parent
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "rootfree_fused",
    "kernels",
    "csrc",
)
SCRIPT = """
    import rootfree_fused, torch
    from rootfree_fused import RootFreeAdamW, ops
    from rootfree_fused.kernels import diag
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    RootFreeAdamW([p], lr=0.1, weight_decay=0.0, damping=0.0, batch_size=1).step()
    assert (p - 0.99).abs().max() < 1e-6, p
    print(rootfree_fused.__file__, "|", ops.backends()["cpu"])
"""


def test_where_one_extension_is_built_so_is_the_other():
    """Tests of csrc/host.cpp are skipped without it, which must not hide a failed build."""
    if ops.backends()["cpu"].startswith("C++"):
        assert _prepared.extension() is not None


def build_wheel(folder, **environment):
    """A wheel of a copy of the sources, and what the build printed."""
    source, output = folder / "source", folder / "wheel"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v"]
    done = subprocess.run(
        [*command, "--wheel-dir", output, source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = output.glob("*.whl")
    return wheel, done.stdout + done.stderr


def run_installed(wheel, folder):
    """What SCRIPT prints in a folder that has nothing but the installed wheel."""
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    # -S: an editable installation in this environment would lend its extension.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, backend = done.stdout.split("|")
    assert Path(file.strip()).is_relative_to(site)
    return backend.strip()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_wheel_runs_its_kernels_where_it_was_not_built(tmp_path):
    wheel, _ = build_wheel(tmp_path)
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"rootfree_fused/py.typed", "rootfree_fused/kernels/diag.py"} <= names
    assert not {name.split("/")[0] for name in names} - {
        "rootfree_fused",
        *(name.split("/")[0] for name in names if ".dist-info/" in name),
    }
    assert run_installed(wheel, tmp_path).startswith("C++ (")


@pytest.mark.parametrize(
    ("environment", "cure"),
    [
        ({"CC": "no-such-compiler", "CXX": "no-such-compiler"}, "install a C++"),
        ({"ROOTFREE_FUSED_NO_EXTENSION": "1"}, "unset ROOTFREE_FUSED_NO_EXTENSION"),
    ],
)
def test_without_the_extension_the_install_succeeds_and_says_what_is_slower(
    tmp_path, environment, cure
):
    wheel, printed = build_wheel(tmp_path, **environment)
    assert "several times slower" in printed
    assert cure in printed
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    assert run_installed(wheel, tmp_path).startswith("reference")
