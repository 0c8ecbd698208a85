"""The C++ extension, and where the Triton kernels lie; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/diag.cpp", "csrc/matrix.cpp", "csrc/registration.cpp"]


class OptionalBuildExt(build_ext):
    """The package works without its extension: one that does not compile is a warning."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            warn_without_extension(str(error), "install a C++20 compiler (g++ 11 or clang 14)")


def warn_without_extension(cause: str, cure: str) -> None:
    warnings.warn(
        f"rootfree_fused is installed without its C++ extension: {cause}. It gives the same "
        "results, but on the CPU its optimizers run several times slower. To cure this, "
        f"{cure}, then reinstall with --no-build-isolation.",
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
    return [
        Extension(
            "rootfree_fused._C",
            SOURCES,
            depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            # torch's stable ABI from 2.11 and Python's from 3.10 on: one build serves all newer.
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020b000000000000"),
                ("Py_LIMITED_API", "0x030a0000"),
            ],
            py_limited_api=True,
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
        ),
        # The name as rootfree_fused/_prepared.py makes it.
        Extension(
            host := "rootfree_fused._host_" + re.sub(r"\W", "_", torch.__version__),
            ["csrc/host.cpp"],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu", "torch_python"],
            define_macros=[("ROOTFREE_HOST", host.rpartition(".")[2])],
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"],
            language="c++",
            optional=True,
        ),
    ]


setup(
    package_dir={"rootfree_fused.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
