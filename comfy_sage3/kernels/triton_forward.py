"""The Triton kernels of 8-bit attention that trains, first half: quantisation and the forward pass. Imports triton.

Numbers are laid out as ``triton_training.Workspace`` says. Exponents are base 2. Lengths in memory are whole tiles of 128
tokens, and what is beyond a sequence's end is 0, so that no load of codes asks where it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TILE = tl.constexpr(128)  # tokens of K and V that share scales
LEAST = tl.constexpr(1e-36)  # the smallest of what is divided by
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a small float, its last bits are the nearest integer's


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    """max |x| along an axis, NaN if any is."""
    return tl.reduce(tl.abs(x), axis, larger)


@triton.jit
def codes(x, inverse):
    """round(x * inverse) as int8, for results within -127 and 127; ties to even."""
    return (x * inverse + TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def hide(x, query, key, queries, keys, mask, mask_query, mask_key, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Scores x with the mask added, -inf where hidden. MASK: 0 none, 1 bool (as bytes), 2 a bias, -inf of which hides."""
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= query)
    if MASK != 0:
        inside = (key < keys) & (query < queries)
        element = tl.load(mask + (query.to(tl.int64) * mask_query + key.to(tl.int64) * mask_key), mask=inside, other=0)
        if MASK == 1:
            seen = seen & (element != 0)
        else:
            bias = element.to(tl.float32)
            seen = seen & (bias != float("-inf"))
            bias = bias * LOG2_E
            x += tl.where(bias < -1e30, -1e30, bias)  # a row of the smallest float attends all alike, as in softmax
    return tl.where(seen, x, float("-inf"))


@triton.jit
def quantize_queries(
    q, mean_k, q8, q_scale, q_mean,
    heads, group, tokens, padded, stride_b, stride_h, stride_t, sign,
    D: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, WITH_MEAN: tl.constexpr,
):  # fmt: skip
    """Codes and a scale for each token of q times ``sign``; that q . mean(K) for the LSE where WITH_MEAN."""
    tiles = padded // BLOCK
    head = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    batch = head // heads
    at = q + (batch.to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h)
    real = (token < tokens)[:, None] & (channel < D)[None, :]
    x = tl.load(at + (token.to(tl.int64)[:, None] * stride_t + channel[None, :]), mask=real, other=0.0).to(tl.float32)
    top = largest(x, 1)
    row = head.to(tl.int64) * padded
    tl.store(q_scale + (row + token), top / 127.0)
    x8 = codes(x, (sign * 127.0 / larger(top, LEAST))[:, None])
    tl.store(q8 + ((row + token)[:, None] * ROW + channel[None, :]), x8, mask=(channel < ROW)[None, :])
    if WITH_MEAN:
        kv_head = batch * (heads // group) + head % heads // group
        mean = tl.load(mean_k + kv_head.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
        tl.store(q_mean + (row + token), tl.sum(x * mean[None, :], 1) * sign)


@triton.jit
def quantize_keys(
    k, v, mean_k, k8, k_scale, v8, v_scale, v16,
    heads, tokens, padded, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
    D: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """A tile of 128 tokens: k less its mean, one scale; v, a scale for each channel, and the 16-bit values of its codes."""
    tiles = padded // TILE
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    token = tile * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, WIDTH)
    batch = (head // heads).to(tl.int64)
    own = (head % heads).to(tl.int64)
    real = (token < tokens)[:, None] & (channel < D)[None, :]
    row = head.to(tl.int64) * padded
    inside = (channel < ROW)[None, :]

    at = k + (batch * k_stride_b + own * k_stride_h)
    x = tl.load(at + (token.to(tl.int64)[:, None] * k_stride_t + channel[None, :]), mask=real, other=0.0).to(tl.float32)
    mean = tl.load(mean_k + head.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
    x = tl.where(real, x - mean[None, :], 0.0)
    top = largest(largest(x, 1), 0)
    tl.store(k_scale + (head.to(tl.int64) * tiles + tile), top / 127.0)
    tl.store(k8 + ((row + token)[:, None] * ROW + channel[None, :]), codes(x, 127.0 / larger(top, LEAST)), mask=inside)

    at = v + (batch * v_stride_b + own * v_stride_h)
    y = tl.load(at + (token.to(tl.int64)[:, None] * v_stride_t + channel[None, :]), mask=real, other=0.0).to(tl.float32)
    tops = largest(y, 0)
    scale = tops / 127.0
    tl.store(v_scale + ((head.to(tl.int64) * tiles + tile) * ROW + channel), scale, mask=channel < ROW)
    y8 = codes(y, (127.0 / larger(tops, LEAST))[None, :])
    tl.store(v8 + ((row + token)[:, None] * ROW + channel[None, :]), y8, mask=inside)
    y16 = (y8.to(tl.float32) * scale[None, :]).to(v16.dtype.element_ty)
    tl.store(v16 + ((row + token)[:, None] * WIDTH + channel[None, :]), y16)


@triton.jit
def load_codes(at, token, channel, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """Codes (tokens, WIDTH), of which ROW lie in memory."""
    if ROW == WIDTH:
        return tl.load(at + (token[:, None] * ROW + channel[None, :]))
    return tl.load(at + (token[:, None] * ROW + channel[None, :]), mask=(channel < ROW)[None, :], other=0)


@triton.jit
def _attend_tile(
    acc, total, top, q, q_scale, k8, k_scale, v16, start, query, queries, keys, mask, mask_query, mask_key,
    ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, WIDTH)
    k = load_codes(k8, key, channel, ROW, WIDTH)
    unit = (q_scale * tl.load(k_scale + start // TILE))[:, None]
    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    if EDGE:
        s = hide(s * unit, query[:, None], key[None, :], queries, keys, mask, mask_query, mask_key, CAUSAL, MASK)
        new = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - reference[:, None])
    else:
        new = tl.maximum(top, tl.max(s, 1) * q_scale * tl.load(k_scale + start // TILE))
        reference = new
        p = tl.exp2(s * unit - new[:, None])
    factor = tl.exp2(top - reference)
    total = total * factor + tl.sum(p, 1)
    v = tl.load(v16 + (key[:, None] * WIDTH + channel[None, :]))
    acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None])
    return acc, total, new


@triton.jit
def attend(
    q8, q_scale, q_mean, k8, k_scale, v16, mask, out, lse, out8, rows,
    heads, group, queries, keys, q_padded, k_padded, unit,
    mask_b, mask_h, mask_query, mask_key, out_b, out_h, out_t,
    D: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: the output in its own type and in 8 bits with a scale a token, and the LSE.

    ``unit`` is log2(e) times the magnitude of the softmax scale; its sign is in the codes of q.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    head = tl.program_id(0) // tiles
    batch = head // heads
    own = head % heads
    kv_head = (batch * (heads // group) + own // group).to(tl.int64)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, WIDTH)
    row = head.to(tl.int64) * q_padded
    k8 += kv_head * k_padded * ROW
    v16 += kv_head * k_padded * WIDTH
    k_scale += kv_head * (k_padded // TILE)
    mask += batch.to(tl.int64) * mask_b + own.to(tl.int64) * mask_h

    q = load_codes(q8 + row * ROW, query, channel, ROW, WIDTH)
    scale = tl.load(q_scale + (row + query)) * unit
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    end = tl.minimum(keys, (tile + 1) * BLOCK_M) if CAUSAL else keys
    full = 0
    if MASK == 0:
        full = (tl.minimum(keys, tile * BLOCK_M) if CAUSAL else keys) // BLOCK_N * BLOCK_N
        for start in range(0, full, BLOCK_N):
            acc, total, top = _attend_tile(
                acc, total, top, q, scale, k8, k_scale, v16, start, query, queries, keys, mask, mask_query, mask_key,
                ROW, WIDTH, BLOCK_N, False, CAUSAL, MASK,
            )  # fmt: skip
    for start in range(full, end, BLOCK_N):
        acc, total, top = _attend_tile(
            acc, total, top, q, scale, k8, k_scale, v16, start, query, queries, keys, mask, mask_query, mask_key,
            ROW, WIDTH, BLOCK_N, True, CAUSAL, MASK,
        )  # fmt: skip

    real = query < queries
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    exponent = top + tl.log2(total)  # -inf where nothing was seen
    flat = head.to(tl.int64) * queries + query
    tl.store(rows + flat, exponent, mask=real)
    if WITH_LSE:
        tl.store(lse + flat, (exponent + tl.load(q_mean + (row + query)) * unit) * LN_2, mask=real)
    largest_out = largest(acc, 1)
    tl.store(rows + (tl.num_programs(0) // tiles).to(tl.int64) * queries + flat, largest_out / 127.0, mask=real)
    inside = real[:, None] & (channel < D)[None, :]
    acc8 = codes(acc, (127.0 / larger(largest_out, LEAST))[:, None])
    tl.store(out8 + (flat[:, None] * D + channel[None, :]), acc8, mask=inside)
    at = out + (batch.to(tl.int64) * out_b + own.to(tl.int64) * out_h)
    tl.store(at + (query.to(tl.int64)[:, None] * out_t + channel[None, :]), acc.to(out.dtype.element_ty), mask=inside)
