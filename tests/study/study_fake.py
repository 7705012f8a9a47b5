"""An engine whose videos, errors and times follow from the precision and the seed; it writes down what it runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from comfy_sage3.compare.engine import Generation, Inspection

STRENGTH = {"exact": 0, "fp4": 12, "int8": 3, "int8-fast": 5, "auto": 4, "plan": 2}
SECONDS = {"exact": 4.0, "fp4": 1.0, "int8": 2.0, "int8-fast": 1.6, "auto": 2.0, "plan": 1.5}


class FakeEngine:
    """``journal``: a file that gets a line "what pid precision seed prompt" at each event; ``nap``: seconds a step."""

    name = "fake"
    floor_method = "one way against another"

    def __init__(
        self, journal: Path | None = None, nap: float = 0.0, emulated: bool = False, device: str = "fake GPU"
    ) -> None:
        self.journal, self.nap, self.emulated, self.device = journal, nap, emulated, device
        self.fails: dict[str, Exception] = {}  # by precision
        self.calls: list[str] = []
        self.closed = False
        self.on_preview = None

    def describe(self):
        return {"engine": self.name, "device": self.device, "dtype": "float32"}

    def check(self, request, sides):
        self._note("check", "-", request)

    def warm_up(self, request, side, on_step):
        self._note("warm-up", side.wish, request)
        for i in range(min(2, request.steps)):
            on_step(i + 1, 2)

    def generate(self, request, side, on_step):
        precision = side.wish
        self._note("start", precision, request)
        if precision in self.fails:
            raise self.fails[precision]
        for i in range(request.steps):
            time.sleep(self.nap)
            on_step(i + 1, request.steps)
        kernel = "exact" if precision == "exact" else f"{precision}-emulated" if self.emulated else f"{precision}-sm90"
        line = {"wished": precision, "kernel": kernel, "reason": "told to", "fell_back": False, "calls": 24}
        seconds = SECONDS[precision] * (1 + 0.05 * (request.seed % 3))
        self._note("end", precision, request)
        return Generation(
            seconds, [seconds / request.steps] * request.steps, [line], seconds / 2, handle=(request, precision)
        )

    def exact(self, request, second_way, on_step):
        self._note("second" if second_way else "first", "exact", request)
        on_step(1, 1)
        return Generation(1.0, [1.0], [], handle=(request, "second" if second_way else "exact"))

    def finish(self, generation):
        request, what = generation.handle
        self._note("decode", what, request)
        generation.video = frames(request, {"second": 1}.get(what, STRENGTH.get(what, 0)))
        generation.decode_seconds = 0.5

    def inspect(self, request, a, b, on_step):
        self._note("inspect", b.wish, request)
        rows = []
        for layer in range(4):
            for kind, k_tokens in (("self", 320), ("cross", 11)):
                for step in range(request.steps):
                    size = STRENGTH[b.wish] * (1 + layer) * (1 + 0.1 * step) / 400
                    each = {"a": errors(1e-6), "b": errors(size), "floor": errors(2e-6)}
                    rows.append({"layer": layer, "kind": kind, "step": step, "q_tokens": 320, "k_tokens": k_tokens, **each})
        each = {"a": errors(1e-6), "b": errors(STRENGTH[b.wish] / 300), "floor": errors(2e-6)}
        return Inspection(rows, [{"step": 0, "sigma": 1.0, **each}])

    def close(self):
        self.closed = True

    def _note(self, what, precision, request):
        self.calls.append(f"{what} {precision} {request.seed}")
        if self.journal is not None:
            line = f"{what} {os.getpid()} {precision} {request.seed} {request.prompt.replace(' ', '_')}\n"
            with open(self.journal, "ab", buffering=0) as file:
                file.write(line.encode())  # one write: whole lines, whoever else writes


def errors(size: float) -> dict[str, float]:
    return {"cosine": 1 - size**2, "relative_l1": size, "rmse": size, "max_abs": size * 10}


def frames(request, strength: int) -> np.ndarray:
    """Noise by the request's seed, moved by ``strength`` in a part: (T, H, W, 3) uint8."""
    size = request.size
    shape = (size.frames, size.height, size.width, 3)
    video = np.random.default_rng(request.seed).integers(30, 180, shape).astype(np.uint8)
    video[1:, : size.height // 2] += np.uint8(strength + request.seed % 3 if strength else 0)
    return video


class Open:
    """``open_engine`` for a process elsewhere: a stand-in whose ``fails`` precision gives up."""

    def __init__(self, journal: Path, nap: float = 0.02, fails: str = "") -> None:
        self.journal, self.nap, self.fails = journal, nap, fails

    def __call__(self, name):
        import torch

        torch.set_num_threads(1)
        engine = FakeEngine(self.journal, self.nap)
        if self.fails:
            engine.fails[self.fails] = RuntimeError("the kernel gave up")
        return engine
