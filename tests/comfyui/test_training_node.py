"""Training keeps its gradients, and the node says which attention they ran through, how long it took and how much memory."""

import gc
from pathlib import Path

import pytest
import torch

from comfy_sage3.comfyui import status, usage
from comfy_sage3.comfyui.install import hooks_of

B, H, L, D = 1, 2, 32, 16


@pytest.fixture
def node(comfy):
    from comfy_sage3.comfyui import training_node

    return training_node


def patched(comfy, node, **options):
    given = {"precision": "int8", "min_tokens": 0, "emulate": False} | options
    return node.Sage3TrainingAttention.execute(comfy.Patcher(), **given).args[0]


def train(comfy, node, length=L, **options):
    """One forward and backward pass of the patched model -> (hook, the gradient of q)."""
    model = patched(comfy, node, **options)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, length, D, generator=g).requires_grad_() for _ in range(3))
    options = model.model_options["transformer_options"]
    out = comfy.attend(q, k, v, H, skip_reshape=True, transformer_options=options)
    gc.collect()  # whatever counted the call may be gone when its gradient runs
    out.square().sum().backward()
    (hook,) = hooks_of(model)
    return hook, q.grad


def test_without_a_kernel_gradients_run_through_exact_attention_and_the_node_says_so(comfy, node):
    hook, grad = train(comfy, node)
    _, exact = train(comfy, node, precision="exact")
    torch.testing.assert_close(grad, exact, rtol=0, atol=0)
    text = status.text(hook)
    assert "0 accelerated, 1 fell back" in text
    assert "1 x exact: int8 needs" in text
    assert "Gradients in 8 bits: none. 1 calls ran through exact attention, and so did their gradients." in text


def test_emulated_they_run_in_8_bits_both_ways_and_both_are_counted(comfy, node):
    hook, grad = train(comfy, node, emulate=True)
    _, exact = train(comfy, node, precision="exact")
    (line,) = hook.report.lines()
    assert (line["kernel"], line["calls"]) == ("int8-emulated", 1)
    assert status.payload(hook)["gradients"] == {"int8-emulated": 1}
    error = float((grad - exact).norm() / exact.norm())
    assert 0 < error < 0.05
    assert "Gradients in 8 bits: 1 x int8-emulated." in status.text(hook)


def test_a_short_call_stays_exact_and_so_does_its_gradient(comfy, node):
    hook, _ = train(comfy, node, emulate=True, min_tokens=L + 1)
    assert status.payload(hook)["gradients"] == {}
    assert f"1 x exact: fewer than {L + 1} tokens" in status.text(hook)


def test_time_and_memory_of_a_run_are_told_when_it_is_over(comfy, node):
    model = patched(comfy, node, emulate=True)
    (hook,) = hooks_of(model)
    assert "Training took" not in status.text(hook)
    model.sample([1.0, 0.5])
    told = status.payload(hook)["training"]
    assert told["device"] == "cpu"
    assert 0 < told["seconds"] < 600
    assert f"Training took {told['seconds']:.1f} s" in status.text(hook)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts a process's most memory anew")
def test_the_most_memory_is_that_of_this_run_alone():
    def most(megabytes):
        counted = usage.Usage(torch.device("cpu"))
        counted.begin()
        block = torch.ones(megabytes << 18)
        del block
        counted.end()
        return counted.peak_bytes

    large, small = most(400), most(1)
    assert large > small + (200 << 20)


def test_where_nobody_counts_memory_only_time_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(usage, "_CLEAR", tmp_path / "none" / "clear_refs")
    counted = usage.Usage(torch.device("cpu"))
    assert counted.text() == ""
    counted.begin()
    counted.end()
    assert counted.peak_bytes is None
    assert counted.text() == f"Training took {counted.seconds:.1f} s."
