"""A sweep: prompts x seeds x precisions or saved plans, each against exact attention. Read from JSON or TOML, bounded.

Every combination is a cell with an id made from all that decides its result, so that the same cell has the same id in
every process, on every machine, and after the file has grown.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from ..compare.engine import Request, Side
from ..compare.measure import MAX_REPEATS
from ..compare.sides import PLAN_SUFFIX
from ..demo.prompts import parse as parse_prompt
from ..demo.sizes import MIN_TOKENS, Size
from ..errors import InputError
from ..plan.plan import MOST_BYTES, LayerPlan
from ..precision import Precision

MAX_PROMPTS, MAX_SEEDS, MAX_CONTESTANTS, MAX_CELLS = 64, 64, 8, 512
MAX_FILE_BYTES = 1 << 20  # of a sweep file as written; one with plans inside may be as large as those
MAX_NAME = 80
ID_VERSION = 1  # a new one where the same settings would no longer mean the same work
EMBEDDED = "embedded"
_URL = re.compile(r"https?://[\w.:\[\]%-]{1,200}(/[\w./~%-]{0,200})?", re.ASCII)

EXAMPLE = """{
  "prompts": ["a large red circle moving left quickly on a black background"],
  "seeds": [1, 2],
  "precisions": ["fp4", "int8"]
}"""


@dataclass(frozen=True)
class Contestant:
    """What runs against exact attention: a precision, or the plan of a name (then ``precision`` is auto).

    ``plan`` is the plan itself, for the embedded model; None with a name: the plan is saved on the ComfyUI server.
    """

    precision: Precision
    plan: LayerPlan | None = None
    plan_name: str = ""

    @property
    def name(self) -> str:
        """ "fp4", or "plan NAME"."""
        return f"plan {self.plan_name}" if self.plan_name else self.precision.value

    @property
    def key(self) -> str:
        """What tells it from every other contestant: the precision, a digest of the plan, or the saved plan's name."""
        return _digest(self.plan.to_json(), 32) if self.plan else self.name


@dataclass(frozen=True)
class Cell:
    """One comparison of a sweep. ``exact`` is the id of its exact side, which all contestants of a prompt and seed share."""

    id: str
    exact: str
    prompt: str
    seed: int
    contestant: Contestant


@dataclass(frozen=True)
class Sweep:
    """What to run. Raises InputError, in one sentence, for anything that cannot be run.

    Attributes:
        prompts, seeds, contestants: every combination is a cell; none occurs twice.
        size, steps, cfg, shift, negative, min_tokens, emulate: as in a single comparison; shift None is the size's own.
        repeats: timed runs of each side of each cell.
        engine: "embedded", or the address of a ComfyUI server.
        name: a title for people.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    contestants: tuple[Contestant, ...]
    size: Size = Size(128, 128, 17)
    steps: int = 20
    cfg: float = 3.0
    shift: float | None = None
    negative: str = ""
    repeats: int = 1
    min_tokens: int = MIN_TOKENS
    emulate: bool = True
    engine: str = EMBEDDED
    name: str = ""

    def __post_init__(self) -> None:
        _several("prompts", self.prompts, MAX_PROMPTS)
        _several("seeds", self.seeds, MAX_SEEDS)
        _several("contestants", [c.key for c in self.contestants], MAX_CONTESTANTS)
        if len({c.name for c in self.contestants}) < len(self.contestants):
            raise InputError("Two plans of this sweep have one name: rename one of the files.")
        count = len(self.prompts) * len(self.seeds) * len(self.contestants)
        if count > MAX_CELLS:
            raise InputError(
                f"This sweep has {count:,} cells (prompts x seeds x precisions): {MAX_CELLS} are the most, so divide it."
            )
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise InputError(f"The number of repeats is {self.repeats}: give 1 to {MAX_REPEATS}.")
        if self.engine != EMBEDDED and not _URL.fullmatch(self.engine):
            raise InputError(
                f"The engine is {self.engine[:80]!r}: give {EMBEDDED!r}, or a server's address such as http://127.0.0.1:8188."
            )
        if len(self.name) > MAX_NAME or not self.name.isprintable():
            raise InputError(f"The name is too long or not one line: give at most {MAX_NAME} characters.")
        for contestant in self.contestants:
            if contestant.precision is Precision.EXACT:
                raise InputError("Exact attention is side A of every cell: leave it out of the precisions.")
            if contestant.plan_name and (contestant.plan is None) == (self.engine == EMBEDDED):
                where = (
                    "a plan's .json file" if self.engine == EMBEDDED else "the name of a plan that is saved on the server"
                )
                raise InputError(f"The plan {contestant.plan_name!r} cannot be used with this engine: give {where}.")
        if self.engine == EMBEDDED and self.size.tokens < self.min_tokens:
            raise InputError(
                f"Videos of {self.size} have {self.size.tokens} tokens, fewer than min_tokens {self.min_tokens}, so that "
                "every call would stay exact: give a larger size, or a smaller min_tokens."
            )
        try:
            parse_prompt(self.negative)
        except InputError as error:
            raise InputError(f"The negative prompt: {error}") from None
        for i, prompt in enumerate(self.prompts):
            self.request(prompt, self.seeds[0])
            try:
                parse_prompt(prompt)
            except InputError as error:
                raise InputError(f"Prompt {i + 1}: {error}") from None
        for seed in self.seeds:
            self.request(self.prompts[0], seed)
        self.sides(self.contestants[0])

    def request(self, prompt: str, seed: int) -> Request:
        """One video of the sweep."""
        return Request(prompt, self.size, seed, self.steps, self.cfg, self.shift, self.negative)

    def sides(self, contestant: Contestant) -> tuple[Side, Side]:
        """A is exact attention, B the contestant."""
        a = Side("A", Precision.EXACT, self.emulate, self.min_tokens)
        saved = contestant.plan_name if contestant.plan is None else ""
        return a, Side("B", contestant.precision, self.emulate, self.min_tokens, contestant.plan, saved)

    def cells(self) -> tuple[Cell, ...]:
        """Every cell; those that share an exact side stand together."""
        found = []
        for prompt in self.prompts:
            for seed in self.seeds:
                shared = self._said(prompt, seed)
                exact = f"seed{seed}-{_digest(shared)}"
                for c in self.contestants:
                    made = {**shared, "contestant": c.key, "min_tokens": self.min_tokens, "emulate": self.emulate}
                    found.append(Cell(f"{_slug(c.name)}-seed{seed}-{_digest(made)}", exact, prompt, seed, c))
        return tuple(found)

    def _said(self, prompt: str, seed: int) -> dict[str, Any]:
        """What decides the exact side."""
        request = self.request(prompt, seed)
        said = {"version": ID_VERSION, "prompt": prompt, "seed": seed, "size": str(self.size), "steps": self.steps}
        said["negative"] = self.negative
        return {**said, "cfg": float(self.cfg), "shift": request.shift, "repeats": self.repeats, "engine": self.engine}

    def to_data(self) -> dict[str, Any]:
        """The sweep as a file has it, plans inside, ready for JSON."""
        data: dict[str, Any] = {
            "name": self.name,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "precisions": [c.precision.value for c in self.contestants if not c.plan_name],
            "plans": [
                {"name": c.plan_name, "plan": json.loads(c.plan.to_json())} if c.plan else c.plan_name
                for c in self.contestants
                if c.plan_name
            ],
            "size": str(self.size),
            "steps": self.steps,
            "cfg": self.cfg,
            "shift": self.shift,
            "negative": self.negative,
            "repeats": self.repeats,
            "min_tokens": self.min_tokens,
            "emulate": self.emulate,
            "engine": self.engine,
        }
        return data


KEYS = (*(f.name for f in fields(Sweep) if f.name != "contestants"), "precisions", "plans")


def read(path: Path) -> Sweep:
    """The sweep in a .json or .toml file. Plans are named by their files, relative to this one."""
    if path.suffix.lower() not in (".json", ".toml"):
        raise InputError(f"{path} is neither .json nor .toml: give the sweep as one of these.")
    text = _text(path, MAX_FILE_BYTES)
    return parse(loads(text, path.suffix.lower()), path.parent)


def loads(text: str, suffix: str) -> Any:
    """Plain data from JSON (".json") or TOML (".toml") text; InputError names the line that is wrong."""
    if suffix == ".toml":
        try:
            import tomllib
        except ImportError:  # Python 3.10
            raise InputError("Sweeps in TOML need Python 3.11 or newer: write this one as JSON.") from None
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"The sweep is not TOML: {_short(error)}.") from None
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"The sweep is not JSON: line {error.lineno}, {error.msg.lower()}.") from None
    except RecursionError:
        raise InputError("The sweep is not JSON that can be read: it is nested too deeply.") from None


def parse(data: Any, folder: Path | None = None) -> Sweep:
    """The sweep that plain data says. Files of plans are read from ``folder``, and refused where it is None."""
    if not isinstance(data, dict):
        raise InputError(f"A sweep is a table of settings such as {' '.join(EXAMPLE.split())}.")
    for key in data:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KEYS)}."
            raise InputError(f"A sweep has no setting {str(key)[:40]!r}: {hint}")
    for key in ("prompts", "seeds"):
        if key not in data:
            raise InputError(f"The sweep has no {key}: give at least one.")
    contestants = [Contestant(Precision.parse(_is(x, str, "precisions"))) for x in _list(data, "precisions")]
    contestants += [_plan(x, folder) for x in _list(data, "plans")]
    if not contestants:
        raise InputError('The sweep has neither precisions nor plans: give such as "precisions": ["fp4", "int8"].')
    given: dict[str, Any] = {
        "prompts": tuple(_is(x, str, "prompts") for x in _list(data, "prompts")),
        "seeds": tuple(_is(x, int, "seeds") for x in _list(data, "seeds")),
        "contestants": tuple(contestants),
    }
    kinds: dict[str, Any] = {"steps": int, "repeats": int, "min_tokens": int, "emulate": bool, "cfg": float, "shift": float}
    kinds |= {"name": str, "engine": str, "negative": str}
    for key, kind in kinds.items():
        if data.get(key) is not None:
            given[key] = _is(data[key], kind, key)
    if data.get("size") is not None:
        given["size"] = Size.parse(_is(data["size"], str, "size"))
    if given.get("engine") == "diffusers":  # as the command line calls it
        given["engine"] = EMBEDDED
    return Sweep(**given)


def _plan(said: Any, folder: Path | None) -> Contestant:
    plan: LayerPlan | None
    if isinstance(said, dict) and set(said) == {"name", "plan"}:
        name, plan = _is(said["name"], str, "plans"), LayerPlan.from_json(json.dumps(said["plan"]))
    elif isinstance(said, str) and not said.endswith(PLAN_SUFFIX):  # saved on a server
        name, plan = said, None
    elif isinstance(said, str):
        if folder is None:
            raise InputError("A plan's file cannot be read from here: put the plan itself into the sweep.")
        path = folder / said
        name, plan = path.stem, LayerPlan.from_json(_text(path, MOST_BYTES))
    else:
        raise InputError('A plan is the name of its file: give such as "plans": ["balanced.json"].')
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InputError(f"A plan's name is empty, too long or not one line: give at most {MAX_NAME} characters.")
    return Contestant(Precision.AUTO, plan, name)


def _text(path: Path, most: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(most + 1)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the path of a file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({_short(error)}): give a text file.") from None
    if len(text) > most:
        raise InputError(f"{path} is longer than {most >> 20} MB: it is no such file.")
    return text


def _list(data: dict[str, Any], key: str) -> list[Any]:
    said = data.get(key, [])
    if not isinstance(said, (list, tuple)):
        raise InputError(f'{key!r} is not a list: give such as [1, 2] or ["fp4"].')
    return list(said)


def _is(value: Any, kind: type, key: str) -> Any:
    """``value`` as ``kind``; whole numbers pass as floats, and true and false never as numbers."""
    fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        words: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise InputError(f"{key!r} has the value {str(value)[:40]!r}: give {words[kind]}.")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise InputError(f"{key!r} has a number that is too large: give one below 2^63.")
    return kind(value)


def _several(name: str, values: Sequence[Any], most: int) -> None:
    if not 1 <= len(values) <= most:
        raise InputError(f"The sweep has {len(values)} {name}: give 1 to {most}.")
    if len(set(values)) < len(values):
        twice = next(v for i, v in enumerate(values) if v in values[:i])
        raise InputError(f"The sweep has {str(twice)[:60]!r} twice under {name}: leave one out.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) != len(pairs):
        raise InputError("A name occurs twice in one table of the sweep: leave one out.")
    return said


def _no_constant(name: str) -> NoReturn:
    raise InputError(f"The sweep contains {name}: give a number.")


def _digest(said: Any, length: int = 10) -> str:
    text = said if isinstance(said, str) else json.dumps(said, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:length]


def _slug(name: str) -> str:
    """``name`` fit for a folder on every system."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32] or "plan"


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
