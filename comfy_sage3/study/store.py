"""A sweep on disk: one folder, in which every result is written whole or not at all and every cell has a lock.

    sweep.json          what is to be run; plans inside, so that nothing else is needed to go on
    exact/ID/           the exact side of one prompt and seed
    cells/ID/           a finished comparison, as ``compare.output.write`` makes it
    failed/ID.json      why a cell has no result
    locks/ID.lock       held while somebody works on it; the system lets go of it when they die, however they die

What is not finished has no name of its own yet, so a killed run leaves nothing that could pass for a result.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..compare.measure import SCHEMA as COMPARISON
from ..compare.measure import Comparison, json_safe
from ..compare.output import METRICS, replaced, write
from ..errors import InputError
from ..files import put
from ..kernels.jit.lock import UNSUPPORTED, try_lock
from . import baseline as baselines
from .baseline import Baseline
from .sweep import Cell, Sweep, parse

SCHEMA = "comfy_sage3.sweep"
SCHEMA_VERSION = 1
SWEEP = "sweep.json"
EXACT, CELLS, FAILED, LOCKS = "exact", "cells", "failed", "locks"
VIDEO, SECOND = "video.npy", "second.npy"
DONE, BROKEN, WAITING = "done", "failed", "waiting"


class Store:
    """The folder ``out`` of one sweep. ``open`` reads one that is there, ``create`` makes or extends it."""

    def __init__(self, out: Path, sweep: Sweep, created: str) -> None:
        self.out, self.sweep, self.created = out, sweep, created
        self._read: dict[str, dict[str, Any]] = {}  # finished cells never change

    @classmethod
    def create(cls, out: Path, sweep: Sweep) -> Store:
        """Make ``out``, or take up the sweep that lies there: results of cells that both have are kept.

        Raises InputError where ``out`` holds anything else or cannot be written to.
        """
        out = out.absolute()
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            if out.is_dir() and any(out.iterdir()):
                created = cls.open(out).created
            elif out.exists() and not out.is_dir():
                raise InputError(f"{out} is a file: give a folder for the sweep.")
            for name in (EXACT, CELLS, FAILED, LOCKS):
                (out / name).mkdir(parents=True, exist_ok=True)
            data = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "created": created, "sweep": sweep.to_data()}
            put(out / SWEEP, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise InputError(f"Cannot write the sweep to {out} ({error.strerror}): give another folder.") from None
        return cls(out, sweep, created)

    @classmethod
    def open(cls, out: Path) -> Store:
        """The sweep in ``out``. Raises InputError where there is none that can be read."""
        try:
            data = json.loads((out / SWEEP).read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(f"{out} holds no sweep: give a new or empty folder, or that of an earlier sweep.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{out / SWEEP} is damaged ({error}): give a new folder.") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(f"{out / SWEEP} is not a sweep of this package: give a new or empty folder.")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"{out} was made by another version of this package: give a new folder.")
        return cls(out.absolute(), parse(data.get("sweep")), str(data.get("created", "")))

    # ---------------------------------------------------------------------------------------- what is there
    def metrics(self, cell: Cell) -> dict[str, Any] | None:
        """The finished cell's metrics; None where it has none, or damaged ones."""
        if cell.id not in self._read:
            found = _json(self.out / CELLS / cell.id / METRICS)
            if not _is_result(found):
                return None
            self._read[cell.id] = found
        return self._read[cell.id]

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """ "reason" and "at" (seconds since 1970) of a cell that failed; None where it did not."""
        found = _json(self.out / FAILED / f"{cell.id}.json")
        return found if isinstance(found.get("reason"), str) and isinstance(found.get("at"), (int, float)) else None

    def state(self, cell: Cell) -> str:
        """ "done", "failed" or "waiting"."""
        if self.metrics(cell) is not None:
            return DONE
        return BROKEN if self.failure(cell) else WAITING

    def folder(self, cell: Cell) -> Path:
        """Where the cell's comparison is or will be."""
        return self.out / CELLS / cell.id

    def baseline(self, cell: Cell) -> Baseline | None:
        """The exact side of the cell's prompt and seed; None where it was not made, or is damaged."""
        folder = self.out / EXACT / cell.exact
        try:
            video, second = (np.load(folder / name, allow_pickle=False) for name in (VIDEO, SECOND))
            return baselines.from_data(_json(folder / "exact.json"), video, second)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
            return None

    # ---------------------------------------------------------------------------------------- what is added
    def finish(self, cell: Cell, comparison: Comparison) -> None:
        """Write a result; only for who holds the cell's lock."""
        _clear(self.folder(cell))
        write(comparison, self.folder(cell))
        (self.out / FAILED / f"{cell.id}.json").unlink(missing_ok=True)

    def fail(self, cell: Cell, reason: str) -> None:
        """Write down why a cell has no result."""
        said = {"cell": cell.id, "reason": reason[:2000], "at": time.time()}
        put(self.out / FAILED / f"{cell.id}.json", json.dumps(said).encode())

    def keep(self, cell: Cell, baseline: Baseline) -> None:
        """Write the exact side of the cell's prompt and seed; only for who holds its lock."""
        target = self.out / EXACT / cell.exact
        _clear(target)
        # ``exact`` bears no schema that could pass for a comparison's.
        with replaced(target) as folder:
            for name, frames in ((VIDEO, baseline.video), (SECOND, baseline.second)):
                buffer = io.BytesIO()
                np.save(buffer, frames, allow_pickle=False)
                (folder / name).write_bytes(buffer.getvalue())
            text = json.dumps(json_safe(baselines.to_data(baseline)), allow_nan=False)
            (folder / "exact.json").write_text(text, "utf-8")

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold the lock of a cell's or an exact side's id for as long as the context lasts; False: somebody else has it."""
        with open(self.out / LOCKS / f"{name}.lock", "a+", encoding="utf-8") as file:
            try:
                taken = try_lock(file)
            except OSError as problem:
                if problem.errno not in UNSUPPORTED:
                    raise
                taken = True  # no locks on this file system: results are still written whole, work may be done twice
            if taken:
                self._sweep_up(name)
            yield taken

    def busy(self) -> list[str]:
        """Ids that somebody is working on right now."""
        return [path.stem for path in sorted((self.out / LOCKS).glob("*.lock")) if _is_locked(path)]

    def _sweep_up(self, name: str) -> None:
        """Remove what a killed run left half-written under this id: nobody else writes it while we hold the lock."""
        for kind in (CELLS, EXACT):
            for left in (self.out / kind).glob(f".{name}-*"):
                shutil.rmtree(left, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Take away a folder of ours without a usable result, which a power cut may leave."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)


def _is_result(found: dict[str, Any]) -> bool:
    parts = ("request", "environment", "sides", "timing", "quality")
    return found.get("schema") == COMPARISON and all(isinstance(found.get(name), dict) for name in parts)


def _json(path: Path) -> dict[str, Any]:
    """What the file says; empty where it is not there, or not a table in JSON."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_locked(path: Path) -> bool:
    try:
        with path.open("a+", encoding="utf-8") as file:
            return not try_lock(file)
    except OSError:
        return False
