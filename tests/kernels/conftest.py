"""A workbench: a fake CUDA toolkit and C++ compiler that take milliseconds and write down what they are asked."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from comfy_sage3.kernels.jit.machine import Machine
from comfy_sage3.kernels.jit.setting import Setting
from comfy_sage3.kernels.jit.torch_build import TorchBuild
from comfy_sage3.kernels.sources import Source, Tree

HERE = Path(__file__).parent
FIXTURE = HERE / "csrc_fixture"

# Copies its source to its output. Words in the source make it fail, wait, or speak like ptxas.
COMPILER = """#!/bin/sh
case "$1" in --version) echo "{version}"; exit 0;; esac
echo "$0 $*" >> {calls}
src= out=
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2"; shift;;
    *.cu|*.cpp|*.o) src="$1"; cat "$1" >> {scratch}.$$;;
  esac
  shift
done
case "$src" in *.cu) if grep -q FAKE_WAIT {scratch}.$$; then sleep 30; fi;; esac
if grep -q FAKE_SPILL {scratch}.$$; then
  echo "ptxas info    : Compiling entry function 'wasteful' for 'sm_90a'"
  echo "ptxas info    : Function properties for wasteful"
  echo "    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads"
  echo "ptxas info    : Used 255 registers, used 1 barriers"
fi
if grep -q FAKE_FULL {scratch}.$$; then echo "nvcc error   : write: No space left on device"; exit 1; fi
if grep -q FAKE_ERROR {scratch}.$$; then echo "$src(3): error: identifier \\"nonsense\\" is undefined"; exit 2; fi
mv {scratch}.$$ "$out"
"""


@dataclass
class Bench:
    """One machine with compilers, one tree of sources, one cache."""

    folder: Path
    opened: list[Path] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home = fake_cuda(self.folder / "cuda", self.calls_file)
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        write_compiler(self.bin / "g++", "g++ (Debian 12.2.0-14) 12.2.0", self.calls_file)
        self.csrc = self.folder / "csrc"
        shutil.copytree(FIXTURE, self.csrc)
        self.cache = self.folder / "cache"
        self.env = {"CUDA_HOME": str(self.home), "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder)}

    @property
    def calls_file(self) -> Path:
        """Where the fake compilers write their command lines."""
        return self.folder / "calls.txt"

    @property
    def calls(self) -> list[str]:
        """The command lines so far, without --version."""
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def setting(self, **changes: object) -> Setting:
        """A Setting on this bench; ``env`` adds variables."""
        env = {**self.env, **changes.pop("env", {})}  # type: ignore[dict-item]
        setting = Setting(
            machine=Machine(windows=False, env=env, site_packages=(), cuda_roots=(), scripts=Path(sys.executable).parent),
            torch=TorchBuild("2.11.0+cu130", "13.0", self.folder / "torch"),
            tree=Tree(self.csrc, (Source("attention/*_sm90.cu", ("90a",)),)),
            archs=("90a",),
            prebuilt=self.folder / "prebuilt",
            root=self.cache,
            spare=self.folder / "spare",
            open_library=self.opened.append,
            package_version="0.1.0",
        )
        return dataclasses.replace(setting, **changes)

    def say(self, text: str) -> None:
        """The report of a load."""
        self.said.append(text)

    def spoil(self, word: str) -> None:
        """Put a word into a kernel that makes the fake compiler do something."""
        kernel = self.csrc / "scale.cu"
        kernel.write_text(f"{kernel.read_text()}\n// {word}\n")

    def leftovers(self) -> list[str]:
        """What lies in the cache that is no entry, lock or note."""
        return sorted(p.name for p in self.cache.glob(".*"))


def write_compiler(path: Path, version: str, calls: Path) -> None:
    """A fake compiler that says ``version``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = shlex.quote(str(path.parent / "scratch"))
    path.write_text(COMPILER.format(version=version, calls=shlex.quote(str(calls)), scratch=scratch))
    path.chmod(0o755)


def fake_cuda(home: Path, calls: Path, version: str = "13.0", gcc: int = 15) -> Path:
    """A toolkit's folder with everything that discovery looks for."""
    for name in ("include/cuda_runtime.h", "include/cccl/nv/target", "lib64/libcudart_static.a", "bin/nvcc.profile"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("")
    config = home / "include" / "crt" / "host_config.h"
    config.parent.mkdir()
    config.write_text(
        f"#if __GNUC__ > {gcc}\n#error\n#endif\n#if (__clang_major__ >= 21) || (__clang_major__ < 3)\n#error\n#endif\n"
        "#if _MSC_VER < 1920 || _MSC_VER >= 1950\n#error\n#endif\n"
    )
    said = f"nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {version}, V{version}.88"
    write_compiler(home / "bin" / "nvcc", said, calls)
    return home


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench in a folder whose name has a space, a dollar and letters of another alphabet."""
    if os.name != "posix":
        pytest.skip("the fake compilers are shell scripts")
    folder = tmp_path / "kernel büro 核 $x"
    folder.mkdir()
    return Bench(folder)


@pytest.fixture
def make_cuda(tmp_path: Path):
    """A function that makes a toolkit's folder (its nvcc is not run by tests that use this)."""
    return lambda home, **kwargs: fake_cuda(home, tmp_path / "calls.txt", **kwargs)
