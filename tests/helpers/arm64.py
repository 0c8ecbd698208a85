"""`make arm64-check`: the wheel for Linux on arm64, made, tried and tested in qemu's user mode.

    python tests/helpers/arm64.py [arguments of pytest]

Apt's Python and pip's torch for arm64 are unpacked into build/arm64, where the next run finds them:
2.9 GB are downloaded and 4.8 GB stay, mostly the CUDA libraries that this torch is linked with.
There setup.py makes the wheel, every optimizer takes a step, and pytest runs tests/csrc or what is
named instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from release import ROOT, TRY, Failed, Trial, call, environment, faults, files_missing, say

WORK = ROOT / "build" / "arm64"
SYSTEM = WORK / "system"  # qemu looks for a file there before it takes the machine's own
PACKAGES = WORK / "packages"
INSTALLED = WORK / "installed"
PYTHON = SYSTEM / "usr/bin/python3.11"
WANTED = ["torch==2.13.0", "pytest", "hypothesis", "expecttest", "numpy"]
TOOLS = ["qemu-aarch64", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb"]
NEEDED = "Debian 12 is needed, and apt-get install qemu-user g++-aarch64-linux-gnu"
# libtorch looks its processor up in these, and does not survive what the machine's own say.
PROCESSOR = {
    "proc/cpuinfo": "processor: 0\nCPU implementer: 0x41\nCPU architecture: 8\nCPU variant: 0x3\n"
    "CPU part: 0xd0c\nCPU revision: 1\nFeatures: fp asimd atomics fphp asimdhp asimdrdm asimddp\n",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
    "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000413fd0c1\n",
}
APT = """
APT::Architecture "arm64"; APT::Architectures {{ "arm64"; }};
Dir::State "{0}"; Dir::State::status "{0}/status"; Dir::Cache "{0}";
"""


def unpack_system(folder: Path) -> None:
    """The files of Debian's packages, none of which is installed or run."""
    apt = WORK / "apt"
    archives = apt / "archives"
    for parent in (apt / "lists" / "partial", archives / "partial"):
        parent.mkdir(parents=True)
    (apt / "status").touch()
    (apt / "config").write_text(APT.format(apt))
    env = {**os.environ, "APT_CONFIG": str(apt / "config")}
    call("apt-get", "update", env=env)
    call("apt-get", "install", "--yes", "--download-only", "--no-install-recommends",
         "python3.11", "libgomp1", "libstdc++6", env=env)  # fmt: skip
    call("apt-get", "download", "libpython3.11-dev", env=env, cwd=archives)
    for package in archives.glob("*.deb"):
        call("dpkg-deb", "-x", package, folder)
    shutil.rmtree(apt)
    for name, text in PROCESSOR.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def unpack_packages(folder: Path) -> None:
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)]
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", "--target",
         folder, "--only-binary=:all:", "--python-version=3.11", *platforms,
         "--platform=manylinux2014_aarch64", *WANTED)  # fmt: skip


def once(make: Callable[[Path], None], folder: Path) -> None:
    """What was broken off counts as not made."""
    if not folder.exists():
        say(f"downloads {folder.relative_to(ROOT)}")
        partial = folder.with_suffix(".partial")
        for old in (partial, WORK / "apt"):
            shutil.rmtree(old, ignore_errors=True)
        make(partial)
        partial.rename(folder)


def build_wheel(env: dict[str, str]) -> Path:
    """By the package's own setup.py: that Python names the cross compiler as its own."""
    shutil.rmtree(WORK / "wheel", ignore_errors=True)
    headers = [SYSTEM / "usr/include", SYSTEM / "usr/include/python3.11"]
    call("qemu-aarch64", PYTHON, "setup.py", "-q", "build", "--build-base", WORK / "build",
         "bdist_wheel", "--dist-dir", WORK / "wheel",
         env={**env, "CPATH": os.pathsep.join(map(str, headers))})  # fmt: skip
    (wheel,) = (WORK / "wheel").glob("*.whl")
    return wheel


def main(arguments: list[str]) -> int:
    """The exit status of pytest."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise Failed(f"no {', '.join(missing)} here: {NEEDED}")
    WORK.mkdir(parents=True, exist_ok=True)
    once(unpack_system, SYSTEM)
    once(unpack_packages, PACKAGES)
    env = {
        **environment(WORK, compiler=True),
        "QEMU_LD_PREFIX": str(SYSTEM),
        "QEMU_CPU": "neoverse-n1",
        "PYTHONPATH": os.pathsep.join(map(str, [INSTALLED, PACKAGES])),
        "ROOTFREE_FUSED_STABLE_ABI": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    shutil.rmtree(INSTALLED, ignore_errors=True)
    say("builds")
    wheel = build_wheel(env)
    with zipfile.ZipFile(wheel) as archive:
        if lacking := files_missing(set(archive.namelist())):
            raise Failed(f"{wheel.name} lacks {', '.join(sorted(lacking))}")
        archive.extractall(INSTALLED)
    say(f"tries {wheel.name}")
    found = json.loads(call("qemu-aarch64", PYTHON, "-c", TRY, env=env, cwd=WORK).splitlines()[-1])
    if wrong := faults(Trial(wheel, True, "C++"), found, INSTALLED, wheel.name.split("-")[1]):
        raise Failed("\n".join([f"{wheel.name}:", *wrong]))
    say(f"{found['backend']}: a step of {', '.join(sorted(found['steps']))}")
    # Not python -m pytest: the sources in this folder would hide what was installed. Torch warns
    # once that this processor has no products of bfloat16.
    pytest = [PYTHON, PACKAGES / "bin" / "pytest", "-W", "ignore:mkldnn_matmul failed"]
    tests = arguments or ["tests/csrc"]
    return subprocess.run(["qemu-aarch64", *map(str, pytest), *tests], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
