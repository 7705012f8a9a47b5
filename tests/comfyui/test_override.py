"""The attention hook's contract, against the stand-in: every way of calling, every way of declining."""

import copy
import itertools
import logging

import pytest
import standin
import torch
import torch.nn.functional as F

from comfy_sage3.attention import attention
from comfy_sage3.comfyui import override as override_module
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.override import make_override
from comfy_sage3.errors import InputError
from comfy_sage3.precision import PrecisionPlan

B, H, LQ, LK, D = 2, 4, 40, 24, 16


def hook(precision="int8", emulate=True, **plan):
    return Hook(PrecisionPlan(precision, **plan), emulate=emulate)


def tensors(kv_heads=H, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, n, D, generator=g) for h, n in ((H, LQ), (kv_heads, LK), (kv_heads, LK))]


def flat(t):
    return t.transpose(1, 2).flatten(2)


def options(override):
    return {"optimized_attention_override": override}


MASKS = {
    "none": lambda: None,
    "bool 2-D": lambda: torch.arange(LQ * LK).reshape(LQ, LK) % 3 > 0,
    "bool 3-D": lambda: (torch.arange(B * LK) % 5 > 0).reshape(B, 1, LK),
    "bool 4-D": lambda: (torch.arange(B * LK) % 4 > 0).reshape(B, 1, 1, LK),
    "additive 2-D": lambda: torch.linspace(-3, 1, LQ * LK).reshape(LQ, LK),
    "additive 4-D": lambda: torch.linspace(-3, 1, B * H * LQ * LK).reshape(B, H, LQ, LK),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("split_in", "split_out"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("positional", [False, True])
def test_every_form_of_call_reaches_the_door(mask, split_in, split_out, positional):
    q, k, v = tensors()
    m = MASKS[mask]()
    given = hook()
    kwargs = {"transformer_options": options(make_override(given)), "scale": 0.2}
    if split_in:
        kwargs["skip_reshape"] = True
    if split_out:
        kwargs["skip_output_reshape"] = True
    args = [q, k, v] if split_in else [flat(q), flat(k), flat(v)]
    if positional:
        args += [H, m]
    else:
        kwargs |= {"heads": H, "mask": m}
    out = standin.attend(*args, **kwargs)

    while m is not None and m.ndim < 4:
        m = m.unsqueeze(0 if m.ndim == 2 else 1)
    want = attention(q, k, v, mask=m, scale=0.2, precision="int8", emulate=True)
    torch.testing.assert_close(out, want if split_out else flat(want), rtol=0, atol=0)
    exact = F.scaled_dot_product_attention(q, k, v, m, scale=0.2)
    assert (want - exact).norm() / exact.norm() < 0.05
    assert [(x["kernel"], x["calls"]) for x in given.report.lines()] == [("int8-emulated", 1)]


@pytest.mark.parametrize("split_in", [False, True])
def test_grouped_heads(split_in):
    q, k, v = tensors(kv_heads=2)
    given = hook()
    args = (q, k, v) if split_in else (flat(q), flat(k), flat(v))
    out = standin.attend(*args, H, enable_gqa=True, skip_reshape=split_in, transformer_options=options(make_override(given)))
    want = attention(q, k, v, enable_gqa=True, precision="int8", emulate=True)
    torch.testing.assert_close(out, flat(want), rtol=0, atol=0)
    assert given.report.accelerated == 1


def test_q_and_k_flat_and_v_split_as_sd3_has_it():
    q, k, v = tensors()
    given = hook()
    out = standin.attend(flat(q), flat(k), v.transpose(1, 2), H, transformer_options=options(make_override(given)))
    torch.testing.assert_close(out, flat(attention(q, k, v, precision="int8", emulate=True)), rtol=0, atol=0)


def test_non_contiguous_views():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors())
    given = hook()
    out = standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given)))
    want = attention(*tensors(), precision="int8", emulate=True)
    torch.testing.assert_close(out, flat(want), rtol=0, atol=0)


def test_containers_are_taken_by_the_plain_override():
    q, k, v = tensors()
    held = [standin.Container(t) for t in (q, k, v)]
    given = hook("fp4")
    out = standin.attend(*held, H, skip_reshape=True, transformer_options=options(make_override(given)))
    torch.testing.assert_close(out, flat(attention(q, k, v, precision="fp4", emulate=True)), rtol=0, atol=0)
    assert [c.tensor for c in held] == [None] * 3


class Spy:
    """A backend that records how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return standin.sdpa(*args, **kwargs)


INT_MASK = torch.zeros(LQ, LK, dtype=torch.int32)
DECLINED = {
    "low precision refused": ({"low_precision_attention": False}, "full precision"),
    "float32 asked for": ({"attn_precision": torch.float32}, "float32"),
    "unknown argument": ({"window": 8}, "window"),
    "integer mask": ({"mask": INT_MASK}, "neither bool nor float"),
    "mask of another size": ({"mask": torch.zeros(LQ, LK + 1)}, "does not broadcast"),
    "heads that do not divide": ({"heads": 7}, "7 heads"),
    "no heads at all": ({"heads": None}, ""),
    "tensor scale": ({"scale": torch.tensor(0.1)}, "scale"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined_calls_go_to_func_as_they_came(case):
    kwargs, reason = DECLINED[case]
    kwargs = {"heads": H, **kwargs}
    q, k, v = (flat(t).half() for t in tensors())
    given = hook("fp4")
    received = []

    def func(*args, **kw):
        received.append((args, kw))
        return "func's own result"

    result = make_override(given)(func, q, k, v, _inside_attn_wrapper=True, **kwargs)
    assert result == "func's own result"
    ((args, kw),) = received
    assert all(a is b for a, b in zip(args, (q, k, v), strict=True))
    assert kw == {"_inside_attn_wrapper": True, **kwargs}
    (line,) = given.report.lines()
    assert reason in line["reason"]
    assert (line["wished"], line["kernel"], line["fell_back"]) == ("fp4", "exact", True)


@pytest.mark.parametrize(
    ("given", "reason", "fell_back"),
    [
        (hook("exact"), "asked for", False),
        (hook("auto"), "CPU", False),
        (hook("fp4", emulate=False), "Blackwell", True),
        (hook("fp4", min_tokens=LK + 1), "tokens", False),
    ],
    ids=["exact", "auto without a kernel", "fp4 without a kernel", "too short"],
)
def test_exact_decisions_keep_the_users_backend(given, reason, fell_back):
    q, k, v = tensors()
    spy = Spy()
    out = standin.hooked(spy)(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given)))
    torch.testing.assert_close(out, flat(F.scaled_dot_product_attention(q, k, v)))
    assert len(spy.calls) == 1
    assert spy.calls[0][1]["_inside_attn_wrapper"] is True  # a backend may call another one without recursion
    (line,) = given.report.lines()
    assert reason in line["reason"]
    assert line["fell_back"] is fell_back


def test_a_backend_that_calls_another_hooked_backend_does_not_recurse():
    given = hook("fp4", emulate=False)
    q, k, v = tensors()

    def backend(*args, **kwargs):
        return standin.attend(*args, **kwargs)  # kwargs carry the mark and transformer_options

    out = standin.hooked(backend)(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given)))
    assert out.shape == (B, LQ, H * D)
    assert given.report.fell_back == 1


def test_an_earlier_override_serves_what_this_one_does_not():
    seen = []

    def earlier(func, *args, **kwargs):
        seen.append((func, args, kwargs))
        return func(*args, **kwargs) + 1

    given = hook("fp4", min_tokens=30)
    q, k, v = tensors()
    spy = Spy()
    slot = options(make_override(given, earlier))
    short = standin.hooked(spy)(q, k, v, H, skip_reshape=True, transformer_options=slot)
    torch.testing.assert_close(short, flat(F.scaled_dot_product_attention(q, k, v)) + 1)
    ((func, args, kwargs),) = seen
    assert func is spy
    assert args[:3] == (q, k, v)
    assert kwargs == {"skip_reshape": True, "_inside_attn_wrapper": True, "transformer_options": slot}
    long = standin.hooked(spy)(q, q, q, H, skip_reshape=True, transformer_options=slot)
    torch.testing.assert_close(long, flat(attention(q, q, q, precision="fp4", emulate=True)), rtol=0, atol=0)
    assert len(seen) == 1


def test_a_failing_kernel_costs_nothing_but_speed(monkeypatch, caplog):
    def broken(*args, report, **kwargs):
        report.record("fp4", "fp4-emulated", "asked for", False)  # some kernels count before they fail
        raise RuntimeError("illegal memory access\nwith details")

    monkeypatch.setattr(override_module, "attention", broken)
    given = hook("fp4")
    q, k, v = tensors()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given)))
    torch.testing.assert_close(out, flat(F.scaled_dot_product_attention(q, k, v)))
    (line,) = given.report.lines()
    assert line["calls"] == 3
    assert line["fell_back"]
    assert "RuntimeError: illegal memory access with details" in line["reason"]
    assert len(caplog.records) == 1


def test_an_input_the_door_refuses_goes_to_func(monkeypatch):
    def refuse(*args, **kwargs):
        raise InputError("head_dim 300 is too large: use 256 or less.")

    monkeypatch.setattr(override_module, "attention", refuse)
    given = hook("fp4")
    q, k, v = tensors()
    out = standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given)))
    assert out.isfinite().all()
    assert "head_dim 300" in given.report.lines()[0]["reason"]


def test_nan_is_told_not_hidden():
    q, k, v = tensors()
    k[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="k contains NaN"):
        standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(hook("fp4"))))


def test_gradients_flow_or_the_call_is_left_alone():
    given = hook("int8")
    q, k, v = (t.requires_grad_() for t in tensors())
    standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given))).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (v,))
    assert q.grad is not None
    assert given.report.lines()[0]["kernel"] == "int8-emulated"

    given = hook("fp4")
    q, k, v = (t.requires_grad_() for t in tensors())
    standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(given))).sum().backward()
    assert v.grad.abs().sum() > 0
    (line,) = given.report.lines()
    assert (line["kernel"], line["fell_back"]) == ("int8-emulated", True)
    assert "grad" in line["reason"]


def test_inference_mode_and_untouched_inputs():
    with torch.inference_mode():
        q, k, v = tensors()
        before = [t.clone() for t in (q, k, v)]
        standin.attend(q, k, v, H, skip_reshape=True, transformer_options=options(make_override(hook("fp4"))))
        assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


def test_compiles_without_a_graph_break_and_counts_every_run():
    given = hook("fp4", min_tokens=30)
    override = make_override(given)

    def model(q, k, v):
        long = override(standin.sdpa, q, q, q, H, skip_reshape=True)
        return long + override(standin.sdpa, q, k, v, H, skip_reshape=True)

    q, k, v = tensors()
    want = model(q, k, v)
    given.report.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(q, k, v), want)
    assert [(x["kernel"], x["calls"]) for x in given.report.lines()] == [("fp4-emulated", 3)]


def test_the_override_survives_deep_copies_of_the_options():
    override = make_override(hook())
    assert copy.deepcopy({"a": override})["a"] is override
