"""How this package was installed, and the line that cures an installation without kernels."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import unquote, urlparse

PACKAGE = Path(__file__).parents[1]
_PIP = "pip install --no-build-isolation --no-deps"


def without_extension() -> tuple[str, str] | None:
    """What setup.py wrote where it built no extension: the cause, and the cure or nothing."""
    marker = PACKAGE / "_without_extension.txt"
    if not marker.exists():
        return None
    cause, cure, *_ = [*marker.read_text(encoding="utf-8").splitlines(), ""]
    return cause, cure


def cure(device: str, error: ImportError) -> tuple[str, str] | None:
    """Why kernels are missing and how to get them; None where that is on purpose."""
    ours = (error.name or "").startswith("rootfree_fused")
    if device == "cuda" and not ours:
        return str(error), "pip install triton"
    if device == "cpu" and (marked := without_extension()):
        cause, remedy = marked
        return (cause, f"{remedy}, then {_reinstall()}") if remedy else None
    root = PACKAGE.parent
    if ours and (root / "csrc").is_dir():
        return (
            f"you import the sources in {root}, which were not built",
            f"{_PIP} -e {shlex.quote(str(root))}; or leave that folder, if the package is "
            "installed elsewhere",
        )
    return str(error), _reinstall()


def _reinstall() -> str:
    """The line that builds the package anew from where it came, past what pip has cached."""
    again = f"{_PIP} --force-reinstall"
    try:
        found = importlib.metadata.distribution("rootfree-fused").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        found = None
    origin = json.loads(found) if found else {}
    url = str(origin.get("url", ""))
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"{again} {editable}{shlex.quote(unquote(urlparse(url).path))}"
    return f"pip cache remove rootfree_fused; {again} {shlex.quote(url or 'rootfree-fused')}"
