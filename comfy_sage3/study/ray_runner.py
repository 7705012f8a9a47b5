"""A sweep on a Ray cluster: every exact side and every cell a task, this process the only one that writes.

A task reads nothing from the folder and writes nothing to it: it gets the sweep and the exact side, and returns a
comparison. So it may be run again when its worker dies, and a result is written once, by whoever holds the cell's lock.
Cells that are done are never sent; what was computed and not yet written when this process dies is computed again.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..compare.engine import Engine
from ..compare.measure import Comparison, OnProgress
from ..errors import EngineError
from .baseline import Baseline, compare_cell, exact_side
from .run import PAUSE, Cancelled, OpenEngine, Outcome, outcome, reason_of
from .store import DONE, Store
from .sweep import Cell, Sweep, parse

RETRIES = 3  # of a task whose worker died; one that fails is not tried again
MOST_IN_FLIGHT = 64  # tasks, whose locks are open files
LOCAL = "local"
CONNECT_SECONDS = 5.0
LOOK = 0.5  # seconds between two looks at what is done

_engine: tuple[str, Engine] | None = None  # of a worker process, kept for its next task of the same run


@dataclass
class _Task:
    """What is running somewhere. ``cell`` is that of a comparison, or the one whose exact side is made."""

    cell: Cell
    exact: bool
    locks: ExitStack


def run_on_ray(
    store: Store,
    address: str,
    open_engine: OpenEngine,
    *,
    on_progress: OnProgress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run every cell that is not done on the cluster at ``address`` ("local": one on this machine, for this run only).

    ``open_engine`` is sent to the workers. Raises EngineError where there is no Ray or no cluster, Cancelled when
    ``stop()`` says so; a failing cell raises nothing. A cluster that was connected before stays connected.
    """
    try:
        import ray
    except ImportError:
        raise EngineError("--ray needs Ray: pip install 'comfy-sage3[ray]', here and on every machine.") from None
    ours = not ray.is_initialized()
    if ours:
        _reach(address)
        try:
            ray.init(address=None if address == LOCAL else address, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray raises a kind of its own for each way of not being there
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineError(f"There is no Ray cluster at {address!r} ({why}): start one with ray start --head.") from None
    try:
        return _Driver(ray, store, open_engine, on_progress or (lambda fraction, doing: None), stop).run()
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise EngineError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise EngineError(f"{address[:80]!r} is no Ray cluster's address: give auto, local, HOST:PORT or ray://HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise EngineError(
            f"There is no Ray cluster at {address!r} ({error.strerror or error}): start one with ray start --head."
        ) from None


class _Driver:
    def __init__(self, ray: Any, store: Store, open_engine: OpenEngine, tell: OnProgress, stop: Callable[[], bool]) -> None:
        self.ray, self.store, self.tell, self.stop = ray, store, tell, stop
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        options = {"max_retries": RETRIES, "retry_exceptions": False, "num_cpus": 1, "num_gpus": 1 if gpus else 0}
        self.room = max(2, min(MOST_IN_FLIGHT, 2 * (gpus or int(resources.get("CPU", 1)))))
        self._make_exact = ray.remote(**options)(make_exact)
        self._make_cell = ray.remote(**options)(make_cell)
        self._sweep = ray.put(store.sweep.to_data())
        self._open = ray.put((uuid.uuid4().hex, open_engine))
        self._exact: dict[str, Any] = {}  # exact id -> its place in the cluster's memory
        self._no_exact: dict[str, str] = {}
        self._running: dict[Any, _Task] = {}
        self._began = time.time()
        self.made = 0

    def run(self) -> Outcome:
        """Send what can be sent, take what is done, until nothing is left."""
        remaining = [cell for cell in self.store.sweep.cells() if self.store.state(cell) != DONE]
        count = len(remaining)
        try:
            while remaining or self._running:
                if self.stop():
                    raise Cancelled("The sweep was stopped: run it again to go on with the cells that are left.")
                remaining = [cell for cell in remaining if len(self._running) >= self.room or not self._send(cell)]
                cells = sum(not task.exact for task in self._running.values())
                done = count - len(remaining) - cells
                self.tell(
                    done / max(1, count), f"{done} of {count} cells settled, {len(self._running)} tasks on the cluster"
                )
                if not self._running:
                    time.sleep(PAUSE)  # somebody else holds what is left
                    continue
                ready, _ = self.ray.wait(list(self._running), timeout=LOOK)
                for reference in ready:
                    self._take(reference)
            return outcome(self.store, self.made)
        finally:
            for reference, task in self._running.items():
                self.ray.cancel(reference, force=True)
                task.locks.close()

    def _send(self, cell: Cell) -> bool:
        """Send the cell, or the exact side that it waits for; whether the cell is off the list."""
        with ExitStack() as locks:
            if not locks.enter_context(self.store.lock(cell.id)):
                return False
            failure = self.store.failure(cell)
            if self.store.metrics(cell) is not None or (failure and failure["at"] >= self._began):
                return True
            if cell.exact in self._no_exact:
                self.store.fail(cell, self._no_exact[cell.exact])
                return True
            exact = self._exact_of(cell)
            if exact is None:
                return False
            reference = self._make_cell.remote(self._sweep, self._open, cell.id, exact)
            self._running[reference] = _Task(cell, False, locks.pop_all())
        return True

    def _exact_of(self, cell: Cell) -> Any:
        """Where the exact side is in the cluster's memory; None while it is being made."""
        if cell.exact in self._exact or any(t.exact and t.cell.exact == cell.exact for t in self._running.values()):
            return self._exact.get(cell.exact)
        with ExitStack() as locks:
            if not locks.enter_context(self.store.lock(cell.exact)):
                return None
            found = self.store.baseline(cell)
            if found is not None:
                self._exact[cell.exact] = self.ray.put(found)
                return self._exact[cell.exact]
            reference = self._make_exact.remote(self._sweep, self._open, cell.id)
            self._running[reference] = _Task(cell, True, locks.pop_all())
        return None

    def _take(self, reference: Any) -> None:
        """Write what a task returned, or why it returned nothing, and let go of its lock."""
        task = self._running.pop(reference)
        with task.locks:
            try:
                result, why = self.ray.get(reference)
            except Exception as error:  # its workers died more often than it is tried again, or memory ran out
                said = (str(error).strip().splitlines() or [""])[-1].strip()  # the traceback of a worker ends with it
                result, why = None, f"The cluster gave up on it ({type(error).__name__}): {said}"
            if task.exact and result is not None:
                self.store.keep(task.cell, result)
                self._exact[task.cell.exact] = self.ray.put(result)  # this process owns it: no worker's death loses it
            elif task.exact:
                self._no_exact[task.cell.exact] = f"The exact side failed: {why}"
            elif result is not None:
                self.store.finish(task.cell, result)
                self.made += 1
            else:
                self.store.fail(task.cell, why)


Opener = tuple[str, OpenEngine]
"""A name of the run, by which a worker knows the engine it has open, and how that is opened."""


def make_exact(data: dict[str, Any], opener: Opener, name: str) -> tuple[Baseline | None, str]:
    """On a worker: the exact side of the cell's prompt and seed, or why there is none."""
    return _guarded(data, opener, name, lambda e, sweep, cell: exact_side(e, sweep, cell, lambda done, doing: None))


def make_cell(data: dict[str, Any], opener: Opener, name: str, exact: Baseline) -> tuple[Comparison | None, str]:
    """On a worker: the cell's comparison, or why there is none."""
    return _guarded(data, opener, name, lambda e, sweep, cell: compare_cell(e, sweep, cell, exact))


def _guarded(data: dict[str, Any], opener: Opener, name: str, work: Callable[[Engine, Sweep, Cell], Any]) -> tuple[Any, str]:
    try:
        sweep = parse(data)
        cell = next(c for c in sweep.cells() if c.id == name)
        return work(_engine_of(opener, sweep), sweep, cell), ""
    except Exception as error:
        return None, reason_of(error)


def _engine_of(opener: Opener, sweep: Sweep) -> Engine:
    """This worker's engine of the run, opened with its first task."""
    global _engine
    run, open_engine = opener
    if _engine is None or _engine[0] != run:
        if _engine is not None:
            _engine[1].close()
            _engine = None
        _engine = (run, open_engine(sweep.engine))
    return _engine[1]
