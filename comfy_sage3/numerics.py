"""``python -m comfy_sage3 numerics``: what each choice of the method costs in accuracy, as tables.

The tables of docs/numerics.md, on inputs made here from a seed: no download, the same on every machine up to the
last digit of fp32 sums.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import training_numerics
from .error_tables import Row, Table, average, markdown
from .errors import InputError
from .metrics import attention_error
from .reference import (
    OUR_FP4,
    Fp4Options,
    Int8Options,
    exact_attention,
    fp4_attention,
    int8_attention,
    int8_attention_backward,
)

GRID = (6, 16, 16)
"""Frames, height and width of the token grid: 1536 tokens."""
HEAD_DIM = 64
SHARPNESS = (1.5, 1.0, 0.7, 0.25)
"""Per head, the standard deviation of Q's content: from peaked to nearly uniform attention."""
SINKS = (0.0, 0.0, 8.0, 9.0)
"""Per head, by how much the scores of the two sink tokens exceed the others (0: no sink)."""
RANK = 24


def video_like(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V (1, 4, 1536, 64) fp32 with the traits of a video model's that matter to quantisation.

    Content: ``RANK`` fields over a frames x height x width grid, smooth in space and time, plus noise, mapped to Q
    and K by matrices that share a component, so that a token attends most to tokens like it. On top of that:

    * channels have offsets that all tokens share, in units of K's content: in each run of 16 channels of K one of
      5 to 15 and the others of about 4, drifting by 6 % over the grid; in Q one of 1 to 3, the others of about
      0.6, drifting by 10 %.
    * two heads have two "sink" tokens that draw most of the attention, with a long faint tail behind them.
    * V has channel offsets of about half its content.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def fields(count: int) -> Tensor:
        """(heads, tokens, count), each field smooth, of unit variance."""
        coarse = normal(len(SHARPNESS) * count, 1, *(max(2, n // 4) for n in GRID))
        fine = F.interpolate(coarse, size=GRID, mode="trilinear", align_corners=True)
        fine = fine.reshape(len(SHARPNESS), count, -1)
        return (fine / fine.std(-1, keepdim=True)).transpose(1, 2)

    def offsets(large: float, small: float) -> Tensor:
        """(heads, 1, HEAD_DIM): one large offset in every 16 channels, of either sign."""
        heads, blocks = len(SHARPNESS), HEAD_DIM // 16
        value = small * normal(heads, blocks, 16)
        where = torch.randint(16, (heads, blocks, 1), generator=generator)
        size = large * (0.5 + torch.rand(heads, blocks, 1, generator=generator)) * normal(heads, blocks, 1).sign()
        return value.scatter(2, where, size).reshape(heads, 1, HEAD_DIM)

    heads = len(SHARPNESS)
    tokens = GRID[0] * GRID[1] * GRID[2]
    content = fields(RANK) + 0.3 * normal(heads, tokens, RANK)
    shared = normal(heads, RANK, HEAD_DIM)
    to_q, to_k = ((shared + 0.5 * normal(heads, RANK, HEAD_DIM)) / RANK**0.5 for _ in "qk")
    to_v = normal(heads, RANK, HEAD_DIM) / RANK**0.5
    q = torch.tensor(SHARPNESS).view(-1, 1, 1) * (content @ to_q) + offsets(2.0, 0.6) * (1 + 0.1 * fields(1))
    k = content @ to_k + offsets(10.0, 4.0) * (1 + 0.06 * fields(1))
    v = content @ to_v + 0.5 * normal(heads, 1, HEAD_DIM)
    for head, boost in enumerate(SINKS):
        mean = q[head].mean(0)
        k[head, :2] += boost * HEAD_DIM**0.5 * mean / (mean @ mean)
    return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)


Inputs = list[tuple[Tensor, Tensor, Tensor]]


def _forward_table(key: str, title: str, inputs: Inputs, rows: list[tuple[str, Fp4Options | Int8Options]]) -> Table:
    exact = [exact_attention(*x)[0] for x in inputs]

    def run(options: Fp4Options | Int8Options, x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if isinstance(options, Fp4Options):
            return fp4_attention(*x, options=options)[0]
        return int8_attention(*x, options=options)[0]

    lines = tuple(
        average(label, [attention_error(run(o, x), e) for x, e in zip(inputs, exact, strict=True)]) for label, o in rows
    )
    return Table(key, title, lines)


def four_bit_format(inputs: Inputs) -> Table:
    """Paper, table 1a."""
    return _forward_table("format", "4-bit format", inputs, [
        ("MXFP4 (blocks of 32, power-of-two scale)", Fp4Options(block_format="mxfp4")),
        ("NVFP4 (blocks of 16, e4m3 scale)", Fp4Options()),
    ])  # fmt: skip


def p_scaling(inputs: Inputs) -> Table:
    """Paper, table 1b."""
    return _forward_table("p", "Quantisation of P", inputs, [
        ("direct", Fp4Options(two_level_p=False)),
        ("two-level, running maximum", Fp4Options(p_reference="running")),
        ("two-level, tile maximum", Fp4Options()),
        ("two-level, lazy power of two", Fp4Options(p_reference="lazy")),
    ])  # fmt: skip


def smoothing_choices(inputs: Inputs) -> Table:
    """Paper, table 16."""
    none = Fp4Options(smooth_q=False, smooth_k=False)
    return _forward_table("smoothing", "Smoothing (4-bit)", inputs, [
        ("none", none),
        ("SmoothQuant", replace(none, rotate="smoothquant")),
        ("Hadamard", replace(none, rotate="hadamard")),
        ("Q only", Fp4Options(smooth_k=False)),
        ("K only", Fp4Options(smooth_q=False)),
        ("Q and K", Fp4Options()),
    ])  # fmt: skip


def q_mean(inputs: Inputs) -> Table:
    """The official code's ``per_block_mean``."""
    return _forward_table("q_mean", "Mean taken out of Q", inputs, [
        ("one for the sequence", Fp4Options(per_block_mean=False)),
        ("one for each 128 rows", Fp4Options()),
    ])  # fmt: skip


def scale_choice(inputs: Inputs) -> Table:
    """Which scale a block of Q, K or V gets; and the mean of V."""
    return _forward_table("scale", "Block scale", inputs, [
        ("maximum at 6 (paper)", Fp4Options()),
        ("maximum at 6 or 4", Fp4Options(block_scale="four_or_six")),
        ("best of three", Fp4Options(block_scale="quick")),
        ("best of nine", Fp4Options(block_scale="search")),
        ("best of three, mean taken out of V", Fp4Options(block_scale="quick", smooth_v=True)),
        ("best of nine, mean taken out of V", Fp4Options(block_scale="search", smooth_v=True)),
    ])  # fmt: skip


def official(inputs: Inputs) -> Table:
    """The official code's method against ours, on inputs anyone can make: N(0,1), and N(0,1) with channel offsets."""
    rows: list[Row] = []
    for name, offset in (("N(0,1)", 0.0), ("with channel offsets", 5.0)):
        made = [plain_inputs(seed, offset) for seed in range(len(inputs))]
        rows += _forward_table("", "", made, [
            (f"{name}: official code", Fp4Options(official_p=True)),
            (f"{name}: paper, P divided by and summed as it is stored", Fp4Options()),
            (f"{name}: ours", OUR_FP4),
        ]).rows  # fmt: skip
    return Table("official", "4-bit method", tuple(rows))


def plain_inputs(seed: int, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q (1, 2, 512, 128), K and V (1, 2, 2048, 128): N(0,1), plus ``offset`` times N(0,1) per head and channel."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(1, 2, n, 128, generator=generator) for n in (512, 2048, 2048))
    q, k, v = (x + offset * torch.randn(1, 2, 1, 128, generator=generator) for x in made)
    return q, k, v


def second_level(inputs: Inputs) -> Table:
    """What e4m3 scales alone do to a V of small magnitude."""
    small = [(q, k, v * 1e-3) for q, k, v in inputs]
    tables = [
        _forward_table("", "", x, [
            (f"{name}, block scales only", Fp4Options()),
            (f"{name}, fp32 scale per head on top", Fp4Options(second_level_scale=True)),
        ])
        for name, x in (("V as it is", inputs), ("V / 1000", small))
    ]  # fmt: skip
    return Table("second_level", "Second-level scale", tables[0].rows + tables[1].rows)


def eight_bit(inputs: Inputs) -> Table:
    """The 8-bit forward pass."""
    return _forward_table("int8", "8-bit forward", inputs, [
        ("no smoothing of K", Int8Options(smooth_k=False)),
        ("scale per block", Int8Options(granularity="block")),
        ("scale per thread (default)", Int8Options()),
        ("scale per token", Int8Options(granularity="token")),
        ("scale per thread, P V in INT8", Int8Options(pv="int8")),
    ])  # fmt: skip


def gradients(inputs: Inputs) -> Table:
    """Paper, table 1c: dQ with dO V^T in INT8 and in high precision; then dK and dV."""
    rows: list[tuple[str, int, Int8Options]] = [
        ("dQ, dO V^T in INT8", 0, Int8Options(do_v="int8")),
        ("dQ, dO V^T not quantised", 0, Int8Options()),
        ("dQ, the same plus rowsum(dS) mean(K)", 0, Int8Options(key_mean_term=True)),
        ("dK, dO V^T not quantised", 1, Int8Options()),
        ("dV, dO V^T not quantised", 2, Int8Options()),
    ]
    errors: list[list[dict[str, float]]] = [[] for _ in rows]
    for seed, x in enumerate(inputs):
        dout = output_gradient(x[2], seed)
        exact = _backward(dout, x, Int8Options(quantize=False))
        done: dict[Int8Options, tuple[Tensor, ...]] = {}
        for (_, which, options), column in zip(rows, errors, strict=True):
            if options not in done:
                done[options] = _backward(dout, x, options)
            column.append(attention_error(done[options][which], exact[which]))
    lines = tuple(average(label, column) for (label, _, _), column in zip(rows, errors, strict=True))
    return Table("gradients", "8-bit gradients", lines)


def output_gradient(v: Tensor, seed: int) -> Tensor:
    """A gradient like a training step's: tokens of very different size (log-normal), channels with a shared part."""
    generator = torch.Generator().manual_seed(seed + 1000)
    size = torch.randn(*v.shape[:-1], 1, generator=generator).exp()
    shared = torch.randn(*v.shape[:2], 1, v.shape[-1], generator=generator)
    return 1e-3 * size * (torch.randn(v.shape, generator=generator) + shared)


def _backward(dout: Tensor, x: tuple[Tensor, Tensor, Tensor], options: Int8Options) -> tuple[Tensor, ...]:
    out, lse = int8_attention(*x, options=options)
    return int8_attention_backward(dout, *x, out, lse, options=options)


TABLES: tuple[Callable[[Inputs], Table], ...] = (
    four_bit_format,
    p_scaling,
    smoothing_choices,
    q_mean,
    scale_choice,
    official,
    second_level,
    eight_bit,
    gradients,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="average over N inputs (default 5)")
    parser.add_argument("--training", action="store_true", help="the 8-bit gradient's tables instead, see docs/numerics.md")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each input with --training (default 4096)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the tables, and write them to ``args.json`` when given."""
    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}: give 1 or more.")
    if args.training:
        return _run_training(args)
    inputs = [video_like(seed) for seed in range(args.seeds)]
    tokens, heads = inputs[0][0].shape[2], inputs[0][0].shape[1]
    print(f"{args.seeds} inputs of {heads} heads x {tokens} tokens x {HEAD_DIM}; errors against exact attention\n")
    tables = []
    for make in TABLES:
        tables.append(make(inputs))
        print(markdown(tables[-1]), end="\n\n", flush=True)
    if args.json:
        _write_json(Path(args.json), {"seeds": args.seeds, "tables": [asdict(t) for t in tables]})
    return 0


def _run_training(args: argparse.Namespace) -> int:
    if args.tokens < 1:
        raise InputError(f"--tokens is {args.tokens}: give 1 or more.")
    print(f"{args.seeds} inputs of 1 head x {args.tokens} tokens x {training_numerics.HEAD_DIM}; errors against fp64\n")
    made = training_numerics.tables(args.seeds, args.tokens)
    for table in made:
        print(training_numerics.markdown(table), end="\n\n", flush=True)
    if args.json:
        _write_json(Path(args.json), {"seeds": args.seeds, "tokens": args.tokens, "tables": [asdict(t) for t in made]})
    return 0


def _write_json(path: Path, content: object) -> None:
    """Write beside the target and rename, so that a failure leaves no half a file."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        Path(name).replace(path)
    except OSError as error:
        raise InputError(f"Cannot write {path} ({error.strerror}): give a file in a folder you can write to.") from error
