"""What is compiled, and for which GPUs: two tables of plain data, and where the sources lie.

``csrc`` stands beside the package in a git checkout and inside it in an installed wheel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

Capability = tuple[int, int]

PACKAGE = Path(__file__).resolve().parents[1]

# Compute capability -> the architecture to compile for. The "a" forms alone have wgmma, TMA multicast and the
# block-scaled mma; they run on exactly that GPU, which is all a build on the user's own machine needs.
TARGETS: dict[Capability, str] = {
    (7, 5): "75",
    (8, 0): "80",
    (8, 6): "86",
    (8, 7): "86",  # Orin runs sm_86 code
    (8, 9): "89",
    (9, 0): "90a",
    (10, 0): "100a",
    (10, 3): "103a",
    (12, 0): "120a",
    (12, 1): "121a",
}
ALL = tuple(dict.fromkeys(TARGETS.values()))
OLDEST_CUDA = {  # the first CUDA whose nvcc knows the architecture
    "75": (10, 0),
    "80": (11, 0),
    "86": (11, 1),
    "89": (11, 8),
    "90a": (12, 0),
    "100a": (12, 8),
    "103a": (12, 9),
    "120a": (12, 8),
    "121a": (12, 9),
}


@dataclass(frozen=True)
class Source:
    """Which architectures a .cu file (a glob below ``csrc``) is compiled for."""

    path: str
    archs: tuple[str, ...] = ALL


# The first row that matches a file decides; a file that no row matches is compiled for every architecture.
# binding.cpp sees SAGE3_HAS_<STEM> for each .cu that is in the build, so it calls no launcher that is not.
NVFP4 = ("120a", "121a")
SOURCES: tuple[Source, ...] = (
    Source("attention/*_sm90.cu", ("90a",)),
    Source("backward/*.cu", ("90a",)),
    Source("attention/*_sm120.cu", NVFP4),
    Source("quantize/nvfp4*.cu", NVFP4),
)

# With SAGE3_EMULATE_FP4 the 4-bit kernels are built for these as well. They have no tensor cores for NVFP4: the two
# instructions are emulated (nvfp4.cuh), exactly and slowly, which is how the kernels are tested without a Blackwell GPU.
EMULATING = ("90a",)
EMULATED: tuple[Source, ...] = tuple(
    Source(row.path, (*EMULATING, *NVFP4)) if row.archs == NVFP4 else row for row in SOURCES
)


@dataclass(frozen=True)
class Tree:
    """A folder of sources. ``rows`` says which architectures each .cu is for."""

    root: Path
    rows: tuple[Source, ...] = SOURCES

    @property
    def include(self) -> Path:
        """Where ``#include <sage3/...>`` starts."""
        return self.root / "include"

    @property
    def binding(self) -> Path:
        """The one file that includes torch's headers."""
        return self.root / "binding.cpp"

    def kernels(self) -> list[Path]:
        """Every .cu, in a fixed order."""
        return sorted(self.root.rglob("*.cu"))

    def files(self) -> list[Path]:
        """Everything a build reads, in a fixed order: what the cache's key is made from."""
        endings = {".cu", ".cuh", ".h", ".cpp"}
        return sorted(path for path in self.root.rglob("*") if path.suffix in endings and path.is_file())

    def archs_of(self, kernel: Path) -> tuple[str, ...]:
        """The architectures that ``kernel`` may be compiled for."""
        relative = kernel.relative_to(self.root)
        return next((row.archs for row in self.rows if relative.match(row.path)), ALL)

    def plan(self, archs: tuple[str, ...]) -> list[tuple[Path, tuple[str, ...]]]:
        """Each .cu that a build for ``archs`` compiles, and for which of them."""
        planned = [(k, tuple(a for a in archs if a in self.archs_of(k))) for k in self.kernels()]
        return [(kernel, mine) for kernel, mine in planned if mine]


def find_tree(package: Path = PACKAGE, rows: tuple[Source, ...] = SOURCES) -> Tree | None:
    """The sources that belong to this copy of the package, or None where they are not installed."""
    for root in (package / "csrc", package.parent / "csrc"):
        if (root / "binding.cpp").is_file() or any(root.rglob("*.cu")):
            return Tree(root, rows)
    return None


def arch_of(capability: Capability) -> str | None:
    """The architecture to compile for a GPU of ``capability``; None when there is none."""
    return TARGETS.get(capability)


def parse_archs(text: str) -> tuple[str, ...]:
    """ "90,120a" or "all" -> ("90a", "120a"), without doubles. Raises InputError naming what there is."""
    if text.strip() == "all":
        return ALL
    found = []
    for word in text.replace(";", ",").split(","):
        name = word.strip().lower().removeprefix("sm_").replace(".", "")
        match = next((arch for arch in ALL if name in (arch, arch.rstrip("a"))), None)
        if match is None:
            raise InputError(f"Unknown architecture {word.strip()!r}: choose from {', '.join(ALL)} or all.")
        found.append(match)
    return tuple(dict.fromkeys(found))


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for machine code of ``archs`` and no PTX: nothing is left to compile at run time."""
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
