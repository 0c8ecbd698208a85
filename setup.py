"""The C++ extension, and where the Triton kernels lie; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/diag.cpp", "csrc/matrix.cpp", "csrc/registration.cpp"]
HOST_SOURCES = ["csrc/host.cpp"]
# torch's stable ABI from 2.11 and Python's from 3.10 on: one build serves all newer.
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")]


class OptionalBuildExt(build_ext):
    """The package works without its extension: one that does not compile is a warning."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            cure = "install a C++20 compiler (g++ 11 or clang 14)"
            if ext.sources == HOST_SOURCES:
                warn_without_extension(str(error), cure, "a step on a GPU takes its host longer")
            else:
                warn_without_extension(str(error), cure)


def warn_without_extension(
    cause: str, cure: str, loss: str = "on the CPU its optimizers run several times slower"
) -> None:
    warnings.warn(
        f"rootfree_fused is installed without its C++ extension: {cause}. It gives the same "
        f"results, but {loss}. To cure this, {cure}, then reinstall with --no-build-isolation.",
        stacklevel=2,
    )


def extensions() -> list[Extension]:
    if os.environ.get("ROOTFREE_FUSED_NO_EXTENSION") == "1":
        warn_without_extension(
            "ROOTFREE_FUSED_NO_EXTENSION is 1", "unset ROOTFREE_FUSED_NO_EXTENSION"
        )
        return []
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        warn_without_extension(str(error), "install torch where rootfree_fused is built")
        return []
    found = {
        "depends": sorted(map(str, Path("csrc").iterdir())),  # an sdist has what is listed
        "include_dirs": include_paths(),
        "library_dirs": library_paths(),
    }
    return [cpu_extension(found), host_extension(found, torch.__version__)]


def cpu_extension(found: dict[str, Any]) -> Extension:
    return Extension(
        "rootfree_fused._C",
        SOURCES,
        py_limited_api=True,
        libraries=["torch_cpu"],
        define_macros=MACROS,
        # No trapping mathematics: g++ vectorizes the float16 conversions only then.
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-fno-trapping-math",
            "-fvisibility=hidden",
        ],
        language="c++",
        optional=True,
        **found,
    )


def host_extension(found: dict[str, Any], torch_version: str) -> Extension:
    """For this torch and this Python alone; the name as rootfree_fused/_prepared.py makes it."""
    name = "_host_" + re.sub(r"\W", "_", torch_version)
    return Extension(
        f"rootfree_fused.{name}",
        HOST_SOURCES,
        libraries=["c10", "torch_cpu", "torch_python"],
        define_macros=[("ROOTFREE_HOST", name)],
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"],
        language="c++",
        optional=True,
        **found,
    )


setup(
    package_dir={"rootfree_fused.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
