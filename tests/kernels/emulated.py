"""CUDA kernels' own sources, run thread by thread on a CPU (emulator/machine.h): how they are built, and what goes in."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F

from comfy_sage3.kernels.sources import find_tree

from .test_nvfp4 import cxx

HERE = Path(__file__).parent
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
LAUNCH = re.compile(r"(?m)^( *)(.+?)<<<(.+), (.+?), (.+?), stream>>>\((\w+)\);")
SHARED = "extern __shared__ __align__(1024) unsigned char memory[];"


def translate(name: str, folder: Path, launches: int, omissible: Collection[str] = ()) -> Path:
    """csrc's file ``name`` as C++: launches become emulator::run, dynamic shared memory the emulator's.

    Statement i of ``omissible``, each of which must stand in the file once, is left out where set_up's ``omitted`` is i.
    """
    path = find_tree().root / name
    text = path.read_text(encoding="utf-8")
    for i, statement in enumerate(omissible):
        assert text.count(statement) == 1, statement
        text = text.replace(statement, f"if (emulator::omitted != {i}) {{ {statement} }}")
    text = text.replace(SHARED, "unsigned char* const memory = emulator::shared_memory();")
    text = text.replace("__shared__ alignas(16) T", "alignas(16) __shared__ T")  # where C++ wants it
    text, found = LAUNCH.subn(r"\1emulator::run(\3, \4, \5, [&] { \2(\6); });", text)
    assert found == launches
    text = text.replace("namespace {\n", f"namespace {path.stem} {{\n", 1)  # several files may become one
    text = text.replace("}  // namespace\n", f"}}  // namespace\nusing namespace {path.stem};\n", 1)
    made = folder / path.name
    made.write_text(text, encoding="utf-8")
    return made


def build(folder: Path, host: str, sources: dict[str, Path]) -> ctypes.CDLL:
    """The host file of that name as a library for this CPU; ``sources``: its macros, and the files that they name."""
    defines = [f'-D{macro}="{path}"' for macro, path in sources.items()]
    flags = ["-std=c++20", "-O2", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]  # as nvcc's device code has it
    flags += ["-shared", "-fPIC", "-fvisibility=hidden", *defines]
    includes = [f"-I{HERE / 'emulator'}", f"-I{find_tree().root / 'include'}"]
    command = [cxx(), *flags, *includes, "-o", folder / "host.so", HERE / host]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    library = ctypes.CDLL(str(folder / "host.so"))
    library.saved_bytes.restype = c_int64
    library.set_up.argtypes = [c_uint32, c_uint32, c_int]
    return library


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other longer than these small tensors take."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def setting(host: ctypes.CDLL, *, at_once: int = 1, seed: int = 12345, omitted: int = -1) -> Iterator[None]:
    """How runs go in here: blocks at once, a seed for the paces of warps and copies, a statement that is left out."""
    host.set_up(at_once, seed, omitted)
    try:
        yield
    finally:
        host.set_up(1, 12345, -1)


class Shape(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")]


class Tensor4(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 4), ("dtype", c_int)]


def view(x):
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Tensor4(x.data_ptr(), (c_int64 * 4)(*strides), DTYPES[x.dtype])


def mask_tiles(mask):
    """mask_tiles.cuh's byte for every 64 x 128 of a mask (B or 1, H or 1, Lq or 1, Lk): nobody, everybody, mixed."""
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    plain = mask if mask.dtype == torch.bool else mask == 0
    (b, h, lq, lk), found = mask.shape, []
    for rows in torch.arange(lq).split(64):
        for columns in torch.arange(lk).split(128):
            part = (..., rows[:, None], columns)
            none, every = hidden[part].all(-1).all(-1), plain[part].all(-1).all(-1)
            found.append(torch.where(none, 0, torch.where(every, 1, 2)))
    return torch.stack(found, -1).to(torch.uint8).reshape(b, h, -1, -(-lk // 128)).contiguous()


def memory(size):
    """1024-byte aligned, all NaN."""
    block = torch.full((size + 1024,), 0xFF, dtype=torch.uint8)
    start = -block.data_ptr() % 1024
    return block[start : start + size]


def to_tokens(x, count):
    return F.pad(x, (0, 0, 0, count - x.shape[2]))


def codes(x, dims):
    scale = x.abs().amax(dims, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1.0, scale)).round(), scale


class Forward:
    """What the forward pass leaves of q, k and v, and the attention of what it stands for."""

    def __init__(self, host, q, k, v, scale, causal, mask=None):
        (b, h, lq, d), (hkv, lk) = q.shape, k.shape[1:3]
        self.shape, self.dim = Shape(b, h, hkv, lq, lk, d), next(n for n in (64, 96, 128, 256) if d <= n)
        q, k, v = (F.pad(x.float(), (0, self.dim - d)) for x in (q, k, v))
        self.saved = memory(host.saved_bytes(ctypes.byref(self.shape)))
        self.at = (c_int64 * 8)()
        host.saved_parts(ctypes.byref(self.shape), self.at)
        offsets = [torch.empty(n, self.dim, dtype=torch.int32) for n in (64, 128, 128)]
        host.saved_offsets(self.dim, *(c_void_p(x.data_ptr()) for x in offsets))

        query_tiles, key_tiles = -(-lq // 64), -(-lk // 128)
        log2e = math.log2(math.e)
        q8, s = codes(q * scale * log2e, (-1,))
        self.put_codes(0, to_tokens(q8, query_tiles * 64).unflatten(2, (-1, 64)), offsets[0])
        self.put(1, to_tokens(s, query_tiles * 64))
        self.q = q8 * s / log2e  # with the softmax scale
        k8, s = codes(to_tokens(k - k.mean(2, keepdim=True), key_tiles * 128).unflatten(2, (key_tiles, 16, 4, 2)), (3, 5, 6))
        self.put_codes(2, k8.flatten(3, 5), offsets[1])
        self.put(3, s)
        self.k = (k8 * s).flatten(2, 5)[:, :, :lk]
        mean, norm = v.mean(2, keepdim=True), v.std(2, keepdim=True, unbiased=False)
        norm = torch.where(norm > 1e-3, norm, 1.0)
        v8, s = codes(to_tokens((v - mean) / norm, key_tiles * 128).unflatten(2, (-1, 128)).unflatten(-1, (-1, 32)), (3, 5))
        self.put_codes(4, v8.flatten(-2), offsets[2])
        self.put(5, s.reshape(-1, self.dim // 32), columns=4 if self.dim <= 128 else 8)
        self.put(6, mean)
        self.put(7, norm)
        self.v = (v8 * s).flatten(-2).flatten(2, 3)[:, :, :lk] * norm + mean
        self.causal, self.mask = causal, mask

    def put(self, part, x, columns=None):
        x = x if columns is None else F.pad(x, (0, columns - x.shape[1]))
        found = x.contiguous().view(torch.uint8).flatten()
        self.saved[self.at[part] : self.at[part] + found.numel()] = found

    def put_codes(self, part, x, offsets):
        """x (B, H, tiles, tokens, D)."""
        tiles = torch.empty(*x.shape[:3], offsets.numel(), dtype=torch.int8)
        tiles[..., offsets.flatten().long()] = x.to(torch.int8).flatten(3)
        self.put(part, tiles)

    def operands(self):
        """What the codes stand for, in fp64; k and v for every head of q, q with the softmax scale."""
        group = self.shape.heads // self.shape.kv_heads
        return self.q.double(), *(x.double().repeat_interleave(group, 1) for x in (self.k, self.v))

    def attend(self):
        """(out, lse, weights) in fp64 of the values that the codes stand for."""
        q, k, v = self.operands()
        scores = q @ k.mT
        if self.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -math.inf)
        elif self.mask is not None:
            scores = scores + self.mask.double()
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))  # a row that attends nothing is 0
        return p @ v, lse, p

    def exact(self, dout, dlse=None):
        """(out, lse, dq, dk, dv) in fp64 of the values that the codes stand for; dq without the softmax scale."""
        group = self.shape.heads // self.shape.kv_heads
        (q, k, v), (out, lse, p) = self.operands(), self.attend()
        dout = F.pad(dout.double(), (0, self.dim - dout.shape[3]))
        dp = dout @ v.mT
        ds = p * (dp - (dout * out).sum(-1, keepdim=True) + (0.0 if dlse is None else dlse.double().unsqueeze(-1)))
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
        self.peak = p.amax(-1).float()
        return out, lse, ds @ k, dk, dv


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_mask(shape, dtype):
    """Tiles that hide everything, nothing and some of it; rows that may attend nothing; values of -inf."""
    lq, lk = shape[-2:]
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
    kept[..., :128] = True
    kept[..., 128:256] = False
    if lq > 70:
        kept[..., 64:70, :] = False
    if dtype == torch.bool:
        return kept
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    return torch.where(kept, torch.where(torch.arange(lk) < 128, torch.zeros_like(bias), bias), -math.inf)
