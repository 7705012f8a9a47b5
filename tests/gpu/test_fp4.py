"""The 4-bit kernels against their specification, comfy_sage3.reference, on the same inputs.

On sm_120 and sm_121 as they are; on sm_90 with SAGE3_EMULATE_FP4=1, which builds them with the two instructions that Hopper
lacks emulated exactly: everything else is the same source.
"""

from __future__ import annotations

import pytest
import torch

from comfy_sage3 import reference
from comfy_sage3.kernels import build

from .calls import DEVICE, poison, scale_of
from .conftest import fp4_operators

LENGTHS = (1, 16, 31, 97, 128, 129, 1000, 4096)
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def fp4():
    ops = fp4_operators()

    def attend(q, k, v, mask=None, causal=False, scale=None):
        poison()
        return ops.fp4_attention(q, k, v, mask, causal, scale_of(q, scale), True)

    return attend


def inputs(lq, lk, d, dtype=torch.bfloat16, h=2, hkv=2, b=1, seed=0, offset=0.0):
    generator = torch.Generator(DEVICE).manual_seed(lq * 7 + lk + d + seed)
    made = []
    for heads, tokens in ((h, lq), (hkv, lk), (hkv, lk)):
        x = torch.randn(b, heads, tokens, d, generator=generator, device=DEVICE)
        x += offset * torch.randn(b, heads, 1, d, generator=generator, device=DEVICE)
        made.append(x.to(dtype))
    return made


def agree(got, q, k, v, mask=None, causal=False, scale=None):
    """Cosine, and the share of elements off by more than two units in the last place of the dtype."""
    out, lse = got
    wide = (x.double() for x in (q, k, v))  # the same numbers, so that only the kernel rounds to fp32
    want, want_lse = reference.fp4_attention(*wide, mask=mask, is_causal=causal, scale=scale, options=reference.OUR_FP4)
    assert out.dtype == q.dtype
    a, b = out.double(), want.to(q.dtype).double()
    unit = torch.finfo(q.dtype).eps * 2.0 ** torch.floor(torch.log2(b.abs().clamp(min=torch.finfo(q.dtype).tiny)))
    off = ((a - b).abs() > 2 * unit).double().mean().item()
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() if b.any() else 1.0
    print(f"cosine {cosine:.8f}, off {off:.6f}, largest {(a - b).abs().max():.3g}")
    assert torch.isfinite(out).all()
    assert cosine >= 0.999999
    assert off <= 0.001
    seen = want_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    # A code of P that falls on the other side of a boundary moves its row's sum: by most where a row has few keys.
    apart = (lse[seen] - want_lse[seen]).abs()
    assert apart.max() <= 3e-3
    assert apart.mean() <= 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_agrees_with_the_reference_to_rounding(fp4, tokens, d, dtype, causal):
    q, k, v = inputs(tokens, tokens, d, dtype)
    agree(fp4(q, k, v, causal=causal), q, k, v, causal=causal)


@pytest.mark.parametrize("d", [1, 40, 72, 96, 112, 160, 256])
def test_other_head_dims_are_padded(fp4, d):
    q, k, v = inputs(200, 333, d)
    agree(fp4(q, k, v), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_query_heads_share_key_heads(fp4, causal):
    q, k, v = inputs(257, 300, 128, h=8, hkv=2, b=2)
    agree(fp4(q, k, v, causal=causal), q, k, v, causal=causal)


@pytest.mark.parametrize(("lq", "lk"), [(1, 700), (97, 400), (400, 97)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_number(fp4, lq, lk, causal):
    q, k, v = inputs(lq, lk, 64)
    agree(fp4(q, k, v, causal=causal), q, k, v, causal=causal)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("kind", ["bool", "padding", "holes", "fp16", "bf16", "fp32", "causal too"])
def test_masks_are_judged_by_token(fp4, kind, d):
    q, k, v = inputs(300, 391, d)
    generator = torch.Generator(DEVICE).manual_seed(5)
    kept = torch.rand(1, 2, 300, 391, generator=generator, device=DEVICE) < 0.7
    kept[:, :, 64:128, 128:256] = False
    kept[:, :, :64, 256:384] = True
    kept[:, :, 299] = False
    if kind == "padding":
        mask = torch.arange(391, device=DEVICE)[None, None, None] < 300
    elif kind == "holes":
        mask = kept[:, :1] & (torch.arange(391, device=DEVICE) % 200 < 100)
    elif kind in ("bool", "causal too"):
        mask = kept
    else:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[kind]
        mask = torch.randn(1, 1, 300, 391, generator=generator, device=DEVICE).to(dtype)
        mask = mask.masked_fill(~kept[:, :1], -torch.inf)
    causal = kind == "causal too"
    agree(fp4(q, k, v, mask, causal), q, k, v, mask, causal)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 1.0])
def test_any_scale(fp4, scale):
    q, k, v = inputs(130, 260, 64)
    agree(fp4(q, k, v, scale=scale), q, k, v, scale=scale)


def test_offsets_of_channels(fp4):
    q, k, v = inputs(300, 1000, 128, offset=5.0)
    agree(fp4(q, k, v), q, k, v)


def test_one_token_that_everybody_attends_to_and_many_that_count_together(fp4):
    """The reference of P must follow tiles down: relative to the one token, all others' scales would vanish."""
    q, k, v = inputs(128, 8192, 64, torch.float16)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, 5, 0] = 14.0  # 14 = 8 * 14 / 8 in natural units above the others
    agree(fp4(q, k, v), q, k, v)


def test_delta_in_chunks_is_the_same(fp4):
    """More query tiles than the correction's workspace holds at once: 256 MB are 16 tiles of 32 heads of 64k keys."""
    q, k, v = inputs(2048 + 5, 66000, 64, h=32, hkv=32)
    whole, _ = fp4(q, k, v)
    part, _ = fp4(q[:, :, 1920:].contiguous(), k, v)
    assert torch.equal(whole[:, :, 1920:], part)


@pytest.mark.parametrize("causal", [False, True])
def test_fifty_calls_give_the_same_bits(fp4, causal):
    q, k, v = inputs(700, 1500, 128, h=4, hkv=4)
    first, first_lse = fp4(q, k, v, causal=causal)
    for _ in range(50):
        out, lse = fp4(q, k, v, causal=causal)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_number_shows(fp4, which, value):
    made = inputs(200, 300, 64)
    made[which][0, 0, 150, 3] = value
    out, _ = fp4(*made)
    assert not torch.isfinite(out[0, 0]).all()
    assert torch.isfinite(out[0, 1]).all()


def test_captured_in_a_graph(fp4):
    q, k, v = inputs(300, 1000, 128)
    want, _ = fp4(q, k, v)
    run = build.load().ops.fp4_attention
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(q, k, v, None, False, 128**-0.5, False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run(q, k, v, None, False, 128**-0.5, False)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_inputs_are_left_as_they_are(fp4):
    made = inputs(200, 300, 96)
    before = [x.clone() for x in made]
    fp4(*made)
    assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))
