"""The cheapest assignment under an error budget: a multiple-choice knapsack, with a proven bound on what is left to gain.

    minimise  sum_i w_i cost_i(p_i)   such that   sum_i w_i error_i(p_i) <= budget sum_i w_i   and   error_i(p_i) <= most

A cell's choices on the lower convex hull of (error, cost) are steps with falling saving per error. Taken in the order of
that rate over all cells, they solve the linear relaxation (Dyer 1984, Zemel 1984): the optimum of every budget that ends at
a step, and otherwise a lower bound that differs from the optimum by less than the one step that does not fit whole. What it
leaves of the budget is then filled with whatever still fits. Where the cells are few enough, as with tens of layers at a few
steps, a dynamic program then looks at everything that could still be cheaper: the optimum is found, and known to be it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError

BUDGETS = {"draft": 0.10, "balanced": 0.04, "faithful": 0.01}
"""Mean relative error (L2) of the attention outputs; docs/plan.md says why these."""

MOST_OF_A_CELL = 3.0
"""No cell may have more than this many times the budget: the mean must not hide a layer that is lost."""


ROUNDING = 1e-9  # of the budget: what ends at it exactly must not fail by how sums are rounded
WORK = 400_000  # assignments of some of the cells that the dynamic program may look at: a second or so


class Choice(NamedTuple):
    """What one precision would cost a cell (seconds, for one step) and the relative error it has there."""

    cost: float
    error: float


@dataclass(frozen=True)
class Solution:
    """``picks[i]`` is the index of cell i's choice; no assignment within the budget costs less than ``bound``."""

    picks: tuple[int, ...]
    cost: float  # weighted, as bound
    error: float  # weighted mean
    bound: float


class _Step(NamedTuple):
    """From one vertex of a cell's hull to the next: what it saves and what error it adds, weighted."""

    cell: int
    before: int
    choice: int
    saving: float
    error: float


def budget_of(name: str, custom: float) -> float:
    """The mean error that ``name`` stands for; ``custom`` for "custom". Raises InputError for what is neither."""
    if name in BUDGETS:
        return BUDGETS[name]
    if name != "custom":
        raise InputError(f"Unknown budget {name!r}: choose one of {', '.join(BUDGETS)} or custom.")
    if not 0.0 <= custom <= 1.0:
        raise InputError(f"The custom error is {custom}: give a relative error from 0 to 1, such as 0.03.")
    return float(custom)


def solve(cells: Sequence[Sequence[Choice]], weights: Sequence[float], budget: float, most: float = math.inf) -> Solution:
    """The cheapest choice of every cell whose weighted mean error is at most ``budget`` and none above ``most``.

    Raises InputError when a cell has no choice at all, or even the least errors exceed the budget (not where exact
    attention, error 0, is among every cell's choices).
    """
    limit = budget * math.fsum(weights) * (1 + ROUNDING)
    hulls = [_hull(cell, most) for cell in cells]
    picks = [hull[0] for hull in hulls]
    slack = limit - math.fsum(w * cell[p].error for cell, w, p in zip(cells, weights, picks, strict=True))
    if slack < 0:
        raise InputError(f"No assignment has a mean error of {budget:g} or less: raise the budget.")
    steps = [
        _Step(i, a, b, w * (cell[a].cost - cell[b].cost), w * (cell[b].error - cell[a].error))
        for i, (cell, hull, w) in enumerate(zip(cells, hulls, weights, strict=True))
        for a, b in zip(hull, hull[1:], strict=False)
    ]
    # by saving per error, the best first; equal rates in the order of the cells, so that a plan can be made again
    steps.sort(key=lambda s: (-_rate(s), s.cell))
    bound = _cost(cells, weights, picks)
    rate = 0.0  # the saving per error at which the budget ends, inside a step that does not fit whole
    for step in steps:
        fits = step.error <= slack
        if not rate:
            bound -= step.saving if fits else step.saving * slack / step.error
            rate = 0.0 if fits else _rate(step)
        if fits and picks[step.cell] == step.before:  # later ones may still fit
            picks[step.cell] = step.choice
            slack -= step.error
    _fill(cells, weights, picks, limit, most)
    cost = _cost(cells, weights, picks)
    if rate and cost > bound:
        known, better = _search(cells, weights, limit, most, rate, cost)
        picks = better or picks
        cost = _cost(cells, weights, picks)
        bound = cost if known else bound
    return Solution(tuple(picks), cost, _mean(cells, weights, picks), min(bound, cost))


def _rate(step: _Step) -> float:
    return step.saving / step.error if step.error > 0 else math.inf


def _hull(cell: Sequence[Choice], most: float) -> list[int]:
    """Choices on the lower convex hull of (error, cost), from the least error down to the least cost."""
    usable = [i for i, c in enumerate(cell) if c.error <= most and math.isfinite(c.cost)]
    if not usable:
        raise InputError("A cell has no choice within the budget: exact attention must be among the choices.")
    hull: list[int] = []
    for i in sorted(usable, key=lambda i: (cell[i].error, cell[i].cost)):
        if hull and cell[i].cost >= cell[hull[-1]].cost:
            continue  # no less error and no cheaper
        while len(hull) > 1 and _above(cell[hull[-2]], cell[hull[-1]], cell[i]):
            hull.pop()
        hull.append(i)
    return hull


def _above(a: Choice, b: Choice, c: Choice) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (a.cost - b.cost) * (c.error - a.error) <= (a.cost - c.cost) * (b.error - a.error)


def _mean(cells: Sequence[Sequence[Choice]], weights: Sequence[float], picks: Sequence[int]) -> float:
    total = math.fsum(weights)
    errors = math.fsum(w * cell[p].error for cell, w, p in zip(cells, weights, picks, strict=True))
    return errors / total if total else 0.0


def _cost(cells: Sequence[Sequence[Choice]], weights: Sequence[float], picks: Sequence[int]) -> float:
    return math.fsum(w * cell[p].cost for cell, w, p in zip(cells, weights, picks, strict=True))


def _fill(cells: Sequence[Sequence[Choice]], weights: Sequence[float], picks: list[int], limit: float, most: float) -> None:
    """Spend what is left of the budget: each time the change that saves the most of those that fit, of any choice."""
    while True:
        errors = [w * cell[p].error for cell, w, p in zip(cells, weights, picks, strict=True)]
        used = math.fsum(errors)
        best: tuple[float, int, int] | None = None
        for i, (cell, w) in enumerate(zip(cells, weights, strict=True)):
            for j, choice in enumerate(cell):
                saving = w * (cell[picks[i]].cost - choice.cost)
                fits = choice.error <= most and used + w * choice.error - errors[i] <= limit
                if saving > 0 and fits and (best is None or saving > best[0]):
                    best = (saving, i, j)
        if best is None:
            return
        picks[best[1]] = best[2]


def _search(
    cells: Sequence[Sequence[Choice]], weights: Sequence[float], limit: float, most: float, rate: float, best: float
) -> tuple[bool, list[int] | None]:
    """Whether all that could cost less than ``best`` was looked at, and the cheapest of it, None where there is nothing.

    Cell by cell, keeps the partial assignments of which none other has both less error and less cost, and which may still
    come out below ``best``: what is left of the budget is worth at most ``rate`` per error, whatever the other cells do.
    """
    usable = [[(j, c) for j, c in enumerate(cell) if c.error <= most and math.isfinite(c.cost)] for cell in cells]
    rest = [0.0]
    for cell, w in zip(reversed(usable), reversed(weights), strict=True):
        rest.append(rest[-1] + min(w * (c.cost + rate * c.error) for _, c in cell))
    rest.reverse()
    least = best * (1 - 1e-9)  # gains below rounding are none
    states: list[tuple[float, float, tuple[object, int] | None]] = [(0.0, 0.0, None)]  # error, cost, way here
    work = 0
    for i, (cell, w) in enumerate(zip(usable, weights, strict=True)):
        work += len(states) * len(cell)
        if work > WORK:
            return False, None
        grown = []
        for error, cost, way in states:
            for j, choice in cell:
                e, c = error + w * choice.error, cost + w * choice.cost
                if e <= limit and c + rest[i + 1] - rate * (limit - e) < least:
                    grown.append((e, c, (way, j)))
        grown.sort(key=lambda state: state[:2])
        states, cheapest = [], math.inf
        for state in grown:
            if state[1] < cheapest:
                states.append(state)
                cheapest = state[1]
    if not states or states[-1][1] >= least:  # what is left of the budget at the end is worth nothing
        return True, None
    picks: list[int] = []
    at = states[-1][2]
    while at is not None:
        at, j = at  # type: ignore[assignment]
        picks.append(j)
    return True, picks[::-1]
