"""A study's results, sorted for tables and plots: by setting, form and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .seeds import Difference, compare
from .settings import AGAIN, EXACT, FORMS, INT8, REFERENCE, SETTINGS, UNSMOOTHED, Setting

Value = Callable[[dict[str, Any]], "float | None"]
PAIRS = ((INT8, EXACT), (AGAIN, EXACT), (INT8, REFERENCE), (UNSMOOTHED, REFERENCE))


def loss(result: dict[str, Any]) -> float | None:
    """The held-out loss at the end, of the averaged weights, with the attention they were trained with."""
    return result["final"]["own"]


def exact_loss(result: dict[str, Any]) -> float | None:
    """The same with exact attention: of the weights alone."""
    return result["final"]["exact"]


def shown(aspect: str) -> Value:
    """The percentage of prompts whose videos show ``aspect``."""

    def value(result: dict[str, Any]) -> float | None:
        found = (result.get("adherence") or {}).get(aspect)
        return None if found is None else 100 * found

    return value


@dataclass
class Group:
    """The results of one setting."""

    setting: Setting
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    paces: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def forms(self) -> list[str]:
        """The forms that have runs, in the order of ``FORMS``."""
        return [form for form in FORMS if self.runs.get(form)]

    @property
    def steps(self) -> int:
        return self.setting.steps

    def values(self, form: str, value: Value) -> dict[int, float]:
        """By seed; runs that have none (they broke off) are left out."""
        found = {seed: value(run) for seed, run in self.runs.get(form, {}).items()}
        return {seed: v for seed, v in found.items() if v is not None}

    def difference(self, form: str, other: str, value: Value) -> Difference | None:
        """``form`` less ``other``, seed by seed."""
        return compare(self.values(form, value), self.values(other, value))

    def broken(self, form: str) -> int:
        """Runs that ended at a loss or gradient that was no finite number."""
        return sum(run["diverged"] is not None for run in self.runs.get(form, {}).values())


def groups(found: dict[str, dict[str, Any]]) -> list[Group]:
    """By setting, in the order of ``SETTINGS``. Raises InputError where results of one setting differ in what they ran."""
    made: dict[str, Group] = {}
    for name, result in found.items():
        setting = Setting.from_json(result["setting"])
        group = made.setdefault(setting.name, Group(setting))
        if group.setting != setting:
            raise InputError(f"{name} is of other settings than the rest of {setting.name}: report them apart.")
        if "seed" in result:
            group.runs.setdefault(result["form"], {})[result["seed"]] = result
        else:
            group.paces[result["form"]] = result
    order = [s.name for s in SETTINGS]
    return sorted(made.values(), key=lambda g: order.index(g.setting.name) if g.setting.name in order else len(order))


def is_small(found: list[Group]) -> bool:
    """Whether anything ran smaller than the study is meant to be, or on a CPU."""
    meant = {s.name: s.to_json() for s in SETTINGS}
    runs = [r for g in found for r in (*g.paces.values(), *(run for by in g.runs.values() for run in by.values()))]
    return any(r["device"] == "CPU" or r["setting"] != meant.get(r["setting"]["name"]) for r in runs)
