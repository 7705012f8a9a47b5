"""Run what a sweep has not run yet: one cell after another, one progress, cancelled between steps, failures written down.

Any number of processes may run one folder together: whoever holds a cell's lock runs it, the others take the next one
and, when none is left, wait for the results of those that are being run, or take over where their runner has died.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..compare.engine import Engine
from ..compare.measure import OnProgress
from ..errors import Sage3Error
from .baseline import Baseline, compare_cell, exact_side
from .store import BROKEN, DONE, Store
from .sweep import Cell

PAUSE = 0.2  # seconds between two looks at cells that somebody else is running
INSPECTED = 2  # a cell replays captured calls: about another run and a half, and its decoding

Result = TypeVar("Result")

OpenEngine = Callable[[str], Engine]
"""``open_engine(name)``: "embedded" or a server's address. Raises Sage3Error where the engine cannot be had."""


class _Failed(Exception):
    """Why a cell, or its exact side, has no result."""


class Cancelled(Sage3Error):
    """The sweep was stopped on request; what was finished is kept."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep stands after a run: cells with a result, cells that failed, and how many of them this run made."""

    done: int
    failed: int
    made: int

    @property
    def sentence(self) -> str:
        """For a person."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.done} of {self.done + self.failed} cells have a result{failed}; {self.made} were run now."


def run(
    store: Store,
    open_engine: OpenEngine,
    *,
    on_progress: OnProgress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run every cell that is not done; cells that failed before are tried again.

    ``stop()`` is asked between steps. Raises Cancelled when it says so, and Sage3Error when the engine cannot be opened:
    a failing cell raises nothing. What ``on_progress`` raises is passed on.
    """
    runner = _Runner(store, open_engine, on_progress or (lambda fraction, doing: None), stop)
    try:
        remaining = [cell for cell in store.sweep.cells() if store.state(cell) != DONE]
        runner.expect(remaining)
        while remaining:
            left = [cell for cell in remaining if not runner.settle(cell)]
            if len(left) == len(remaining):
                runner.look(0.0, f"waiting for {len(left)} cells that another process is running")
                time.sleep(PAUSE)
            remaining = left
    finally:
        runner.close()
    return outcome(store, runner.made)


def outcome(store: Store, made: int) -> Outcome:
    """Count what there is."""
    states = [store.state(cell) for cell in store.sweep.cells()]
    return Outcome(states.count(DONE), states.count(BROKEN), made)


def reason_of(error: BaseException) -> str:
    """Why a cell failed, on one line."""
    said = (str(error).strip().splitlines() or [""])[0]
    return said if isinstance(error, Sage3Error) and said else f"{type(error).__name__}: {said}".removesuffix(": ")


class _Interrupted(BaseException):
    """Carries what a listener raised, or a cancellation, past the handling of failing cells."""


class _Runner:
    def __init__(self, store: Store, open_engine: OpenEngine, on_progress: OnProgress, stop: Callable[[], bool]) -> None:
        self.store, self.sweep = store, store.sweep
        self._open, self._listener, self._stop = open_engine, on_progress, stop
        self._engine: Engine | None = None
        self._exact: tuple[str, Baseline] | None = None  # the last one, for the next contestant
        self._no_exact: dict[str, str] = {}  # why an exact side could not be made
        self._began = time.time()
        self._weights: dict[str, float] = {}
        self._total, self._done, self._count, self._at = 1.0, 0.0, 0, 0
        self.made = 0

    def expect(self, cells: list[Cell]) -> None:
        """Weigh the work: runs of the model, for a cell and, once, for its exact side."""
        for cell in cells:
            self._weights[cell.id] = self.sweep.repeats + INSPECTED
            if cell.exact not in self._weights and self.store.baseline(cell) is None:
                self._weights[cell.exact] = self.sweep.repeats + 1
        self._total, self._count = sum(self._weights.values()) or 1.0, len(cells)

    def settle(self, cell: Cell) -> bool:
        """Bring one cell to a result or a recorded failure; False where somebody else is at it or at its exact side."""
        with self.store.lock(cell.id) as mine:
            if not mine:
                return False
            if not self._is_settled(cell):
                try:
                    exact = self._exact_of(cell)
                    if exact is None:
                        return False
                    self._run(cell, exact)
                except _Interrupted as carried:
                    raise carried.args[0] from None
                except _Failed as failed:
                    self.store.fail(cell, str(failed))
            self._pass(cell.id)
            self._at += 1
            return True

    def look(self, done: float, doing: str) -> None:
        """Tell the listener, and see whether to stop."""
        if self._stop():
            raise Cancelled("The sweep was stopped: run it again to go on with the cells that are left.")
        self._listener(min((self._done + done) / self._total, 1.0), doing)

    def close(self) -> None:
        """Let go of the engine, if one was needed."""
        if self._engine is not None:
            self._engine.close()

    def _is_settled(self, cell: Cell) -> bool:
        """Whether somebody finished the cell, or failed at it, since this run began."""
        if self.store.metrics(cell) is not None:
            return True
        failure = self.store.failure(cell)
        return failure is not None and failure["at"] >= self._began

    def _exact_of(self, cell: Cell) -> Baseline | None:
        """The exact side, made where it is missing; None while somebody else makes it. Raises _Failed where it fails."""
        if self._exact and self._exact[0] == cell.exact:
            return self._exact[1]
        if cell.exact in self._no_exact:
            raise _Failed(self._no_exact[cell.exact])
        found = self.store.baseline(cell)
        if found is None:
            with self.store.lock(cell.exact) as mine:
                if not mine:
                    return None
                found = self.store.baseline(cell)  # somebody may have finished it just now
                if found is None:
                    try:
                        found = self._guarded(cell, cell.exact, lambda tell: exact_side(self.engine, self.sweep, cell, tell))
                    except _Failed as failed:
                        self._no_exact[cell.exact] = f"The exact side failed: {failed}"
                        raise _Failed(self._no_exact[cell.exact]) from None
                    self.store.keep(cell, found)
        self._pass(cell.exact)
        self._exact = (cell.exact, found)
        return found

    def _run(self, cell: Cell, exact: Baseline) -> None:
        done = self._guarded(cell, cell.id, lambda tell: compare_cell(self.engine, self.sweep, cell, exact, tell))
        self.store.finish(cell, done)
        self.made += 1

    def _guarded(self, cell: Cell, part: str, work: Callable[[OnProgress], Result]) -> Result:
        """``work`` with this part's progress. Raises _Failed, with the reason, for whatever goes wrong in it."""
        weight, where = (
            self._weights.get(part, 0.0),
            f"{self._at + 1} of {self._count}: {cell.contestant.name}, seed {cell.seed}",
        )
        self.engine  # noqa: B018  an engine that cannot be had is no failing cell

        def tell(fraction: float, doing: str) -> None:
            try:
                self.look(weight * fraction, f"{where}: {doing}")
            except Exception as raised:
                raise _Interrupted(raised) from None

        try:
            return work(tell)
        except Exception as error:
            gc.collect()  # an error's traceback holds the tensors of the run that failed
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise _Failed(reason_of(error)) from None

    @property
    def engine(self) -> Engine:
        """The sweep's engine, opened when it is first needed. Raises what opening it raises."""
        if self._engine is None:
            try:
                self._engine = self._open(self.sweep.engine)
            except Exception as error:
                raise _Interrupted(error) from None
        return self._engine

    def _pass(self, part: str) -> None:
        self._done += self._weights.pop(part, 0.0)
