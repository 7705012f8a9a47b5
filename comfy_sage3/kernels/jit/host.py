"""Finding the C++ compiler and ninja, and checking that nvcc accepts the compiler.

Which compilers an nvcc accepts stands in its own ``crt/host_config.h``; it is read, not copied into a table.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .cuda import Cuda
from .machine import Machine, ToolchainError, dotted, first_line, numbers

OLDEST_GCC = 9  # C++17, complete
INSTALL_MSVC = "install the Visual Studio 2022 Build Tools with the workload 'Desktop development with C++'"
MSVC_COMPONENT = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"


@dataclass(frozen=True)
class Host:
    """The C++ compiler. ``env`` is what must be set around it (cl.exe needs a dozen variables)."""

    path: Path
    kind: str  # "gcc", "clang" or "msvc"
    version: tuple[int, ...]
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Which compiler this is, wherever it lies."""
        return f"{self.kind} {dotted(self.version)}"


def find_host(machine: Machine) -> Host:
    """CXX if set, else g++ or clang++; cl.exe on Windows. Raises ToolchainError naming the package."""
    if machine.windows:
        return _find_msvc(machine)
    for name in (machine.env.get("CXX", ""), "g++", "c++", "clang++"):
        path = Path(name) if os.sep in name else machine.which(name)
        if not name or path is None or not path.is_file():
            continue
        said = machine.run([str(path), "--version"])
        match = re.search(r"(\d+\.\d+(?:\.\d+)?)", said.partition("\n")[0].rpartition(")")[2] or said)
        if match:
            return Host(path, "clang" if "clang" in said else "gcc", numbers(match[1]))
    raise ToolchainError("No C++ compiler was found: install g++ (apt install g++, or dnf install gcc-c++).")


def check_host(host: Host, cuda: Cuda) -> None:
    """Whether nvcc accepts this compiler. Raises ToolchainError naming one that it accepts."""
    header = cuda.header("crt/host_config.h")
    text = header.read_text(errors="replace") if header else ""
    theirs, cuda_name = host.version[0], f"CUDA {dotted(cuda.version)}"
    if host.kind == "msvc":
        match = re.search(r"_MSC_VER < (\d+) \|\| _MSC_VER >= (\d+)", text)
        number = host.version[0] * 100 + host.version[1]
        if match and not int(match[1]) <= number < int(match[2]):
            raise ToolchainError(f"{cuda_name} does not accept cl.exe {dotted(host.version)}: {INSTALL_MSVC}.")
        return
    name, limit = ("g++", r"__GNUC__ > (\d+)") if host.kind == "gcc" else ("clang++", r"__clang_major__ >= (\d+)")
    found = [int(x) for x in re.findall(limit, text)]
    newest = max(found) - (host.kind == "clang") if found else theirs
    if theirs > newest:
        raise ToolchainError(
            f"{host.path} is {host.kind} {theirs}, and {cuda_name} accepts up to {newest}: "
            f"install {name}-{newest} and set CXX={name}-{newest}."
        )
    if host.kind == "gcc" and theirs < OLDEST_GCC:
        raise ToolchainError(f"{host.path} is gcc {theirs}: install g++ {OLDEST_GCC} to {newest}.")


def find_ninja(machine: Machine) -> Path:
    """ninja beside this Python (where its wheel puts it), on PATH, or in its wheel. Raises ToolchainError."""
    inside = [folder / "ninja" / "data" / "bin" / machine.exe("ninja") for folder in machine.site_packages]
    for path in (machine.scripts / machine.exe("ninja"), machine.which("ninja"), *inside):
        if path is not None and path.is_file():
            return path
    raise ToolchainError("ninja was not found: pip install ninja.")


def _find_msvc(machine: Machine) -> Host:
    """cl.exe: the one on PATH (a developer prompt), else the newest that vswhere knows."""
    on_path = machine.which("cl")
    if on_path is not None:
        return _msvc(on_path, machine, {})
    base = Path(machine.env.get("PROGRAMFILES(X86)", r"C:\Program Files (x86)"))
    vswhere = base / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    if not vswhere.is_file():
        raise ToolchainError(f"No C++ compiler was found (neither cl.exe nor vswhere.exe): {INSTALL_MSVC}.")
    ask = [str(vswhere), "-products", "*", "-latest", "-requires", MSVC_COMPONENT, "-format", "json", "-utf8"]
    try:
        places = json.loads(machine.run(ask))
    except ValueError:
        places = []
    for place in places:
        batch = Path(place["installationPath"], "VC", "Auxiliary", "Build", "vcvars64.bat")
        if not batch.is_file():
            continue
        # One string, since cmd has quoting rules of its own; chcp so that `set` prints paths as UTF-8.
        said = machine.run(f'cmd /d /s /c "chcp 65001 >nul & call "{batch}" >nul && set"')
        pairs = (line.split("=", 1) for line in said.splitlines() if "=" in line)
        env = {name.upper(): value for name, value in pairs}  # it prints Path, os.environ says PATH: one may stay
        for folder in env.get("PATH", "").split(";"):
            if folder and Path(folder, "cl.exe").is_file():
                return _msvc(Path(folder, "cl.exe"), machine, env)
    raise ToolchainError(f"Visual Studio was found, but not its C++ compiler: {INSTALL_MSVC}.")


def _msvc(path: Path, machine: Machine, env: Mapping[str, str]) -> Host:
    said = machine.run([str(path)])
    match = re.search(r"(\d\d\.\d\d\.\d+)", said)  # the words around it are in the user's language
    if match is None:
        raise ToolchainError(f"{path} does not start: {first_line(said)}")
    return Host(path, "msvc", numbers(match[1]), env)
