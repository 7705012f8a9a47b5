"""Saved plans: sage3_plans/NAME.json in ComfyUI's user directory."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from ..files import put
from ..plan.plan import LayerPlan, read

FOLDER, SUFFIX = "sage3_plans", ".json"
LONGEST = 80
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for devices


def folder() -> Path:
    """Where plans lie; not made until one is saved."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / FOLDER


def saved() -> list[str]:
    """Names of the saved plans, in order."""
    try:
        found = [p.name.removesuffix(SUFFIX) for p in folder().iterdir() if p.suffix == SUFFIX and p.is_file()]
    except OSError:  # no plan was saved yet
        return []
    return sorted(name for name in found if name == clean(name))


def clean(name: str) -> str:
    """``name`` fit for a file on every system: letters, digits, space and ._-() stay; "" where nothing does."""
    kept = re.sub(r"[^\w .()-]+", "_", name).strip(" ._")[:LONGEST].strip(" .")
    return f"{kept}_" if _RESERVED.fullmatch(kept) else kept


def save(name: str, plan: LayerPlan) -> Path:
    """Write ``plan`` under ``name``, all of it or nothing. Raises InputError for a name of which nothing is left."""
    fit = clean(name)
    if not fit:
        raise InputError(f"A plan cannot be saved as {name!r}: use letters and digits.")
    path = folder() / f"{fit}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, plan.to_json().encode())
    return path


def load(name: str) -> LayerPlan:
    """The plan saved as ``name``. Raises InputError where there is none of that name or it cannot be used."""
    if name not in saved():
        raise InputError(f"There is no saved plan {name!r}: make one with Sage3 Precision Plan and give it a file name.")
    path = folder() / f"{name}{SUFFIX}"
    return read(path, f"The plan {name!r}", "make it again")
