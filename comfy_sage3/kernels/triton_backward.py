"""The Triton kernels of 8-bit attention that trains, second half: the gradient. Imports triton.

Two kernels: one walks over the queries of a tile of keys (dK, dV), one over the keys of a tile of queries (dQ). Both compute
the scores anew, so that every sum has one writer: the same bits in every run.

    S = Q8 K8^T, P = 2^(S - lse), dP = dO V^T in 16 bit, dS = P (dP - delta)
    dV = (P o)^T dO8, dK = (dS r)^T Q8, dQ = dS K

with o the scales of dO8, one a token, and r those of Q8: inside the operand that is quantised, since a contraction over
queries lets out nothing that differs from one to another. So Q8 are the forward pass's codes, and a token whose gradient is
small has all its digits. P o and dS r are quantised for each tile, one scale a key. Both factors cost nothing: P o = 2^(S -
(lse - log2 o)), and dO is multiplied by r/o before it is rounded to 16 bits, so that dS r = P o (dP - delta) as it is. That
also fits fp16 at any size of the gradients. dQ is divided by r/o at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import LEAST, TILE, codes, hide, larger, largest, load_codes

# Planes of ``stats``, (STATS, heads, padded queries) fp32: what the kernels need of a query.
UNIT, SHIFTED, DELTA, EXPONENT, INVERSE = (tl.constexpr(i) for i in range(5))
STATS = 5


@triton.jit
def prepare_queries(
    dout, dlse, q8, q_scale, out8, rows, do16, do8_t, q8_t, stats,
    heads, queries, padded, unit, stride_b, stride_h, stride_t,
    D: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """dO in 16 bits, times r/o, and in 8 bits, codes transposed, and the numbers of each query.

    UNIT: what a score of q8 . k8 counts, but for K's scale. EXPONENT: the LSE, and +inf for a query that sees nothing or is
    beyond the end. SHIFTED: it less log2 o. DELTA: rowsum(dO O) less the gradient of the LSE, times r/o. INVERSE: o/r.
    """
    tiles = padded // BLOCK
    head = tl.program_id(0) // tiles
    total = tl.num_programs(0) // tiles
    token = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    there = token < queries
    real = there[:, None] & (channel < D)[None, :]
    flat = head.to(tl.int64) * queries + token
    row = head.to(tl.int64) * padded + token
    at = dout + ((head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h)
    x = tl.load(at + (token.to(tl.int64)[:, None] * stride_t + channel[None, :]), mask=real, other=0.0).to(tl.float32)
    top = largest(x, 1)
    o = tl.where(top == 0.0, 1.0, larger(top / 127.0, 1e-30))
    at_t = head.to(tl.int64) * padded * WIDTH + (channel[:, None] * padded + token[None, :])
    tl.store(do8_t + at_t, tl.trans(codes(x, (1.0 / o)[:, None])))
    tl.store(q8_t + at_t, tl.trans(load_codes(q8, row, channel, ROW, WIDTH)))
    scale = tl.load(q_scale + row)
    ratio = tl.where(scale == 0.0, 1.0, scale) / o
    x = (x * ratio[:, None]).to(do16.dtype.element_ty)
    tl.store(do16 + (row[:, None] * WIDTH + channel[None, :]), x)

    y = tl.load(out8 + (flat[:, None] * D + channel[None, :]), mask=real, other=0).to(tl.float32)
    y_scale = tl.load(rows + (total.to(tl.int64) * queries + flat), mask=there, other=0.0)
    delta = tl.sum(x.to(tl.float32) * y, 1) * y_scale
    exponent = tl.load(rows + flat, mask=there, other=float("-inf"))
    dead = exponent == float("-inf")
    if WITH_DLSE:
        delta -= tl.where(dead, 0.0, tl.load(dlse + flat, mask=there, other=0.0) * ratio)
    exponent = tl.where(dead, float("inf"), exponent)
    plane = total.to(tl.int64) * padded
    tl.store(stats + (UNIT * plane + row), scale * unit)
    tl.store(stats + (SHIFTED * plane + row), exponent - tl.log2(o))
    tl.store(stats + (DELTA * plane + row), delta)
    tl.store(stats + (EXPONENT * plane + row), exponent)
    tl.store(stats + (INVERSE * plane + row), 1.0 / ratio)


@triton.jit
def prepare_keys(
    k8, k_scale, v8, v_scale, k_made, v16, padded,
    WIDTH: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """V in 16 bits, and for dQ either K in 16 bits or, TRANSPOSED, its codes."""
    tiles = padded // BLOCK
    head = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    group = head.to(tl.int64) * (padded // TILE) + tl.program_id(0) % tiles * BLOCK // TILE
    channel = tl.arange(0, WIDTH)
    row = head.to(tl.int64) * padded + token
    at = row[:, None] * WIDTH + channel[None, :]
    scale = tl.load(v_scale + (group * ROW + channel), mask=channel < ROW, other=0.0)
    v = load_codes(v8, row, channel, ROW, WIDTH).to(tl.float32) * scale[None, :]
    tl.store(v16 + at, v.to(v16.dtype.element_ty))
    k = load_codes(k8, row, channel, ROW, WIDTH)
    if TRANSPOSED:
        at_t = head.to(tl.int64) * padded * WIDTH + (channel[:, None] * padded + token[None, :])
        tl.store(k_made + at_t, tl.trans(k))
    else:
        tl.store(k_made + at, (k.to(tl.float32) * tl.load(k_scale + group)).to(k_made.dtype.element_ty))


@triton.jit
def _quantize(x):
    """x as int8 with a scale for each row."""
    top = larger(largest(x, 1), LEAST)
    return codes(x, (127.0 / top)[:, None]), top * (1.0 / 127.0)


@triton.jit
def _keys_tile(
    dk, dv, k, v, k_scale, first_query, row, plane, q8, q8_t, do16, do8_t, stats, key, queries, keys, padded,
    mask, mask_query, mask_key,
    ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Adds what queries first_query.. of the head whose memory begins at token ``row`` give."""
    query = first_query + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, WIDTH)
    q = load_codes(q8 + row * ROW, query, channel, ROW, WIDTH)
    at = stats + row + query
    unit, shifted, delta = tl.load(at + UNIT * plane), tl.load(at + SHIFTED * plane), tl.load(at + DELTA * plane)
    s = tl.dot(k, tl.trans(q), out_dtype=tl.int32).to(tl.float32)
    if EDGE:
        s *= (unit * k_scale)[None, :]
        s = hide(s, query[None, :], key[:, None], queries, keys, mask, mask_query, mask_key, CAUSAL, MASK)
        p = tl.exp2(s - shifted[None, :])
    else:
        p = tl.exp2(s * (unit * k_scale)[None, :] - shifted[None, :])
    do = tl.load(do16 + row * WIDTH + (query[:, None] * WIDTH + channel[None, :]))
    dp = tl.dot(v, tl.trans(do))
    ds8, ds_scale = _quantize(p * (dp - delta[None, :]))
    p8, p_scale = _quantize(p)
    across = row * WIDTH + (channel[:, None] * padded + query[None, :])
    do8 = tl.load(do8_t + across)
    dv += tl.dot(p8, tl.trans(do8), out_dtype=tl.int32).to(tl.float32) * p_scale[:, None]
    q_t = tl.load(q8_t + across)
    dk += tl.dot(ds8, tl.trans(q_t), out_dtype=tl.int32).to(tl.float32) * ds_scale[:, None]
    return dk, dv


@triton.jit
def keys_gradient(
    q8, q8_t, do16, do8_t, stats, k8, k_scale, v16, mask, dk, dv,
    kv_heads, queries, keys, q_padded, k_padded, softmax_scale, mask_b, mask_h, mask_query, mask_key,
    D: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, from all query heads that share it. ``softmax_scale`` is a magnitude: q8 has its sign."""
    tiles = tl.cdiv(keys, BLOCK_N)
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(0) // tiles
    batch = kv_head // kv_heads
    first_head = kv_head * GROUP  # of (batch, head)
    plane = (tl.num_programs(0) // tiles).to(tl.int64) * GROUP * q_padded
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, WIDTH)
    row = kv_head.to(tl.int64) * k_padded
    k = load_codes(k8 + row * ROW, key, channel, ROW, WIDTH)
    v = tl.load(v16 + row * WIDTH + (key[:, None] * WIDTH + channel[None, :]))
    scale = tl.load(k_scale + kv_head.to(tl.int64) * (k_padded // TILE) + tile * BLOCK_N // TILE)
    dk_sum = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, WIDTH), tl.float32)

    q_tiles = tl.cdiv(queries, BLOCK_M)
    first = tl.minimum(tile * BLOCK_N // BLOCK_M, q_tiles) if CAUSAL else 0
    inner = first  # from here on all of these keys are seen
    if MASK != 0:
        inner = q_tiles
    elif CAUSAL:
        inner = tl.minimum(tl.cdiv((tile + 1) * BLOCK_N, BLOCK_M), q_tiles)
    if CAUSAL or MASK != 0:
        count = inner - first
        for i in range(0, GROUP * count):
            head = first_head + (i // count if GROUP > 1 else 0)
            at = mask + batch.to(tl.int64) * mask_b + (head % (kv_heads * GROUP)).to(tl.int64) * mask_h
            dk_sum, dv_sum = _keys_tile(
                dk_sum, dv_sum, k, v, scale, (first + (i % count if GROUP > 1 else i)) * BLOCK_M,
                head.to(tl.int64) * q_padded, plane, q8, q8_t, do16, do8_t, stats, key, queries, keys, q_padded,
                at, mask_query, mask_key, ROW, WIDTH, BLOCK_M, True, CAUSAL, MASK,
            )  # fmt: skip
    if MASK == 0:
        count = q_tiles - inner
        for i in range(0, GROUP * count):
            head = first_head + (i // count if GROUP > 1 else 0)
            dk_sum, dv_sum = _keys_tile(
                dk_sum, dv_sum, k, v, scale, (inner + (i % count if GROUP > 1 else i)) * BLOCK_M,
                head.to(tl.int64) * q_padded, plane, q8, q8_t, do16, do8_t, stats, key, queries, keys, q_padded,
                mask, mask_query, mask_key, ROW, WIDTH, BLOCK_M, False, CAUSAL, MASK,
            )  # fmt: skip

    at = kv_head.to(tl.int64) * keys * D + (key[:, None] * D + channel[None, :])
    inside = (key < keys)[:, None] & (channel < D)[None, :]
    tl.store(dk + at, (dk_sum * softmax_scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_sum.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _queries_tile(
    dq, q, do, unit, exponent, delta, start, k8, k_made, k_scale, v16, query, queries, keys, padded,
    mask, mask_query, mask_key,
    ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Adds what keys start.. give."""
    key = start + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, WIDTH)
    k = load_codes(k8, key, channel, ROW, WIDTH)
    scale = tl.load(k_scale + start // TILE)
    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    if EDGE:
        s *= (unit * scale)[:, None]
        s = hide(s, query[:, None], key[None, :], queries, keys, mask, mask_query, mask_key, CAUSAL, MASK)
        p = tl.exp2(s - exponent[:, None])
    else:
        p = tl.exp2(s * (unit * scale)[:, None] - exponent[:, None])
    v = tl.load(v16 + (key[:, None] * WIDTH + channel[None, :]))
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
    if EIGHT:
        ds8, ds_scale = _quantize(ds)
        k_t = tl.load(k_made + (channel[:, None] * padded + key[None, :]))
        dq += tl.dot(ds8, tl.trans(k_t), out_dtype=tl.int32).to(tl.float32) * (ds_scale * scale)[:, None]
    else:
        k16 = tl.load(k_made + (key[:, None] * WIDTH + channel[None, :]))
        dq = tl.dot(ds.to(k16.dtype), k16, dq)
    return dq


@triton.jit
def queries_gradient(
    q8, do16, stats, k8, k_made, k_scale, v16, mask, dlse, mean_k, dq,
    heads, group, queries, keys, q_padded, k_padded, softmax_scale, mask_b, mask_h, mask_query, mask_key,
    D: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, EIGHT: tl.constexpr, WITH_DLSE: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries. With a gradient of the LSE the rows of dS no longer add up to 0, and K's mean counts."""
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
    plane = (tl.num_programs(0) // tiles).to(tl.int64) * q_padded
    k8 += kv_head * k_padded * ROW
    v16 += kv_head * k_padded * WIDTH
    k_made += kv_head * k_padded * WIDTH
    k_scale += kv_head * (k_padded // TILE)
    mask += batch.to(tl.int64) * mask_b + own.to(tl.int64) * mask_h

    q = load_codes(q8 + row * ROW, query, channel, ROW, WIDTH)
    do = tl.load(do16 + row * WIDTH + (query[:, None] * WIDTH + channel[None, :]))
    at = stats + row + query
    unit, exponent, delta = tl.load(at + UNIT * plane), tl.load(at + EXPONENT * plane), tl.load(at + DELTA * plane)
    total = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    end = tl.minimum(keys, (tile + 1) * BLOCK_M) if CAUSAL else keys
    full = 0
    if MASK == 0:
        full = (tl.minimum(keys, tile * BLOCK_M) if CAUSAL else keys) // BLOCK_N * BLOCK_N
        for start in range(0, full, BLOCK_N):
            total = _queries_tile(
                total, q, do, unit, exponent, delta, start, k8, k_made, k_scale, v16, query, queries, keys, k_padded,
                mask, mask_query, mask_key, ROW, WIDTH, BLOCK_N, False, CAUSAL, MASK, EIGHT,
            )  # fmt: skip
    for start in range(full, end, BLOCK_N):
        total = _queries_tile(
            total, q, do, unit, exponent, delta, start, k8, k_made, k_scale, v16, query, queries, keys, k_padded,
            mask, mask_query, mask_key, ROW, WIDTH, BLOCK_N, True, CAUSAL, MASK, EIGHT,
        )  # fmt: skip

    flat = head.to(tl.int64) * queries + query
    real = query < queries
    total = total * tl.load(at + INVERSE * plane)[:, None]
    if WITH_DLSE:
        mean = tl.load(mean_k + kv_head * D + channel, mask=channel < D, other=0.0)
        gradient = tl.load(dlse + flat, mask=real, other=0.0)
        total += tl.where(exponent == float("inf"), 0.0, gradient)[:, None] * mean[None, :]
    inside = real[:, None] & (channel < D)[None, :]
    tl.store(dq + (flat[:, None] * D + channel[None, :]), (total * softmax_scale).to(dq.dtype.element_ty), mask=inside)
