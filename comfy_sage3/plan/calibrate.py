"""Error per layer and noise level: captured q, k and v through every precision, against exact attention in fp32.

One call at a time and nothing of it kept: of a long one a few heads and blocks of 128 queries, always with all keys. That
is exact for those rows: the methods quantise Q in blocks of 128 rows, and K and V head by head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import attention
from ..dispatch import Call, choose
from ..errors import InputError
from ..kernels.devices import capability_of
from ..precision import Precision
from ..reference import exact_attention
from ..report import Report
from .costs import Costs, measured, modelled
from .plan import MEASURED, Budget, LayerPlan, nearest
from .solve import MOST_OF_A_CELL, Choice, budget_of, solve

BATCHES, HEADS, BLOCKS, BLOCK = 2, 4, 4, 128
SHORT = 1 << 22  # scores; a call with fewer is replayed whole
AT_ONCE = 1 << 24  # elements of K held at a time in fp32: 64 MB


class Error(NamedTuple):
    """Sums of squares over what was compared: of the difference and of the exact values."""

    difference: float = 0.0
    size: float = 0.0

    @property
    def relative(self) -> float | None:
        """|out - exact| / |exact|; None where that is not a finite number."""
        if self.difference == 0.0:
            return 0.0
        value = math.sqrt(self.difference / self.size) if self.size > 0 else math.inf
        return value if math.isfinite(value) else None


@torch.no_grad()
def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precisions: Iterable[Precision],
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    layout: str = "HND",
    emulate: bool = False,
) -> dict[Precision, Error | None]:
    """How far each of ``precisions`` is from exact attention on a sample of one call.

    Args:
        q, k, v: as ``attention`` takes them, GQA included: (B, H, L, D) in layout "HND", (B, L, H, D) in "NHD".
        mask: 4-D, broadcastable to (B, H, Lq, Lk); scale: of the scores, None for D ** -0.5.
        emulate: compute in plain PyTorch what has no kernel here.

    Returns:
        per precision the sums of squares, or None where it cannot serve this call or gives a result that is not finite.
        The inputs are not modified.
    """
    if layout == "NHD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    unseen = Report()  # a replay is no call of the model's
    found: dict[Precision, Error | None] = {p: Error() for p in precisions}
    for p in found:
        if choose(describe(q, k, mask), p, emulate=emulate).fell_back:
            found[p] = None
    if not any(e is not None for e in found.values()):
        return found  # the reference, too, may not take such a call
    for b, heads, rows in _samples(q.shape, k.shape, q.device):
        of_kv = heads // (q.shape[1] // k.shape[1])
        qs, ks, vs = q[b : b + 1, heads][:, :, rows], k[b : b + 1, of_kv], v[b : b + 1, of_kv]
        ms = None if mask is None else _mask_of(mask, b, heads, rows)
        truth, _ = exact_attention(qs.float(), ks.float(), vs.float(), mask=ms, scale=scale)
        size = float(torch.linalg.vector_norm(truth)) ** 2
        for p, so_far in found.items():
            if so_far is None:
                continue
            try:
                out = attention(qs, ks, vs, mask=ms, scale=scale, precision=p, emulate=emulate, report=unseen)
            except InputError:  # NaN in the inputs, which nothing but exact attention is to be blamed for
                found[p] = None
                continue
            assert isinstance(out, Tensor)
            difference = float(torch.linalg.vector_norm(out.float() - truth)) ** 2
            finite = math.isfinite(difference) and math.isfinite(size)
            found[p] = Error(so_far.difference + difference, so_far.size + size) if finite else None
    return found


def describe(q: Tensor, k: Tensor, mask: Tensor | None) -> Call:
    """What dispatch decides by, of an inference call in layout HND."""
    capability = capability_of(q.device)
    return Call(tuple(q.shape), tuple(k.shape), q.dtype, q.device.type, capability, has_mask=mask is not None)


def _samples(q_shape: torch.Size, k_shape: torch.Size, device: torch.device) -> Iterable[tuple[int, Tensor, Tensor | slice]]:
    """(batch element, its heads, its query rows), a few heads at a time."""
    (batch, heads, q_len, head_dim), k_len = q_shape, k_shape[2]
    whole = batch * heads * q_len * k_len <= SHORT
    rows: Tensor | slice = slice(None)
    blocks = -(-q_len // BLOCK)
    if not whole and blocks > BLOCKS:
        begins = torch.tensor(spread(blocks, BLOCKS), device=device) * BLOCK
        rows = (begins[:, None] + torch.arange(BLOCK, device=device)).flatten()
        rows = rows[rows < q_len]
    some = spread(heads, heads if whole else HEADS)
    together = max(1, AT_ONCE // max(1, k_len * head_dim))
    for b in spread(batch, batch if whole else BATCHES):
        for i in range(0, len(some), together):
            yield b, torch.tensor(some[i : i + together], device=device), rows


def _mask_of(mask: Tensor, b: int, heads: Tensor, rows: Tensor | slice) -> Tensor:
    mask = mask if mask.shape[0] == 1 else mask[b : b + 1]
    mask = mask if mask.shape[1] == 1 else mask[:, heads]
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def spread(size: int, count: int) -> list[int]:
    """Up to ``count`` of the indices below ``size``, evenly spread, the first and the last among them."""
    if count >= size:
        return list(range(size))
    return [size // 2] if count == 1 else sorted({round(i * (size - 1) / (count - 1)) for i in range(count)})


@dataclass
class _Cell:
    errors: dict[Precision, Error | None] = field(default_factory=dict)
    seconds: dict[Precision, float] = field(default_factory=dict)


class Calibration:
    """What is known of every (layer, column) so far: sums only, no tensor is kept."""

    def __init__(self, costs: Costs, *, emulate: bool, min_tokens: int) -> None:
        self.costs = costs
        self.emulate = emulate
        self.min_tokens = min_tokens
        self._cells: dict[tuple[str, int], _Cell] = {}
        self._timed: dict[tuple[object, ...], dict[Precision, float]] = {}

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers seen, in the order of their first call."""
        return tuple(dict.fromkeys(layer for layer, _ in self._cells))

    def add(
        self,
        layer: str,
        column: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        exact: Callable[[], object],
        mask: Tensor | None = None,
        scale: float | None = None,
        layout: str = "HND",
    ) -> None:
        """Replay one call of ``layer`` at the sigma of ``column``. ``exact`` runs it as the user's own attention does.

        Tensors as for ``replay``. Calls of one cell are pooled: a precision that one of them cannot have, none has.
        """
        errors = replay(q, k, v, self.costs.precisions, mask=mask, scale=scale, layout=layout, emulate=self.emulate)
        seconds = self._seconds(q, k, v, mask, scale, layout, exact, [p for p, e in errors.items() if e is not None])
        cell = self._cells.setdefault((layer, column), _Cell())
        for p, error in errors.items():
            before = cell.errors.get(p, Error())
            both = before is not None and error is not None
            cell.errors[p] = Error(*(a + b for a, b in zip(before, error, strict=True))) if both else None  # type: ignore[arg-type]
        for p, s in seconds.items():
            cell.seconds[p] = cell.seconds.get(p, 0.0) + s

    def _seconds(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        layout: str,
        exact: Callable[[], object],
        precisions: list[Precision],
    ) -> dict[Precision, float]:
        shapes = [tuple(t.shape) if layout == "HND" else tuple(t.transpose(1, 2).shape) for t in (q, k)]
        if self.costs.kind != MEASURED:
            return {p: modelled(p, shapes[0], shapes[1]) for p in (Precision.EXACT, *precisions)}
        key = (*shapes, q.dtype, None if mask is None else mask.shape, layout, tuple(precisions))
        if key not in self._timed:

            def at(precision: Precision) -> Callable[[], object]:
                gqa = shapes[0][1] != shapes[1][1]
                return lambda: attention(
                    q, k, v, mask=mask, scale=scale, layout=layout, enable_gqa=gqa, precision=precision, report=Report()
                )

            self._timed[key] = measured({Precision.EXACT: exact} | {p: at(p) for p in precisions})
        return self._timed[key]

    def plan(self, model: str, sigmas: list[float], schedule: list[float], budget: str, custom: float = 0.0) -> LayerPlan:
        """Solve what was measured under ``budget``. ``sigmas``: of the columns, falling; ``schedule``: of all steps.

        Raises InputError where nothing was measured or the budget is unknown.
        """
        limit = budget_of(budget, custom)
        if not self._cells:
            raise InputError(
                f"No attention call of at least {self.min_tokens} tokens was seen at a calibrated step: lower min_tokens."
            )
        exact, precisions = Precision.EXACT, self.costs.precisions
        layers, most = self.layers, limit * MOST_OF_A_CELL
        # how many steps each column stands for; a column that is nearest to none would weigh nothing
        steps = [0] * len(sigmas)
        for s in schedule:
            steps[nearest(sigmas, s)] += 1
        steps = [max(1, n) for n in steps]

        keys = [(layer, column) for layer in layers for column in range(len(sigmas)) if (layer, column) in self._cells]
        options = []  # of each cell: what it may have, exact first
        for key in keys:
            cell = self._cells[key]
            choices = [(exact, Choice(cell.seconds[exact], 0.0))]
            for p in precisions:
                error = cell.errors[p].relative if cell.errors[p] is not None else None  # type: ignore[union-attr]
                if error is not None:
                    choices.append((p, Choice(cell.seconds[p], error)))
            options.append(choices)
        solution = solve([[c for _, c in o] for o in options], [steps[c] for _, c in keys], limit, most)
        picked = {key: o[i][0] for key, o, i in zip(keys, options, solution.picks, strict=True)}
        known = {key: dict(o) for key, o in zip(keys, options, strict=True)}

        def table(p: Precision, what: str) -> tuple[tuple[float | None, ...], ...]:
            rows = []
            for layer in layers:
                row = (known.get((layer, c), {}).get(p) for c in range(len(sigmas)))
                rows.append(tuple(None if x is None else getattr(x, what) for x in row))
            return tuple(rows)

        return LayerPlan(
            model=model,
            layers=layers,
            sigmas=tuple(sigmas),
            steps=tuple(steps),
            chosen=tuple(tuple(picked.get((layer, c), exact) for c in range(len(sigmas))) for layer in layers),
            errors={p: table(p, "error") for p in precisions},
            seconds={p: table(p, "cost") for p in (exact, *precisions)},
            budget=Budget(budget, limit, most),
            bound=solution.bound,
            costs=self.costs.kind,
            device=self.costs.device,
            emulated=self.costs.emulated,
            min_tokens=self.min_tokens,
        )
