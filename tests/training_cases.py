"""What attention that trains in 8 bits must do on any device.

test_training.py runs it emulated on a CPU, gpu/test_training.py by a kernel. Held against the chain rule in fp64. Sizes are
small, odd, and beyond one tile of queries (64) and of keys (128).
"""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from comfy_sage3 import Report, training
from comfy_sage3.errors import InputError

B, H, LQ, LK, D = 2, 4, 70, 150, 40


@dataclass(frozen=True)
class Place:
    """Where the cases run: what serves them there, with gradients and without, and whether that has to be asked to."""

    device: str
    kernel: str
    inference: str
    emulate: bool
    least: float = 0.999  # cosine with fp64

    def randn(self, *shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, dtype)

    def qkv(self, b=B, h=H, hkv=None, lq=LQ, lk=LK, d=D, dtype=torch.float32, seed=0):
        """N(0,1), K and V off centre; leaves."""
        shapes = ((b, h, lq, d), (b, hkv or h, lk, d), (b, hkv or h, lk, d))
        q, k, v = (self.randn(*s, seed=seed + i) for i, s in enumerate(shapes))
        return [x.to(dtype).requires_grad_() for x in (q, k + 0.7, v + 0.3)]

    def near(self, got, want):
        """Whether dq, dk and dv are what they are to be, as far as 8 bits go."""
        for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
            assert a.shape == b.shape, name
            assert a.isfinite().all(), name
            assert cosine(a, b) > self.least, (name, cosine(a, b))

    def attention(self, *args, report=None, **kwargs):
        """``training.attention``, and the certainty that it ran in 8 bits."""
        report = Report() if report is None else report
        out = training.attention(*args, emulate=self.emulate, report=report, **kwargs)
        if not torch.compiler.is_compiling():
            assert {line["kernel"] for line in report.lines()} <= {self.kernel, self.inference}, report.summary()
        return out


def calls_of(report):
    """Forward passes by kernel."""
    total = Counter()
    for line in report.lines():
        total[line["kernel"]] += line["calls"]
    return total


def exact(q, k, v, dout=None, mask=None, causal=False, scale=None, dlse=None):
    """(out, lse, dq, dk, dv) in fp64, by the chain rule: autograd makes NaN of a row that may attend nothing."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.detach().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        mask = mask.detach()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    out = p @ v
    ds = torch.zeros_like(p)
    dv = torch.zeros_like(v)
    if dout is not None:
        dout = dout.double()
        ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
        dv = p.mT @ dout
    if dlse is not None:
        ds = ds + p * dlse.double().unsqueeze(-1)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q * scale, dv))
    return out, lse, ds @ k * scale, dk, dv


def cosine(a, b):
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def mask_of(place, kind):
    if kind is None:
        return None
    keep = place.randn(B, 1, LQ, LK, seed=5) < 0.8
    keep[..., 3, :] = False  # a row that may attend nothing
    return keep if kind == "bool" else place.randn(1, H, LQ, LK, seed=6).masked_fill(~keep, -math.inf)


class Block(nn.Module):
    """A small causal transformer layer that calls F.scaled_dot_product_attention's place."""

    def __init__(self, attend, width=64, heads=4):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def plain(q, k, v, **kwargs):
    """Looked up when it is called, as models do."""
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


class Toy(nn.Module):
    """Two layers that can look a token back."""

    TOKENS, LENGTH = 17, 65

    def __init__(self, attend):
        super().__init__()
        self.token, self.place = nn.Embedding(self.TOKENS, 64), nn.Embedding(self.LENGTH, 64)
        self.layers = nn.Sequential(Block(attend), Block(attend))
        self.head = nn.Linear(64, self.TOKENS)

    def forward(self, x):
        return self.head(self.layers(self.token(x) + self.place.weight))


def train(attend, steps, learning_rate, device="cpu", seed=0):
    """Losses of a toy that learns to name the token before; fails where a parameter or a gradient is not finite."""
    torch.manual_seed(seed)
    model = Toy(attend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    data = torch.Generator().manual_seed(seed + 1)
    losses, finite = [], []
    for _ in range(steps):
        x = torch.randint(Toy.TOKENS, (4, Toy.LENGTH), generator=data).to(device)
        loss = F.cross_entropy(model(x)[:, 1:].flatten(0, 1), x[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        finite.append(torch.stack([y.isfinite().all() for p in model.parameters() for y in (p, p.grad)]).all())
    assert bool(torch.stack(finite).all())
    return torch.stack(losses).tolist()  # waited for once


class TrainingCases:
    """Each method takes the fixture ``place``."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("hkv", [4, 2, 1])
    def test_gradients_are_those_of_exact_attention_within_8_bits(self, place, hkv, causal, dtype):
        tensors = place.qkv(hkv=hkv, dtype=dtype)
        out = place.attention(*tensors, is_causal=causal, enable_gqa=True)
        dout = place.randn(*out.shape, seed=9, dtype=dtype)
        got = torch.autograd.grad(out, tensors, dout)
        assert [x.dtype for x in (out, *got)] == [dtype] * 4
        want = exact(*tensors, dout, causal=causal)
        assert cosine(out, want[0]) > place.least
        place.near(got, want[2:])

    @pytest.mark.parametrize("kind", ["bool", "additive"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_masks(self, place, kind, causal):
        tensors, mask = place.qkv(), mask_of(place, kind)
        out = place.attention(*tensors, mask, is_causal=causal)
        dout = place.randn(*out.shape, seed=9)
        got = torch.autograd.grad(out, tensors, dout)
        place.near(got, exact(*tensors, dout, mask, causal)[2:])
        assert not out[:, :, 3].any()
        assert not got[0][:, :, 3].any()

    def test_a_mask_that_requires_grad_gets_it_exactly_and_the_report_says_so(self, place):
        tensors, report = place.qkv(), Report()
        mask = place.randn(1, 1, LQ, LK, seed=6).requires_grad_()
        out = training.attention(*tensors, mask, emulate=place.emulate, report=report)
        (got,) = torch.autograd.grad(out.square().sum(), mask)
        wide = mask.detach().double().requires_grad_()
        q, k, v = (x.detach().double() for x in tensors)
        (want,) = torch.autograd.grad(((q @ k.mT * D**-0.5 + wide).softmax(-1) @ v).square().sum(), wide)
        assert got.shape == want.shape
        assert cosine(got, want) > 0.99999
        (line,) = report.lines()
        assert (line["kernel"], line["reason"]) == ("exact", "int8 needs a mask that does not require grad; this one does")

    @pytest.mark.parametrize("view", ["token-major", "cut from one projection", "NHD"])
    def test_memory_of_any_order(self, place, view):
        tensors = place.qkv(hkv=4, lq=LK)
        dout = place.randn(B, H, LK, D, seed=9)
        want = exact(*tensors, dout)[2:]
        if view == "cut from one projection":
            whole = torch.cat([x.detach().transpose(1, 2) for x in tensors], -1).requires_grad_()  # (B, L, H, 3 D)
            out = place.attention(*(x.transpose(1, 2) for x in whole.chunk(3, -1)))
            (together,) = torch.autograd.grad(out, whole, dout)
            place.near([x.transpose(1, 2) for x in together.chunk(3, -1)], want)
            return
        leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]
        if view == "NHD":
            out = place.attention(*leaves, layout="NHD").transpose(1, 2)
        else:
            out = place.attention(*(x.transpose(1, 2) for x in leaves))
        place.near([x.transpose(1, 2) for x in torch.autograd.grad(out, leaves, dout)], want)

    @pytest.mark.parametrize("kind", ["strided", "expanded", "transposed"])
    def test_an_incoming_gradient_of_any_order(self, place, kind):
        tensors = place.qkv()
        out = place.attention(*tensors)
        if kind == "strided":
            dout = torch.stack([place.randn(*out.shape, seed=9), place.randn(*out.shape, seed=10)], -1)[..., 0]
        elif kind == "expanded":
            dout = place.randn(B, 1, 1, D, seed=9).expand_as(out)
        else:
            dout = place.randn(B, H, D, LQ, seed=9).mT
        assert not dout.is_contiguous()
        place.near(torch.autograd.grad(out, tensors, dout), exact(*tensors, dout)[2:])

    @pytest.mark.parametrize("through", ["lse", "both"])
    def test_the_gradient_of_lse(self, place, through):
        tensors = place.qkv(hkv=2)
        out, lse = place.attention(*tensors, is_causal=True, enable_gqa=True, return_lse=True)
        dout = place.randn(*out.shape, seed=9) if through == "both" else None
        dlse = place.randn(*lse.shape, seed=10)
        outputs, incoming = ((out, lse), (dout, dlse)) if through == "both" else ((lse,), (dlse,))
        got = torch.autograd.grad(outputs, tensors, incoming, allow_unused=True)
        want = exact(*tensors, dout, causal=True, dlse=dlse)
        assert (lse - want[1]).abs().max() < 0.1
        if through == "both":
            place.near(got, want[2:])
        else:
            assert cosine(got[0], want[2]) > place.least
            assert cosine(got[1], want[3]) > place.least
            assert got[2] is None or not got[2].any()

    @pytest.mark.parametrize("which", ["q", "k", "v", "qk", "kv", "qv"])
    def test_only_some_require_grad(self, place, which):
        tensors = place.qkv()
        dout = place.randn(B, H, LQ, D, seed=9)
        all_of_them = torch.autograd.grad(place.attention(*tensors, deterministic=True), tensors, dout)
        some = [x.detach().requires_grad_(name in which) for name, x in zip("qkv", tensors, strict=True)]
        place.attention(*some, deterministic=True).backward(dout)
        for name, x, want in zip("qkv", some, all_of_them, strict=True):
            assert (x.grad is not None) == (name in which)
            assert x.grad is None or torch.equal(x.grad, want)

    @pytest.mark.parametrize("uses", ["xxx", "xxy", "xyy", "xyx"])
    def test_one_tensor_used_twice(self, place, uses):
        x, y, _ = place.qkv(lq=LK)
        names = {"x": x, "y": y}
        given = [names[c] for c in uses]
        dout = place.randn(B, H, LK, D, seed=9)
        wanted = [names[c] for c in sorted(set(uses))]
        scale = 0.05  # a token's product with itself is D: it would attend nothing else
        got = torch.autograd.grad(place.attention(*given, scale=scale), wanted, dout)
        parts = exact(*given, dout, scale=scale)[2:]
        for tensor, a in zip(wanted, got, strict=True):
            b = sum(part for part, used in zip(parts, given, strict=True) if used is tensor)
            assert cosine(a, b) > place.least

    def test_gradients_add_up_over_calls(self, place):
        tensors = place.qkv()
        dout = place.randn(B, H, LQ, D, seed=9)
        for _ in range(2):
            place.attention(*tensors, deterministic=True).backward(dout)
        once = torch.autograd.grad(place.attention(*tensors, deterministic=True), tensors, dout)
        for x, g in zip(tensors, once, strict=True):
            torch.testing.assert_close(x.grad, 2 * g)

    def test_a_second_derivative_is_refused_in_plain_words(self, place):
        tensors = place.qkv()
        out = place.attention(*tensors)
        (dq,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="This attention has no second derivatives: .* use precision exact"):
            dq.sum().backward()

    @pytest.mark.parametrize(("b", "lq", "lk"), [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
    def test_nothing_to_attend(self, place, b, lq, lk):
        tensors, report = place.qkv(b=b, lq=lq, lk=lk), Report()
        out = training.attention(*tensors, emulate=place.emulate, report=report)
        for x, g in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert g.shape == x.shape
            assert not g.any()
        assert report.lines()[0]["reason"] == "int8 needs at least one query and one key; this call is empty"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_casts_as_for_pytorch_s_attention(self, place, dtype):
        tensors = place.qkv()
        dout = place.randn(B, H, LQ, D, seed=9, dtype=dtype)
        with torch.autocast(place.device, dtype):
            out = place.attention(*tensors, deterministic=True)
        got = torch.autograd.grad(out, tensors, dout)
        assert out.dtype == dtype
        assert [g.dtype for g in got] == [torch.float32] * 3
        by_hand = place.attention(*(x.to(dtype) for x in tensors), deterministic=True)
        assert torch.equal(out, by_hand)
        for a, b in zip(got, torch.autograd.grad(by_hand, tensors, dout), strict=True):
            assert torch.equal(a, b)

    def test_backward_inside_autocast_is_the_same(self, place):
        tensors = place.qkv()
        dout = place.randn(B, H, LQ, D, seed=9)
        want = torch.autograd.grad(place.attention(*tensors, deterministic=True), tensors, dout)
        out = place.attention(*tensors, deterministic=True)
        with torch.autocast(place.device, torch.bfloat16):
            got = torch.autograd.grad(out, tensors, dout)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing(self, place, use_reentrant):
        report = Report()

        def attend(q, k, v):
            return place.attention(q * 1.0, k, v, is_causal=True, deterministic=True, report=report)

        tensors = place.qkv()
        dout = place.randn(B, H, LQ, D, seed=9)
        want = torch.autograd.grad(attend(*tensors), tensors, dout)
        report.reset()
        checkpoint(attend, *tensors, use_reentrant=use_reentrant).backward(dout)
        for x, b in zip(tensors, want, strict=True):
            assert torch.equal(x.grad, b)
        # reentrant: its first pass is one without gradients
        assert calls_of(report) == Counter([place.kernel, place.inference if use_reentrant else place.kernel])
        assert report.gradients() == {place.kernel: 1}

    @pytest.mark.parametrize("mask_kind", [None, "bool"])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled_in_one_graph(self, place, backend, mask_kind):
        if backend == "inductor" and place.device == "cpu" and shutil.which("g++") is None:
            pytest.skip("inductor's CPU code needs g++")
        if backend == "inductor" and place.device == "cuda":
            pytest.importorskip("triton")
        torch._dynamo.reset()
        report, mask = Report(), mask_of(place, mask_kind)

        def loss(q, k, v):
            out, lse = place.attention(
                q * 1.0, k, v, mask, is_causal=True, return_lse=True, deterministic=True, report=report
            )
            return (out * 2.0).square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()

        tensors = place.qkv()
        want = torch.autograd.grad(loss(*tensors), tensors)
        graph = torch.compile(loss, backend=backend, fullgraph=True)
        for _ in range(2):
            for a, b in zip(torch.autograd.grad(graph(*tensors), tensors), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert calls_of(report) == {place.kernel: 3}
        assert report.gradients() == {place.kernel: 3}

    def test_forward_and_backward_are_counted(self, place):
        tensors, report = place.qkv(), Report()
        out = place.attention(*tensors, report=report)
        assert report.gradients() == {}
        out.sum().backward()
        with torch.no_grad():
            place.attention(*tensors, report=report)
        assert calls_of(report) == Counter([place.kernel, place.inference])
        assert report.gradients() == {place.kernel: 1}
        assert f"1 x {place.kernel}: gradients" in report.summary()

    @pytest.mark.parametrize("how", ["keyword", "torch"])
    def test_deterministic_mode_gives_the_same_bits(self, place, how):
        tensors = place.qkv(lq=300, lk=700)
        dout = place.randn(B, H, 300, D, seed=9)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(how == "torch")
        try:
            chosen = {"deterministic": True} if how == "keyword" else {}
            runs = [torch.autograd.grad(place.attention(*tensors, **chosen), tensors, dout) for _ in range(5)]
        finally:
            torch.use_deterministic_algorithms(before)
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    @pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-12, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tiny_gradients_do_not_underflow(self, place, dtype, size):
        tensors = place.qkv(dtype=dtype)
        out = place.attention(*tensors)
        dout = place.randn(B, H, LQ, D, seed=9, dtype=torch.float32).mul(size).to(dtype)
        place.near(torch.autograd.grad(out, tensors, dout), exact(*tensors, dout)[2:])

    @pytest.mark.parametrize("size", [1.0, 1e-2, 1e3])
    def test_fp16_keeps_what_fp16_can_say(self, place, size):
        """Exact gradients below 6e-5 have fewer digits in fp16, whoever computes them."""
        tensors = place.qkv(dtype=torch.float16)
        dout = place.randn(B, H, LQ, D, seed=9).mul(size).half()
        got = torch.autograd.grad(place.attention(*tensors), tensors, dout)
        place.near(got, [x.half() for x in exact(*tensors, dout)[2:]])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_tiny_gradients_among_large_ones_keep_their_digits(self, place, dtype):
        """In one tile of queries: dq has its own digits in every row."""
        tensors = place.qkv(dtype=dtype)
        sizes = 10.0 ** -(3.0 * (torch.arange(LQ, device=place.device) % 5)).view(1, 1, -1, 1)  # 1 to 1e-12
        dout = (place.randn(B, H, LQ, D, seed=9) * sizes).to(dtype)
        got = torch.autograd.grad(place.attention(*tensors), tensors, dout)
        want = exact(*tensors, dout)[2:]
        for start in range(5):
            assert cosine(got[0][:, :, start::5], want[0][:, :, start::5]) > place.least, start
        place.near(got, want)

    def test_the_module_stands_where_pytorch_s_function_does(self, place):
        report = Report()
        module = training.Sage3Attention(emulate=place.emulate, deterministic=True, report=report)
        assert "precision='int8'" in repr(module)
        assert not list(module.parameters())
        torch.manual_seed(0)
        model = Block(module).to(place.device)
        twin = copy.deepcopy(model)
        exact_twin = Block(plain).to(place.device)
        exact_twin.load_state_dict(model.state_dict())
        x = place.randn(2, 90, 64, seed=3)
        for each in (model, twin, exact_twin):
            each(x).square().sum().backward()
        for a, b, c in zip(model.parameters(), twin.parameters(), exact_twin.parameters(), strict=True):
            assert cosine(a.grad, b.grad) > 0.99999
            assert cosine(a.grad, c.grad) > place.least
        assert report.gradients() == {place.kernel: 2}
        with pytest.raises(InputError, match="dropout_p is 0.1: 8-bit attention has no dropout"):
            module(*place.qkv(), dropout_p=0.1)

    @pytest.mark.parametrize("use_reentrant", [None, False, True])
    def test_a_model_that_is_written_already(self, place, use_reentrant):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(place.device)
        x = place.randn(2, 90, 64, seed=3).requires_grad_()

        def run(x):
            return model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)

        parameters = (x, *model.parameters())
        run(x).square().sum().backward()
        want = [p.grad.clone() for p in parameters]
        model.zero_grad()
        x.grad = None
        with training.sdpa_replaced(emulate=place.emulate) as replaced:
            run(x).square().sum().backward()
        again = {None: [], False: [place.kernel], True: [place.inference]}[use_reentrant]
        assert calls_of(replaced.report) == Counter([place.kernel, *again])
        assert replaced.report.gradients() == {place.kernel: 1}
        for p, b in zip(parameters, want, strict=True):
            assert cosine(p.grad, b) > 0.995

    def test_a_compiled_model_that_is_written_already(self, place):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Block(plain).to(place.device)
        x = place.randn(2, 90, 64, seed=3)
        with training.sdpa_replaced(emulate=place.emulate, deterministic=True) as replaced:
            model(x).square().sum().backward()
            want = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
        for p, b in zip(model.parameters(), want, strict=True):
            assert cosine(p.grad, b) > 0.9999  # linear layers may add up in another order, which moves a code here and there
        assert replaced.report.gradients() == {place.kernel: 2}

    def test_what_the_context_leaves_to_pytorch_it_names(self, place):
        q, k, v = place.qkv()
        with training.sdpa_replaced(emulate=place.emulate) as replaced:
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
            F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])
            F.scaled_dot_product_attention(q, k, v)
        lines = {line["reason"]: (line["kernel"], line["fell_back"]) for line in replaced.report.lines()}
        assert lines.pop("8-bit attention has no dropout") == ("exact", True)
        assert lines.pop("8-bit attention takes tensors of 4 dimensions") == ("exact", True)
        assert list(lines.values()) == [(place.kernel, False)]
        with training.sdpa_replaced("exact") as outer, training.sdpa_replaced("exact") as inner:
            F.scaled_dot_product_attention(q, k, v)  # exact attention is PyTorch's function, not what replaced it
        assert (len(outer.report.lines()), inner.report.lines()[0]["calls"]) == (0, 1)
        F.scaled_dot_product_attention(q, k, v)
        assert sum(line["calls"] for line in replaced.report.lines()) == 3
