"""8-bit attention with an 8-bit gradient in Triton, as torch ops: for GPUs and head dims that csrc/backward is not for.

The same numerics, with scales where Triton takes them best: one a token of Q and of dO, one for 128 keys of K, one for 128
tokens of each channel of V; of P and of dS one a key and tile of queries. P V, dO V^T and dS K are products in 16 bits.

Between the passes lie one byte a channel of q, k, v and of the output, and three numbers a token: 4.1 bytes where flash
attention keeps the 8 of q, k, v and out in bf16. Triton comes with torch on Linux; it is imported when it is needed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..report import record_gradient_note, record_note
from . import training
from .jit.switches import Switches
from .ops import NAMESPACE, no_second_derivative

MAX_HEAD_DIM = 256
TILE = 128
"""Tokens that share scales of K and V; all lengths in memory are multiples of it."""
_PREPARED = 64  # tokens of a block of the kernels that prepare, a divisor of TILE
_ALIGNMENT = 256


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps of a block, tiles in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """The three kernels' tiles; ``eight_bit_dq``: dQ = dS K of 8-bit operands too."""

    forward: Tiles
    keys: Tiles
    queries: Tiles
    eight_bit_dq: bool = False


# By the width of a head and what a block can have of shared memory: 227 KB (Hopper, B200), 163 KB (A100), 99 KB (all
# others). Not by trial on the user's GPU: that takes minutes, and what it finds differs from run to run. Those of the first
# for heads of 64 and 128 are the best of eight measured on an H200; the others are what fits without spilling.
_LARGE = {
    64: Config(Tiles(64, 64, 4, 3), Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 3)),
    128: Config(Tiles(128, 64, 4, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
    256: Config(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
}
_MEDIUM = {
    64: Config(Tiles(128, 64, 4, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 8, 3)),
    128: Config(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    256: Config(Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
}
_SMALL = {
    64: Config(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), True),
    128: Config(Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 4, 2), True),
    256: Config(Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(64, 32, 8, 2), True),
}


def config(capability: tuple[int, int], width: int) -> Config:
    """The tiles for a GPU and a padded head dim; to find better ones: benchmarks/attention.py --backward."""
    table = _LARGE if capability[0] in (9, 10) else _MEDIUM if capability in ((8, 0), (8, 7)) else _SMALL
    return table[max(width, 64)]


def absent() -> str | None:
    """Why the ops cannot run here, or None. A constant in a compiled graph."""
    if Switches.read(os.environ).force_reference:
        return "SAGE3_FORCE_REFERENCE is set"
    if not _has_triton():
        return "Triton is not installed (it comes with torch on Linux)"
    return None if _has_compiler() else "Triton compiles with gcc or clang, and neither is installed"


absent._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see devices.py


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _has_compiler() -> bool:
    """For what launches a kernel, as Triton looks for one; on Windows it brings its own."""
    return os.name == "nt" or "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))


def padded_head_dim(d: int) -> int:
    """The head dim that the kernels compute with. Raises InputError above 256."""
    if d > MAX_HEAD_DIM:
        raise InputError(f"The 8-bit gradient takes a head_dim of at most {MAX_HEAD_DIM}, this call has {d}.")
    return max(32, 1 << (d - 1).bit_length())


# ------------------------------------------------------------------------------------------------ memory
@dataclass(frozen=True)
class Workspace:
    """What ``saved`` holds, one after the other, each from a multiple of 256 bytes on: (name, type, shape).

    ``row`` bytes are a token's codes: the head dim, and as many zeros as make it a multiple of 8.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def row(self) -> int:
        return -(-self.head_dim // 8) * 8

    @property
    def q_padded(self) -> int:
        return -(-self.queries // TILE) * TILE

    @property
    def k_padded(self) -> int:
        return -(-self.keys // TILE) * TILE

    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        q, kv = self.batch * self.heads, self.batch * self.kv_heads
        k_codes = (kv, self.k_padded, self.row)
        return (
            ("q8", torch.int8, (q, self.q_padded, self.row)),
            ("q_scale", torch.float32, (q, self.q_padded)),
            ("k8", torch.int8, k_codes),
            ("k_scale", torch.float32, (kv, self.k_padded // TILE)),
            ("v8", torch.int8, k_codes),
            ("v_scale", torch.float32, (kv, self.k_padded // TILE, self.row)),
            ("mean_k", torch.float32, (kv, self.head_dim)),
        )

    def bytes(self) -> int:
        return sum(_aligned(dtype, shape) for _, dtype, shape in self.parts())

    def views(self, saved: Tensor) -> dict[str, Tensor]:
        """The parts of ``saved``."""
        found, at = {}, 0
        for name, dtype, shape in self.parts():
            found[name] = saved[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            at += _aligned(dtype, shape)
        return found


def _aligned(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def workspace_bytes(batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Of ``saved``."""
    return Workspace(batch, heads, kv_heads, queries, keys, head_dim).bytes()


# ------------------------------------------------------------------------------------------------ launches
def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _config(device: torch.device, width: int) -> Config:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)
    return config(capability, width)


def _channels_last(x: Tensor) -> Tensor:
    """x with a token's channels together."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _sixteen_bits(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float16 else torch.bfloat16


def _mask_arguments(mask: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> tuple[int, Tensor, tuple[int, ...]]:
    """(MASK, the mask or anything, its strides over ``shape``)."""
    if mask is None:
        return 0, like, (0, 0, 0, 0)
    full = mask.expand(shape)
    return (1, full.view(torch.uint8), full.stride()) if mask.dtype == torch.bool else (2, full, full.stride())


def _launch(x: Tiles, mask: int) -> dict[str, int]:
    """A mask's elements take their share of shared memory, and one stage of everything makes room for them."""
    stages = max(1, x.stages - 1) if mask else x.stages
    return {"BLOCK_M": x.queries, "BLOCK_N": x.keys, "num_warps": x.warps, "num_stages": stages}


def _output_like(q: Tensor) -> Tensor:
    """q's order of memory, if that keeps a token's channels together."""
    out = torch.empty_like(q)
    return out if out.stride(3) == 1 and q.shape[3] > 1 else q.new_empty(q.shape)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, return_lse: bool, chosen: Config
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``attend`` returns, by tiles of one's choice."""
    from . import triton_forward as kernels

    (b, h, lq, d), (hkv, lk) = q.shape, k.shape[1:3]
    space, width = Workspace(b, h, hkv, lq, lk, d), padded_head_dim(d)
    out = _output_like(q)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    saved = q.new_empty(space.bytes(), dtype=torch.uint8)
    out8 = q.new_empty(q.shape, dtype=torch.int8)
    rows = q.new_empty((2, b, h, lq), dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        rows[0], rows[1] = -math.inf, 0.0
        return out.zero_(), lse.fill_(-math.inf), saved, out8.zero_(), rows
    q, k, v = (_channels_last(x) for x in (q, k, v))
    at = space.views(saved)
    torch.mean(k, 2, dtype=torch.float32, out=at["mean_k"].view(b, hkv, d))
    v16 = q.new_empty((b * hkv, space.k_padded, width), dtype=_sixteen_bits(q.dtype))
    q_mean = q.new_empty((b * h, space.q_padded) if return_lse else (1,), dtype=torch.float32)
    kind, mask, strides = _mask_arguments(mask, saved, (b, h, lq, lk))
    kernels.quantize_queries[(b * h * (space.q_padded // _PREPARED),)](
        q, at["mean_k"], at["q8"], at["q_scale"], q_mean, h, h // hkv, lq, space.q_padded, *q.stride()[:3],
        math.copysign(1.0, scale), D=d, WIDTH=width, ROW=space.row, BLOCK=_PREPARED, WITH_MEAN=return_lse,
    )  # fmt: skip
    kernels.quantize_keys[(b * hkv * (space.k_padded // TILE),)](
        k, v, at["mean_k"], at["k8"], at["k_scale"], at["v8"], at["v_scale"], v16, hkv, lk, space.k_padded,
        *k.stride()[:3], *v.stride()[:3], D=d, WIDTH=width, ROW=space.row, num_warps=8,
    )  # fmt: skip
    kernels.attend[(b * h * -(-lq // chosen.forward.queries),)](
        at["q8"], at["q_scale"], q_mean, at["k8"], at["k_scale"], v16, mask, out, lse, out8, rows, h, h // hkv, lq, lk,
        space.q_padded, space.k_padded, abs(scale) * math.log2(math.e), *strides, *out.stride()[:3], D=d, WIDTH=width,
        ROW=space.row, CAUSAL=is_causal, MASK=kind, WITH_LSE=return_lse, **_launch(chosen.forward, kind),
    )  # fmt: skip
    return out, lse, saved, out8, rows


class Backward:
    """The gradient of one forward pass: what its two kernels need, prepared, and each of them by tiles of one's choice."""

    def __init__(
        self, dout: Tensor, dlse: Tensor | None, saved: Tensor, out8: Tensor, rows: Tensor, mask: Tensor | None,
        kv_heads: int, keys: int, is_causal: bool, scale: float, eight_bit_dq: bool,
    ) -> None:  # fmt: skip
        from . import triton_backward as kernels

        b, h, lq, d = dout.shape
        space, width = Workspace(b, h, kv_heads, lq, keys, d), padded_head_dim(d)
        self.space, self.at, self.like, self.scale, self.eight_bit_dq = space, space.views(saved), dout, scale, eight_bit_dq
        self.dlse = dlse
        sixteen = _sixteen_bits(dout.dtype)
        self.do16 = dout.new_empty((b * h, space.q_padded, width), dtype=sixteen)
        self.do8_t, self.q8_t = (dout.new_empty((b * h, width, space.q_padded), dtype=torch.int8) for _ in range(2))
        self.stats = dout.new_empty((kernels.STATS, b * h, space.q_padded), dtype=torch.float32)
        self.v16 = dout.new_empty((b * kv_heads, space.k_padded, width), dtype=sixteen)
        self.k_made = torch.empty_like(self.v16, dtype=torch.int8 if eight_bit_dq else torch.bfloat16)
        kind, self.mask, self.mask_strides = _mask_arguments(mask, saved, (b, h, lq, keys))
        sizes: dict[str, Any] = {"WIDTH": width, "ROW": space.row}
        self.constants = sizes | {"D": d, "CAUSAL": is_causal, "MASK": kind}
        dout, at = _channels_last(dout), self.at
        kernels.prepare_queries[(b * h * (space.q_padded // _PREPARED),)](
            dout, self._dlse(), at["q8"], at["q_scale"], out8, rows, self.do16, self.do8_t, self.q8_t, self.stats, h, lq,
            space.q_padded, abs(scale) * math.log2(math.e), *dout.stride()[:3], D=d, BLOCK=_PREPARED,
            WITH_DLSE=dlse is not None, **sizes,
        )  # fmt: skip
        kernels.prepare_keys[(b * kv_heads * (space.k_padded // _PREPARED),)](
            at["k8"], at["k_scale"], at["v8"], at["v_scale"], self.k_made, self.v16, space.k_padded, BLOCK=_PREPARED,
            TRANSPOSED=eight_bit_dq, **sizes,
        )  # fmt: skip

    def _dlse(self) -> Tensor:
        return self.stats if self.dlse is None else self.dlse  # a kernel that is told so does not read it

    def of_keys(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """(dk, dv)."""
        from . import triton_backward as kernels

        x, at = self.space, self.at
        dk, dv = (self.like.new_empty((x.batch, x.kv_heads, x.keys, x.head_dim)) for _ in range(2))
        kernels.keys_gradient[(x.batch * x.kv_heads * -(-x.keys // tiles.keys),)](
            at["q8"], self.q8_t, self.do16, self.do8_t, self.stats, at["k8"], at["k_scale"], self.v16, self.mask, dk, dv,
            x.kv_heads, x.queries, x.keys, x.q_padded, x.k_padded, abs(self.scale), *self.mask_strides,
            GROUP=x.heads // x.kv_heads, **self.constants, **_launch(tiles, self.constants["MASK"]),
        )  # fmt: skip
        return dk, dv

    def of_queries(self, tiles: Tiles) -> Tensor:
        """dq."""
        from . import triton_backward as kernels

        x, at = self.space, self.at
        dq = self.like.new_empty(self.like.shape)
        kernels.queries_gradient[(x.batch * x.heads * -(-x.queries // tiles.queries),)](
            at["q8"], self.do16, self.stats, at["k8"], self.k_made, at["k_scale"], self.v16, self.mask, self._dlse(),
            at["mean_k"], dq, x.heads, x.heads // x.kv_heads, x.queries, x.keys, x.q_padded, x.k_padded, self.scale,
            *self.mask_strides, EIGHT=self.eight_bit_dq, WITH_DLSE=self.dlse is not None, **self.constants,
            **_launch(tiles, self.constants["MASK"]),
        )  # fmt: skip
        return dq


def run_backward(
    dout: Tensor, dlse: Tensor | None, saved: Tensor, out8: Tensor, rows: Tensor, mask: Tensor | None, kv_heads: int,
    keys: int, is_causal: bool, scale: float, chosen: Config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``gradient`` returns, by tiles of one's choice."""
    if dout.numel() == 0 or kv_heads * keys == 0:
        none = dout.new_zeros((dout.shape[0], kv_heads, keys, dout.shape[3]))
        return torch.zeros_like(dout, memory_format=torch.contiguous_format), none, none.clone()
    made = Backward(
        dout, dlse, saved, out8, rows, mask, kv_heads, keys, is_causal, scale, chosen.eight_bit_dq
    )  # fmt: skip
    dk, dv = made.of_keys(chosen.keys)
    return made.of_queries(chosen.queries), dk, dv


# ------------------------------------------------------------------------------------------------ ops
@torch.library.custom_op(f"{NAMESPACE}::int8_attention_saving_triton", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    deterministic: bool = False,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """8-bit attention of q (B, H, Lq, D), k and v (B, Hkv, Lk, D) -> (out, lse, saved, out8, rows).

    As ``training.attend``, but for what ``saved`` holds. ``rows``: the LSE in base 2 without K's mean, the scales of out8.
    The gradient is always ``deterministic``. Raises InputError for head dims above 256.
    """
    with _on(q.device):
        result = run_forward(
            q, k, v, mask, is_causal, scale, return_lse, _config(q.device, padded_head_dim(q.shape[3]))
        )  # fmt: skip
    record_note(note)
    return result


@torch.library.custom_op(f"{NAMESPACE}::int8_attention_gradient_triton", mutates_args=())
def gradient(
    dout: Tensor,
    dlse: Tensor | None,
    saved: Tensor,
    out8: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    kv_heads: int,
    keys: int,
    is_causal: bool,
    scale: float,
    deterministic: bool,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of ``attend`` from the gradients of out and lse, contiguous and in dout's dtype."""
    with _on(dout.device):
        result = run_backward(
            dout, dlse, saved, out8, rows, mask, kv_heads, keys, is_causal, scale,
            _config(dout.device, padded_head_dim(dout.shape[3])),
        )  # fmt: skip
    record_gradient_note(note)
    return result


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    return_lse: bool,
    deterministic: bool = False,
    note: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = workspace_bytes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return (
        _output_like(q),
        q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32),
        q.new_empty(size, dtype=torch.uint8),
        q.new_empty(q.shape, dtype=torch.int8),
        q.new_empty((2, *q.shape[:3]), dtype=torch.float32),
    )


gradient.register_fake(training.faked_gradient)
attend.register_autograd(training.backward_by(gradient), setup_context=training.save)
gradient.register_autograd(no_second_derivative)
