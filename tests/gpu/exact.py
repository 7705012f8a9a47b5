"""Attention as it is defined, in fp64, and how far an 8-bit kernel may be from it: every tolerance stands here."""

from __future__ import annotations

import torch
from torch import Tensor

from comfy_sage3 import reference
from comfy_sage3.reference import Int8Options

# Relative L1 for N(0,1) inputs of at least LONG_ENOUGH keys. Both products in 8 bits leave about 0.016 at any length; a
# scale, a tile or a tail that is wrong leaves far more than 0.03.
NORMAL = 0.03
LONG_ENOUGH = 97

# int8-fast: each weight is off by up to 6 %, 2 % (standard deviation) where they are many; the sum of a row's, which its
# LSE is made of, by 4 % (0.06 in the logarithm) where all are alike.
FAST_NORMAL = 0.04
FAST_LSE = 3.0

# Everywhere else (few keys, offsets, peaked rows) the reference's 8-bit attention says what 8 bits can do. A kernel
# groups its scales a little differently, hence the factor; and where the reference is nearly exact, bf16 outputs and
# 8-bit V leave a little of their own.
OF_REFERENCE = 1.5
BESIDES = 0.006
BESIDES_WORST_ROW = 0.1

# The worst row's L1 error, relative to its own size or to the mean row's, whichever is larger: one wrong row among
# thousands does not move the mean.
WORST_ROW = 0.3

# LSE of N(0,1) inputs: a score is off by 0.011 (standard deviation), one that a row hangs on by four to five times that.
LSE_MEAN = 0.02
LSE_WORST = 0.1

# The same values at other addresses: sums (of means) may be taken in another order, which moves a code here and there.
SAME = 0.003


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64; a row that may attend nothing gives 0 and -inf. Causal: query i attends keys 0..i."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = ~torch.ones_like(hidden).tril()
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores, hidden = scores + mask.double(), hidden | (mask == -torch.inf)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return p @ v, lse


def relative_l1(got: Tensor, want: Tensor) -> float:
    """sum |got - want| / sum |want|; 0 where both are all zeros."""
    got, want = got.double(), want.double()
    difference, size = float((got - want).abs().sum()), float(want.abs().sum())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def worst_row(got: Tensor, want: Tensor) -> float:
    """The largest L1 error of a row, relative to the row or to the mean row."""
    error, size = ((got.double() - want).abs().mean(-1), want.abs().mean(-1))
    return float((error / torch.maximum(size, size.mean()).clamp_min(1e-30)).max())


def reference_errors(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, want: Tensor
) -> tuple[float, float]:
    """What the plain PyTorch 8-bit attention misses ``want`` by: relative L1, and the worst row's."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    out, _ = reference.int8_attention(
        q.float(), k.float(), v.float(), mask=mask, is_causal=causal, scale=scale, options=Int8Options(pv="int8")
    )
    return relative_l1(out, want), worst_row(out, want)


def problems(
    got: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False,
    scale: float | None = None, *, normal: bool = True, lse_factor: float = 1.0, bound: float = NORMAL,
) -> list[str]:  # fmt: skip
    """What is wrong with (got, lse), each as a sentence with the case in it; an empty list if nothing is.

    normal: the inputs are N(0,1), so that with enough keys ``bound`` holds. lse_factor: how much larger the scores'
    errors are than those of N(0,1) inputs; 0 leaves the values of the LSE alone.
    """
    want, want_lse = exact(q, k, v, mask, causal, scale)
    shape = f"q {tuple(q.shape)} k {tuple(k.shape)} {str(q.dtype)[6:]}{' causal' if causal else ''}"
    masked = "" if mask is None else f" mask {tuple(mask.shape)} {str(mask.dtype)[6:]}"
    case, found = shape + masked + ("" if scale is None else f" scale {scale:g}"), []
    if got.shape != q.shape or got.dtype != q.dtype:
        return [f"{case}: out is {tuple(got.shape)} {got.dtype}"]
    if not got.isfinite().all():
        return [f"{case}: {int((~got.isfinite()).sum())} values are not finite"]
    dead = want_lse == -torch.inf
    if got[dead].count_nonzero():
        found.append(f"{case}: rows that attend nothing are not 0")
    error, worst = relative_l1(got, want), worst_row(got, want)
    worst_bound = WORST_ROW
    if (error > bound or worst > worst_bound) and not (normal and k.shape[2] >= LONG_ENOUGH):
        of_all, of_worst = reference_errors(q, k, v, mask, causal, scale, want)
        bound = max(bound, OF_REFERENCE * of_all + BESIDES)
        worst_bound = max(worst_bound, OF_REFERENCE * of_worst + BESIDES_WORST_ROW)
    if error > bound:
        found.append(f"{case}: relative L1 {error:.4f}, at most {bound:.4f} allowed")
    if worst > worst_bound:
        found.append(f"{case}: worst row {worst:.3f}, at most {worst_bound:.3f} allowed")
    if lse is not None:
        found += [f"{case}: {text}" for text in lse_problems(lse, want_lse, lse_factor)]
    return found


def lse_problems(lse: Tensor, want: Tensor, factor: float = 1.0) -> list[str]:
    """What is wrong with a log-sum-exp."""
    if lse.dtype != torch.float32 or lse.shape != want.shape:
        return [f"lse is {tuple(lse.shape)} {lse.dtype}"]
    dead = want == -torch.inf
    if not torch.equal(lse == -torch.inf, dead):
        return ["lse is -inf elsewhere than in the rows that attend nothing"]
    difference = (lse.double() - want).masked_fill(dead, 0.0).abs()
    if not difference.isfinite().all():
        return ["lse is not finite"]
    if factor and (difference.mean() > factor * LSE_MEAN or difference.max() > factor * LSE_WORST):
        return [f"lse is off by {difference.mean():.4f} in the mean, {difference.max():.4f} at worst"]
    return []
