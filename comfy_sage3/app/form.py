"""What a visitor typed, as a request and two sides. The server checks everything: the API knows no page's limits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..compare.engine import PLANNED, Request, Side
from ..compare.given import MOST_BYTES, Given, read_text
from ..compare.sides import read_plan
from ..demo.prompts import MAX_PROMPT_CHARACTERS
from ..demo.sizes import Size
from ..errors import InputError
from ..precision import Precision
from .services import EMBEDDED, Limits, Services

SIZES = ("64x64", "128x128", "256x256", "480x480", "832x480")
FRAMES = (1, 5, 9, 17, 33)
CHOICES = {
    "exact": "exact",
    "fp4": "fp4 (4 bits)",
    "int8": "int8 (8 bits)",
    "int8-fast": "int8-fast",
    "auto": "auto",
    PLANNED: "a saved plan",
}
WORKFLOWS = Path(__file__).parents[2] / "workflows" / "api"  # in a checkout; a wheel has none
BUNDLED_GRAPH = "the bundled model, as above"
_SIZE = re.compile(r"(\d{1,5})\s*[x×*]\s*(\d{1,5})")
LONGEST = 200


def request(prompt: Any, negative: Any, seed: Any, steps: Any, cfg: Any, size: Any, frames: Any) -> Request:
    """Raises InputError for anything that Request would not take, and for what is not even of its kind."""
    found = _SIZE.fullmatch(_text("size", size, LONGEST).strip().lower())
    if not found:
        raise InputError(f"Cannot read the size {str(size)[:40]!r}: give WIDTHxHEIGHT such as 128x128.")
    return Request(
        _text("prompt", prompt, MAX_PROMPT_CHARACTERS),
        Size(int(found[1]), int(found[2]), whole("number of frames", frames)),
        seed=whole("seed", seed),
        steps=whole("number of steps", steps),
        cfg=_number("guidance", cfg),
        negative=_text("negative prompt", negative, MAX_PROMPT_CHARACTERS),
    )


def side(label: str, wish: Any, plan: Any, saved: Any, server: bool) -> Side:
    """``plan``: the path of an uploaded plan; ``saved``: the name of one on the server, where the engine is a server."""
    text = _text(f"precision of {label}", wish, LONGEST)
    if text != PLANNED:
        return Side(label, Precision.parse(text))
    if server:
        name = _text(f"plan of {label}", saved, LONGEST).strip()
        if not name:
            raise InputError(f"Side {label} has no plan: choose one that is saved on the server.")
        return Side(label, Precision.AUTO, saved=name)
    if not plan:
        raise InputError(f"Side {label} has no plan: upload the .json file that Sage3 Precision Plan saved.")
    return Side(label, Precision.AUTO, table=read_plan(Path(_text(f"plan of {label}", plan, 4096))))


def workflows() -> list[str]:
    """Names of the workflows that come with the pack and draw one picture or video."""
    found = []
    for path in sorted(WORKFLOWS.glob("*.json")):
        try:
            read_text(path.stem, path.read_text("utf-8"))
        except (InputError, OSError, UnicodeDecodeError):  # those that draw both sides themselves, for instance
            continue
        found.append(path.stem)
    return found


def workflow(chosen: Any, uploaded: Any) -> Given | None:
    """The uploaded workflow, else the chosen one of the pack's; None for the bundled model's own graph."""
    if uploaded:
        path = Path(_text("workflow", uploaded, 4096))
        name = path.name[:60]
    else:
        name = _text("workflow", chosen, LONGEST)
        if name in ("", BUNDLED_GRAPH):
            return None
        if name not in workflows():
            raise InputError(f"There is no workflow {name[:60]!r} here: choose one of the list, or upload yours.")
        path = WORKFLOWS / f"{name}.json"
    try:
        with path.open(encoding="utf-8") as file:
            return read_text(name, file.read(MOST_BYTES + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The workflow {name} cannot be read ({type(error).__name__}): upload it again.") from None


def as_given(side: Side, given: Given) -> Side:
    """``side`` with what the workflow's own node says, which is left as it is."""
    settings = given.settings()
    least = settings.get("min_tokens")
    return replace(
        side, emulate=settings.get("emulate") is True, min_tokens=least if type(least) is int and least >= 0 else 0
    )


def repeats(value: Any, limits: Limits) -> int:
    """Timed runs of each side."""
    count = whole("number of timed runs", value)
    if not 1 <= count <= limits.repeats:
        raise InputError(f"The number of timed runs is {count}: give 1 to {limits.repeats}.")
    return count


def address(kind: Any, typed: Any, services: Services) -> str:
    """The engine's name: ``embedded`` or a server's address.

    Where the app serves others, they may not make it call addresses of their choosing: it is the one it was started with.
    """
    if kind == EMBEDDED:
        return EMBEDDED
    url = _text("server's address", typed, LONGEST).strip().rstrip("/")
    if services.mask_errors and url != services.engine.rstrip("/"):
        raise InputError("This app uses the engine it was started with: choose that one.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise InputError(f"{url[:80]!r} is not a server's address: give one like http://127.0.0.1:8188.")
    return url


def whole(name: str, value: Any) -> int:
    """A whole number, given as one or as a float without a fraction (what JSON makes of 3.0)."""
    number = _number(name, value)
    if isinstance(value, int):
        return value
    if number != math.floor(number) or abs(number) > 2**53:
        raise InputError(f"The {name} is {value}: give a whole number.")
    return int(number)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"The {name} is {str(value)[:40]!r}: give a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"The {name} is {str(value)[:40]}: give a number.")
    return number


def _text(name: str, value: Any, longest: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"The {name} is not a text: give one.")
    if len(value) > longest:
        raise InputError(f"The {name} has {len(value)} characters: give {longest} at most.")
    if "\x00" in value:
        raise InputError(f"The {name} contains a NUL character: leave it out.")
    return value
