"""How it is measured: peers take turns, several rounds, each sample at least 10 ms; medians and their spread.

Before each sample the GPU rests, and warms up with one untimed call: at its power limit it lowers its clock by a quarter
within a tenth of a second, and without the pause one peer's heat would be another's slowness. Rest 0 measures that state.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from comfy_sage3.metrics import attention_error

from .shapes import Shape

REST_S = 0.06
SAMPLE_MS = 10.0  # events are exact to about a microsecond, launches to some ten
TINY_MS = 0.3  # calls shorter than this are replayed as a CUDA graph: otherwise Python would be measured
MOST_ROUNDS = 15
FEWEST_ROUNDS = 5
LONG_MS = 1000.0  # a round longer than this is taken twice only
INPUT_SETS = 16  # at most, so that inputs that fit in L2 do not stay there

ROWS = 1024  # query rows that are held against exact attention
HEADS = 4
OFFSET = 5.0  # standard deviation of the channels' offsets; the content's is 1
SINK_CHANNEL = 16.0  # of the queries that see a sink
KINDS = ("normal", "offsets", "kv-offsets")
KIND_TEXT = {
    "normal": "N(0,1)",
    "offsets": "N(0,1) + channel offsets on Q, K, V",
    "kv-offsets": "N(0,1) + channel offsets on K, V",
}

Calls = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call. ``by`` is "events" or "graph"."""

    median: float
    p10: float
    p90: float
    samples: int
    calls: int  # in one sample
    by: str = "events"


class Clock(Protocol):
    """What can time a batch of calls, in ms."""

    def time(self, batch: Callable[[], None]) -> float:
        """How long one run of ``batch`` took on the device."""

    def rest(self, warm_up: Callable[[], None]) -> None:
        """Let the device cool down, then run ``warm_up``, untimed."""

    def batch(self, calls: Calls, count: int, tiny: bool) -> tuple[Callable[[], None], str]:
        """``count`` calls, taking turns among ``calls``, as one function, and how it is run."""


class CudaClock:
    """CUDA events on the current stream; a rest takes so many seconds."""

    def __init__(self, rest_s: float = REST_S) -> None:
        self.rest_s = rest_s

    def rest(self, warm_up: Callable[[], None]) -> None:
        """Sleep, with nothing running on the GPU; the first call after it brings the clock up."""
        torch.cuda.synchronize()
        time.sleep(self.rest_s)
        warm_up()

    def time(self, batch: Callable[[], None]) -> float:
        """Milliseconds between an event before and one after, both on the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        batch()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def batch(self, calls: Calls, count: int, tiny: bool) -> tuple[Callable[[], None], str]:
        """A loop; a captured graph for tiny calls that can be captured."""
        loop = looped(calls, count)
        if not tiny:
            return loop, "events"
        try:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loop()
            return graph.replay, "graph"
        except RuntimeError:  # somebody allocates or synchronises inside: then its launches are part of its time
            torch.cuda.synchronize()
            return loop, "events"


def looped(calls: Calls, count: int) -> Callable[[], None]:
    """``count`` calls, taking turns among ``calls``."""

    def loop() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    return loop


def interleaved(runners: Mapping[str, Calls], seconds: float, clock: Clock) -> dict[str, Timing]:
    """Time every runner in about ``seconds`` altogether, round by round, forth and back. Raises what a call raises."""
    batches: dict[str, tuple[Callable[[], None], int, str]] = {}
    cost = 0.0
    for name, calls in runners.items():
        ms = _estimate(calls, clock)
        count = max(1, math.ceil(SAMPLE_MS / max(ms, 1e-3)))
        count = -(-count // len(calls)) * len(calls)  # every set of inputs as often as the others
        run, by = clock.batch(calls, count, ms < TINY_MS)
        if by == "graph":
            clock.time(run)
        batches[name] = run, count, by
        cost += ms * count
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS if cost < LONG_MS else 2, int(seconds * 1000 / max(cost, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            run, count, _ = batches[name]
            clock.rest(looped(runners[name], 1))
            samples[name].append(clock.time(run) / count)
    return {name: summary(ms, batches[name][1], batches[name][2]) for name, ms in samples.items()}


def _estimate(calls: Calls, clock: Clock) -> float:
    """Warm up, and say about how long a call takes."""
    first = clock.time(looped(calls, 1))
    if first > 200:
        return first  # long enough for what comes once to vanish
    clock.time(looped(calls, len(calls)))
    single = clock.time(looped(calls, 1))
    return single if single > 1 else clock.time(looped(calls, 10)) / 10


def summary(ms: Sequence[float], calls: int, by: str) -> Timing:
    """Median, and the first and last decile."""
    return Timing(statistics.median(ms), quantile(ms, 0.1), quantile(ms, 0.9), len(ms), calls, by)


def quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def input_sets(shape: Shape, element_size: int, l2_bytes: int) -> int:
    """How many sets of inputs take turns: enough that together they are three times L2."""
    return max(1, min(INPUT_SETS, math.ceil(3 * l2_bytes / (shape.elements() * element_size))))


def inputs(
    shape: Shape, kind: str, seed: int, device: str, dtype: torch.dtype = torch.bfloat16, heads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``shape``; with ``heads`` only so many and one batch. Drawn in fp32, then rounded."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads = (shape.batch, shape.heads) if heads is None else (1, min(heads, shape.heads))
    made = []
    for which, tokens in (("q", shape.queries), ("k", shape.keys), ("v", shape.keys)):
        x = torch.empty(batch, heads, tokens, shape.head_dim, dtype=dtype, device=device)
        for b in range(batch):  # piece by piece: fp32 copies of the longest would be large
            x[b] = torch.randn(x.shape[1:], generator=generator, device=device)
        if kind == "offsets" or (kind == "kv-offsets" and which != "q"):
            x += OFFSET * torch.randn(batch, heads, 1, shape.head_dim, generator=generator, device=device).to(dtype)
        made.append(x)
    q, k, v = made
    if shape.score_std != 1.0:
        q *= shape.score_std**0.5
        k *= shape.score_std**0.5
    if shape.sink:
        give_sink(q, k, v, shape.sink)
    return q, k, v


def give_sink(q: Tensor, k: Tensor, v: Tensor, weight: float, sees: Tensor | float = 1.0) -> None:
    """Makes the first key of N(0,1) q (B, H, Lq, D), k and v (B, Hkv, Lk, D) take about ``weight`` of every query, in place.

    Where ``sees`` (Lq) is 1, not 0. Its value becomes small, as in trained models. Scores are to be scaled by 1 / sqrt(D).
    """
    q[..., 0], k[..., 0] = SINK_CHANNEL * sees, 0.0  # a channel that only the sink answers to
    others = k.shape[2] * math.exp(0.5)  # the sum of exp(N(0,1)) over that many
    k[:, :, 0] = 0.0
    k[:, :, 0, 0] = math.log(weight / (1 - weight) * others) / (SINK_CHANNEL * q.shape[3] ** -0.5)
    v[:, :, 0] *= 0.05


def sampled_rows(queries: int) -> Tensor:
    """Up to ``ROWS`` rows, evenly over the sequence, the first and the last among them."""
    return torch.linspace(0, queries - 1, min(ROWS, queries), dtype=torch.float64).round().long()


def sampled_heads(shape: Shape) -> int:
    """How many heads are held against exact attention."""
    return min(shape.heads, HEADS if shape.keys <= 16384 else 2)


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, causal: bool, dout: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """fp64 attention of these rows of the first batch -> (out, dq or None), each (heads, rows, D).

    q, k, v: (B, heads, tokens, D), already cut to the heads that matter. ``dout`` (of q's shape) asks for dq.
    """
    at_once = max(1, min(len(rows), (1 << 27) // k.shape[2]))  # scores: 1 GB
    scale, rows = q.shape[-1] ** -0.5, rows.to(q.device)
    out = torch.empty(q.shape[1], len(rows), v.shape[-1], dtype=torch.float64, device=q.device)
    dq = None if dout is None else torch.empty_like(out)
    for head in range(q.shape[1]):
        keys, values = k[0, head].double(), v[0, head].double()
        for start in range(0, len(rows), at_once):
            piece = rows[start : start + at_once]
            scores = (q[0, head, piece].double() * scale) @ keys.T
            if causal:
                hidden = torch.arange(len(keys), device=q.device) > piece[:, None]
                scores.masked_fill_(hidden, -torch.inf)
            p = torch.softmax(scores, -1)
            here = slice(start, start + at_once)
            out[head, here] = p @ values
            if dq is not None and dout is not None:
                dp = dout[0, head, piece].double() @ values.T
                dq[head, here] = (p * (dp - (p * dp).sum(-1, keepdim=True))) @ keys * scale
    return out, dq


def error(got: Tensor, exact: Tensor, rows: Tensor) -> dict[str, float]:
    """Relative L1 and cosine of a peer's full output at the rows and heads of ``exact``."""
    found = attention_error(got[0, : exact.shape[0]][:, rows.to(got.device)], exact)
    return {"relative_l1": found["relative_l1"], "cosine": found["cosine"]}


def copy_bandwidth(clock: Clock, device: str, gigabytes: float = 2.0) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    source = torch.empty(int(gigabytes * 1e9), dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    run = looped([lambda: target.copy_(source)], 5)
    clock.time(run)
    ms = statistics.median(clock.time(run) for _ in range(5)) / 5
    return 2 * source.numel() / ms / 1e6
