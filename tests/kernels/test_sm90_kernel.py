"""Hopper's 8-bit attention (csrc/attention/int8_sm90.cu), its own source run thread by thread on a CPU: emulator/machine.h.

Above all who works on what: jobs that are dealt out beforehand, and jobs that are taken from a counter and announced in a
ring of slots. Several blocks run at once, each warp at a pace that the seed decides. Outputs start out as NaN, and a job
that is done twice adds its log-sum-exp twice.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_int, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from .emulated import Forward, Shape, Tensor4, build, mask_tiles, normal, one_thread, setting, some_mask, translate, view

# Statements of the kernel, and what happens without them.
OMISSIBLE = {
    "a number is read before it is there": "sm90::barrier_await(&shared.job_full[slot.stage], slot.parity);",
    "a number is never announced": "sm90::barrier_arrive(&shared.job_full[slot.stage]);",
    "a number is replaced while it is in use": "sm90::barrier_await(&shared.job_empty[slot.stage], slot.parity ^ 1);",
    "a slot is never given back": "release(&shared.job_empty[round % kJobSlots]);",
    "a job is known to its consumer before its queries are": "if constexpr (!kDealt) await_queries();",
    "queries are replaced while they are in use": (
        "sm90::barrier_await(&shared.q_empty[consumer], static_cast<uint32_t>(round & 1) ^ 1);"
    ),
    "a job without tiles keeps its queries": "if (n >= end) release(&shared.q_empty[consumer]);",
    "keys are replaced while they are in use": "sm90::barrier_await(&shared.k_empty[i], place.parity ^ 1);",
    "values are replaced while they are in use": "sm90::barrier_await(&shared.v_empty[i], place.parity ^ 1);",
    "values are read before they are there": (
        "sm90::barrier_wait(&shared.v_full[place.stage], place.parity);\n      multiply(Int<0>{});"
    ),
    "scores are read before they are there": "sm90::wgmma_wait<0>();\n      sm90::pin(s);",
    "sums of values are read before they are there": "sm90::wgmma_wait<pending>();",
}


class Attend(ctypes.Structure):
    _fields_ = [
        ("shape", Shape), ("workspace", c_void_p), ("out", Tensor4), ("lse", c_void_p), ("mask", Tensor4),
        ("mask_tiles", c_void_p), ("causal", c_bool), ("fast", c_bool), ("multiprocessors", c_int),
        ("next_job", c_void_p), ("peak", c_void_p),
    ]  # fmt: skip


class Result(NamedTuple):
    """out (B, H, Lq, D); lse, without what it held before, and peak (B, H, Lq); numbers that the counter gave out."""

    out: Tensor
    lse: Tensor
    peak: Tensor
    counted: int

    def same_bits(self, other: Result) -> bool:
        return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(self[:3], other[:3], strict=True))


@dataclass
class Case:
    """One call: (queries, keys, head dim), and what else it has."""

    sizes: tuple[int, int, int]
    heads: tuple[int, int, int] = (1, 3, 3)  # batch, heads, kv heads
    causal: bool = False
    mask: Tensor | None = None
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # of the scores, beside head_dim^-1/2

    def operands(self, host) -> Forward:
        (lq, lk, d), (b, h, hkv) = self.sizes, self.heads
        q, k, v = normal(b, h, lq, d, seed=0), normal(b, hkv, lk, d, seed=1) + 1, normal(b, hkv, lk, d, seed=2)
        return Forward(host, q, k, v, self.scale * d**-0.5, self.causal, self.mask)

    @property
    def jobs(self) -> int:
        lq, _, d = self.sizes
        return self.heads[0] * self.heads[1] * -(-lq // (128 if d > 128 else 192))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sm90")
    source = translate("attention/int8_sm90.cu", folder, launches=1, omissible=OMISSIBLE.values())
    with one_thread():
        yield build(folder, "sm90_host.cpp", {"SAGE3_ATTEND": source})


def attend(host, case, operands, *, blocks, taken, at_once=None, fast=False, seed=0, omitted=None):
    """The Result of ``blocks`` blocks whose jobs are taken from a counter, or are not; or what the emulator stopped at."""
    b, h, lq = *case.heads[:2], case.sizes[0]
    out = torch.full((b, lq, h, case.sizes[2]), math.nan, dtype=case.dtype).transpose(1, 2)
    before = normal(b, h, lq, seed=9)  # what int8_quantize puts there
    lse, peak = before.clone(), torch.full((b, h, lq), math.nan)
    tiles = mask_tiles(case.mask) if case.mask is not None else None
    counter = c_int(0)
    call = Attend(
        operands.shape, operands.saved.data_ptr(), view(out), lse.data_ptr(),
        view(case.mask) if case.mask is not None else Tensor4(), tiles.data_ptr() if tiles is not None else None,
        case.causal, fast, blocks, ctypes.addressof(counter) if taken else None, peak.data_ptr(),
    )  # fmt: skip
    message = ctypes.create_string_buffer(200)
    number = list(OMISSIBLE).index(omitted) if omitted is not None else -1
    with setting(host, at_once=at_once or blocks, seed=seed, omitted=number):
        error = host.attend(ctypes.byref(call), message)
    return message.value.decode() if error else Result(out, lse - before, peak, counter.value)


def check(got, operands, fast):
    """Against fp64 attention of what the codes stand for: left is the rounding of P, and that of ``fast`` exponentials."""
    out, lse, weights = operands.attend()
    out, seen = out[..., : got.out.shape[3]], lse > -math.inf
    assert got.out.isfinite().all()
    assert not got.out[~seen].any()
    assert (got.out - out).abs().sum() < (0.025 if fast else 0.008) * out.abs().sum()
    assert torch.equal(got.lse > -math.inf, seen)
    assert (got.lse - lse)[seen].abs().max() < (0.06 if fast else 0.02)
    if not fast:
        peak = got.peak[seen] / weights.amax(-1)[seen]
        assert peak.min() > 0.249
        assert peak.max() < 1.02


def bool_mask(*shape):
    return some_mask(shape, torch.bool)


def jobs_without_tiles(mask):
    """The first 192 queries of the first head, and all of the last one, attend nothing."""
    mask = mask.clone()
    nothing = False if mask.dtype == torch.bool else -math.inf
    mask[:, 0, :192] = mask[:, -1] = nothing
    return mask


CASES = {
    "hd64": Case((400, 300, 64)),
    "hd96": Case((200, 300, 96), heads=(1, 5, 5)),
    "hd128": Case((200, 300, 128), heads=(1, 5, 5)),
    "hd256": Case((200, 200, 256), heads=(1, 5, 5)),
    "one job": Case((190, 300, 64), heads=(1, 1, 1)),
    "jobs of one tile": Case((1, 100, 64), heads=(2, 6, 6)),
    "sharp scores": Case((200, 300, 64), scale=8.0),
    "hd80 in bf16, grouped heads, batch": Case((130, 257, 80), heads=(2, 4, 2), dtype=torch.bfloat16),
    "hd37 in fp16": Case((65, 129, 37), dtype=torch.float16),
    "causal, hd64": Case((600, 600, 64), causal=True),
    "causal, grouped heads, hd128": Case((400, 400, 128), heads=(1, 4, 2), causal=True),
    "causal, more queries, hd96": Case((500, 140, 96), causal=True),
    "causal, more keys, hd256": Case((260, 400, 256), causal=True),
    "bool mask": Case((400, 400, 64), mask=bool_mask(1, 1, 400, 400)),
    "bool mask of keys alone": Case((200, 400, 128), mask=bool_mask(1, 3, 1, 400)),
    "additive mask": Case((200, 400, 96), mask=some_mask((1, 3, 200, 400), torch.float16)),
    "jobs without tiles": Case((400, 300, 64), mask=jobs_without_tiles(bool_mask(1, 3, 400, 300))),
    "jobs without tiles, causal": Case(
        (400, 300, 128), causal=True, mask=jobs_without_tiles(some_mask((1, 3, 400, 300), torch.float32))
    ),
    "jobs without tiles, hd256": Case((200, 300, 256), mask=jobs_without_tiles(bool_mask(1, 3, 200, 300))),
}
RUNS = [(blocks, taken) for blocks in (1, 2, 3) for taken in (False, True)]


@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_every_job_is_done_once_whoever_does_it(host, name, fast):
    """Without a mask and causality, jobs that are not taken are dealt out; else blocks walk in steps of their number."""
    case = CASES[name]
    assert case.mask is None or set(mask_tiles(case.mask).flatten().tolist()) >= {0, 2}
    operands = case.operands(host)
    first = None
    for seed, (blocks, taken) in enumerate(RUNS):
        got = attend(host, case, operands, blocks=blocks, taken=taken, fast=fast, seed=seed)
        assert isinstance(got, Result), got
        assert got.counted == (case.jobs if taken else 0)  # the last number of each block is no job
        if first is None:
            check(got, operands, fast and case.sizes[2] <= 128)
            first = got
        assert got.same_bits(first), (blocks, taken)


@pytest.mark.parametrize("name", ["jobs of one tile", "jobs without tiles", "causal, more queries, hd96"])
def test_results_do_not_depend_on_who_is_fast(host, name):
    """Paces of warps, of copies, and blocks one after the other, so that the first does nearly all."""
    case = CASES[name]
    operands = case.operands(host)
    first = attend(host, case, operands, blocks=1, taken=False)
    for seed in range(1, 11):
        got = attend(host, case, operands, blocks=2, taken=True, seed=seed)
        assert isinstance(got, Result), got
        assert got.same_bits(first), seed
    assert attend(host, case, operands, blocks=3, at_once=1, taken=True).same_bits(first)


@pytest.mark.parametrize("omitted", OMISSIBLE)
def test_what_is_missing_is_seen_here(host, omitted):
    """Of what this emulation is worth: it does notice."""
    case = CASES["jobs without tiles"]
    operands = case.operands(host)
    got = attend(host, case, operands, blocks=2, taken=True, omitted=omitted)
    if "never" in omitted:
        assert "everybody waits" in got
    elif isinstance(got, Result):
        assert not got.same_bits(attend(host, case, operands, blocks=2, taken=True))
