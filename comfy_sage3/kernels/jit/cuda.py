"""Finding nvcc and the disassemblers, and checking that they fit torch and each other.

In order: CUDA_HOME, CUDA_PATH, PATH, the usual install folders, NVIDIA's wheels in site-packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..sources import OLDEST_CUDA
from .machine import EXTRA, Machine, ToolchainError, dotted, first_line, numbers

WHEELS = "NVIDIA's wheels"
DOWNLOADS = "developer.nvidia.com/cuda-downloads"
HEADERS = {  # a header that must be there: the wheel that brings it
    "cuda_runtime.h": "nvidia-cuda-runtime",
    "crt/host_config.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: its folder, its nvcc, nvcc's version and identity, and how it was found."""

    home: Path
    nvcc: Path
    version: tuple[int, ...]
    identity: str
    where: str

    def include_dirs(self) -> list[Path]:
        """Headers for the host compiler; nvcc finds its own."""
        roots = [self.home / "include", *sorted(self.home.glob("targets/*/include"))]
        found = [folder for root in roots for folder in (root, root / "cccl") if folder.is_dir()]
        return list({folder.resolve(): folder for folder in reversed(found)}.values())[::-1]  # links are doubles

    def header(self, name: str) -> Path | None:
        """Where a header of the toolkit lies."""
        return next((d / name for d in self.include_dirs() if (d / name).is_file()), None)

    def library_dir(self) -> Path | None:
        """The folder that holds the static CUDA runtime."""
        folders = ("lib64", "lib", "lib/x64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        names = ("libcudart_static.a", "cudart_static.lib")
        return next((self.home / f for f in folders for n in names if (self.home / f / n).is_file()), None)


def homes(machine: Machine) -> Iterator[tuple[Path, str]]:
    """Folders that may hold a toolkit, best first, each with how it was found."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if machine.env.get(name):
            yield Path(machine.env[name]), name
    on_path = machine.which("nvcc")
    if on_path is not None:
        yield _around(on_path, machine), "PATH"
    for root in machine.cuda_roots:
        yield root, str(root)
    if machine.windows:
        base = Path(machine.env.get("PROGRAMFILES", r"C:\Program Files"), "NVIDIA GPU Computing Toolkit", "CUDA")
        if base.is_dir():
            for root in sorted(base.iterdir(), key=lambda path: numbers(path.name), reverse=True):
                yield root, str(root)
    for folder in machine.site_packages:
        for root in sorted(folder.glob("nvidia/cu[0-9]*"), key=lambda path: numbers(path.name), reverse=True):
            yield root, WHEELS


def find_cuda(machine: Machine, torch_cuda: str | None = None, archs: Sequence[str] = ()) -> Cuda:
    """The first toolkit whose nvcc starts and fits (see ``check_cuda``), so an old one is no obstacle.

    Raises ToolchainError: what is wrong with the first one found, or that there is none.
    """
    wrong: ToolchainError | None = None
    for home, where in homes(machine):
        nvcc = home / "bin" / machine.exe("nvcc")
        if not nvcc.is_file():
            continue
        said = machine.run([str(nvcc), "--version"])
        match = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", said)
        if match is None:
            wrong = wrong or ToolchainError(f"{nvcc} does not start: {first_line(said)}")
            continue
        cuda = Cuda(home, nvcc, numbers(match[1]), f"nvcc {match[2] or match[1]}", where)
        try:
            check_cuda(cuda, torch_cuda, archs)
        except ToolchainError as problem:
            wrong = wrong or problem
            continue
        return cuda
    if wrong is not None:
        raise wrong
    if any((folder / "nvidia" / "cuda_nvcc").is_dir() for folder in machine.site_packages):
        raise ToolchainError(
            "nvcc was not found, and NVIDIA's wheels for CUDA 12 do not contain it: install the CUDA 12 toolkit "
            f"({DOWNLOADS}, or conda's cuda-nvcc), or torch for CUDA 13 and {EXTRA}."
        )
    raise ToolchainError(
        f"nvcc was not found: {EXTRA} (with torch for CUDA 13), or the CUDA toolkit from {DOWNLOADS} "
        "(set CUDA_HOME where its folder is an unusual one)."
    )


def check_cuda(cuda: Cuda, torch_cuda: str | None, archs: Sequence[str] = ()) -> None:
    """Whether this nvcc can build for this torch and these GPUs. Raises ToolchainError.

    Within one major version CUDA's parts fit each other, whichever is newer.
    """
    if torch_cuda is not None and cuda.version[0] != numbers(torch_cuda)[0]:
        major = numbers(torch_cuda)[0]
        how = EXTRA if major >= 13 else f"the CUDA {major} toolkit ({DOWNLOADS})"
        raise ToolchainError(
            f"nvcc is of CUDA {dotted(cuda.version)} ({cuda.nvcc}), torch of CUDA {torch_cuda}: install {how} "
            f"and set CUDA_HOME to its folder."
        )
    for arch in archs:
        if cuda.version < OLDEST_CUDA[arch]:
            least = dotted(OLDEST_CUDA[arch])
            raise ToolchainError(
                f"nvcc {dotted(cuda.version)} ({cuda.nvcc}) does not know sm_{arch}: install CUDA {least} or newer."
            )
    if cuda.where == WHEELS:
        _check_wheels(cuda)
    for header, wheel in HEADERS.items():
        if cuda.header(header) is None:
            fitting = f"'{wheel}=={dotted(cuda.version)}.*'"
            raise ToolchainError(f"{cuda.home} lacks {header}: pip install {fitting}, or reinstall the toolkit.")
    if cuda.library_dir() is None:
        raise ToolchainError(f"{cuda.home} lacks the static CUDA runtime: {EXTRA}, or reinstall the toolkit.")


def find_binary(name: str, machine: Machine, cuda: Cuda | None = None) -> Path:
    """``cuobjdump`` or ``nvdisasm``: beside nvcc, else any. Raises ToolchainError naming the wheel."""
    folders = [cuda.home] if cuda else []
    for home in [*folders, *(home for home, _ in homes(machine))]:
        path = home / "bin" / machine.exe(name)
        if path.is_file():
            return path
    raise ToolchainError(f"{name} was not found: {EXTRA} (or pip install nvidia-cuda-{name}).")


def _check_wheels(cuda: Cuda) -> None:
    """The compiler is spread over wheels that pip may take from different releases.

    A newer nvvm writes PTX that this ptxas refuses ("Unsupported .version"): said before, not after.
    """
    for name in ("nvidia_nvvm", "nvidia_cuda_crt"):
        for found in cuda.home.parents[1].glob(f"{name}-*.dist-info"):
            theirs = numbers(found.name.split("-")[1])[:2]
            if theirs != cuda.version:
                package, ours = name.replace("_", "-"), dotted(cuda.version)
                raise ToolchainError(
                    f"NVIDIA's wheels do not fit each other: nvcc is {ours}, {package} is {dotted(theirs)}; "
                    f"pip install '{package}=={ours}.*'."
                )


def _around(nvcc: Path, machine: Machine) -> Path:
    """The toolkit around an nvcc on PATH, through links and wrapper scripts (``--dryrun`` prints its TOP)."""
    home = nvcc.resolve().parents[1]
    if (nvcc.resolve().parent / "nvcc.profile").is_file():
        return home
    match = re.search(r"^#\$ TOP=(.+)$", machine.run([str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull]), re.M)
    return Path(os.path.normpath(match[1].strip())) if match else home
