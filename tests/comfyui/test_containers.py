"""Calls that hand q, k and v over for good: their memory is free before the kernel makes its output."""

import weakref

import pytest
import standin
import torch
import torch.nn.functional as F

from comfy_sage3.attention import attention
from comfy_sage3.comfyui import override as override_module
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.override import make_override
from comfy_sage3.errors import KernelError
from comfy_sage3.precision import PrecisionPlan

B, H, HKV, L, D = 2, 4, 2, 40, 16
HANDED = []  # weak references to what the model has handed over in its latest call


def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, h, L, D, generator=g) for h in (H, HKV, HKV)]


def exact():
    return F.scaled_dot_product_attention(*tensors(), enable_gqa=True)


@pytest.fixture
def freeing(monkeypatch):
    """The emulated kernel in the place of a compiled one, which lets go of its inputs. Returns what it saw."""
    seen = {"held": [], "alive": [], "result": None, "error_before": None, "error_after": None}

    def attention_freeing(hold, **options):
        seen["held"].append([t.shape for t in hold])
        if seen["error_before"]:
            raise seen["error_before"]
        tensors = [t.clone() for t in hold]
        hold.clear()
        seen["alive"].append(sum(handed() is not None for handed in HANDED))
        if seen["error_after"]:
            raise seen["error_after"]
        out = attention(*tensors, **options)
        return out if seen["result"] is None else seen["result"](out)

    monkeypatch.setattr(override_module, "attention_freeing", attention_freeing)
    monkeypatch.setattr(override_module, "COMPILED", {"int8-emulated": "int8", "fp4-emulated": "fp4"})
    return seen


def attend(hook, previous=None, flat=False, mask=None, made=tensors):
    """One call of a model that keeps nothing of what it hands over -> (B, H, L, D)."""
    if flat:
        held = [standin.Container(t.transpose(1, 2).flatten(2)) for t in made()]
    else:
        held = [standin.Container(t) for t in made()]
    HANDED[:] = [weakref.ref(c.tensor) for c in held]
    out = standin.attend(
        *held, H, mask=mask, skip_reshape=not flat, skip_output_reshape=True, enable_gqa=True,
        transformer_options={"optimized_attention_override": make_override(hook, previous), "block_index": 3},
    )  # fmt: skip
    assert [c.tensor for c in held] == [None] * 3
    return out


def hook(precision="int8", **options):
    return Hook(PrecisionPlan(precision), emulate=True, **options)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mask", [None, torch.arange(H * L * L).reshape(1, H, L, L) % 3 > 0])
def test_nobody_holds_the_tensors_when_the_kernel_has_its_copy(comfy, freeing, flat, mask):
    given = hook()
    for _ in range(2):
        out = attend(given, flat=flat, mask=mask)
    want = attention(*tensors(), mask=mask, enable_gqa=True, precision="int8", emulate=True)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert freeing["alive"] == [0, 0]
    assert [(x["kernel"], x["calls"], x["fell_back"]) for x in given.report.lines()] == [("int8-emulated", 2, False)]


def test_the_first_call_of_a_layer_is_tried_on_a_few_heads_before_anything_is_let_go(comfy, freeing, monkeypatch):
    tried = []

    def spoilt(q, k, v, **options):
        tried.append((q.shape, k.shape))
        return torch.zeros_like(q)

    monkeypatch.setattr(override_module, "attention", spoilt)
    given = hook()
    torch.testing.assert_close(attend(given), exact())
    assert tried == [((1, 4, L, D), (1, 2, L, D))]
    assert freeing["held"] == []
    (line,) = given.report.lines()
    assert line["fell_back"]
    assert "agrees too little" in line["reason"]
    attend(given)
    assert len(tried) == 1  # and the layer is not tried again in this run


def test_a_kernel_that_fails_before_it_let_go_costs_nothing(comfy, freeing):
    freeing["error_before"] = torch.cuda.OutOfMemoryError("no room")
    given = hook()
    for _ in range(2):
        torch.testing.assert_close(attend(given), exact())
    assert len(freeing["held"]) == 1  # a shape without room is not tried again in this run
    (line,) = given.report.lines()
    assert (line["calls"], line["fell_back"]) == (2, True)
    assert "memory did not suffice for int8-emulated at 40 tokens" in line["reason"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [({"error_after": RuntimeError("launch failed")}, "launch failed"), ({"result": lambda out: out / 0}, "exact_layers")],
)
def test_what_cannot_be_mended_any_more_stops_with_a_sentence(comfy, freeing, fault, words):
    freeing.update(fault)
    with pytest.raises(KernelError, match=words):
        attend(hook())


def test_calls_that_are_left_go_to_the_chosen_backend_in_their_containers(comfy, freeing, monkeypatch):
    import sys

    seen = []

    def backend(*args, **kwargs):
        seen.append([type(a).__name__ for a in args[:3]])
        return standin.attend(*args, **kwargs)

    monkeypatch.setattr(sys.modules["comfy.ldm.modules"].attention, "optimized_attention", backend)
    torch.testing.assert_close(attend(hook("exact")), exact())
    assert seen == [["Container"] * 3]


@pytest.mark.parametrize("containers", [False, True])
def test_an_earlier_override_gets_what_is_left_in_the_form_it_takes(comfy, freeing, containers):
    seen = []

    def earlier(func, *args, **kwargs):
        seen.append([type(a).__name__ for a in args[:3]])
        return func(*args, **kwargs) + 1

    if containers:

        def own(*args, **kwargs):
            seen.append([type(a).__name__ for a in args[:3]])
            return standin.sdpa(*(c.take() for c in args[:3]), *args[3:], **kwargs) + 1

        earlier.container_function = own
    torch.testing.assert_close(attend(hook("exact"), earlier), exact() + 1)
    assert seen == [["Container" if containers else "Tensor"] * 3]
