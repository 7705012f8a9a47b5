"""Calibration on a GPU: errors come from its kernels, costs from its clock, and long calls gain."""

import pytest
import torch

from comfy_sage3.attention import attention
from comfy_sage3.plan.calibrate import Calibration, replay
from comfy_sage3.plan.costs import costs_of
from comfy_sage3.precision import Precision

from .calls import DEVICE, qkv


@pytest.fixture(scope="module")
def costs():
    found = costs_of(torch.device(DEVICE), emulate=False)
    if torch.cuda.get_device_capability() < (7, 5):
        pytest.skip("this GPU has no 8-bit kernel")
    assert Precision.INT8 in found.precisions
    return found


def test_costs_are_measured_here(costs):
    assert costs.kind == "measured"
    assert costs.device == torch.cuda.get_device_name()
    assert costs.emulated == ()


def test_the_kernels_error_on_a_sample_is_that_on_the_whole_call(costs):
    q, k, v = qkv(4096, 4096, 128, h=16)
    exact = attention(q.float(), k.float(), v.float(), precision="exact")
    for precision in costs.precisions:
        out = attention(q, k, v, precision=precision)
        whole = float((out.float() - exact).norm() / exact.norm())
        assert replay(q, k, v, [precision])[precision].relative == pytest.approx(whole, rel=0.05)


def test_a_long_call_is_planned_in_low_precision_and_takes_little_memory(costs):
    q, k, v = qkv(32768, 32768, 128, h=24)
    made = Calibration(costs, emulate=False, min_tokens=1024)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made.add("0", 0, q, k, v, exact=lambda: attention(q, k, v, precision="exact"))
    assert torch.cuda.memory_allocated() - before < 1 << 20  # nothing is kept
    assert torch.cuda.max_memory_allocated() - before < 4 * q.numel() * q.element_size()
    plan = made.plan("m", [1.0], [1.0], "draft")
    assert plan.costs == "measured"
    assert plan.chosen[0][0] is not Precision.EXACT
    assert plan.speedup > 1.1
    assert 1e-4 < plan.total_seconds() < 1.0
