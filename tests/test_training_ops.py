"""The ops of the 8-bit gradient, without a GPU: a library whose operators are the reference."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from comfy_sage3 import Report, attention, reference
from comfy_sage3 import training as public
from comfy_sage3.attention import attention_freeing
from comfy_sage3.errors import InputError
from comfy_sage3.kernels import build, exact, ops, training, triton_training


class Operators:
    """What binding.cpp registers of the gradient. The fp32 bytes of q, k and v stand for what is saved."""

    def __init__(self):
        self.gradients = 0
        self.deterministic = []

    def int8_attention_saving(self, q, k, v, mask, is_causal, scale, return_lse, kernel):
        assert kernel == "sm90"
        got, lse = reference.int8_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale, options=reference.OUR_INT8)
        out = torch.empty_like(q)
        if out.stride(3) != 1:
            out = torch.empty(q.shape, dtype=q.dtype)
        out.copy_(got)
        saved = torch.zeros(training.workspace_bytes(*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:]), dtype=torch.uint8)
        self.inputs = [x.detach().clone() for x in (q, k, v, out, lse)]
        return (
            out,
            lse if return_lse else torch.empty(0),
            saved,
            torch.zeros(q.shape, dtype=torch.int8),
            torch.zeros(3, *q.shape[:3]),
        )

    def int8_attention_gradient(self, dout, dlse, saved, out8, rows, mask, kv_heads, keys, is_causal, scale, deterministic):
        assert (saved.dtype, out8.dtype, rows.shape) == (torch.uint8, torch.int8, (3, *dout.shape[:3]))
        assert (kv_heads, keys) == self.inputs[1].shape[1:3]
        self.gradients += 1
        self.deterministic.append(deterministic)
        made = reference.int8_attention_backward(
            dout, *self.inputs, mask=mask, is_causal=is_causal, scale=scale, options=reference.OUR_INT8
        )
        if dlse is not None:
            assert dlse.dtype == torch.float32
            assert dlse.is_contiguous()
            more = exact.backward(None, dlse, *self.inputs[:3], mask, is_causal, scale)
            made = [x + y for x, y in zip(made, more, strict=True)]
        return tuple(x.contiguous() for x in made)


class Library(build.Loaded):
    @property
    def ops(self):
        return self.operators


@pytest.fixture
def library(monkeypatch):
    torch._dynamo.reset()
    Library.operators = Operators()
    monkeypatch.setattr(build, "_outcome", Library(Path("fake.so"), "fake", ("90a",), "cache", 0.0))
    return Library.operators


@pytest.fixture
def hopper(library, monkeypatch):
    """The CPU plays a GPU of sm_90 for the door, too."""
    monkeypatch.setattr(sys.modules["comfy_sage3.attention"], "capability_of", lambda device: (9, 0))
    return library


def qkv(lq=33, lk=40, d=32, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, lq, d), (2, kv_heads, lk, d), (2, kv_heads, lk, d))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def test_the_gradients_are_those_of_exact_attention_within_8_bits(library):
    tensors = qkv()
    out = training.attend(*tensors, None, True, 0.2, False)[0]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, tensors, dout)
    wide = [x.repeat_interleave(2, 1) if i else x for i, x in enumerate(tensors)]
    plain = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=0.2)
    for a, b in zip(got, torch.autograd.grad(plain, tensors, dout), strict=True):
        assert a.shape == b.shape
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
    assert library.gradients == 1


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(library, return_lse):
    mask = torch.rand(1, 1, 33, 40, generator=torch.Generator().manual_seed(3)) < 0.7 if return_lse else None
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in qkv()]
    torch.library.opcheck(
        training.attend, (*tensors, mask, False, 0.2, return_lse), test_utils=("test_schema", "test_faketensor")
    )
    saved = training.attend(*tensors, mask, False, 0.2, False)[2:]
    dout, dlse = torch.randn(tensors[0].shape), torch.randn(tensors[0].shape[:3]) if return_lse else None
    torch.library.opcheck(
        training.gradient,
        (dout, dlse, *saved, mask, 2, 40, False, 0.2, False),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs g++")
def test_compiled_without_a_break(library):
    def loss(q, k, v):
        return training.attend(q * 1.0, k, v, None, False, 0.2, False)[0].square().sum()

    tensors = qkv()
    want = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_refused_in_plain_words(library):
    tensors = qkv()
    out = training.attend(*tensors, None, False, 0.2, False)[0]
    dout = torch.randn(out.shape).requires_grad_()
    dq = torch.autograd.grad(out, tensors, dout, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dq.sum().backward()


@pytest.mark.parametrize("through", ["lse", "both"])
def test_the_gradient_of_lse_is_passed_on(library, through):
    tensors = qkv()
    mask = torch.rand(1, 1, 33, 40, generator=torch.Generator().manual_seed(3)) < 0.7
    weights = torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(4))

    def loss(out, lse):
        return (lse * weights).sum() + (out.square().sum() if through == "both" else 0.0)

    out, lse = training.attend(*tensors, mask, False, 0.2, True)[:2]
    got = torch.autograd.grad(loss(out, lse), tensors, allow_unused=True)
    want = torch.autograd.grad(loss(*ops.exact_attention(*tensors, mask, False, 0.2, True)), tensors, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is None or not b.any():  # values, of lse alone
            assert not a.any()
        else:
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
def test_what_is_kept_is_at_most_six_tenths_of_flash_attentions(library, d, heads, kv_heads):
    """q, k, v and out in bf16, and the LSE, which both keep."""
    b, lq, lk = 2, 1024, 1000
    shape = (b, heads, lq, d)
    q, k = torch.empty(shape, device="meta"), torch.empty(b, kv_heads, lk, d, device="meta")
    kept = training.attend(q, k, k, None, False, 0.2, False)[2:]
    ours = sum(x.numel() * x.element_size() for x in kept)
    flash = 2 * (2 * q.numel() + 2 * k.numel()) + 4 * b * heads * lq
    assert ours <= 0.6 * flash


def test_larger_head_dims_are_refused(library):
    with pytest.raises(InputError, match="at most 128, this call has 160"):
        training.padded_head_dim(160)


@pytest.mark.parametrize("d", [1, 32])
@pytest.mark.parametrize("view", ["contiguous", "token-major", "channels apart"])
def test_the_fake_strides_are_right(library, view, d):
    q, k, v = (x.detach() for x in qkv(d=d))
    if view == "token-major":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif view == "channels apart":
        q = q.mT.contiguous().mT
    arguments = (None, False, 0.2, True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = training.attend(*(mode.from_tensor(x) for x in (q, k, v)), *arguments)
    for a, b in zip(fake, training.attend(q, k, v, *arguments), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


# ---- the door


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_door_trains_by_the_kernel_and_infers_by_the_other_op(hopper, monkeypatch, layout, return_lse):
    tensors, report = qkv(), Report()
    given = tensors if layout == "HND" else [x.transpose(1, 2) for x in tensors]
    got = attention(*given, enable_gqa=True, layout=layout, precision="int8", return_lse=return_lse, report=report)
    out = got[0] if return_lse else got
    grads = torch.autograd.grad(out.square().sum(), tensors)
    want = training.attend(*tensors, None, False, 32**-0.5, False)[0]
    assert torch.equal(out if layout == "HND" else out.transpose(1, 2), want)
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), tensors), strict=True):
        assert torch.equal(a, b)
    (line,) = report.lines()
    assert (line["kernel"], line["reason"], line["fell_back"]) == ("int8-sm90", "asked for, runs on sm_90", False)
    assert report.gradients() == {"int8-sm90": 1}

    asked = []
    monkeypatch.setattr(ops, "int8_attention_compiled", lambda *a: asked.append(a[-2]) or (want, want.new_empty(0)))
    with torch.no_grad():
        attention(*given, enable_gqa=True, layout=layout, precision="int8")
    assert asked == ["sm90"]


@pytest.mark.parametrize(("chosen", "switch", "told"), [(None, False, False), (None, True, True), (True, False, True)])
def test_deterministic_is_a_choice_or_follows_torch(hopper, chosen, switch, told):
    tensors = qkv()
    torch.use_deterministic_algorithms(switch)
    try:
        public.attention(*tensors, enable_gqa=True, deterministic=chosen).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert hopper.deterministic == [told]
    public.attention(*tensors, enable_gqa=True, deterministic=False).sum().backward()
    assert hopper.deterministic == [told, False]


def test_a_graph_is_compiled_anew_when_torch_is_to_be_deterministic(hopper):
    tensors = qkv()

    def loss(q, k, v):
        return public.attention(q * 1.0, k, v, enable_gqa=True).square().sum()

    graph = torch.compile(loss, backend="aot_eager", fullgraph=True)
    graph(*tensors).backward()
    torch.use_deterministic_algorithms(True)
    try:
        graph(*tensors).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    graph(*tensors).backward()
    assert hopper.deterministic == [False, True, False]


def test_a_wider_head_trains_exactly_without_triton_and_says_why(hopper, monkeypatch):
    monkeypatch.setattr(triton_training, "absent", lambda: "Triton is not installed")
    tensors, report = qkv(d=160), Report()
    attention(*tensors, enable_gqa=True, precision="int8", report=report).sum().backward()
    (line,) = report.lines()
    assert (line["kernel"], line["fell_back"]) == ("exact", True)
    assert line["reason"] == "int8 needs Triton for its gradient; Triton is not installed"
    assert hopper.gradients == 0


@pytest.mark.parametrize(("capability", "d"), [((9, 0), 160), ((8, 6), 32)])
def test_tritons_op_trains_where_it_is_chosen_and_infers_nothing(hopper, monkeypatch, capability, d):
    """Its place is taken by the other trainer's op: what is asked is who is called with what."""
    door, asked = sys.modules["comfy_sage3.attention"], []

    def op(q, k, v, mask, is_causal, scale, return_lse, deterministic, note):
        asked.append((q.shape[3], scale, deterministic))
        return training.attend(*(x[..., :32] for x in (q, k, v)), mask, is_causal, scale, return_lse, deterministic, note)

    monkeypatch.setattr(triton_training, "absent", lambda: None)
    monkeypatch.setattr(door, "capability_of", lambda device: capability)
    monkeypatch.setitem(door.TRAINED, "int8-triton", op)
    tensors, report = qkv(d=d), Report()
    attention(*tensors, enable_gqa=True, precision="int8", report=report).sum().backward()
    assert asked == [(d, d**-0.5, False)]
    assert all(x.grad.any() for x in tensors[2:])
    assert report.gradients() == {"int8-triton": 1}
    with torch.no_grad():
        monkeypatch.setattr(ops, "int8_attention_compiled", lambda q, *a: (torch.empty_like(q), q.new_empty(0)))
        monkeypatch.setattr("comfy_sage3.kernels.compiled.failure", lambda capability: None)
        attention(*tensors, enable_gqa=True, precision="int8", report=report)
    assert len(asked) == 1
    assert [line["kernel"] for line in report.lines()][0] == "int8-triton"


def test_tensors_that_are_handed_over_keep_their_gradients(hopper):
    tensors, report = qkv(), Report()
    hold = list(tensors)
    out = attention_freeing(hold, enable_gqa=True, precision="int8", report=report)
    assert hold == []
    assert all(x.any() for x in torch.autograd.grad(out.square().sum(), tensors))
    assert report.gradients() == {"int8-sm90": 1}
