"""A stand-in engine whose times, reports and frames are known beforehand, and the smallest real request."""

from __future__ import annotations

import numpy as np
import pytest

from comfy_sage3.compare.engine import Generation, Inspection, Request, Side
from comfy_sage3.demo.sizes import Size
from comfy_sage3.precision import Precision

PROMPT = "a large red circle moving left on a black background"
ERRORS = {"cosine": 0.5, "relative_l1": 0.25, "rmse": 0.125, "max_abs": 2.0}


class StandInEngine:
    """Writes down what it is asked for. ``kernels`` and ``seconds`` are per precision."""

    name = "standin"
    floor_method = "one way against another"

    def __init__(self, size: Size, kernels: dict[str, str] | None = None) -> None:
        self.size = size
        self.kernels = {"exact": "exact", "fp4": "fp4-emulated", "int8": "int8-sm90"} | (kernels or {})
        self.seconds = {"exact": [4.0, 8.0, 6.0], "fp4": [2.0, 3.0, 1.0], "int8": [2.0, 3.0, 1.0]}
        self.log: list[str] = []
        self.inspects = True
        self.short_calls = False  # whether a run also reports calls its side's plan keeps exact
        self.shapes_differ = False

    def describe(self):
        return {"engine": self.name, "device": "stand-in", "dtype": "float32"}

    def check(self, request, sides):
        self.log.append("check")

    def warm_up(self, request, side, on_step):
        self.log.append(f"warm-up {side.label}")
        for i in range(2):
            on_step(i + 1, 2)

    def generate(self, request, side, on_step):
        self.log.append(f"run {side.label}")
        for i in range(request.steps):
            on_step(i + 1, request.steps)
        wished = side.precision.value
        past = self.log.count(f"run {side.label}") - 1
        kernel = self.kernels[wished]
        line = {"wished": wished, "kernel": kernel, "reason": "told to", "calls": 24}
        line["fell_back"] = not kernel.startswith(wished)
        lines = [line]
        if side.precision is not Precision.EXACT and self.short_calls:
            why = side.plan.choose(None, 320, 11)[1]
            short = {"wished": "exact", "kernel": "exact", "reason": why, "fell_back": False, "calls": 24}
            lines = [line, short]
        total = self.seconds[wished][past % 3]
        return Generation(
            total,
            [total / request.steps] * request.steps,
            lines,
            total / 2,
            None,
            handle=side.precision.value,
        )

    def exact(self, request, second_way, on_step):
        self.log.append(f"exact {'second' if second_way else 'first'} way")
        return Generation(1.0, [1.0], [], handle="second" if second_way else "exact")

    def finish(self, generation):
        self.log.append(f"decode {generation.handle}")
        generation.video = frames(self.size, {"exact": 0, "second": 1}.get(generation.handle, 6))
        if self.shapes_differ and generation.handle == "fp4":
            generation.video = generation.video[:, :-1]
        generation.decode_seconds = 0.5

    def inspect(self, request, a, b, on_step):
        self.log.append("inspect")
        if not self.inspects:
            return None
        each = {"a": ERRORS, "b": ERRORS, "floor": ERRORS}
        rows = [
            {"layer": layer, "kind": kind, "step": step, "q_tokens": 320, "k_tokens": k_tokens, **each}
            for layer in range(2)
            for kind, k_tokens in (("self", 320), ("cross", 11))
            for step in range(2)
        ]
        return Inspection(rows, [{"step": 0, "sigma": 1.0, **each}])

    def close(self):
        self.log.append("close")


def frames(size: Size, offset: int) -> np.ndarray:
    """Noise by a fixed seed, one step of ``offset`` in a part of the second frame: (T, H, W, 3) uint8."""
    video = np.random.default_rng(0).integers(20, 200, (size.frames, size.height, size.width, 3)).astype(np.uint8)
    video[1, :8] += np.uint8(offset)
    return video


@pytest.fixture
def request_():
    return Request(PROMPT, Size(32, 16, 5), seed=1, steps=2)


@pytest.fixture
def sides():
    return Side("A", Precision.EXACT), Side("B", Precision.FP4)


@pytest.fixture
def standin(request_):
    return StandInEngine(request_.size)
