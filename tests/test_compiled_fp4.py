"""The compiled 4-bit kernel as the door uses it, without a GPU: a library whose operator is the reference."""

import sys
from pathlib import Path

import pytest
import torch

from comfy_sage3 import Report, attention, reference
from comfy_sage3.kernels import build


class Operators:
    """What binding.cpp registers, and what was asked."""

    def __init__(self):
        self.calls = 0

    def fp4_attention(self, q, k, v, mask, is_causal, scale, return_lse):
        self.calls += 1
        out, lse = reference.fp4_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale, options=reference.OUR_FP4)
        return out, lse if return_lse else torch.empty(0)


class Library(build.Loaded):
    operators = Operators()

    @property
    def ops(self):
        return self.operators


@pytest.fixture
def plays(monkeypatch):
    """The CPU plays an NVIDIA GPU, with or without SAGE3_EMULATE_FP4: ``plays(capability, switch)``."""

    def plays(capability, switch):
        Library.operators = Operators()
        monkeypatch.setattr(build, "_outcome", Library(Path("fake.so"), "fake", ("90a", "120a"), "cache", 0.0))
        monkeypatch.setattr(sys.modules["comfy_sage3.attention"], "capability_of", lambda device: capability)
        monkeypatch.setenv("SAGE3_EMULATE_FP4", switch)
        return Library.operators

    torch._dynamo.reset()
    return plays


@pytest.mark.parametrize(
    ("capability", "switch", "kernel", "reason"),
    [
        ((12, 0), "0", "fp4-sm120", "asked for, runs on sm_120"),
        ((12, 0), "1", "fp4-sm120", "asked for, runs on sm_120"),
        ((9, 0), "1", "fp4-sm120-emulated",
         "asked for, the Blackwell kernel with its two instructions emulated: the quality is real, the speed is not"),
        ((9, 0), "0", "fp4-emulated", "asked for, emulated in plain PyTorch: the quality is real, the speed is not"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("graph", [False, True])
def test_the_kernel_runs_and_the_report_says_which_it_was(plays, capability, switch, kernel, reason, graph):
    library, report = plays(capability, switch), Report()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 64, generator=generator) for n in (33, 130, 130))

    def attend(q, k, v):
        return attention(q, k, v, precision="fp4", emulate=True, report=report)

    out = torch.compile(attend, backend="eager", fullgraph=True)(q, k, v) if graph else attend(q, k, v)
    assert torch.equal(out, reference.fp4_attention(q, k, v, options=reference.OUR_FP4)[0])
    assert library.calls == (0 if kernel == "fp4-emulated" else 1)
    (line,) = report.lines()
    assert (line["kernel"], line["reason"], line["fell_back"]) == (kernel, reason, False)
