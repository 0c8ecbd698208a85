"""timm without torchvision, which would bring another torch: its optimizers need none of it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

_MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


class _Anything(type):
    """Of classes that have every attribute, another such class."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIn(ModuleType):
    __path__ = ()
    __getattr__ = _Anything.__getattr__


def import_timm():
    """Import timm, with stand-ins for torchvision while it is imported; skip without timm."""
    if "timm" not in sys.modules:
        with pytest.MonkeyPatch.context() as patch:
            if not _has_torchvision():
                _stand_in(patch)
            pytest.importorskip("timm.optim")
    return sys.modules["timm"]


def _has_torchvision():
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # missing, or built for another torch
        return False
    return True


def _stand_in(patch):
    for name in _MODULES:
        module = _StandIn(f"torchvision{name}")
        patch.setitem(sys.modules, module.__name__, module)
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
