"""``python -m comfy_sage3 numerics --training``: how near the 8-bit gradient is to the exact one, as tables.

Inputs are N(0,1), head dim 128, with Q and K times sigma: scores then have a standard deviation of sigma squared. Errors are
against fp64. The rows follow arXiv 2505.11594 (tables 1c and 6) and the sweep over sigma of arXiv 2603.02170. A third table
has an attention sink: one key that takes half of the weight of every query, or every second one, with a small value, as
language models have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .error_tables import Row, Table, average
from .metrics import attention_error
from .reference import OUR_INT8, Int8Options, int8_attention, int8_attention_backward

HEAD_DIM = 128
SIGMAS = (1.0, 3.0, 5.0, 8.0, 10.0)
METHODS = (
    ("ours", OUR_INT8),
    ("INT8, a scale a row", replace(OUR_INT8, gradient_scales="row")),
    ("paper (P V in FP8)", Int8Options()),
    ("paper (P V in INT8)", Int8Options(pv="int8")),
    ("paper, dO V^T in INT8", Int8Options(pv="int8", do_v="int8")),
    ("paper, FP8 for INT8", Int8Options(products="fp8")),
)
SWEPT = tuple(m for m in METHODS if m[0] in ("ours", "paper (P V in FP8)"))  # over sigma
SUNK = tuple(m for m in METHODS if m[0] in ("ours", "INT8, a scale a row", "paper (P V in INT8)"))  # with a sink
SINKS = ((1, "sink"), (2, "every second query's sink"))
OF_FORWARD = ("ours", "paper (P V in FP8)", "paper (P V in INT8)")  # methods whose forward passes differ
NAMES = ("O", "dQ", "dK", "dV")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(seed: int, tokens: int, sigma: float = 1.0) -> Inputs:
    """q, k, v and the output's gradient, each (1, 1, tokens, 128) fp32."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(1, 1, tokens, HEAD_DIM, generator=generator) for _ in range(4))
    return q * sigma, k * sigma, v, dout


def with_sink(x: Inputs, weight: float = 0.5, every: int = 1) -> Inputs:
    """The same, but that the first key takes about ``weight`` of every so-many-th query, with a twentieth of its value."""
    q, k, v, dout = (t.clone() for t in x)
    q[..., 0], k[..., 0] = 0.0, 0.0
    q[..., ::every, 0] = 8.0  # a channel that only the sink answers to
    rest = (q[..., 1:] @ k[..., 1:, 1:].mT * HEAD_DIM**-0.5).exp().sum(-1).mean()
    k[..., 0, :] = 0.0
    k[..., 0, 0] = (rest * weight / (1.0 - weight)).log() / (8.0 * HEAD_DIM**-0.5)
    v[..., 0, :] *= 0.05
    return q, k, v, dout


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = (leaves[0] @ leaves[1].mT * HEAD_DIM**-0.5).softmax(-1) @ leaves[2]
        grads = torch.autograd.grad(out, leaves, dout.double())
    return (out.detach(), *grads)


def computed(x: Inputs, options: Int8Options) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) in 8 bits."""
    out, lse = int8_attention(*x[:3], options=options)
    return (out, *int8_attention_backward(x[3], *x[:3], out, lse, options=options))


def tables(seeds: int, tokens: int, sigmas: Sequence[float] = SIGMAS) -> list[Table]:
    """The output's and the gradients' errors of each method, dQ's and dK's over sigma, and the gradients' with a sink."""
    errors: dict[str, list[dict[str, float]]] = {}

    def note(x: Inputs, methods: Sequence[tuple[str, Int8Options]], label: str, first_key: int = 0) -> None:
        """Of dK and dV from a key on."""
        wanted = exact(*x)
        for method, options in methods:
            for name, got, want in zip(NAMES, computed(x, options), wanted, strict=True):
                if name in ("dK", "dV"):
                    got, want = got[:, :, first_key:], want[:, :, first_key:]
                errors.setdefault(label.format(name=name, method=method), []).append(attention_error(got, want))

    for seed in range(seeds):
        note(inputs(seed, tokens), METHODS, "{name}, {method}")
        for sigma in sigmas:
            note(inputs(seed, tokens, sigma), SWEPT, f"{{name}}, sigma {sigma:g}, {{method}}")
        # Without the sink's own gradient, which outweighs all other keys'.
        for every, sink in SINKS:
            note(with_sink(inputs(seed, tokens), every=every), SUNK, f"{{name}}, {sink}, {{method}}", first_key=1)

    def rows(labels: Sequence[str]) -> tuple[Row, ...]:
        return tuple(average(label, errors[label]) for label in labels)

    main = [f"{name}, {method}" for name in NAMES for method, _ in METHODS if name != "O" or method in OF_FORWARD]
    sweep = [f"{name}, sigma {sigma:g}, {method}" for name in ("dQ", "dK") for sigma in sigmas for method, _ in SWEPT]
    sunk = [f"{name}, {sink}, {method}" for _, sink in SINKS for name in NAMES[1:] for method, _ in SUNK]
    return [
        Table("training", f"8-bit training, N(0,1), {tokens} tokens", rows(main)),
        Table("sigma", f"Q and K times sigma, {tokens} tokens", rows(sweep)),
        Table("sink", f"A sink with half of the weight, {tokens} tokens; dK and dV of the others", rows(sunk)),
    ]


def markdown(table: Table) -> str:
    """The table as docs/numerics.md shows it: cosines that are all but 1 need their digits."""
    lines = [f"| {table.title} | cosine | relative L1 |", "| --- | ---: | ---: |"]
    return "\n".join(lines + [f"| {r.label} | {r.cosine:.5f} | {r.relative_l1:.4f} |" for r in table.rows])
