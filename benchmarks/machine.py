"""Where it was measured: device, clocks, versions, commit. Nothing here names a folder of the machine."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from comfy_sage3.kernels import build

ROOT = Path(__file__).resolve().parents[1]
SMI_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "celsius",
    "driver_version": "driver",
}


def tidy(text: str) -> str:
    """``text`` with every absolute path cut to its last part: "no /home/me/x/nvcc" -> "no nvcc"."""
    text = re.sub(r"(?<![\w.~/\\-])~?/(?:[^\s/:'\"(),;]+/)+", "", text)
    return re.sub(r"\b[A-Za-z]:\\(?:[^\s\\:'\"(),;]+\\)+", "", text)


def device() -> dict[str, Any]:
    """The current CUDA device."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(l2_bytes() / 2**20, 1),
    }


def l2_bytes() -> int:
    """Size of the device's L2; 64 MiB where torch does not say."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(found, "L2_cache_size", 0)) or 64 * 2**20


def smi() -> dict[str, Any] | None:
    """Clocks, power and driver by nvidia-smi; None where there is none."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = str(getattr(found, "uuid", ""))
    which = ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", *which, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_smi(said)


def parse_smi(said: str) -> dict[str, Any] | None:
    """The first line of nvidia-smi's csv, numbers as numbers; None for what it does not know."""
    lines = said.strip().splitlines()
    cells = [cell.strip() for cell in lines[0].split(",")] if lines else []
    if len(cells) != len(SMI_FIELDS):
        return None
    return {name: _number(cell) for name, cell in zip(SMI_FIELDS.values(), cells, strict=True)}


def _number(cell: str) -> float | str | None:
    if cell.startswith("["):  # [N/A], [Not Supported]
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def record(what: str, command: str) -> dict[str, Any]:
    """The head of a record: what was measured, by which command, when, where."""
    return {
        "what": what,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "smi": smi(),
        "versions": versions(),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """As JSON, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str | None]:
    """Of everything that a figure depends on."""
    outcome = build.outcome()
    return {
        "comfy_sage3": _version("comfy-sage3"),
        "comfy_kitchen": _version("comfy-kitchen"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "kernels": f"sm_{', sm_'.join(outcome.archs)}" if isinstance(outcome, build.Loaded) else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any] | None:
    """The checkout's commit, and whether tracked files differ from it; None outside a checkout."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else {"hash": head, "changed": bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
