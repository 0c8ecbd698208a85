"""The line that cures an installation without kernels, for its cause."""

from __future__ import annotations

import json
import shlex

import pytest

from rootfree_fused.ops import install


class Distribution:
    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return json.dumps(self.origin) if self.origin else None


PIP = "pip install --no-build-isolation --no-deps --force-reinstall"


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, f"pip cache remove rootfree_fused; {PIP} rootfree-fused"),
        (
            {"url": "https://host/rootfree_fused-0.1.0.tar.gz", "archive_info": {}},
            f"pip cache remove rootfree_fused; {PIP} https://host/rootfree_fused-0.1.0.tar.gz",
        ),
        ({"url": "file:///a%20b/clone", "dir_info": {}}, f"{PIP} '/a b/clone'"),
        ({"url": "file:///clone", "dir_info": {"editable": True}}, f"{PIP} -e /clone"),
    ],
)
def test_the_line_installs_anew_from_where_it_came(origin, line, monkeypatch, tmp_path):
    monkeypatch.setattr(install, "PACKAGE", tmp_path)
    found = Distribution(origin)
    monkeypatch.setattr(install.importlib.metadata, "distribution", lambda _: found)
    error = ImportError("undefined symbol: aoti", name="rootfree_fused._C")
    assert install.cure("cpu", error) == (str(error), line)
    (tmp_path / "_without_extension.txt").write_text("no g++\ninstall g++\n")
    assert install.cure("cpu", error) == ("no g++", f"install g++, then {line}")
    (tmp_path / "_without_extension.txt").write_text("not wanted\n")
    assert install.cure("cpu", error) is None


def test_sources_are_known_by_what_lies_beside_them(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "PACKAGE", tmp_path / "clone" / "rootfree_fused")
    (tmp_path / "clone" / "csrc").mkdir(parents=True)
    for device, module in (("cpu", "_C"), ("cuda", "kernels")):
        error = ModuleNotFoundError("no module", name=f"rootfree_fused.{module}")
        cause, cure = install.cure(device, error)
        assert cause.startswith("you import the sources in ")
        assert f"pip install --no-build-isolation --no-deps -e {shlex.quote(str(tmp_path))}" in cure


def test_triton_is_what_kernels_need_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "PACKAGE", tmp_path)
    error = ModuleNotFoundError("No module named 'triton'", name="triton")
    assert install.cure("cuda", error) == (str(error), "pip install triton")
