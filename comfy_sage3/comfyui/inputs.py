"""Inputs that several nodes have, and what an older ComfyUI does not know of an input or a schema."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

from ..precision import MIN_TOKENS


def where_known(make: Any, *args: Any, known: dict[str, Any], **options: Any) -> Any:
    """``make`` with those of ``known`` that this ComfyUI's version of it takes: 0.3.64 takes fewer."""
    takes = inspect.signature(make).parameters
    return make(*args, **options, **{name: value for name, value in known.items() if name in takes})


def advanced(make: Any, *args: Any, **options: Any) -> Any:
    """An input folded away by default."""
    return where_known(make, *args, known={"advanced": True}, **options)


def min_tokens(tooltip: str) -> Any:
    """Calls of fewer query or key tokens are left alone."""
    return io.Int.Input("min_tokens", default=MIN_TOKENS, min=0, max=1_000_000, step=1, tooltip=tooltip)


def percent(name: str, default: float, tooltip: str) -> Any:
    """A place in the sampling schedule, 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
