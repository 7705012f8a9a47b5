"""The folder of a study: a JSON for each finished arm, all of them together in study.json, checkpoints, encoded clips."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..demo.train import device_name
from ..errors import InputError
from ..files import put
from .settings import Arm, Setting

SCHEMA = 1
ALL = "study.json"


class Store:
    """A study's folder; made where it is missing."""

    def __init__(self, out: Path) -> None:
        self.out, self.arms, self.partial, self.data = out, out / "arms", out / "partial", out / "data"
        for folder in (self.arms, self.partial, self.data):
            folder.mkdir(parents=True, exist_ok=True)
        if (out / ALL).exists():
            self._unpack()

    def done(self, name: str, setting: Setting) -> bool:
        """Whether this arm or pace has its JSON. Raises InputError where that is of other settings."""
        path = self._path(name)
        if not path.exists():
            return False
        if _read(path).get("setting") != setting.to_json():
            raise InputError(f"{path} was made with other settings: give another --out, or delete that file.")
        return True

    def write(self, arm: Arm, result: dict[str, Any]) -> None:
        self.put(arm.name, result)

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Write one result whole or not at all."""
        put(self._path(name), (json.dumps(result, allow_nan=False) + "\n").encode())

    def pack(self) -> Path:
        """Write all results together into study.json: one file to carry away, from which ``run`` and ``report`` go on."""
        found = {path.stem: _read(path) for path in sorted(self.arms.glob("*.json"))}
        put(self.out / ALL, (json.dumps({"schema": SCHEMA, "results": found}, allow_nan=False) + "\n").encode())
        return self.out / ALL

    def _unpack(self) -> None:
        for name, result in results(self.out / ALL).items():
            if not self._path(name).exists():
                self.put(name, result)

    def _path(self, name: str) -> Path:
        return self.arms / f"{name}.json"


def results(path: Path) -> dict[str, dict[str, Any]]:
    """All results by name, of a study's folder or of a study.json. Raises InputError where there are none."""
    if path.is_dir():
        found = {p.stem: _read(p) for p in sorted((path / "arms").glob("*.json"))}
        if not found and (path / ALL).exists():
            return results(path / ALL)
    else:
        found = _read(path).get("results", {})
    if not found:
        raise InputError(f"{path} holds no results of a training study: run train-study run first.")
    for name, result in found.items():
        if result.get("schema") != SCHEMA:
            raise InputError(f"{name} in {path} is not a result of this version's training study (schema {SCHEMA}).")
    return found


def machine(device: str) -> dict[str, Any]:
    """Where a result was made."""
    versions = {"comfy_sage3": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions["diffusers"] = metadata.version("diffusers")
    if torch.device(device).type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"device": device_name(device), "versions": versions}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read as a result: {problem}.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a result of a training study.")
    return found
