"""Whether an attention override that another node installed still leads to ours.

The slot holds one function. A node that comes after ours either keeps ours and calls it for what it does not serve, or
throws it away. Only then is ours put back on top, so the two are told apart by looking at what the function holds.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

MOST = 200  # objects that are looked at


def leads_to(function: Any, targets: Collection[Any]) -> bool:
    """Whether ``function`` is one of ``targets`` or holds one: in its closure, its object, or what it wraps."""
    wanted = {id(t) for t in targets}
    seen: set[int] = set()
    todo = [function]
    while todo and len(seen) < MOST:
        held = todo.pop(0)
        if id(held) in wanted:
            return True
        if id(held) not in seen:
            seen.add(id(held))
            todo.extend(_held_by(held))
    return False


def _held_by(held: Any) -> Iterator[Any]:
    """What a callable keeps, one step further."""
    if isinstance(held, functools.partial):
        yield from (held.func, *held.args, *held.keywords.values())
        return
    for cell in getattr(held, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that was never set
            continue
    for name in ("__wrapped__", "__func__", "__self__"):
        inner = getattr(held, name, None)
        if inner is not None:
            yield inner
    if isinstance(held, (list, tuple)):
        yield from held
    elif isinstance(held, dict):
        yield from held.values()
    else:
        yield from (getattr(held, "__defaults__", None) or ())
        state = getattr(held, "__dict__", None)
        if isinstance(state, dict) and not isinstance(held, type):
            yield from (x for x in state.values() if callable(x) or isinstance(x, (list, tuple, dict)))
