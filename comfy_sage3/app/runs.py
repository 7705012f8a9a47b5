"""One visitor's run: a thread that compares, what it has to tell, and how it is stopped.

The comparison runs in a thread of its own, so that the page hears of it while it works. It is stopped between two steps
by raising from the engine's own callback: everything on the way out puts back what it changed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..compare.engine import Engine, Generation, Inspection, OnPreview, OnStep, Request, Side
from ..compare.measure import Comparison, compare
from ..errors import InputError, Sage3Error
from .memory import give_back
from .services import HIDDEN_ERROR, Services

log = logging.getLogger("comfy_sage3")
WARMING = "warming up"
TELL_SECONDS = 0.25  # the page hears this often, whatever the model's speed


class Stopped(Exception):
    """Raised inside a run that its visitor no longer wants."""


@dataclass
class SideState:
    """What a side is doing. ``preview``: uint8 (H, W, 3)."""

    name: str
    text: str = "waiting"
    done: int = 0
    steps: int = 0
    active: bool = False
    preview: np.ndarray | None = None


@dataclass
class State:
    """A run as the page shows it; ``failed`` is a sentence for the visitor, who asked for it where ``stopped``."""

    doing: str = "starting"
    fraction: float = 0.0
    seconds: float = 0.0
    running: bool = True
    failed: str = ""
    stopped: bool = False
    sides: dict[str, SideState] = field(default_factory=dict)


class Watched:
    """An engine that tells which side is at which step, shows previews, and stops when it is to stop."""

    def __init__(self, engine: Engine, state: State, stop: threading.Event) -> None:
        self._engine, self._state, self._stop = engine, state, stop
        self._key: str | None = None
        engine.on_preview = self._preview
        self.name, self.floor_method = engine.name, engine.floor_method
        self.on_preview: OnPreview | None = None

    def describe(self) -> dict[str, str]:
        return self._engine.describe()

    def check(self, request: Request, sides: Sequence[Side]) -> None:
        self._engine.check(request, sides)

    def warm_up(self, request: Request, side: Side, on_step: OnStep) -> None:
        self._engine.warm_up(request, side, self._on(side.label, WARMING, on_step))

    def generate(self, request: Request, side: Side, on_step: OnStep) -> Generation:
        return self._engine.generate(request, side, self._on(side.label, "sampling", on_step))

    def exact(self, request: Request, second_way: bool, on_step: OnStep) -> Generation:
        return self._engine.exact(request, second_way, self._on(None, "", on_step))

    def finish(self, generation: Generation) -> None:
        self._check()
        self._engine.finish(generation)

    def inspect(self, request: Request, a: Side, b: Side, on_step: OnStep) -> Inspection | None:
        return self._engine.inspect(request, a, b, self._on(None, "", on_step))

    def close(self) -> None:
        self._engine.on_preview = None
        self._engine.close()

    def _on(self, label: str | None, text: str, on_step: OnStep) -> OnStep:
        """``on_step`` that also tells of the side with this label; None: of neither."""
        self._check()
        self._key = label.lower() if label else None
        for key, side in self._state.sides.items():
            side.active = key == self._key
            if not side.active and side.text.startswith(WARMING):  # its turn is yet to come
                side.text, side.done, side.steps = "warmed up, waiting", 0, 0
        mine = self._state.sides.get(self._key or "")
        if mine:
            mine.text, mine.done, mine.steps = text, 0, 0

        def stepped(done: int, steps: int) -> None:
            self._check()
            if mine:
                mine.text, mine.done, mine.steps = f"{text}, step {done} of {steps}", done, steps
            on_step(done, steps)

        return stepped

    def _preview(self, frame: np.ndarray) -> None:
        self._check()
        mine = self._state.sides.get(self._key or "")
        if mine:
            mine.preview = frame

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


class Stops:
    """Who may stop what: one event per session, made when a run is asked for, dropped when it is over."""

    def __init__(self, most_waiting: int = 8) -> None:
        self.most_waiting = most_waiting
        self._lock = threading.Lock()
        self._asked: dict[str, threading.Event] = {}
        self._taken: set[str] = set()

    def ask(self, session: str) -> None:
        """A run of ``session`` is asked for: it can be stopped even while it waits. InputError where too many wait."""
        with self._lock:
            waiting = len(self._asked.keys() - self._taken - {session})
            if waiting >= self.most_waiting:
                raise InputError(f"The queue is full, with {waiting} waiting: try again in a few minutes.")
            self._asked[session] = threading.Event()
            self._taken.discard(session)

    def take(self, session: str) -> threading.Event:
        """The stop of the run that begins now."""
        with self._lock:
            self._taken.add(session)
            return self._asked.setdefault(session, threading.Event())

    def drop(self, session: str, stop: threading.Event) -> None:
        """That run is over."""
        with self._lock:
            if self._asked.get(session) is stop:
                del self._asked[session]
                self._taken.discard(session)

    def stop(self, session: str) -> bool:
        """Stop the session's run, waiting or running; False where it has none."""
        with self._lock:
            stop = self._asked.get(session)
        if stop is None:
            return False
        stop.set()
        return True

    def leave(self, session: str) -> None:
        """The visitor is gone: stop what runs, forget what waits."""
        self.stop(session)
        with self._lock:
            if session not in self._taken:
                self._asked.pop(session, None)


def watch(
    services: Services,
    open_engine: Callable[[], Engine],
    request: Request,
    a: Side,
    b: Side,
    repeats: int,
    stop: threading.Event,
    keep: Callable[[Comparison], str],
) -> Iterator[State | tuple[Comparison, str]]:
    """Run a comparison, yielding its state a few times a second, and at last it and what ``keep`` calls it.

    Errors are in the state.

    Closing the generator stops the run. However it ends, the engine is closed before the last value or the return.
    """
    state = State(sides={"a": SideState(a.name), "b": SideState(b.name)})
    done: queue.Queue[tuple[Comparison, str] | None] = queue.Queue()
    began = time.monotonic()

    def progress(fraction: float, doing: str) -> None:
        if stop.is_set():
            raise Stopped
        state.fraction, state.doing = fraction, doing

    def work() -> None:
        made: tuple[Comparison, str] | None = None
        try:
            state.doing = "waiting for the GPU"
            with services.gpu:
                if stop.is_set():
                    raise Stopped
                state.doing = "loading the model"
                engine = Watched(open_engine(), state, stop)
                try:
                    comparison = compare(engine, request, a, b, repeats=repeats, on_progress=progress)
                finally:
                    engine.close()
            progress(0.99, "writing the results")
            made = comparison, keep(comparison)
        except Stopped:
            state.failed, state.stopped = "Stopped: nothing was kept, and the model is as it was.", True
        except Sage3Error as error:
            state.failed = str(error)
        except Exception as error:
            log.exception("A comparison failed")
            state.failed = told(services, error)
        finally:
            done.put(made)

    thread = threading.Thread(target=work, name="sage3-compare", daemon=True)
    thread.start()
    try:
        while True:
            try:
                made = done.get(timeout=TELL_SECONDS)
            except queue.Empty:
                state.seconds = time.monotonic() - began
                yield state
                continue
            state.seconds, state.running = time.monotonic() - began, False
            if made is None:
                state.doing = state.failed
            else:
                state.doing, state.fraction = "done", 1.0
            for side in state.sides.values():
                side.active = False
            yield state
            if made is not None:
                yield made
            return
    finally:
        stop.set()
        thread.join()
        give_back()


def told(services: Services, error: Exception) -> str:
    """What a visitor hears of an error that was not meant for people."""
    if services.mask_errors:
        return HIDDEN_ERROR
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def plain(state: State, uri: Callable[[np.ndarray], str]) -> dict[str, Any]:
    """``state`` as progress.js shows it."""
    return {
        "doing": state.doing,
        "fraction": state.fraction,
        "seconds": round(state.seconds, 1),
        "running": state.running,
        "failed": bool(state.failed) and not state.stopped,
        "sides": {
            key: {
                "name": side.name,
                "text": side.text,
                "done": side.done,
                "steps": side.steps,
                "active": side.active,
                "preview": None if side.preview is None else uri(side.preview),
            }
            for key, side in state.sides.items()
        },
    }
