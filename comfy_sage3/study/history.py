"""Every run under the out folder, as the files say: comparisons and sweeps, newest first; no database.

A folder is ours when the file that names a run says so in its schema. Everything else that lies there is listed with what
it seems to be, and never touched.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..compare.measure import SCHEMA as COMPARISON
from ..compare.output import METRICS
from ..compare.tables import headline
from ..errors import InputError
from .results import measured
from .store import SWEEP, Store

KINDS = ("comparison", "sweep", "foreign", "damaged")
MOST_FOLDERS = 2000  # that are looked into
MOST_BYTES = 64 << 20  # of one run's metrics
_NAME = re.compile(r"(?!\.)[^/\\\x00:]{1,200}")
_DELETED = ".deleted-"


@dataclass(frozen=True)
class Entry:
    """One folder under out.

    Attributes:
        id: the folder's name.
        kind: "comparison", "sweep", "foreign" (not a run of ours) or "damaged" (a run whose files cannot be read).
        when: ISO time of the run, in UTC; of the folder's last change where it says none.
        title: what it was of, or what is the matter with it.
        state: "done", or how far a sweep is.
    """

    id: str
    kind: str
    when: str
    title: str
    state: str = ""

    @property
    def ours(self) -> bool:
        """Whether it can be opened and deleted."""
        return self.kind in ("comparison", "sweep")


class History:
    """The runs under ``out``, which need not be there yet. Every call looks at the files anew."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out)

    def list(self) -> list[Entry]:
        """Every folder, newest first. Hidden ones, which are half-written or half-deleted, are left out."""
        try:
            names = sorted(e.name for e in os.scandir(self.out) if e.is_dir() and not e.name.startswith("."))
        except OSError:
            return []
        found = [self._entry(name) for name in names[:MOST_FOLDERS]]
        return sorted(found, key=lambda entry: (entry.when, entry.id), reverse=True)

    def open(self, name: str) -> dict[str, Any] | Store:
        """A comparison's metrics, or a sweep. Raises InputError where there is no run of that name."""
        entry = self._known(name)
        if entry.kind == "sweep":
            return Store.open(self.folder(name))
        return _metrics(self.folder(name))

    def folder(self, name: str) -> Path:
        """The folder of a name: a direct child of out and no link. Raises InputError for every other name."""
        path = self.out / name if isinstance(name, str) and _NAME.fullmatch(name) else None
        if path is None or path.is_symlink() or not path.is_dir():
            raise InputError(f"There is no run {str(name)[:80]!r} in the out folder: look at the list again.")
        return path

    def compare(self, names: Sequence[str]) -> Sequence[dict[str, Any]]:
        """The chosen runs in one table: a row a comparison, and of a sweep a row a finished cell. Raises InputError."""
        rows = []
        for name in names:
            found = self.open(name)
            if isinstance(found, Store):
                cells = [(f"{name}/{cell.id}", found.metrics(cell)) for cell in found.sweep.cells()]
                rows += [_row(label, metrics) for label, metrics in cells if metrics]
            else:
                rows.append(_row(name, found))
        return rows

    def delete(self, name: str) -> None:
        """Remove a run. Raises InputError for what is not ours, lies elsewhere, or is a sweep that is running."""
        entry = self._known(name)
        path = self.folder(name)
        if entry.kind == "sweep" and Store.open(path).busy():
            raise InputError(f"The sweep {name!r} is running: stop it first.")
        aside = self.out / f"{_DELETED}{secrets.token_hex(4)}"
        try:
            path.rename(aside)  # at once gone from the list; what follows may be interrupted
            shutil.rmtree(aside)
        except OSError as error:
            raise InputError(f"The run {name!r} cannot be deleted ({error.strerror}): remove its folder yourself.") from None

    def clean(self) -> None:
        """Finish deletions that were interrupted."""
        for left in self.out.glob(f"{_DELETED}*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)

    def _known(self, name: str) -> Entry:
        """The entry of a run of ours. Raises InputError for everything else."""
        self.folder(name)
        entry = self._entry(name)
        if entry.kind == "foreign":
            raise InputError(f"{name!r} is not a run of this app: it is left as it is.")
        if entry.kind == "damaged":
            raise InputError(f"The run {name!r} is damaged ({entry.title}): look into its folder, and remove it yourself.")
        return entry

    def _entry(self, name: str) -> Entry:
        path = self.out / name
        changed = _changed(path)
        if path.is_symlink():
            return Entry(name, "foreign", changed, "a link to another place")
        if (path / SWEEP).is_file():
            try:
                return self._sweep(name, Store.open(path), changed)
            except InputError as error:
                return Entry(name, "damaged", changed, str(error).replace(str(path), name))
        if (path / METRICS).is_file():
            try:
                found = _metrics(path)
                return Entry(name, "comparison", _when(found.get("created"), changed), _title(found), "done")
            except InputError as error:
                return Entry(name, "damaged", changed, str(error))
            except (KeyError, TypeError, AttributeError, ValueError):
                return Entry(name, "damaged", changed, f"{METRICS} does not say what a comparison says")
        return Entry(name, "foreign", changed, f"it has neither {METRICS} nor {SWEEP}")

    def _sweep(self, name: str, store: Store, changed: str) -> Entry:
        sweep, cells = store.sweep, store.sweep.cells()
        done = sum((store.folder(cell) / METRICS).is_file() for cell in cells)  # not read: there may be hundreds
        said = f"{_count(len(sweep.prompts), 'prompt')} x {_count(len(sweep.seeds), 'seed')} x "
        said += ", ".join(c.name for c in sweep.contestants)
        state = "done" if done == len(cells) else f"{done} of {len(cells)} cells"
        return Entry(name, "sweep", _when(store.created, changed), f"{sweep.name}: {said}" if sweep.name else said, state)


def _metrics(path: Path) -> dict[str, Any]:
    """A comparison's metrics.json. Raises InputError where it cannot be read or is somebody else's."""
    file = path / METRICS
    try:
        if file.stat().st_size > MOST_BYTES:
            raise InputError(f"{METRICS} is too large")
        found = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise InputError(f"{METRICS} cannot be read: {type(error).__name__}") from None
    if not isinstance(found, dict) or found.get("schema") != COMPARISON:
        raise InputError(f"{METRICS} is not that of a comparison")
    return found


def _title(m: dict[str, Any]) -> str:
    sides, request = m["sides"], m["request"]
    headline(m)  # which reads all that a list, a table or a page will read
    return f"{sides['a']['precision']} and {sides['b']['precision']}, seed {request['seed']}: {request['prompt']}"


def _row(name: str, m: dict[str, Any]) -> dict[str, Any]:
    """One comparison in a table of many."""
    r, sides = m["request"], m["sides"]
    row = {"run": name, "created": m["created"], "prompt": r["prompt"], "seed": r["seed"], "steps": r["steps"]}
    row |= {"size": f"{r['width']}x{r['height']}x{r['frames']}", "a": sides["a"]["precision"], "b": sides["b"]["precision"]}
    return row | measured(m)


def _changed(path: Path) -> str:
    try:
        return _iso(path.lstat().st_mtime)
    except OSError:
        return _iso(0)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _when(said: Any, otherwise: str) -> str:
    """``said`` where it is a time, in UTC; else ``otherwise``."""
    try:
        when = datetime.fromisoformat(said)
    except (TypeError, ValueError):
        return otherwise
    return when.astimezone(timezone.utc).isoformat(timespec="seconds") if when.tzinfo else otherwise


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
