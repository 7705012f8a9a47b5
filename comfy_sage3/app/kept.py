"""Kept comparisons: runs under the out folder by their names, and the recorded one that comes with the package."""

from __future__ import annotations

import re
import secrets
from datetime import datetime
from pathlib import Path

from ..compare.measure import Comparison
from ..compare.output import METRICS, read, write
from ..errors import InputError

RECORDED = "recorded"
_NAME = re.compile(r"[0-9a-z][0-9a-z-]{0,60}")


def keep(comparison: Comparison, out: Path) -> str:
    """Write the comparison to a new folder of ``out`` and return the folder's name: a time, then what it was of."""
    sides = comparison.metrics["sides"]
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{sides['a']['precision']}-{sides['b']['precision']}-{secrets.token_hex(2)}"
    write(comparison, out / stem)
    return stem


def load(name: str, out: Path) -> Comparison:
    """A run by its name, never by a path; InputError where there is none."""
    if name == RECORDED:
        return read(Path(__file__).parent / RECORDED)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not (out / name / METRICS).is_file():
        raise InputError("There is no such run: it was deleted, or the app was started with another --out.")
    return read(out / name)


def latest(out: Path) -> str:
    """The newest run's name; the recorded one where there is none."""
    found = [p.parent.name for p in out.glob(f"*/{METRICS}") if _NAME.fullmatch(p.parent.name)] if out.is_dir() else []
    dated = sorted(name for name in found if re.match(r"\d{8}-\d{6}-", name))
    return dated[-1] if dated else RECORDED
