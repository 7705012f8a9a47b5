"""The tools a build starts, found together and checked against torch, the GPUs and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cuda import Cuda, find_cuda
from .host import Host, check_host, find_host, find_ninja
from .machine import Machine


@dataclass(frozen=True)
class Toolchain:
    """nvcc, the C++ compiler and ninja."""

    cuda: Cuda
    host: Host
    ninja: Path
    windows: bool = False

    @property
    def identity(self) -> str:
        """Which compilers these are, for the cache's key; where they lie does not matter."""
        return f"{self.cuda.identity}, {self.host.identity}"


def find_toolchain(torch_cuda: str | None, archs: Sequence[str] = (), machine: Machine | None = None) -> Toolchain:
    """The tools to build for ``archs`` and a torch made for CUDA ``torch_cuda`` (None: any).

    Raises ToolchainError naming the thing to install.
    """
    machine = machine or Machine()
    cuda = find_cuda(machine, torch_cuda, archs)
    host = find_host(machine)
    check_host(host, cuda)
    return Toolchain(cuda, host, find_ninja(machine), machine.windows)
