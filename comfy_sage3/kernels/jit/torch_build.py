"""The torch that kernels are built for and loaded into: versions, headers, libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .machine import numbers


@dataclass(frozen=True)
class TorchBuild:
    """What a library must agree with. ``cuda`` is None for a torch without CUDA."""

    version: str
    cuda: str | None
    folder: Path
    cxx11_abi: bool = True

    @classmethod
    def here(cls) -> TorchBuild:
        """The torch of this process."""
        folder = Path(torch.__file__).parent
        return cls(str(torch.__version__), torch.version.cuda, folder, bool(torch._C._GLIBCXX_USE_CXX11_ABI))

    @property
    def minor(self) -> tuple[int, ...]:
        """(2, 11): torch's C++ interface changes between these, not within one."""
        return numbers(self.version)[:2]

    @property
    def standard(self) -> str:
        """The C++ its headers are written in."""
        return "c++20" if self.minor >= (2, 12) else "c++17"

    @property
    def include_dirs(self) -> list[Path]:
        """For binding.cpp."""
        return [self.folder / "include", self.folder / "include" / "torch" / "csrc" / "api" / "include"]

    @property
    def library_dir(self) -> Path:
        """Where ``libraries`` lie."""
        return self.folder / "lib"

    @property
    def libraries(self) -> list[str]:
        """What binding.cpp is linked with. No libtorch_python: the result serves every Python."""
        cuda = ["c10_cuda", "torch_cuda"]
        return ["c10", "torch_cpu", *[name for name in cuda if self._has(name)], "torch"]

    def _has(self, name: str) -> bool:
        return any((self.library_dir / file).is_file() for file in (f"lib{name}.so", f"{name}.lib"))
