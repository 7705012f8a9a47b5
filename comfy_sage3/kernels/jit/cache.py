"""Folders of built libraries: finding one that fits, checking it, publishing a new one at once or not at all.

An entry is a folder with the library and a manifest: what it was built from and for, its size and SHA-256. It
comes into being by one rename of a finished private folder, so nobody ever sees half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .machine import numbers
from .recipe import LAYOUT, Recipe, library_name, namespace_of
from .toolchain import Toolchain

MANIFEST = "manifest.json"
PRIVATE = ".building-"
LEAST_FREE = 256 << 20  # bytes that a build may need for a while
KEPT = 90 * 24 * 3600.0  # seconds after which an entry that nobody loaded is removed
LONGEST = 150  # characters of a folder on Windows, whose compilers stop at 260 with what they add


@dataclass(frozen=True)
class Manifest:
    """What stands beside a library."""

    layout: int
    entry: str
    package_version: str
    sources: str  # hash
    torch: str
    cuda: str | None
    cxx11_abi: bool
    archs: tuple[str, ...]
    compilers: str
    system: str
    size: int
    sha256: str

    @classmethod
    def of(cls, recipe: Recipe, toolchain: Toolchain, entry: str, library: Path) -> Manifest:
        """The manifest of a library that has just been built."""
        torch = recipe.torch
        return cls(
            LAYOUT, entry, recipe.package_version, recipe.sources_hash, torch.version, torch.cuda, torch.cxx11_abi,
            recipe.archs, toolchain.identity, recipe.system, library.stat().st_size, sha256(library),
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ValueError when it is not one of ours."""
        try:
            data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(**{**data, "archs": tuple(data["archs"])})
        except (OSError, TypeError, KeyError, UnicodeDecodeError) as problem:
            raise ValueError(f"{folder / MANIFEST}: {problem}") from None

    def write(self, folder: Path) -> None:
        """Beside the library."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Entry:
    """A library that was found, and what its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The file to load."""
        return self.folder / library_name(self.manifest.entry, self.manifest.system.startswith("win"))

    @property
    def namespace(self) -> str:
        """Where torch.ops has its operators."""
        return namespace_of(self.manifest.entry)

    def damage(self) -> str | None:
        """What is wrong with the file, by its recorded size and hash; None when it is whole."""
        try:
            size = self.library.stat().st_size
            if size != self.manifest.size:
                return f"{self.library} has {size} bytes instead of {self.manifest.size}"
            if sha256(self.library) != self.manifest.sha256:
                return f"{self.library} is not the file that was built"
        except OSError as problem:
            return f"{self.library} cannot be read ({problem.strerror})"
        return None


def sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        hashed = hashlib.sha256()
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def built_entries(root: Path, base: str) -> Iterator[Entry]:
    """The entries of a recipe, newest first, with whatever compiler they were made."""
    folders = [path for path in root.glob(f"{base}-*") if (path / MANIFEST).is_file()] if root.is_dir() else []
    for folder in sorted(folders, key=lambda path: (path / MANIFEST).stat().st_mtime, reverse=True):
        try:
            yield Entry(folder, Manifest.read(folder))
        except ValueError:
            continue  # damaged: as if it were not there


def serves(entry: Entry, archs: Sequence[str]) -> bool:
    """Whether a library has code for all of these GPUs."""
    return set(archs) <= set(entry.manifest.archs)


def misfit(entry: Entry, recipe: Recipe, have_sources: bool) -> str | None:
    """Why a prebuilt library does not belong to this torch, these GPUs and this package; None when it does.

    Its torch need not be the same to the letter: within 2.11 the interface stays.
    """
    m, torch = entry.manifest, recipe.torch
    pairs = [
        ("package", m.package_version, recipe.package_version),
        ("system", m.system, recipe.system),
        ("torch", numbers(m.torch)[:2], torch.minor),
        ("CUDA", numbers(m.cuda or "")[0], numbers(torch.cuda or "")[0]),
        ("C++ ABI", m.cxx11_abi, torch.cxx11_abi),
        ("layout", m.layout, LAYOUT),
    ]
    for what, theirs, ours in pairs:
        if theirs != ours:
            return f"it is for {what} {_text(theirs)}, this is {_text(ours)}"
    if have_sources and m.sources != recipe.sources_hash:
        return "the sources have changed since"
    if not serves(entry, recipe.archs):
        return f"it is for sm_{', sm_'.join(m.archs)}, this needs sm_{', sm_'.join(recipe.archs)}"
    return None


def candidates(root: Path, windows: bool, temporary: Path | None = None) -> list[Path]:
    """Where a build may go: the cache, else a folder of this user among the temporary files."""
    name = f"comfy_sage3-{os.getuid()}" if hasattr(os, "getuid") else "comfy_sage3"
    spare = (temporary or Path(tempfile.gettempdir())) / name
    return [path for path in (root, spare) if not (windows and len(str(path)) > LONGEST)]


def unusable(folder: Path, least: int = LEAST_FREE) -> str | None:
    """Why nothing can be built in ``folder`` (which is made if need be); None when something can."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        return f"{folder}: {problem.strerror or problem}"
    if free < least:
        return f"{folder}: {free >> 20} MB are free, {least >> 20} are needed"
    return None


def is_private(folder: Path) -> bool:
    """Whether nobody else can put files into ``folder``: asked of folders in places open to all."""
    if not hasattr(os, "getuid"):
        return True  # Windows: the temporary folder is the user's own
    state = folder.lstat()
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022


def publish(private: Path, final: Path) -> None:
    """Make a finished private folder the entry ``final``. A damaged entry in its place goes first."""
    try:
        os.rename(private, final)
        return
    except OSError as problem:
        taken = problem.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EACCES) and final.is_dir()
        if not taken:
            raise
    aside = final.with_name(f"{PRIVATE}{final.name}-old-{os.getpid()}-{time.monotonic_ns()}")
    os.rename(final, aside)
    os.rename(private, final)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(root: Path, entry: str, now: float | None = None) -> None:
    """Remove what killed builds of this entry left (its lock is held), and entries long unused."""
    for left in root.glob(f"{PRIVATE}{entry}-*"):
        shutil.rmtree(left, ignore_errors=True)
    before = (time.time() if now is None else now) - KEPT
    for manifest in root.glob(f"*/{MANIFEST}"):
        if manifest.parent.name != entry and manifest.stat().st_mtime < before:
            shutil.rmtree(manifest.parent, ignore_errors=True)


def touch(entry: Entry) -> None:
    """Note that an entry was used, where the disk lets us."""
    try:
        os.utime(entry.folder / MANIFEST)
    except OSError:
        return


def _text(value: object) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)
