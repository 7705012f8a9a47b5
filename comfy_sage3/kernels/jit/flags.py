"""What the compilers are told, in one place, so that ``sass`` looks at the code that ``build`` makes."""

from __future__ import annotations

from pathlib import Path

NVCC = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG", "-lineinfo")
GCC = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DNDEBUG")
MSVC = ("/std:c++17", "/O2", "/MD", "/EHsc", "/nologo", "/Zc:preprocessor", "/DNDEBUG")
# Inside nvcc, for the host half of a .cu. MSVC's old preprocessor cannot read CUDA's newer headers.
NVCC_HOST_GCC = ("-Xcompiler=-fPIC,-fvisibility=hidden",)
NVCC_HOST_MSVC = ("-Xcompiler=/MD,/EHsc,/nologo,/Zc:preprocessor",)


def nvcc_flags(windows: bool, include: Path, *, verbose: bool = False) -> list[str]:
    """nvcc's flags without the architectures; ``verbose`` makes ptxas report registers and spills."""
    flags = [*NVCC, *(NVCC_HOST_MSVC if windows else NVCC_HOST_GCC), f"-I{include}"]
    return [*flags, "-Xptxas=-v"] if verbose else flags
