"""What is to be built, exactly: the bytes of the sources, the flags, the torch. Its hash names the result."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..sources import Source, Tree
from .flags import GCC, LINK_GCC, MSVC, SYSTEM_GCC, host_flags, nvcc_flags
from .toolchain import Toolchain
from .torch_build import TorchBuild

LAYOUT = 1  # of cache entries and manifests: raised when they change


@dataclass(frozen=True)
class Recipe:
    """One library to build. The sources are held as bytes: what is hashed is what is compiled."""

    sources: tuple[tuple[str, bytes], ...]  # path below csrc with forward slashes, content
    rows: tuple[Source, ...]
    archs: tuple[str, ...]
    torch: TorchBuild
    package_version: str
    lineinfo: bool = False
    system: str = f"{sys.platform}-{platform.machine().lower()}"

    @classmethod
    def read(
        cls, tree: Tree, archs: tuple[str, ...], torch: TorchBuild, package_version: str, lineinfo: bool = False
    ) -> Recipe:
        """The recipe for ``tree`` as its files are now."""
        sources = tuple((p.relative_to(tree.root).as_posix(), p.read_bytes()) for p in tree.files())
        return cls(sources, tree.rows, tuple(sorted(archs)), torch, package_version, lineinfo)

    @property
    def windows(self) -> bool:
        """Whether cl.exe is the C++ compiler."""
        return self.system.startswith("win")

    @property
    def sources_hash(self) -> str:
        """Of every source and header: names and contents, and which file is for which GPU."""
        hashed = hashlib.sha256(repr(self.rows).encode())
        for name, content in self.sources:
            hashed.update(f"{name}\0{len(content)}\0".encode() + content)
        return hashed.hexdigest()

    @property
    def base(self) -> str:
        """What a library must agree with to be used at all. GPUs and compilers stand in its manifest.

        Python is not in it: the library is loaded by torch and knows nothing of Python.
        """
        flags = [*nvcc_flags(self.windows, lineinfo=self.lineinfo), *LINK_GCC, *SYSTEM_GCC]
        flags += [*(MSVC if self.windows else GCC), *host_flags(self.windows, self.torch.standard, self.torch.cxx11_abi)]
        parts = [LAYOUT, self.package_version, self.sources_hash, flags]
        parts += [self.torch.version, self.torch.cuda, self.torch.cxx11_abi, self.system]
        return _short(parts, 16)

    def entry(self, toolchain: Toolchain) -> str:
        """The name of the result: ``base``, and a hash of the GPUs and the compilers."""
        return f"{self.base}-{_short([self.archs, toolchain.identity], 8)}"

    def kernels(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each .cu that is compiled, and for which of ``archs``."""
        tree = Tree(Path("csrc"), self.rows)
        paths = [Path("csrc", name) for name, _ in self.sources if name.endswith(".cu")]
        planned = [(p.relative_to("csrc").as_posix(), tuple(a for a in self.archs if a in tree.archs_of(p))) for p in paths]
        return [(name, archs) for name, archs in planned if archs]

    def write(self, folder: Path) -> None:
        """Copy the sources to ``folder``/csrc."""
        for name, content in self.sources:
            path = folder / "csrc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def namespace_of(entry: str) -> str:
    """The torch.ops namespace of an entry's operators.

    Each library has its own: two copies of this package in one process, or two versions, must not register the
    same operators, which ends the process.
    """
    return "sage3_" + entry.replace("-", "_")


def library_name(entry: str, windows: bool) -> str:
    """The file name, the same wherever the library lies, so that a loaded one is recognised."""
    return namespace_of(entry) + (".dll" if windows else ".so")


def has_macro(name: str) -> str:
    """The macro that tells binding.cpp that "attention/int8_sm90.cu" is in the build: SAGE3_HAS_INT8_SM90."""
    return "SAGE3_HAS_" + re.sub(r"\W", "_", Path(name).stem).upper()


def _short(parts: object, length: int) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:length]
