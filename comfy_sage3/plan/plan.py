"""The plan: a precision for every layer and noise level, with the measurements it was solved from, as strict JSON.

A table has one row a layer and one column a calibrated sigma. A cell without a number (None) is a layer that made no
call long enough at that sigma, or a precision that could not serve it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError
from ..precision import Precision

FORMAT, VERSION = "comfy_sage3.plan", 1
MEASURED, MODELLED = "measured", "modelled"
LOW = (Precision.FP4, Precision.INT8_FAST, Precision.INT8)  # cheapest first; a plan never says auto
MOST_BYTES = 8 << 20
MOST_LAYERS, MOST_SIGMAS, MOST_TEXT, MOST_STEPS = 2000, 200, 200, 1_000_000
_MODEL = re.compile(r"[\w.-]{1,200}", re.ASCII)

Table = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Budget:
    """What the solver was held to: the mean relative error over the schedule's cells, and the most of any one cell."""

    name: str  # "draft", "balanced", "faithful" or "custom"
    error: float
    most: float


@dataclass(frozen=True)
class LayerPlan:
    """Which precision each layer gets at each noise level.

    Attributes:
        model: fingerprint of the model it was made on.
        layers: names of the rows, as ``Layer.key``; "" stands for calls of a model that names no layers.
        sigmas: the calibrated noise levels, falling.
        steps: how many of the schedule's steps lie nearest to each of them; at least one.
        chosen: a precision for every cell: fp4, int8-fast, int8 or exact.
        errors: per low precision, |out - exact| / |exact| (L2) of every cell.
        seconds: per precision, exact among them, the attention time of one step in every cell.
        bound: no plan within the budget takes less than this (seconds of all steps).
        costs: "measured" or "modelled"; ``device`` is the GPU that was measured or that the model is of.
        emulated: the precisions that had no kernel where the plan was made: right in quality, modelled in cost.
        min_tokens: calls with fewer query or key tokens were not looked at, and are to stay exact.
    """

    model: str
    layers: tuple[str, ...]
    sigmas: tuple[float, ...]
    steps: tuple[int, ...]
    chosen: tuple[tuple[Precision, ...], ...]
    errors: Mapping[Precision, Table]
    seconds: Mapping[Precision, Table]
    budget: Budget
    bound: float
    costs: str
    device: str
    emulated: tuple[Precision, ...] = ()
    min_tokens: int = 0

    def choose(self, layer: str, sigma: float) -> Precision:
        """The precision of ``layer`` at ``sigma``: that of the nearest calibrated sigma by ratio. Unknown layers: exact."""
        if layer not in self.layers:
            return Precision.EXACT
        return self.chosen[self.layers.index(layer)][self.column(sigma)]

    def column(self, sigma: float) -> int:
        """Which calibrated sigma is nearest to ``sigma`` by ratio: the last for 0 and less, the noisier of two equals."""
        return nearest(self.sigmas, sigma)

    def error(self, row: int, column: int) -> float | None:
        """The error that the chosen precision costs this cell; None for one without calls."""
        if self.seconds[Precision.EXACT][row][column] is None:
            return None
        pick = self.chosen[row][column]
        return 0.0 if pick is Precision.EXACT else self.errors[pick][row][column]

    def _cells(self) -> list[tuple[int, int, int]]:
        """(row, column, steps) of every cell with calls."""
        known = self.seconds[Precision.EXACT]
        return [
            (row, column, steps)
            for row in range(len(self.layers))
            for column, steps in enumerate(self.steps)
            if known[row][column] is not None
        ]

    @property
    def mean_error(self) -> float:
        """The mean over layers and steps of what the choice costs: what the budget bounds."""
        cells = self._cells()
        total = sum(steps for _, _, steps in cells)
        return math.fsum(steps * (self.error(r, c) or 0.0) for r, c, steps in cells) / total if total else 0.0

    def worst(self) -> tuple[float, str, float]:
        """(error, layer, sigma) of the worst cell."""
        cells = [((self.error(r, c) or 0.0), self.layers[r], self.sigmas[c]) for r, c, _ in self._cells()]
        return max(cells, key=lambda cell: cell[0], default=(0.0, "", self.sigmas[0]))

    def total_seconds(self, precision: Precision | None = None) -> float:
        """Attention time of the whole schedule: as planned, or with every cell at ``precision`` (exact where it cannot)."""
        total = []
        for row, column, steps in self._cells():
            seconds = self.seconds[precision or self.chosen[row][column]][row][column]
            total.append(steps * (self.seconds[Precision.EXACT][row][column] if seconds is None else seconds))  # type: ignore[operator]
        return math.fsum(total)

    @property
    def speedup(self) -> float:
        """Exact attention's time over the plan's; 1 where there is none."""
        planned = self.total_seconds()
        return self.total_seconds(Precision.EXACT) / planned if planned else 1.0

    def counts(self) -> dict[Precision, int]:
        """Layers x steps of the schedule that each precision got, of those with calls."""
        found: dict[Precision, int] = {}
        for row, column, steps in self._cells():
            pick = self.chosen[row][column]
            found[pick] = found.get(pick, 0) + steps
        return {p: found[p] for p in (*LOW, Precision.EXACT) if p in found}

    def to_json(self) -> str:
        """The plan as text; numbers keep all their digits."""
        rows = [
            {
                "layer": layer,
                "chosen": [p.value for p in self.chosen[i]],
                "errors": {p.value: list(table[i]) for p, table in self.errors.items()},
                "seconds": {p.value: list(table[i]) for p, table in self.seconds.items()},
            }
            for i, layer in enumerate(self.layers)
        ]
        said = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "budget": {"name": self.budget.name, "error": self.budget.error, "most": self.budget.most},
            "costs": self.costs,
            "device": self.device,
            "emulated": [p.value for p in self.emulated],
            "min_tokens": self.min_tokens,
            "bound": self.bound,
            "sigmas": list(self.sigmas),
            "steps": list(self.steps),
            "layers": rows,
        }
        return json.dumps(said, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """Read what ``to_json`` wrote. Raises InputError, in one sentence, for any other text."""
        if len(text) > MOST_BYTES:
            _wrong(f"it is longer than {MOST_BYTES >> 20} MB")
        try:
            said = json.loads(text, object_pairs_hook=_once, parse_constant=lambda name: _wrong(f"it contains {name}"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            _wrong("it is not JSON" + (f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""))
        return _read(said)


def nearest(sigmas: Sequence[float], sigma: float) -> int:
    """The index of the one of ``sigmas`` (positive, falling) that is nearest to ``sigma`` by ratio; for 0 the last."""
    if not sigma > 0:
        return len(sigmas) - 1
    return min(range(len(sigmas)), key=lambda i: abs(math.log(sigma / sigmas[i])))


def _read(said: Any) -> LayerPlan:
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        _wrong(f'it has no "format": "{FORMAT}"')
    if said.get("version") != VERSION or isinstance(said.get("version"), bool):
        raise InputError(
            f"This plan is of version {said.get('version')!r:.40} and this version of Sage3 reads {VERSION}: make it again."
        )
    names = {"format", "version", "model", "budget", "costs", "device", "emulated"}
    _keys(said, names | {"min_tokens", "bound", "sigmas", "steps", "layers"}, "the plan")
    model = _text(said["model"], "model")
    if not _MODEL.fullmatch(model):
        _wrong('"model" is not a fingerprint')
    budget = _keys(said["budget"], {"name", "error", "most"}, '"budget"')
    costs = _text(said["costs"], "costs")
    if costs not in (MEASURED, MODELLED):
        _wrong(f'"costs" is neither "{MEASURED}" nor "{MODELLED}"')
    sigmas = tuple(_number(x, "sigmas") for x in _list(said["sigmas"], "sigmas", MOST_SIGMAS))
    if not sigmas or sigmas[-1] <= 0 or any(a <= b for a, b in zip(sigmas, sigmas[1:], strict=False)):
        _wrong('"sigmas" are not positive and falling')
    steps = tuple(_count(x, "steps", 1) for x in _list(said["steps"], "steps", MOST_SIGMAS))
    if len(steps) != len(sigmas):
        _wrong(f'"steps" has {len(steps)} values for {len(sigmas)} sigmas')
    emulated = tuple(_precision(x, LOW) for x in _list(said["emulated"], "emulated", len(LOW)))

    rows = _list(said["layers"], "layers", MOST_LAYERS)
    if not rows:
        _wrong("it has no layers")
    layers, chosen = [], []
    errors: dict[Precision, list[tuple[float | None, ...]]] = {}
    seconds: dict[Precision, list[tuple[float | None, ...]]] = {}
    for row in rows:
        _keys(row, {"layer", "chosen", "errors", "seconds"}, "a layer")
        layers.append(_text(row["layer"], "layer"))
        picks = _list(row["chosen"], "chosen", MOST_SIGMAS)
        chosen.append(tuple(_precision(x, (*LOW, Precision.EXACT)) for x in picks))
        _columns(len(picks), len(sigmas), "chosen")
        _collect(row["errors"], "errors", errors, LOW, len(sigmas), len(layers))
        _collect(row["seconds"], "seconds", seconds, (*LOW, Precision.EXACT), len(sigmas), len(layers))
    if len(set(layers)) != len(layers):
        _wrong("two of its layers have one name")
    if set(seconds) != {*errors, Precision.EXACT}:
        _wrong('"seconds" must name exact and the precisions of "errors"')
    plan = LayerPlan(
        model=model,
        layers=tuple(layers),
        sigmas=sigmas,
        steps=steps,
        chosen=tuple(chosen),
        errors={p: tuple(table) for p, table in errors.items()},
        seconds={p: tuple(table) for p, table in seconds.items()},
        budget=Budget(_text(budget["name"], "name"), _number(budget["error"], "error"), _number(budget["most"], "most")),
        bound=_number(said["bound"], "bound"),
        costs=costs,
        device=_text(said["device"], "device"),
        emulated=emulated,
        min_tokens=_count(said["min_tokens"], "min_tokens", 0),
    )
    for i, layer in enumerate(layers):
        for j in range(len(sigmas)):
            pick = plan.chosen[i][j]
            if pick is not Precision.EXACT and (pick not in errors or errors[pick][i][j] is None):
                _wrong(f'it chooses {pick.value} for layer "{layer}" without a measured error')
    return plan


def _wrong(what: str) -> NoReturn:
    raise InputError(f"This is not a precision plan that can be used: {what}; make the plan again.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said = dict(pairs)
    if len(said) != len(pairs):
        _wrong("a name occurs twice in it")
    return said


def _keys(said: Any, names: set[str], what: str) -> dict[str, Any]:
    if not isinstance(said, dict) or set(said) != names:
        _wrong(f"{what} must have {', '.join(sorted(names))} and nothing else")
    return said


def _list(said: Any, name: str, most: int) -> list[Any]:
    if not isinstance(said, list) or len(said) > most:
        _wrong(f'"{name}" is not a list of at most {most}')
    return said


def _text(said: Any, name: str) -> str:
    if not isinstance(said, str) or len(said) > MOST_TEXT or not (said.isprintable()):
        _wrong(f'"{name}" is not a text of one line')
    return said


def _number(said: Any, name: str) -> float:
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not 0 <= said < 1e30:
        _wrong(f'"{name}" has a value that is not a number from 0 up')
    return float(said)


def _count(said: Any, name: str, least: int) -> int:
    if isinstance(said, bool) or not isinstance(said, int) or not least <= said <= MOST_STEPS:
        _wrong(f'"{name}" has a value that is not a whole number from {least} up')
    return said


def read(path: Path, what: str, remedy: str) -> LayerPlan:
    """The plan in a file. Raises InputError, which names ``what`` and the ``remedy``, where there is no such plan."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} cannot be read ({type(error).__name__}): {remedy}.") from None
    return LayerPlan.from_json(text)


def _precision(said: Any, allowed: tuple[Precision, ...]) -> Precision:
    for precision in allowed:
        if said == precision.value:
            return precision
    _wrong(f"a precision is not one of {', '.join(p.value for p in allowed)}")


def _columns(have: int, want: int, name: str) -> None:
    if have != want:
        _wrong(f'"{name}" has {have} values for {want} sigmas')


def _collect(
    said: Any,
    name: str,
    into: dict[Precision, list[tuple[float | None, ...]]],
    allowed: tuple[Precision, ...],
    columns: int,
    rows: int,
) -> None:
    """Read one layer's values per precision; every layer must have the same precisions."""
    if not isinstance(said, dict):
        _wrong(f'"{name}" is not a table')
    for key, values in said.items():
        row = _list(values, name, MOST_SIGMAS)
        _columns(len(row), columns, name)
        read: Callable[[Any], float | None] = lambda x: None if x is None else _number(x, name)  # noqa: E731
        into.setdefault(_precision(key, allowed), []).append(tuple(read(x) for x in row))
    if any(len(table) != rows for table in into.values()):
        _wrong(f'"{name}" does not name the same precisions for every layer')
