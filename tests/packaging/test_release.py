"""`make release-check` tells a broken artefact; what it builds is tested in test_packaging.py."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import release
from helpers.release import Failed, Trial

SITE = Path("/site")
WHEEL, SDIST = Path("a.whl"), Path("a.tar.gz")
TRIALS = [Trial(WHEEL, False, "C++"), Trial(SDIST, False, "reference"), Trial(SDIST, True, "C++")]
WARNING = f"rootfree_fused runs its reference; to cure this, {release.CURE}"


def found(trial, **changes):
    """What a right artefact says of itself, but for the changes."""
    reference = trial.backend == "reference"
    return {
        "file": "/site/rootfree_fused/__init__.py",
        "version": "1.2.3+reference" if reference else "1.2.3",
        "backend": f"{trial.backend} (avx2)",
        "steps": dict.fromkeys(release.CLASSES, True),
        "said": [WARNING] * reference,
        **changes,
    }


@pytest.mark.parametrize("trial", TRIALS)
def test_a_right_artefact_has_no_faults(trial):
    assert release.faults(trial, found(trial), SITE, "1.2.3") == []


@pytest.mark.parametrize(
    ("trial", "changes", "fault"),
    [
        (TRIALS[0], {"file": "/clone/rootfree_fused/__init__.py"}, "was imported, not what was"),
        (TRIALS[0], {"version": "1.2.2"}, "version 1.2.2, not 1.2.3"),
        (TRIALS[1], {"version": "1.2.3"}, r"version 1.2.3, not 1.2.3\+reference"),
        (TRIALS[0], {"backend": "reference: no module"}, "'reference: no module', not C"),
        (TRIALS[1], {"backend": "C++ (amx)"}, r"'C\+\+ \(amx\)', not reference"),
        (TRIALS[2], {"steps": {"IFShampoo": True}}, "no step of .*RootFreeAdamW"),
        (
            TRIALS[2],
            {"steps": {**dict.fromkeys(release.CLASSES, True), "IFShampoo": False}},
            "a step of IFShampoo is no step",
        ),
        (TRIALS[0], {"said": [WARNING]}, "not none"),
        (TRIALS[1], {"said": []}, "not one with the cure"),
        (TRIALS[1], {"said": ["rootfree_fused is slow"]}, "not one with the cure"),
    ],
)
def test_a_broken_artefact_is_told(trial, changes, fault):
    (said,) = release.faults(trial, found(trial, **changes), SITE, "1.2.3")
    assert re.search(fault, said), said


def test_every_optimizer_of_an_installation_takes_a_step(tmp_path):
    done = release.call(sys.executable, "-I", "-c", release.TRY, cwd=tmp_path)
    said = json.loads(done.splitlines()[-1])
    assert set(said["steps"]) == release.CLASSES
    assert all(said["steps"].values())
    assert said["version"]


def test_a_command_that_fails_ends_the_check_with_what_it_said():
    script = "import sys; print('first'); sys.exit('broken')"
    with pytest.raises(Failed, match=r"(?s)first.*broken"):
        release.call(sys.executable, "-c", script)


def test_no_compiler_is_found_where_there_is_to_be_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("ROOTFREE_FUSED_NO_EXTENSION", "1")
    env = release.environment(tmp_path, compiler=False)
    assert not any(shutil.which(name, path=env["PATH"]) for name in ("g++", "cc", "clang", "c++"))
    assert Path(env["CC"]).name == Path(env["CXX"]).name == "false"
    for variables in (env, release.environment(tmp_path, compiler=True)):
        assert not {"PYTHONPATH", "ROOTFREE_FUSED_NO_EXTENSION"} & variables.keys()


@pytest.mark.parametrize("lost", ["py.typed", "_C.abi3.so", "kernels/diag.py"])
def test_a_wheel_that_lacks_a_file_is_told(lost):
    names = {f"rootfree_fused/{name}" for name in ("__init__.py", "py.typed", "_C.abi3.so")}
    names.add("rootfree_fused/kernels/diag.py")
    assert release.files_missing(names) == set()
    assert release.files_missing(names - {f"rootfree_fused/{lost}"}) == {f"rootfree_fused/{lost}"}


OPEN, DONE = "# Changelog\n\n## 1.3.0 (unreleased)\n", "# Changelog\n\n## 1.2.3\n\n## 1.2.2\n"


def test_a_commit_is_a_release_where_changelog_and_tag_say_its_version():
    assert release.not_ready(DONE, "1.2.3", ["v1.2.3", "other"]) is None
    assert release.not_ready(DONE, "1.2.3", []) is None
    assert "1.3.0 (unreleased), version 1.2.3" in release.not_ready(OPEN, "1.2.3", [])


@pytest.mark.parametrize(
    ("changelog", "version", "tags", "fault"),
    [
        (DONE, "1.2.3", ["v1.2.4"], "the tag v1.2.4 is on a commit of version 1.2.3"),
        (DONE, "1.2.4", [], "newest heading is 1.2.3, the version 1.2.4"),
        (OPEN, "1.2.3", ["v1.2.3"], r"changelog says 1.3.0 \(unreleased\)"),
    ],
)
def test_a_release_that_contradicts_itself_is_told(changelog, version, tags, fault):
    with pytest.raises(Failed, match=fault):
        release.not_ready(changelog, version, tags)


def test_the_changelog_has_the_form_that_is_read():
    heading = release.HEADING.search((release.ROOT / "CHANGELOG.md").read_text())
    assert heading is not None


CSRC = release.ROOT / "csrc"
X86 = re.compile(r"^#if defined\(__x86_64__\)[^\n]*\n.*?^#(?:else|endif)", re.DOTALL | re.MULTILINE)


def included(path):
    """What a file includes where the machine is no x86, by its own headers too."""
    names = re.findall(r'^#include ["<](.*)[">]', X86.sub("", path.read_text()), re.MULTILINE)
    own = [CSRC / name for name in names if (CSRC / name).exists()]
    return set(names).union(*map(included, own))


def test_operators_are_registered_on_every_machine():
    """A header that only x86 includes is missed on arm64 alone."""
    registering = [p for p in CSRC.glob("*.cpp") if "STABLE_TORCH_LIBRARY" in p.read_text()]
    assert len(registering) > 3
    for path in registering:
        assert "torch/csrc/stable/library.h" in included(path), path.name
