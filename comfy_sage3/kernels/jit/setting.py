"""Everything a load depends on, in one value: the defaults are this process, tests bring their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..sources import EMULATED, PACKAGE, SOURCES, Tree, find_tree
from . import cache
from .lock import TIMEOUT
from .machine import Machine
from .recipe import Recipe
from .switches import Switches, cache_root
from .torch_build import TorchBuild

PREBUILT = PACKAGE / "kernels" / "prebuilt"


def tree_here() -> Tree | None:
    """This package's sources; with SAGE3_EMULATE_FP4 the 4-bit ones are for more GPUs."""
    return find_tree(rows=EMULATED if Switches.read(os.environ).emulate_fp4 else SOURCES)


def open_library(path: Path) -> None:
    """Load a library into torch, which then has its operators. Raises OSError when it does not fit."""
    torch.ops.load_library(str(path))


@dataclass(frozen=True)
class Setting:
    """The machine, the torch, the sources and the folders of one load."""

    machine: Machine = field(default_factory=Machine)
    torch: TorchBuild = field(default_factory=TorchBuild.here)
    tree: Tree | None = field(default_factory=tree_here)
    archs: tuple[str, ...] | None = None  # None: those of the GPUs that are there
    prebuilt: Path = PREBUILT
    root: Path | None = None  # None: the user's cache folder
    spare: Path | None = None  # where to go when that cannot be written; None: the system's temporary folder
    open_library: Callable[[Path], None] = open_library
    lock_timeout: float = TIMEOUT
    package_version: str = ""

    @property
    def switches(self) -> Switches:
        """The environment's."""
        return Switches.read(self.machine.env)

    @property
    def cache(self) -> Path:
        """Where built libraries are kept."""
        return self.root or cache_root(self.machine.env)

    @property
    def version(self) -> str:
        """This package's."""
        if self.package_version:
            return self.package_version
        from ... import __version__

        return __version__

    def recipe(self, archs: tuple[str, ...]) -> Recipe:
        """What would be built for ``archs`` now; without sources, what a prebuilt library must agree with."""
        tree = self.tree or Tree(PACKAGE / "no-sources")
        return Recipe.read(tree, archs, self.torch, self.version, bool(self.switches.lineinfo))

    def folders(self) -> list[Path]:
        """Where built libraries may lie: the cache, and the spare folder where it exists and is ours alone."""
        root, *spare = cache.candidates(self.cache, self.machine.windows, self.spare)
        return [root, *(path for path in spare if path.is_dir() and cache.is_private(path))]
