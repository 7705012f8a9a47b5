"""The door: what it computes, what it refuses, what it writes down, and what it leaves alone."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3 import Precision, Report, attention, reference
from comfy_sage3.errors import InputError
from comfy_sage3.report import process_report

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
EMULATED = {
    "fp4": partial(reference.fp4_attention, options=reference.OUR_FP4),
    "int8": partial(reference.int8_attention, options=reference.OUR_INT8),
    "int8-fast": partial(reference.int8_attention, options=reference.OUR_INT8_FAST),
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(b=2, h=4, hkv=4, lq=33, lk=33, d=32, dtype=torch.float32, seed=0):
    shapes = ((b, h, lq, d), (b, hkv, lk, d), (b, hkv, lk, d))
    return [randn(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def oracle(q, k, v, mask=None, is_causal=False, scale=None):
    """Attention row by row as it is defined, float64: only the keys a query may see are ever touched."""
    q, k, v = (t.detach().double() for t in (q, k, v))
    b, h, lq, d = q.shape
    group = h // k.shape[1]
    full = None if mask is None else mask.expand(b, h, lq, k.shape[2])
    out = torch.zeros(b, h, lq, v.shape[-1], dtype=torch.float64)
    lse = torch.full((b, h, lq), -torch.inf, dtype=torch.float64)
    for i, j, row in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(lq)).tolist():
        keep = torch.arange(k.shape[2]) <= row if is_causal else torch.ones(k.shape[2], dtype=torch.bool)
        bias = torch.zeros(k.shape[2], dtype=torch.float64)
        if full is not None:
            m = full[i, j, row]
            keep, bias = (keep & m, bias) if m.dtype == torch.bool else (keep & (m > -torch.inf), m.double())
        if keep.any():
            s = k[i, j // group, keep] @ q[i, j, row] * (d**-0.5 if scale is None else scale) + bias[keep]
            out[i, j, row] = torch.softmax(s, 0) @ v[i, j // group, keep]
            lse[i, j, row] = s.logsumexp(0)
    return out, lse


# ---- what it computes


@st.composite
def situations(draw):
    b, hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lq, lk, d = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["none", "bool", "additive"]))
    seed = draw(st.integers(0, 10**6))
    mask = None
    if kind != "none":
        shape = [draw(st.sampled_from([1, n])) for n in (b, hkv * group, lq, lk)][draw(st.integers(0, 3)) :]
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.8]))
        bias = torch.randn(shape, generator=generator)
        mask = keep if kind == "bool" else bias.masked_fill(~keep, -torch.inf)
    tensors = qkv(b, hkv * group, hkv, lq, lk, d, seed=seed)
    view = draw(st.sampled_from(["contiguous", "token-major", "sliced", "expanded", "flipped stride"]))
    is_causal, scale = draw(st.booleans()), draw(st.sampled_from([None, 0.2, 1.0]))
    return [strided(t, view) for t in tensors], mask, is_causal, scale


def strided(t, view):
    """``t``'s values (for "expanded", its first head's) in memory that is not plainly contiguous."""
    if view == "token-major":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if view == "sliced":  # as q, k, v are cut from one projection; also off 16-byte alignment
        return torch.cat([t[..., :1], t, t], -1)[..., 1 : t.shape[-1] + 1]
    if view == "expanded":
        return t[:, :1].expand_as(t)
    if view == "flipped stride":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    return t


@settings(max_examples=60, deadline=None)
@given(situations(), st.sampled_from(["HND", "NHD"]), st.booleans())
def test_exact_is_attention_as_defined(situation, layout, return_lse):
    tensors, mask, is_causal, scale = situation
    want, want_lse = oracle(*tensors, mask, is_causal, scale)
    if layout == "NHD":
        tensors = [t.transpose(1, 2) for t in tensors]
    got = attention(*tensors, mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True, layout=layout,
                    precision="exact", return_lse=return_lse)  # fmt: skip
    out, lse = got if return_lse else (got, None)
    out = out.transpose(1, 2) if layout == "NHD" else out
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    if lse is not None:
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(situations(), st.sampled_from(["HND", "NHD"]), st.sampled_from(list(EMULATED)))
def test_emulation_hands_the_reference_what_was_meant(situation, layout, precision):
    tensors, mask, is_causal, scale = situation
    given = [t.transpose(1, 2) for t in tensors] if layout == "NHD" else tensors
    report = Report()
    out, lse = attention(*given, mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True, layout=layout,
                         precision=precision, return_lse=True, emulate=True, report=report)  # fmt: skip
    want, want_lse = EMULATED[precision](*tensors, mask=mask, is_causal=is_causal, scale=scale)
    assert torch.equal(out.transpose(1, 2) if layout == "NHD" else out, want)
    assert torch.equal(lse, want_lse)
    assert report.lines()[0]["kernel"] == f"{precision}-emulated"
    _, true_lse = oracle(*tensors, mask, is_causal, scale)
    dead = true_lse == -torch.inf
    assert want[dead].abs().sum() == 0
    assert torch.equal(want_lse == -torch.inf, dead)


@settings(max_examples=40, deadline=None)
@given(situations(), st.sampled_from(["auto", *EMULATED, "exact"]), st.booleans())
def test_inputs_stay_as_they_were_and_the_output_is_fresh(situation, precision, return_lse):
    tensors, mask, is_causal, scale = situation
    held = [*tensors, *([] if mask is None else [mask])]
    bits = [(t.clone(), t._version) for t in held]
    got = attention(*tensors, mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True,
                    precision=precision, return_lse=return_lse, emulate=True)  # fmt: skip
    for t, (before, version) in zip(held, bits, strict=True):
        assert torch.equal(t, before)
        assert t._version == version
    memory = {t.untyped_storage().data_ptr() for t in held}
    for out in got if return_lse else [got]:
        assert out.untyped_storage().data_ptr() not in memory
        out.add_(1)  # writing to it is safe
    assert all(torch.equal(t, before) for t, (before, _) in zip(held, bits, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["auto", "fp4", "int8", "exact"])
def test_every_dtype_comes_back_as_it_was_and_close(dtype, precision, device):
    q, k, v = (t.to(device) for t in qkv(lq=70, lk=70, dtype=dtype))
    report = Report()
    out, lse = attention(q, k, v, precision=precision, emulate=True, return_lse=True, report=report)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want = oracle(q.cpu(), k.cpu(), v.cpu())[0]
    error = (out.cpu().double() - want).norm() / want.norm()
    low_bit = report.lines()[0]["kernel"] != "exact"
    assert low_bit == (precision in ("fp4", "int8") and dtype != torch.float64)
    exact = 1e-2 if dtype.itemsize == 2 else 1e-5
    assert error < ({"fp4": 0.25, "int8": 0.05}[precision] if low_bit else exact)


def test_head_dim_above_256_and_of_v_alone_are_served_exactly_with_the_reason():
    report = Report()
    q, k, v = qkv(d=300)
    out, lse = attention(q, k, v, precision="fp4", emulate=True, return_lse=True, report=report)
    torch.testing.assert_close(out.double(), oracle(q, k, v)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), oracle(q, k, v)[1], rtol=1e-4, atol=1e-5)
    assert report.lines()[0]["reason"] == "fp4 and int8 need a head_dim of at most 256; this call has 300"
    q, k, _ = qkv(d=24)
    v = randn(2, 4, 33, 40)
    for return_lse in (False, True):
        got = attention(q, k, v, precision="int8", emulate=True, return_lse=return_lse, report=report)
        out = got[0] if return_lse else got
        torch.testing.assert_close(out.double(), oracle(q, k, v)[0], rtol=1e-4, atol=1e-5)
    assert report.fell_back == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("precision", ["fp4", "exact"])
@pytest.mark.parametrize(("b", "h", "lq", "lk"), [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 0, 0)])
def test_empty_tensors_give_empty_or_zero(b, h, lq, lk, precision, return_lse, device):
    q, k, v = (t.to(device).requires_grad_() for t in qkv(b, h, h, lq, lk, 8))
    got = attention(q, k, v, precision=precision, emulate=True, return_lse=return_lse)
    out = got[0] if return_lse else got
    assert out.shape == q.shape
    assert out.abs().sum() == 0
    if return_lse:
        assert got[1].shape == (b, h, lq)
        assert bool((got[1] == -torch.inf).all())
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.abs().sum() == 0


@pytest.mark.parametrize("precision", ["fp4", "int8", "exact"])
@pytest.mark.parametrize("kind", ["bool", "additive", "causal and bool"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_may_attend_nothing_are_zero_with_zero_gradient(precision, kind, grad, dtype, device):
    q, k, v = (t.to(device).requires_grad_(grad) for t in qkv(lq=9, lk=9, dtype=dtype))
    keep = torch.ones(9, 9, dtype=torch.bool, device=device)
    keep[4] = False
    if kind == "causal and bool":
        keep[2, :3] = False  # what causality leaves of row 2
    mask = keep if kind != "additive" else torch.where(keep, 0.0, -torch.inf)
    out = attention(q, k, v, mask=mask, is_causal="causal" in kind, precision=precision, emulate=True)
    dead = [2, 4] if "causal" in kind else [4]
    assert out[:, :, dead].abs().sum() == 0
    assert bool((out.detach().abs().sum(-1) > 0).sum() == 2 * 4 * (9 - len(dead)))
    if grad:
        dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert all(bool(g.isfinite().all()) for g in (dq, dk, dv))
        assert dq[:, :, dead].abs().sum() == 0


@pytest.mark.parametrize("precision", ["exact", "int8", "int8-fast", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # fp16's -65504 leaves the scores their differences
def test_a_row_of_the_lowest_number_attends_everything_alike_and_one_of_minus_infinity_nothing(precision, dtype):
    """Models fill their masks with -finfo.max: a padding token's row is all of it, and still has a mean."""
    q, k, v = qkv(b=1, h=1, hkv=1, dtype=dtype)
    mask = torch.zeros(1, 1, 33, 33, dtype=dtype)
    mask[..., 3, :] = torch.finfo(dtype).min
    mask[..., 5, :] = -torch.inf
    out = attention(q, k, v, mask=mask, precision=precision, emulate=True)[0, 0].float()
    mean = v[0, 0].float().mean(0)
    assert (out[3] - mean).norm() < 0.2 * mean.norm()
    assert (out[5] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("shape", [(9, 13), (4, 1, 13), (2, 1, 9, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("needs", ["mask", "all"])
def test_a_mask_that_requires_grad_gets_it_from_exact_attention(shape, return_lse, is_causal, needs):
    tensors, report = qkv(lq=9, lk=13, d=8), Report()
    mask = randn(*shape, seed=7).requires_grad_()
    with torch.no_grad():
        if shape[-1] > 1:
            mask[..., 5] = -torch.inf
    wanted = [mask] if needs == "mask" else [mask, *(t.requires_grad_() for t in tensors)]
    got = attention(*tensors, mask=mask, is_causal=is_causal, precision="int8", emulate=True, return_lse=return_lse,
                    report=report)  # fmt: skip
    out, lse = got if return_lse else (got, None)
    weights = randn(*out.shape, seed=8), randn(2, 4, 9, seed=9)
    loss = (out * weights[0]).sum() + (0.0 if lse is None else (lse * weights[1]).sum())

    wide = [t.detach().double().requires_grad_() for t in wanted]
    q, k, v = wide[1:] or (t.double() for t in tensors)
    scores = q @ k.mT * 8**-0.5 + wide[0]
    if is_causal:
        scores = scores.masked_fill(~torch.ones(9, 13, dtype=torch.bool).tril(), -torch.inf)
    true = (scores.softmax(-1) @ v * weights[0]).sum()
    if lse is not None:
        true = true + (scores.logsumexp(-1) * weights[1]).sum()
    for a, b in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(true, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    (line,) = report.lines()
    assert (line["kernel"], line["fell_back"]) == ("exact", True)
    assert line["reason"] == "int8 needs a mask that does not require grad; this one does"


def test_a_mask_that_requires_grad_gets_it_in_a_compiled_graph_too():
    tensors, mask = qkv(lq=9, lk=9, d=8), randn(9, 9, seed=7).requires_grad_()

    def loss(mask):
        return attention(*tensors, mask=mask, precision="int8", emulate=True).square().sum()

    (want,) = torch.autograd.grad(loss(mask), mask)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(mask), mask)
    torch.testing.assert_close(got, want)


def test_a_mask_of_another_float_dtype_is_taken_in_the_inputs_own():
    q, k, v = qkv(dtype=torch.bfloat16)
    bias = randn(33, 33)
    want = attention(q, k, v, mask=bias.bfloat16(), precision="exact")
    assert torch.equal(attention(q, k, v, mask=bias, precision="exact"), want)


# ---- gradients and modes


def test_exact_gradients_are_pytorch_s():
    tensors = [t.requires_grad_() for t in qkv()]
    got = torch.autograd.grad(attention(*tensors).square().sum(), tensors)
    want = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).square().sum(), tensors)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("precision", "emulate", "kernel", "fell_back"),
    [
        ("exact", True, "exact", False),
        ("int8", True, "int8-emulated", False),
        ("fp4", True, "int8-emulated", True),
        ("fp4", False, "exact", True),
        ("auto", True, "exact", False),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_inputs_that_require_grad_get_gradients(precision, emulate, kernel, fell_back, which):
    tensors, report = qkv(lq=70, lk=70), Report()
    tensors[which].requires_grad_()
    out = attention(*tensors, precision=precision, emulate=emulate, report=report)
    line = report.lines()[0]
    assert (line["kernel"], line["fell_back"]) == (kernel, fell_back)
    (got,) = torch.autograd.grad(out.square().sum(), tensors[which])
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).square().sum(), tensors[which])
    assert F.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_parameters_do_not_stop_fp4(mode):
    report = Report()
    with mode():
        q, k, v = (torch.nn.Parameter(t) for t in qkv())
        out = attention(q, k, v, precision="fp4", emulate=True, report=report)
    assert report.lines()[0]["kernel"] == "fp4-emulated"
    assert not out.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp4", "int8", "exact"])
def test_autocast_works_as_for_pytorch_s_attention(precision, device):
    q, k, v = (t.to(device) for t in qkv())
    with torch.autocast(device, torch.bfloat16):
        out = attention(q, k.bfloat16(), v, precision=precision, emulate=True)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert attention(*(t.double() for t in (q, k, v))).dtype == torch.float64
    want = attention(*(t.bfloat16() for t in (q, k, v)), precision=precision, emulate=True)
    assert torch.equal(out, want)


def test_meta_tensors_give_shapes():
    q, k, v = (t.to("meta") for t in qkv())
    assert attention(q, k, v, precision="exact").shape == q.shape
    assert attention(q, k, v, precision="fp4", emulate=True).shape == q.shape


# ---- what it writes down


def test_a_fallback_is_recorded_with_its_reason_and_nothing_is_printed(capfd):
    report = Report()
    for _ in range(3):
        attention(*qkv(), precision="fp4", report=report)
    attention(*qkv(), precision=Precision.AUTO, report=report)
    first, second = report.lines()
    assert (first["wished"], first["kernel"], first["fell_back"], first["calls"]) == ("fp4", "exact", True, 3)
    assert first["reason"].startswith("fp4 needs a Blackwell GPU (sm_120 or sm_121); this is a CPU")
    assert (second["wished"], second["fell_back"]) == ("auto", False)
    assert capfd.readouterr() == ("", "")


def test_auto_never_emulates():
    report = Report()
    attention(*qkv(), emulate=True, report=report)
    assert report.lines()[0]["kernel"] == "exact"


@pytest.mark.parametrize(("precision", "lse"), [("exact", False), ("exact", True), ("fp4", False)])
def test_a_call_without_a_report_is_counted_in_the_process_report(precision, lse):
    def seen():
        return sum(x["calls"] for x in process_report.lines())

    before = seen()
    attention(*qkv(), precision=precision, emulate=True, return_lse=lse)
    assert seen() == before + 1


def test_a_refused_call_is_not_counted():
    report = Report()
    q, k, v = qkv()
    for precision in ("exact", "fp4"):
        with pytest.raises(InputError):
            attention(q * torch.nan, k, v, precision=precision, emulate=True, report=report)
    assert report.lines() == []


def test_threads_share_the_door_and_a_report():
    tensors, report = qkv(), Report()
    want = {p: attention(*tensors, precision=p, emulate=True) for p in ("fp4", "int8", "exact")}

    def work(i):
        p = ("fp4", "int8", "exact")[i % 3]
        return torch.equal(attention(*tensors, precision=p, emulate=True, report=report), want[p])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(60)))
    assert [x["calls"] for x in report.lines()] == [20, 20, 20]


# ---- what it refuses


def changed(**changes):
    q, k, v = qkv()
    return {"q": q, "k": k, "v": v, **changes}


REFUSED = {
    "precision": (changed(precision="fp8"), "Unknown precision 'fp8'"),
    "layout": (changed(layout="BHSD"), "Unknown layout 'BHSD': choose 'HND'"),
    "not a tensor": (changed(q=[1.0]), "q is a list: give a torch.Tensor"),
    "dimensions": (changed(k=randn(4, 33, 32)), "k has 3 dimensions: give 4"),
    "integers": (changed(v=torch.ones(2, 4, 33, 32, dtype=torch.int64)), "v is torch.int64: convert it"),
    "fp8": (changed(q=randn(2, 4, 33, 32).to(torch.float8_e4m3fn)), "q is torch.float8_e4m3fn: convert it"),
    "complex": (changed(q=randn(2, 4, 33, 32).to(torch.complex64)), "q is torch.complex64: convert it"),
    "sparse": (changed(q=randn(2, 4, 33, 32).to_sparse()), "give a dense tensor"),
    "devices": (changed(k=torch.empty(2, 4, 33, 32, device="meta")), "k is on meta and q on cpu: move"),
    "dtypes": (changed(v=randn(2, 4, 33, 32, dtype=torch.bfloat16)), "v is torch.bfloat16 and q is torch.fl"),
    "batch": (changed(k=randn(1, 4, 33, 32), v=randn(1, 4, 33, 32)), "k has batch 1 and q 2"),
    "k and v tokens": (changed(v=randn(2, 4, 31, 32)), "k has 4 heads of 33 tokens and v has 4 of 31"),
    "k and v heads": (changed(v=randn(2, 2, 33, 32)), "k has 4 heads of 33 tokens and v has 2 of 33"),
    "head_dim": (changed(k=randn(2, 4, 33, 16)), "k has head_dim 16 and q 32"),
    "head_dim 0": (changed(q=randn(2, 4, 33, 0), k=randn(2, 4, 33, 0)), "head_dim is 0"),
    "gqa": (changed(k=randn(2, 2, 33, 32), v=randn(2, 2, 33, 32)), "pass enable_gqa=True"),
    "gqa ratio": (
        changed(k=randn(2, 3, 33, 32), v=randn(2, 3, 33, 32), enable_gqa=True),
        "q has 4 heads and k and v have 3: grouped-query attention needs a multiple",
    ),
    "gqa none": (changed(k=randn(2, 0, 33, 32), v=randn(2, 0, 33, 32), enable_gqa=True), "needs a multiple"),
    "mask type": (changed(mask=True), "mask is a bool: give a torch.Tensor or None"),
    "mask integers": (changed(mask=torch.ones(33, 33, dtype=torch.uint8)), "mask is torch.uint8: give bool"),
    "mask shape": (
        changed(mask=torch.ones(33, 32, dtype=torch.bool)),
        r"mask has shape \(33, 32\): it must broadcast to .* = \(2, 4, 33, 33\)",
    ),
    "mask heads": (changed(mask=torch.ones(2, 2, 33, 33, dtype=torch.bool)), r"shape \(2, 2, 33, 33\)"),
    "mask dimensions": (changed(mask=torch.ones(1, 2, 4, 33, 33, dtype=torch.bool)), "must broadcast"),
    "mask device": (changed(mask=torch.ones(33, 33, dtype=torch.bool, device="meta")), "mask is on meta"),
    "scale nan": (changed(scale=float("nan")), "scale is nan: give a finite number"),
    "scale infinite": (changed(scale=float("inf")), "scale is inf: give a finite number"),
    "scale type": (changed(scale="1"), "scale is a str: give a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("precision", ["auto", "fp4"])
def test_what_cannot_be_used_is_refused_in_one_sentence(case, precision):
    arguments, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refused:
        attention(**{"precision": precision, "emulate": True, **arguments})
    assert "\n" not in str(refused.value)


def test_token_major_tensors_in_the_wrong_layout_are_refused_where_it_shows():
    q, k, v = randn(1, 50, 4, 32), randn(1, 60, 4, 32), randn(1, 60, 4, 32)
    assert attention(q, k, v, layout="NHD").shape == q.shape
    with pytest.raises(InputError, match="check the layout"):
        attention(q, k, v)


@pytest.mark.parametrize("precision", ["auto", "exact", "fp4", "int8"])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_is_refused_naming_the_tensor(precision, name, dtype):
    q, k, v = qkv(dtype=dtype)
    tensors = {"q": q, "k": k, "v": v, "mask": torch.zeros(1, 1, 33, 33, dtype=dtype)}
    tensors[name][0, 0, 7, 3] = torch.nan
    with pytest.raises(InputError, match=f"^{name} contains NaN: look at the step that produced it"):
        attention(**tensors, precision=precision, emulate=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_is_refused_where_rounding_would_hide_it(sign):
    q, k, v = qkv()
    v[1, 2, 3, 4] = sign * torch.inf
    for precision in ("fp4", "int8"):
        with pytest.raises(InputError, match="v contains infinity"):
            attention(q, k, v, precision=precision, emulate=True)
    assert not attention(q, k, v, precision="exact").isfinite().all()  # exact attention shows it as it is
