"""The C++ extension, and where the Triton kernels lie; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import runpy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = [
    "csrc/accumulate.cpp",
    "csrc/diag.cpp",
    "csrc/lowbit.cpp",
    "csrc/matrix.cpp",
    "csrc/module.cpp",
    "csrc/packing.cpp",
    "csrc/rootfree_shampoo.cpp",
]
KNOWN_TENSORS = ["csrc/known_tensors.cpp"]
# torch's stable ABI from 2.11 and Python's from 3.10 on: one build serves all newer.
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")]


# Beside the package where it has no extension: why, and what to do about it (nothing: on purpose).
MARKER = "_without_extension.txt"
ON_PURPOSE = "ROOTFREE_FUSED_NO_EXTENSION was 1 at installation"
STABLE_ABI = "ROOTFREE_FUSED_STABLE_ABI"  # 1 for a wheel that is to serve other machines


class OptionalBuildExt(build_ext):
    """The package works without its extension: one that does not compile is a warning."""

    missing: tuple[str, str] | None = None  # why there is no extension, and its cure
    not_built: tuple[str, ...] = ()  # patterns of modules, of which no old one is to stay

    def run(self) -> None:
        self.missing = why_not()
        if self.missing is None:
            super().run()
        else:
            self.not_built = "_C", "_known_tensors_*"
            warn_without_extension(*self.missing)
        self.mark()

    def build_extensions(self) -> None:
        """As setuptools, on MAX_JOBS cores, or all."""
        compile_ = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                each = pool.map(lambda source: compile_([source], **options), sources)
                return [name for objects in each for name in objects]

        self.compiler.compile = compile_all
        super().build_extensions()

    def mark(self) -> None:
        """Say beside the package that it has no extension, or nothing; no old one stays there."""
        folders = [Path(self.build_lib, "rootfree_fused")]
        if self.inplace:
            build_py = self.get_finalized_command("build_py")
            folders.append(Path(build_py.get_package_dir("rootfree_fused")))
        for folder in filter(Path.is_dir, folders):
            (folder / MARKER).unlink(missing_ok=True)
            if self.missing is not None:
                (folder / MARKER).write_text("\n".join(self.missing) + "\n", encoding="utf-8")
            for name in self.not_built:
                for old in folder.glob(f"{name}.*"):
                    old.unlink()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.not_built += (ext.name.rpartition(".")[2],)
            cause, cure = (
                " ".join(str(error).split()),
                "install a C++20 compiler (g++ 11, clang 14)",
            )
            if ext.sources == KNOWN_TENSORS:
                warn_without_extension(cause, cure, "a step on a GPU takes its host longer")
            else:
                warn_without_extension(cause, cure)
                self.missing = cause, cure


class MarkedWheel(bdist_wheel):
    """A wheel whose version and tags say where it has no extension.

    pip keeps what it builds: by its name a wheel without the extension would be the good one's.
    """

    def run(self) -> None:
        build = self.get_finalized_command("build_ext")
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        if build.missing is not None:
            self.distribution.metadata.version += "+reference"
            self.distribution.ext_modules = None
            self.root_is_pure, self.py_limited_api = True, False
            self.dist_info_dir = None  # of before the build, with the other version
            self.reinitialize_command("egg_info")
        super().run()


def warn_without_extension(
    cause: str, cure: str, loss: str = "on the CPU its optimizers run several times slower"
) -> None:
    cure = cure or "unset ROOTFREE_FUSED_NO_EXTENSION"
    warnings.warn(
        f"rootfree_fused is installed without its C++ extension: {cause}. It gives the same "
        f"results, but {loss}. To cure this, {cure}, then reinstall with --no-build-isolation.",
        stacklevel=2,
    )


def why_not() -> tuple[str, str] | None:
    """Why no extension can be built, and its cure, if it is one to cure."""
    if os.environ.get("ROOTFREE_FUSED_NO_EXTENSION") == "1":
        return ON_PURPOSE, ""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return str(error), "install torch where rootfree_fused is built"
    return None


def extensions() -> list[Extension]:
    if why_not() is not None:
        return [Extension("rootfree_fused._C", SOURCES, optional=True)]  # never compiled
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    common = {
        "depends": sorted(map(str, Path("csrc").iterdir())),  # an sdist has what is listed
        "include_dirs": include_paths(),
        "library_dirs": library_paths(),
    }
    return [cpu_extension(common), known_tensors_extension(common, torch.__version__)]


def cpu_extension(common: dict[str, Any]) -> Extension:
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
            "-fno-math-errno",  # nor square roots otherwise
            "-fvisibility=hidden",
        ],
        language="c++",
        optional=True,
        **common,
    )


def known_tensors_extension(common: dict[str, Any], torch_version: str) -> Extension:
    """For this torch and this Python alone."""
    names = runpy.run_path("rootfree_fused/ops/extensions.py")
    name = names["known_tensors_module"](torch_version)
    return Extension(
        f"rootfree_fused.{name}",
        KNOWN_TENSORS,
        libraries=["c10", "torch_cpu", "torch_python"],
        define_macros=[("ROOTFREE_MODULE", name)],
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden"],
        language="c++",
        optional=True,
        **common,
    )


def extensions_for_others() -> list[Extension]:
    """Without those that serve the torch and the Python of the build alone."""
    return [extension for extension in extensions() if extension.py_limited_api]


setup(
    package_dir={"rootfree_fused.kernels": "kernels"},
    ext_modules=extensions_for_others() if os.environ.get(STABLE_ABI) == "1" else extensions(),
    cmdclass={"build_ext": OptionalBuildExt, "bdist_wheel": MarkedWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
