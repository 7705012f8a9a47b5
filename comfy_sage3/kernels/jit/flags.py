"""What the compilers are told, in one place, so that ``sass`` looks at the code that ``build`` makes."""

from __future__ import annotations

NVCC = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG")
# For the host half of a .cu. MSVC's old preprocessor cannot read CUDA's newer headers.
NVCC_GCC = ("-Xcompiler=-fPIC,-fvisibility=hidden",)
NVCC_MSVC = ("-Xcompiler=/MD,/EHsc,/nologo,/Zc:preprocessor",)
GCC = ("-O2", "-fPIC", "-fvisibility=hidden", "-DNDEBUG")
MSVC = ("/O2", "/MD", "/EHsc", "/nologo", "/utf-8", "/Zc:preprocessor", "/DNDEBUG", "/DNOMINMAX")
# -z defs: a missing launcher is an error here and not when the library is loaded. The CUDA runtime is linked
# statically and hidden: wheels ship it without the names a linker looks for, and torch may hold another one.
LINK_GCC = ("-shared", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL", "-Wl,-s")
SYSTEM_GCC = ("-lrt", "-ldl", "-lpthread")


def nvcc_flags(windows: bool, *, lineinfo: bool = False) -> list[str]:
    """nvcc's flags, without paths and architectures."""
    return [*NVCC, *(NVCC_MSVC if windows else NVCC_GCC), *(["-lineinfo"] if lineinfo else [])]


def host_flags(windows: bool, standard: str, cxx11_abi: bool) -> list[str]:
    """The C++ compiler's flags for binding.cpp, without paths."""
    if windows:
        return [*MSVC, f"/std:{standard}"]
    return [*GCC, f"-std={standard}", f"-D_GLIBCXX_USE_CXX11_ABI={int(cxx11_abi)}"]
