"""Tensors that are handed over for good: their memory is free before the output is made, and the result is the same."""

import pytest
import torch

from comfy_sage3.attention import attention, attention_freeing
from comfy_sage3.report import Report

from .calls import qkv

SHAPES = {"hnd": (1, 8, 8192, 128), "hd64": (2, 4, 5000, 64), "ragged": (1, 3, 4097, 72)}


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["int8", "int8-fast"])
def test_the_same_numbers(shape, layout, precision):
    b, h, n, d = SHAPES[shape]
    q, k, v = qkv(n, n, d, b=b, h=h)
    if layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    report, hold = Report(), [q.clone(), k.clone(), v.clone()]
    out = attention_freeing(hold, layout=layout, precision=precision, report=report)
    assert hold == []
    assert torch.equal(out, attention(q, k, v, layout=layout, precision=precision))
    (line,) = report.lines()
    assert line["kernel"].startswith("int8")
    assert not line["fell_back"]


def test_a_mask_and_grouped_heads():
    q, k, v = qkv(1500, 1300, 128, h=8, hkv=2)
    mask = torch.arange(1300, device=q.device)[None, None, None] < 1200
    out = attention_freeing([q.clone(), k.clone(), v.clone()], mask=mask, enable_gqa=True, precision="int8")
    assert torch.equal(out, attention(q, k, v, mask=mask, enable_gqa=True, precision="int8"))


def test_the_peak_is_lower_by_what_was_let_go():
    b, h, n, d = 1, 16, 16384, 128
    one = b * h * n * d * 2  # bytes of q, of k, of v and of the output
    attention(*qkv(n, n, d, b=b, h=h), precision="int8")

    def peak(run):
        hold = list(qkv(n, n, d, b=b, h=h))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run(hold)
        torch.cuda.synchronize()
        assert out.isfinite().all()
        return torch.cuda.max_memory_allocated() - before

    kept = peak(lambda hold: attention(*hold, precision="int8"))
    freed = peak(lambda hold: attention_freeing(hold, precision="int8"))
    codes = 1.6 * 3 * one / 2  # at most, of three tensors in 8 bit
    assert kept > one
    assert freed < codes  # the output lies where q, k and v were


def test_a_call_that_no_compiled_kernel_serves_is_attention_as_ever():
    q, k, v = qkv(300, 300, 320)
    hold = [q.clone(), k.clone(), v.clone()]
    out = attention_freeing(hold, precision="int8")
    assert torch.equal(out, attention(q, k, v, precision="int8"))
    assert hold == []


def test_a_refused_call_leaves_the_tensors_where_they_are():
    hold = list(qkv(300, 300, 64))
    before = list(hold)
    with pytest.raises(ValueError, match="layout"):
        attention_freeing(hold, layout="sideways", precision="int8")
    assert all(a is b for a, b in zip(hold, before, strict=True))
