"""NaN and infinity: never a finite number where exact attention has none, and no harm to other heads."""

import pytest
import torch

from .calls import DTYPES, qkv
from .exact import exact

LQ, LK, D = 203, 391, 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_where_exact_attention_is_not_finite_neither_is_the_kernel(kernel, which, bad, dtype):
    clean = qkv(LQ, LK, D, h=3, dtype=dtype)
    plain, plain_lse = kernel.with_lse(*clean)
    for token, channel in ((0, 0), (130, 31), (LQ - 1, 63), (64, 17)):
        tensors = [x.clone() for x in clean]
        tensors["qkv".index(which)][1, 2, token, channel] = bad
        want, want_lse = exact(*tensors)
        out, lse = kernel.with_lse(*tensors)
        case = f"{bad} in {which}[{token}, {channel}]"
        assert out[want.isnan()].isnan().all(), f"{case}: finite where exact attention is NaN"
        assert not out[want.isinf()].isfinite().any(), f"{case}: finite where exact attention is infinite"
        assert lse[want_lse.isnan()].isnan().all(), f"{case}: lse is a number where the exact one is NaN"
        for b in range(2):
            for h in range(3):
                if (b, h) != (1, 2):
                    assert torch.equal(out[b, h], plain[b, h]), f"{case}: head {b}, {h} has changed"
                    assert torch.equal(lse[b, h], plain_lse[b, h])


@pytest.mark.parametrize("which", ["k", "v"])
def test_causal_rows_that_see_a_nan_are_nan(kernel, which):
    tensors = list(qkv(391, 391, D, h=1))
    tensors["kv".index(which) + 1][0, 0, 200] = float("nan")
    out = kernel(*tensors, causal=True)
    assert out[0, 0, 200:].isnan().all()
    assert out[1].isfinite().all()


def test_a_row_of_q_that_is_nan_leaves_the_other_rows_alone(kernel):
    q, k, v = qkv(LQ, LK, D, h=1)
    plain = kernel(q, k, v)
    q[0, 0, 70] = float("nan")
    out = kernel(q, k, v)
    assert out[0, 0, 70].isnan().all()
    others = torch.arange(LQ, device=q.device) != 70
    assert torch.equal(out[0, 0, others], plain[0, 0, others])


def test_nan_beyond_a_mask_still_shows_or_is_hidden_but_never_changes_a_weight(kernel):
    """A key that nobody may attend holds NaN: either the result is NaN, or it is right."""
    q, k, v = qkv(LQ, LK, D, h=1)
    mask = torch.ones(1, 1, 1, LK, dtype=torch.bool, device=q.device)
    mask[..., 300:] = False
    want, _ = exact(q, k, v, mask)
    v[:, :, 310] = float("nan")
    out = kernel(q, k, v, mask)
    fine = out.isfinite()
    assert ((out.double() - want)[fine].abs() < 0.2).all()


def test_all_nan_is_all_nan(kernel):
    for which in range(3):
        tensors = list(qkv(130, 257, 128))
        tensors[which] = torch.full_like(tensors[which], float("nan"))
        assert kernel(*tensors).isnan().all()
