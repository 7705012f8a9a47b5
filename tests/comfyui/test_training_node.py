"""Training keeps its gradients, and the node says which attention they ran through."""

import pytest
import torch

from comfy_sage3.comfyui import status
from comfy_sage3.comfyui.install import hooks_of

B, H, L, D = 1, 2, 32, 16


@pytest.fixture
def node(comfy):
    from comfy_sage3.comfyui import training_node

    return training_node


def train(comfy, node, **options):
    """One forward and backward pass of the patched model -> (hook, the gradient of q)."""
    given = {"precision": "int8", "min_tokens": 0, "emulate": False} | options
    model = node.Sage3TrainingAttention.execute(comfy.Patcher(), **given).args[0]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, L, D, generator=g).requires_grad_() for _ in range(3))
    options = model.model_options["transformer_options"]
    comfy.attend(q, k, v, H, skip_reshape=True, transformer_options=options).square().sum().backward()
    (hook,) = hooks_of(model)
    return hook, q.grad


def test_without_a_kernel_gradients_run_through_exact_attention_and_the_node_says_so(comfy, node):
    hook, grad = train(comfy, node)
    _, exact = train(comfy, node, precision="exact")
    torch.testing.assert_close(grad, exact, rtol=0, atol=0)
    text = status.text(hook)
    assert "0 accelerated, 1 fell back" in text
    assert "1 x exact: int8 needs" in text
    assert node.NO_KERNEL in text


def test_emulated_they_run_in_8_bits_both_ways(comfy, node):
    hook, grad = train(comfy, node, emulate=True)
    _, exact = train(comfy, node, precision="exact")
    assert hook.report.lines()[0]["kernel"] == "int8-emulated"
    error = float((grad - exact).norm() / exact.norm())
    assert 0 < error < 0.05
    assert node.NO_KERNEL not in status.text(hook)


def test_the_sentence_goes_when_a_kernel_comes(comfy, node, monkeypatch):
    import dataclasses

    kernel = dataclasses.replace(node.KERNELS[1], trainable=True)
    assert not node.has_kernel()
    monkeypatch.setattr(node, "KERNELS", (kernel,))
    assert node.has_kernel()
    assert node.NO_KERNEL not in node.Sage3TrainingAttention.define_schema().options["description"]
