"""The machine as the build sees it: one value, so that a test can be a Windows or a machine without compilers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

EXTRA = "pip install 'comfy-sage3[build]'"


class ToolchainError(Exception):
    """What is missing or does not fit, and the thing to install; one sentence."""


def run_text(command: Sequence[str] | str) -> str:
    """The output of a command, both streams; "" when it cannot be started. A str goes to Windows as it is."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")  # a compiler may speak the machine's own code page


def site_packages() -> tuple[Path, ...]:
    """Where pip puts wheels, and whatever else Python imports from (--user, --target)."""
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    return tuple(dict.fromkeys(Path(name) for name in names if name and Path(name).is_dir()))


@dataclass(frozen=True)
class Machine:
    """What discovery may ask of the machine it runs on. On Windows the names in ``env`` are upper case, as in os.environ."""

    windows: bool = sys.platform == "win32"
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    run: Callable[[Sequence[str] | str], str] = run_text
    site_packages: tuple[Path, ...] = field(default_factory=site_packages)
    cuda_roots: tuple[Path, ...] = (Path("/usr/local/cuda"), Path("/opt/cuda"))
    scripts: Path = Path(sys.executable).parent

    def exe(self, name: str) -> str:
        """``name`` as an executable file is called here."""
        return f"{name}.exe" if self.windows else name

    def which(self, name: str) -> Path | None:
        """``name`` on this machine's PATH."""
        for folder in self.env.get("PATH", "").split(";" if self.windows else ":"):
            path = Path(folder, self.exe(name))
            if folder and path.is_file() and (self.windows or os.access(path, os.X_OK)):
                return path
        return None


GIB_PER_JOB = 3.0  # what one nvcc takes for a large attention kernel


def parallel_jobs(env: Mapping[str, str], cores: int | None = None, free_gib: float | None = None) -> int:
    """How many compilers at once: cores and free memory bound it, and MAX_JOBS where set."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free_gib = free_memory_gib() if free_gib is None else free_gib
    jobs = min(cores, int(free_gib / GIB_PER_JOB))
    asked = env.get("MAX_JOBS", "")
    if asked.isdigit():
        jobs = min(jobs, int(asked))
    return max(1, jobs)


def free_memory_gib() -> float:
    """Memory that can be had without swapping; 8 where the system does not say."""
    try:
        if sys.platform == "win32":
            return _free_memory_windows()
        text = Path("/proc/meminfo").read_text()
        found = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) / 2**20  # type: ignore[index]
        for limit, used in CGROUPS:  # a container's own limit
            if Path(limit).exists() and (most := Path(limit).read_text().strip()).isdigit():
                found = min(found, (int(most) - int(Path(used).read_text())) / 2**30)
        return found
    except (OSError, TypeError, ValueError, AttributeError):
        return 8.0


CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _free_memory_windows() -> float:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "free", "page", "free_page", "v", "free_v", "ext")
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.free / 2**30


def numbers(text: str) -> tuple[int, ...]:
    """The numbers in a version text: "13.0.88" -> (13, 0, 88)."""
    return tuple(int(x) for x in re.findall(r"\d+", text)) or (0,)


def dotted(version: Sequence[int]) -> str:
    """(13, 0) -> "13.0"."""
    return ".".join(str(x) for x in version)


def first_line(text: str) -> str:
    """What a command said, in one line, for a message."""
    return text.strip().partition("\n")[0].strip() or "it printed nothing"
