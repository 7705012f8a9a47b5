"""The reference kernels against PyTorch's own attention and against each other."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.errors import InputError
from comfy_sage3.numerics import plain_inputs
from comfy_sage3.reference import (
    OUR_FP4,
    OUR_INT8,
    OUR_INT8_FAST,
    Fp4Options,
    Int8Options,
    exact_attention,
    fp4_attention,
    int8_attention,
    int8_attention_backward,
)
from comfy_sage3.reference.forward import LINEAR_BIAS, linear_exp2
from comfy_sage3.reference.tiles import lazy_references

LENGTHS = [1, 15, 16, 17, 97, 127, 128, 129, 257]
KERNELS = {
    "exact": (exact_attention, 1e-5),
    "fp4 unquantised": (lambda *a, **k: fp4_attention(*a, **k, options=Fp4Options(quantize=False)), 1e-4),
    "int8 unquantised": (lambda *a, **k: int8_attention(*a, **k, options=Int8Options(quantize=False)), 1e-4),
}


def inputs(q_tokens, k_tokens, head_dim=32, heads=2, kv_heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, q_tokens, head_dim, generator=g)
    k, v = (torch.randn(1, kv_heads, k_tokens, head_dim, generator=g) for _ in "kv")
    return q, k, v


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_without_quantisation_every_length_is_exact(name, causal, tokens):
    kernel, tolerance = KERNELS[name]
    q, k, v = inputs(tokens, tokens)
    out, lse = kernel(q, k, v, is_causal=causal)
    scores = (q.double() @ k.double().mT) * 32**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    assert torch.allclose(out.double(), scores.softmax(-1) @ v.double(), atol=tolerance)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=tolerance)


@pytest.mark.parametrize("kernel", [fp4_attention, int8_attention])
@given(
    q_tokens=st.integers(1, 150), k_tokens=st.integers(1, 150), head_dim=st.integers(1, 256), group=st.integers(1, 3),
    mask=st.sampled_from([None, "bool", "additive"]), causal=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None, derandomize=True)
def test_quantised_attention_follows_exact_attention(kernel, q_tokens, k_tokens, head_dim, group, mask, causal):
    q, k, v = inputs(q_tokens, k_tokens, head_dim, heads=2 * group)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 1, q_tokens, k_tokens, generator=g)
    chosen = {None: None, "bool": bias > -1, "additive": bias}[mask]
    before = [t.clone() for t in (q, k, v)]
    out, lse = kernel(q, k, v, mask=chosen, is_causal=causal)
    exact, exact_lse = exact_attention(q, k, v, mask=chosen, is_causal=causal)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    dead = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), dead)
    assert (out[dead] == 0).all()
    assert out.isfinite().all()
    relative = (out - exact).norm() / exact.norm().clamp_min(1e-6)
    assert relative < (0.5 if kernel is fp4_attention else 0.15)


@pytest.mark.parametrize("kernel", [fp4_attention, int8_attention])
def test_a_causal_row_does_not_see_the_future(kernel):
    q, k, v = inputs(300, 300, 64)
    out, _ = kernel(q, k, v, is_causal=True, options=None)
    # Tokens 256.. are in a later tile than row 100: whatever they hold, only the shared key mean may move.
    changed = v.clone()
    changed[:, :, 256:] += 0  # the same values: bitwise repeatable
    again, _ = kernel(q, k, changed, is_causal=True, options=None)
    assert torch.equal(out, again)
    hidden, _ = kernel(q, k, v, mask=torch.ones(300, 300, dtype=torch.bool).tril())
    assert cosine(out, hidden) > 0.999


def test_error_bands_on_normal_inputs():
    q, k, v = inputs(512, 512, 128)
    exact, _ = exact_attention(q, k, v)
    assert cosine(fp4_attention(q, k, v)[0], exact) > 0.975
    assert cosine(int8_attention(q, k, v)[0], exact) > 0.999
    assert cosine(int8_attention(q, k, v, options=Int8Options(pv="int8"))[0], exact) > 0.9995
    assert cosine(int8_attention(q, k, v, options=OUR_INT8_FAST)[0], exact) > 0.9990


def gradients(q, k, v, dout, **options):
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    wide = [leaves[0], *(t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in leaves[1:])]
    F.scaled_dot_product_attention(*wide, **options).backward(dout.double())
    return [t.grad for t in leaves]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("tokens", [(64, 64), (130, 130), (97, 40)])
@pytest.mark.parametrize("form", ["not quantised", "block", "row", "query"])
def test_backward_against_exact_gradients(causal, kv_heads, tokens, form):
    q, k, v = inputs(*tokens, 64, kv_heads=kv_heads)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    quantize = form != "not quantised"
    options = Int8Options(gradient_scales=form) if quantize else Int8Options(quantize=False)
    out, lse = int8_attention(q, k, v, is_causal=causal, options=options)
    got = int8_attention_backward(dout, q, k, v, out, lse, is_causal=causal, options=options)
    for mine, exact in zip(got, gradients(q, k, v, dout, is_causal=causal), strict=True):
        if quantize:
            assert cosine(mine, exact) > 0.995
        else:
            assert torch.allclose(mine.double(), exact, atol=2e-5)


SIZES = (1.0, 0.0, 1e4, 1e-4, 1e-2, 1e8)  # of dO of each 64 queries


@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1], (0.0, 0.0, 1.0), (1e-30, 1e10, 0.0), (1e-37,)], ids=str)
def test_scales_of_queries_follow_gradients_of_any_size(sizes):
    count = 64 * len(sizes)
    q, k, v = inputs(count, 700, 64, kv_heads=1)  # more than one piece of keys
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    dout *= torch.tensor(sizes).repeat_interleave(64).view(1, 1, count, 1)
    out, lse = int8_attention(q, k, v, options=OUR_INT8)
    got = int8_attention_backward(dout, q, k, v, out, lse, options=OUR_INT8)
    want = gradients(q, k, v, dout)
    assert all(x.isfinite().all() for x in got)
    if max(sizes) < 1e-30:
        return
    for mine, exact in zip(got, want, strict=True):
        assert cosine(mine, exact) > 0.999
    for i, size in enumerate(sizes):
        mine, exact = (x[0][:, :, 64 * i : 64 * i + 64] for x in (got, want))
        assert not mine.any() if size == 0.0 else size < 1e-20 or cosine(mine, exact) > 0.999, i


def test_scales_of_queries_where_scores_are_sharp_and_where_they_are_not():
    q, k, v = inputs(600, 600, 64)
    q = q * torch.where(torch.arange(600) // 100 % 2 == 0, 0.1, 4.0).view(1, 1, 600, 1)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    found = {}
    for form in ("row", "query"):
        options = Int8Options(pv="int8", gradient_scales=form)
        out, lse = int8_attention(q, k, v, is_causal=True, options=options)
        got = int8_attention_backward(dout, q, k, v, out, lse, is_causal=True, options=options)
        found[form] = [cosine(a, e) for a, e in zip(got, gradients(q, k, v, dout, is_causal=True), strict=True)]
    for row, query in zip(found["row"], found["query"], strict=True):  # what the scores are off is in both
        assert 1 - query < 1 - row + 1e-3


def test_high_precision_dov_is_what_keeps_dq_accurate():
    q, k, v = inputs(256, 256, 64)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    exact = gradients(q, k, v, dout)[0]
    found = {}
    for kind in ("high", "int8"):
        options = Int8Options(do_v=kind)
        out, lse = int8_attention(q, k, v, options=options)
        found[kind] = cosine(int8_attention_backward(dout, q, k, v, out, lse, options=options)[0], exact)
    assert found["high"] > found["int8"]


@settings(max_examples=200, deadline=None)
@given(st.floats(-126.0, 126.0, width=32))
def test_the_linear_exponential_is_within_six_percent_and_the_bits_of_a_float(x):
    value = linear_exp2(torch.tensor(x, dtype=torch.float64))
    assert 1.0 <= float(value / torch.tensor(x, dtype=torch.float64).exp2()) < 1.0615
    bits = torch.tensor(round((x + 127) * 2**23), dtype=torch.int32)
    assert float(bits.view(torch.float32)) == pytest.approx(float(value), rel=1e-6)


def test_the_linear_exponential_is_right_in_the_mean():
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    assert float((linear_exp2(x) / x.exp2()).mean().log2()) == pytest.approx(LINEAR_BIAS, abs=1e-3)


def test_linear_exponentials_need_integer_codes():
    with pytest.raises(InputError, match='needs pv "int8"'):
        Int8Options(exponential="linear")


def test_the_mean_of_v_passes_through_four_bits_unharmed():
    q, k, v = inputs(130, 257, kv_heads=1)
    offset = 100.0 * torch.randn(1, 1, 1, 32, generator=torch.Generator().manual_seed(3))
    options = Fp4Options(smooth_v=True)
    plain, _ = fp4_attention(q, k, v, options=options)
    moved, _ = fp4_attention(q, k, v + offset, options=options)
    torch.testing.assert_close(moved - offset, plain, rtol=0, atol=2e-3)
    without, _ = fp4_attention(q, k, v + offset)
    exact, _ = exact_attention(q, k, v)
    assert (without - offset - exact).abs().mean() > 5 * (moved - offset - exact).abs().mean()


def test_a_row_that_sees_nothing_does_not_get_the_mean_of_v():
    q, k, v = inputs(5, 40)
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[2] = False
    out, lse = fp4_attention(q, k, v + 3.0, mask=mask, options=Fp4Options(smooth_v=True))
    assert out[:, :, 2].count_nonzero() == 0
    assert (lse[:, :, 2] == -torch.inf).all()
    assert (out[:, :, 3].mean(-1) - 3.0).abs().max() < 1.0


def test_four_bits_on_normal_inputs_gain_by_the_choice_of_scales():
    """N(0,1), head_dim 128, 2048 tokens: the paper's choice leaves a relative L2 error of 0.192."""
    q, k, v = inputs(512, 2048, head_dim=128)
    exact, _ = exact_attention(q, k, v)

    def error(options):
        out, _ = fp4_attention(q, k, v, options=options)
        return float((out - exact).norm() / exact.norm()), cosine(out, exact)

    six, ours = error(Fp4Options()), error(OUR_FP4)
    assert ours[0] <= 0.178 < 0.185 < six[0]
    assert ours[1] >= 0.984


def test_the_kernels_operands_leave_no_other_choice():
    with pytest.raises(InputError, match="kernel_operands needs smooth_v"):
        Fp4Options(kernel_operands=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.2, -0.2])
def test_the_kernels_operands_serve_every_shape(causal, scale):
    for q_tokens, k_tokens, head_dim, heads in ((1, 1, 40, 2), (130, 257, 24, 4), (300, 300, 64, 6)):
        q, k, v = inputs(q_tokens, k_tokens, head_dim, heads=heads)
        out, lse = fp4_attention(q, k, v + 3, is_causal=causal, scale=scale, options=OUR_FP4)
        exact, exact_lse = exact_attention(q, k, v + 3, is_causal=causal, scale=scale)
        assert (out - exact).norm() < 0.15 * exact.norm()
        assert (lse - exact_lse).abs().mean() < 0.1


@pytest.mark.parametrize("drop", [60.0, 1e4])
@pytest.mark.parametrize("first_seen", [0, 512])
def test_a_lazy_reference_survives_scores_that_fall_or_begin_late(drop, first_seen):
    """From tile to tile by more than fp32 could follow, and in a later run of tiles than the first."""
    q, k, v = inputs(20, 1300, 64)
    bias = -drop * torch.arange(11).repeat_interleave(128)[:1300].clamp(max=3)
    bias[:first_seen] = -torch.inf
    out, lse = fp4_attention(q, k, v, mask=bias.expand(20, -1), options=OUR_FP4)
    exact, exact_lse = exact_attention(q, k, v, mask=bias.expand(20, -1))
    assert (out - exact).norm() < 0.3 * exact.norm()
    torch.testing.assert_close(lse, exact_lse, rtol=1e-3, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, 0.0])
def test_an_additive_mask_of_zeros_or_infinities_is_a_bool_mask(dtype, scale):
    """Also where it joins the scores in their own units, and where those count nothing."""
    q, k, v = (x.to(dtype) for x in inputs(140, 300, 64))
    kept = torch.rand(140, 300, generator=torch.Generator().manual_seed(2)) < 0.7
    kept[5] = False
    bias = torch.zeros(140, 300).masked_fill(~kept, -torch.inf)
    masked = [fp4_attention(q, k, v, mask=mask, scale=scale, options=OUR_FP4) for mask in (kept, bias)]
    assert all(torch.equal(a, b) for a, b in zip(*masked, strict=True))
    assert all(torch.isfinite(out).all() for out, _ in masked)


def test_a_mask_that_is_the_same_for_all_tokens_moves_only_the_lse():
    """Four times every weight, a power of two: codes stay, but for those at a boundary."""
    q, k, v = (x.double() for x in inputs(140, 300, 64))
    plain, plain_lse = fp4_attention(q, k, v, options=OUR_FP4)
    out, lse = fp4_attention(q, k, v, mask=torch.full((140, 300), 2 * math.log(2)), options=OUR_FP4)
    assert (out - plain).norm() < 1e-2 * plain.norm()
    assert (lse - plain_lse - 2 * math.log(2)).abs().mean() < 1e-3


def test_lazy_references_do_not_depend_on_how_tiles_are_cut():
    g = torch.Generator().manual_seed(0)
    block_max = 8 * torch.randn(2, 8 * 9, 5, generator=g)
    block_max[0, 8:24] = -torch.inf
    state = torch.full((2, 2, 5), -torch.inf)
    whole, _, end = lazy_references(block_max, state, 8)
    pieces = []
    for piece in block_max.split((16, 40, 16), 1):
        reference, factor, state = lazy_references(piece, state, 8)
        torch.testing.assert_close(factor, torch.exp(reference - state[:, :1]))
        pieces.append(reference)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(state, end)
    above = (block_max.unflatten(1, (-1, 8)).amax(2) - whole[:, ::8]) / math.log(2)
    seen = above > -torch.inf
    assert (above[seen] <= 2 + 1e-4).all()
    assert (above[seen] >= -3 - 1e-4).all()


def test_the_official_sum_is_that_of_the_weights_before_rounding():
    """With a V of sixes, which 4 bits hold, the output is 6 sum P^ / sum P, off by the rounding of P; ours is 6."""
    q, k, _ = inputs(64, 256)
    sixes = torch.full((1, 2, 256, 32), 6.0)
    official, _ = fp4_attention(q, k, sixes, options=Fp4Options(official_p=True))
    ours, _ = fp4_attention(q, k, sixes)
    assert (ours - 6).abs().max() < 1e-4
    assert 0.01 < (official - 6).abs().mean() < 0.3


def test_with_offsets_our_four_bits_err_half_as_much_as_the_official_code():
    q, k, v = plain_inputs(0, 5.0)
    exact, _ = exact_attention(q, k, v)
    official, ours = (
        float((fp4_attention(q, k, v, options=o)[0] - exact).norm() / exact.norm())
        for o in (Fp4Options(official_p=True), OUR_FP4)
    )
    assert ours < 0.5 * official
