"""The loop all references share: attention by tiles of the score matrix, with an online softmax.

Scores are held transposed, S^T = K Q^T with shape (pairs, keys, rows): everything that is constant over a block of
keys (block scale, running maximum) then varies along the contiguous dimension, which is what makes reductions and
broadcasts over blocks of 16 keys vectorise. Memory is O(N D) plus one tile of scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

WeightRule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(scores, block_max, maximum) -> (new maximum, what the rows' sums grow by; None: by the weights).

scores (n, c, R) holds S^T and is overwritten with the (quantised) P^T relative to the new maximum;
block_max (n, c / block, R) is the largest score of each block of keys; maximum and its successor are (n, 1, R), or more
than one number a row if the rule has to keep more (``states``): the first is what the weights are relative to.
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of one call. ``groups`` is the number of query heads that share a key head."""

    batch: int
    kv_heads: int
    groups: int
    q_tokens: int
    k_tokens: int
    head_dim: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        """Check q (B, H, Lq, D) against k and v (B, Hkv, Lk, D).

        Raises:
            InputError: they do not fit, or a dtype or device differs.
        """
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            raise InputError(
                f"q, k and v must have 4 dimensions (batch, heads, tokens, head_dim), got {q.dim()}, {k.dim()}, {v.dim()}."
            )
        if k.shape != v.shape:
            raise InputError(f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}.")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise InputError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch size and head_dim.")
        heads, kv_heads = q.shape[1], k.shape[1]
        if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
            raise InputError(f"{heads} query heads cannot share {kv_heads} key heads: give a multiple.")
        if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
            raise InputError(
                f"q, k and v must share one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}: convert them."
            )
        if not q.device == k.device == v.device:
            raise InputError(f"q, k and v are on {q.device}, {k.device} and {v.device}: move them to one device.")
        if not 1 <= q.shape[3] <= 256:
            raise InputError(f"head_dim is {q.shape[3]}: 1 to 256 are supported.")
        return cls(q.shape[0], kv_heads, heads // kv_heads if kv_heads else 1, q.shape[2], k.shape[2], q.shape[3])

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """``mask`` as a view (B, Hkv, G, Lq, Lk).

        Raises:
            InputError: it does not broadcast to (B, H, Lq, Lk) or is neither bool nor floating point.
        """
        if mask is None:
            return None
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"The mask is {mask.dtype}: give bool (True attends) or a floating-point bias.")
        full = (self.batch, self.kv_heads * self.groups, self.q_tokens, self.k_tokens)
        try:
            if mask.dim() > 4:
                raise RuntimeError
            return mask.expand(full).unflatten(1, (self.kv_heads, self.groups))
        except RuntimeError:
            raise InputError(f"A mask of shape {tuple(mask.shape)} does not broadcast to {full}.") from None


@dataclass(frozen=True)
class Plan:
    """How the work is cut. Nothing but speed and memory depends on it.

    rows divides 128 or is a multiple of it, so that a piece lies inside one smoothing block of Q or is made of
    whole ones; keys is a multiple of every tile size in use; pairs counts (batch, kv head) pairs done at once.
    """

    rows: int
    keys: int
    pairs: int

    @classmethod
    def for_device(cls, device: torch.device, shape: Shape) -> Plan:
        """On a CPU 128 x 512 scores a core stay in its L2 cache; a GPU wants few, large launches."""
        if device.type == "cpu":
            rows, keys, budget = 128, 512, 128 * 1024
        else:
            rows, keys, budget = 1024, 4096, 64 * 1024 * 1024
        rows = min(rows, -(-max(shape.q_tokens, 1) // 128) * 128)
        keys = min(keys, -(-max(shape.k_tokens, 1) // 128) * 128)
        return cls(rows, keys, max(1, budget // (rows * keys * shape.groups)))


def row_ranges(tokens: int, rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``rows`` rows; when rows > 128 a last partial block of 128 comes alone (see ``Plan``)."""
    start = 0
    while start < tokens:
        stop = min(start + rows, tokens)
        if rows > 128 and stop == tokens and (stop - start) > 128 and (stop - start) % 128:
            stop -= (stop - start) % 128
        yield start, stop
        start = stop


def pair_ranges(shape: Shape, pairs: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of the (batch, kv head) grid of about ``pairs`` pairs: slices for the two dimensions."""
    if pairs >= shape.kv_heads > 0:
        step = pairs // shape.kv_heads
        for b in range(0, shape.batch, step):
            yield slice(b, min(b + step, shape.batch)), slice(0, shape.kv_heads)
        return
    for b in range(shape.batch):
        for h in range(0, shape.kv_heads, pairs):
            yield slice(b, b + 1), slice(h, min(h + pairs, shape.kv_heads))


def hide_(
    scores: Tensor, mask: Tensor | None, *, rows: tuple[int, int], keys: tuple[int, int], limit: int, causal: bool
) -> None:
    """Apply padding, causality and mask to S^T in place, by token.

    scores: (n, c, G, r) for rows[0]..rows[1] and keys[0]..keys[1]; keys at or past ``limit`` are padding.
    mask: (b, h, G, r, c') already cut to these rows and to keys below ``limit``; b * h = n.
    """
    real = limit - keys[0]
    if real < scores.shape[1]:
        scores[:, real:] = -torch.inf
    if mask is not None:
        piece = mask.permute(0, 1, 4, 2, 3).flatten(0, 1)
        if piece.dtype == torch.bool:
            scores[:, :real].masked_fill_(piece.logical_not(), -torch.inf)
        else:
            scores[:, :real] += piece.to(scores.dtype)
    if causal and keys[1] - 1 > rows[0]:
        key = torch.arange(keys[0], keys[1], device=scores.device)
        row = torch.arange(rows[0], rows[1], device=scores.device)
        scores.masked_fill_((key[:, None] > row).unsqueeze(1), -torch.inf)


def references(block_max: Tensor, maximum: Tensor, per_tile: int, own_tile: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The online softmax's maxima for a run of KV tiles, computed together.

    Args:
        block_max: (n, blocks, R), largest score of each block of keys.
        maximum: (n, 1, R), running maximum before these tiles.
        per_tile: blocks in a tile.
        own_tile: P of a tile is taken relative to the tile's own row maximum (True) or to the running one.

    Returns:
        (reference, factor, new maximum): reference (n, blocks, R) is what to subtract from the scores, never
        -inf; factor (n, blocks, R) = exp(reference - new maximum) brings each block to the common scale, 0 where
        nothing has been seen; new maximum (n, 1, R).
    """
    blocks = block_max.shape[1]
    tiles = F.pad(block_max, (0, 0, 0, -blocks % per_tile), value=-torch.inf)
    tiles = tiles.unflatten(1, (-1, per_tile)).amax(2)
    if own_tile:
        reference, new = tiles, torch.maximum(maximum, tiles.amax(1, keepdim=True))
    else:
        reference = torch.cat((maximum, tiles), 1).cummax(1).values[:, 1:]
        new = reference[:, -1:]
    factor = torch.exp(reference - finite(new))
    reference, factor = (
        x.repeat_interleave(per_tile, 1)[:, :blocks] if per_tile > 1 else x for x in (finite(reference), factor)
    )
    return reference, factor, new


LAZY_UP, LAZY_DOWN, LAZY_FLOOR = 2, 3, 40  # powers of two


def lazy_references(block_max: Tensor, state: Tensor, per_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``references``, for references m that are whole powers of two and follow the tile's maximum T lazily.

    m starts at 2^0. Where T exceeds m by more than 2^2 or is below it by more than 2^3, m becomes the power of two at or
    above T, or 2^-40 of the largest it was for any tile, if that is more, so that what was summed before cannot overflow.
    A tile of which a row sees nothing leaves that row's m.

    state (n, 2, R) and its successor hold m and the largest it was, as natural logarithms; -inf where nothing was seen.
    """
    blocks = block_max.shape[1]
    tiles = F.pad(block_max, (0, 0, 0, -blocks % per_tile), value=-torch.inf)
    tiles = tiles.unflatten(1, (-1, per_tile)).amax(2) * math.log2(math.e)
    m = finite(state[:, 0] * math.log2(math.e)).round()
    highest = (state[:, 1] * math.log2(math.e)).round()
    powers = []
    for top in tiles.unbind(1):
        seen = top > -torch.inf
        astray = seen & ((top - m > LAZY_UP) | (m - top > LAZY_DOWN))
        m = torch.where(astray, torch.maximum(top.ceil(), highest - LAZY_FLOOR), m)
        highest = torch.where(seen, torch.maximum(highest, m), highest)
        powers.append(m)
    reference = torch.stack(powers, 1)
    factor = torch.exp2((reference - m.unsqueeze(1)).clamp(max=126.0))
    reference, factor = (x.repeat_interleave(per_tile, 1)[:, :blocks] for x in (reference, factor))
    m = m.masked_fill(highest == -torch.inf, -torch.inf)
    return reference * math.log(2), factor, torch.stack((m, highest), 1) * math.log(2)


def finite(maximum: Tensor) -> Tensor:
    """``maximum`` with 0 for -inf (a row that has seen no key), so that subtracting it makes no NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def attend(
    shape: Shape,
    q_t: Tensor,
    k_t: Tensor,
    v: Tensor,
    weigh: WeightRule,
    *,
    block: int = 1,
    states: int = 1,
    unit: float | None = None,
    means_t: Tensor | None = None,
    k_smooth_t: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T + means k_smooth^T + mask) v and its LSE, tile by tile.

    Args:
        q_t: (B, Hkv, G, D', Lq), the operand of the product, softmax scale included.
        k_t: (B, Hkv, D', Lk') with Lk' >= Lk a multiple of ``block``.
        v: (B, Hkv, Lk', D), rows past Lk zero.
        weigh: turns scores into weights, see ``WeightRule``.
        block: keys that share a maximum for ``weigh``.
        states: numbers that ``weigh`` keeps for a row.
        unit: what the products are to be multiplied by, more than 0, after they were rounded to fp32, as tensor cores give
            them. An additive mask joins before, in these units and rounded to fp32 once more, as in the kernel.
        means_t: (B, Hkv, G, D, blocks of 128 rows or 1), the part of q taken out by smoothing, times the scale.
        k_smooth_t: (B, Hkv, D, Lk'), what ``means_t`` is multiplied with.
        mask: (B, Hkv, G, Lq, Lk) view, bool or additive.

    Returns:
        out (B, H, Lq, D) in ``out_dtype`` and lse (B, H, Lq) fp32 (fp64 if the operands are), -inf for rows that
        see no key.
    """
    plan = Plan.for_device(v.device, shape)
    b, h, g, d = shape.batch, shape.kv_heads, shape.groups, shape.head_dim
    out = torch.zeros(b, h, g, shape.q_tokens, d, dtype=out_dtype, device=v.device)
    lse = torch.full((b, h, g, shape.q_tokens), -torch.inf, dtype=v.dtype, device=v.device)
    sums = torch.zeros_like(lse)
    if out.numel() == 0 or shape.k_tokens == 0:
        return out.flatten(1, 2), lse.flatten(1, 2)
    padded = k_t.shape[-1]
    for bs, hs in pair_ranges(shape, plan.pairs):
        keys_t, values = k_t[bs, hs].flatten(0, 1), v[bs, hs].flatten(0, 1)
        n = values.shape[0]
        smooth_t = None if k_smooth_t is None else k_smooth_t[bs, hs].flatten(0, 1)
        for r0, r1 in row_ranges(shape.q_tokens, plan.rows):
            width = g * (r1 - r0)
            q_piece = q_t[bs, hs, :, :, r0:r1].flatten(0, 1).transpose(1, 2).reshape(n, -1, width)
            maximum = values.new_full((n, states, width), -torch.inf)
            total = values.new_zeros((n, 1, width))
            acc = values.new_zeros((n, d, width))
            for c0 in range(0, min(padded, r1) if is_causal else padded, plan.keys):
                c1 = min(c0 + plan.keys, padded)
                if is_causal:  # keys after the last row are hidden from all of these rows
                    c1 = min(c1, -(-r1 // block) * block)
                scores = torch.bmm(keys_t[:, :, c0:c1].transpose(1, 2), q_piece)
                grid = scores.view(n, c1 - c0, g, r1 - r0)
                if means_t is not None and smooth_t is not None:
                    _add_means_(grid, means_t[bs, hs].flatten(0, 1), smooth_t[:, :, c0:c1], r0, r1)
                limit = min(c1, shape.k_tokens)
                piece = None if mask is None else mask[bs, hs, :, r0:r1, c0:limit]
                if unit is not None:
                    scores.copy_(scores.float())
                    if piece is not None and piece.dtype != torch.bool:
                        _add_bias_(grid, piece, unit)
                        piece = None
                    scores.mul_(unit)
                hide_(grid, piece, rows=(r0, r1), keys=(c0, c1), limit=limit, causal=is_causal)
                block_max = scores.view(n, (c1 - c0) // block, block, width).amax(2) if block > 1 else scores
                new, growth = weigh(scores, block_max, maximum)
                rescale = torch.exp(maximum[:, :1] - finite(new[:, :1]))
                total.mul_(rescale).add_(scores.sum(1, keepdim=True) if growth is None else growth)
                acc.mul_(rescale).baddbmm_(values[:, c0:c1].transpose(1, 2), scores)
                maximum = new
            acc.div_(total.masked_fill(total == 0, 1.0))
            shape_out = (bs.stop - bs.start, hs.stop - hs.start, d, g, r1 - r0)
            out[bs, hs, :, r0:r1] = acc.view(shape_out).permute(0, 1, 3, 4, 2)
            lse[bs, hs, :, r0:r1] = maximum[:, :1].view(shape_out[0], shape_out[1], g, r1 - r0)
            sums[bs, hs, :, r0:r1] = total.view(shape_out[0], shape_out[1], g, r1 - r0)
    lse += torch.log(sums)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _add_means_(grid: Tensor, means_t: Tensor, smooth_t: Tensor, r0: int, r1: int) -> None:
    """Add means . K^T to S^T (n, c, G, r): one number for each key and block of 128 rows."""
    n, c, g, r = grid.shape
    if means_t.shape[-1] > 1:
        means_t = means_t[..., r0 // 128 : -(-r1 // 128)]
    blocks = means_t.shape[-1]
    correction = torch.bmm(means_t.transpose(2, 3).flatten(1, 2), smooth_t).transpose(1, 2)  # (n, c, G * blocks)
    grid.view(n, c, g, blocks, r // blocks).add_(correction.unflatten(2, (g, blocks)).unsqueeze(-1))


def _add_bias_(grid: Tensor, piece: Tensor, unit: float) -> None:
    """Add a mask, cut as in ``hide_``, to S^T (n, c, G, r), which counts ``unit`` each; every number is an fp32 one."""
    log2_e, per_bias = (torch.tensor(x, dtype=torch.float32) for x in (math.log2(math.e), unit / math.log(2)))
    bias = (piece.permute(0, 1, 4, 2, 3).flatten(0, 1).float() * log2_e.item()).to(grid.dtype)
    real = grid[:, : bias.shape[1]]
    real.copy_((bias * (1 / per_bias).item() + real).float())
