"""A side as a person names it: a precision, or the file of a plan."""

from __future__ import annotations

from pathlib import Path

from ..demo.sizes import MIN_TOKENS
from ..plan.plan import LayerPlan, read
from ..precision import Precision
from .engine import Side

PLAN_SUFFIX = ".json"


def read_side(label: str, text: str, emulate: bool = True, min_tokens: int = MIN_TOKENS) -> Side:
    """``text`` is a precision such as "fp4", or the path of a plan's .json file. Raises InputError for neither."""
    if not text.endswith(PLAN_SUFFIX):
        return Side(label, Precision.parse(text), emulate, min_tokens)
    return Side(label, Precision.AUTO, emulate, min_tokens, table=read_plan(Path(text)))


def read_plan(path: Path) -> LayerPlan:
    """The plan in a file. Raises InputError where it cannot be read or is no plan."""
    return read(path, f"The plan {path}", "check the path")
