"""The compiled kernels as the door uses them, without a GPU: a library whose operators are the reference."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comfy_sage3 import Report, attention, doctor, reference
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.override import make_override
from comfy_sage3.errors import InputError, KernelError
from comfy_sage3.kernels import build, ops, triton_training
from comfy_sage3.precision import PrecisionPlan

ROOT = Path(__file__).parents[1]
NO_NVCC = "nvcc 13 is not installed"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs g++")
LONG, SHORT = 4128, 48  # keys: above and below where "auto" leaves a call to exact attention


class Operators:
    """What binding.cpp registers: its signature, dtypes, strides; and a list of what was asked."""

    def __init__(self):
        self.calls = []

    def int8_attention(self, q, k, v, mask, is_causal, scale, return_lse, kernel):
        assert isinstance(is_causal, bool)
        assert isinstance(scale, float)
        assert mask is None or mask.dim() == 4
        assert mask is None or mask.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32)
        self.calls.append({"kernel": kernel, "scale": scale, "causal": is_causal, "lse": return_lse, "q": q.stride()})
        out = torch.empty_like(q)
        if out.stride(3) != 1:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        with ops.full_precision(q):  # a kernel knows nothing of autocast
            got, lse = reference.int8_attention(q, k, v, mask=mask, is_causal=is_causal, scale=scale)
        out.copy_(got)
        return out, lse if return_lse else torch.empty(0)


class Library(build.Loaded):
    operators = Operators()

    @property
    def ops(self):
        return self.operators


@pytest.fixture
def gpu(monkeypatch):
    """The CPU plays an NVIDIA GPU: ``gpu(capability, outcome)``, then its operators; ``built`` is the default."""

    def plays(capability=(9, 0), outcome=None):
        Library.operators = Operators()
        built = Library(Path("fake.so"), "fake", ("75", "89", "90a", "120a"), "cache", 0.0)
        monkeypatch.setattr(build, "_outcome", outcome or built)
        for name in ("comfy_sage3.attention", "comfy_sage3.comfyui.override", "comfy_sage3.doctor"):
            monkeypatch.setattr(sys.modules[name], "capability_of", lambda device: capability)
        return Library.operators

    torch._dynamo.reset()
    return plays


def qkv(lq=33, lk=LONG, d=32, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, lq, d), (2, kv_heads, lk, d), (2, kv_heads, lk, d))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def token_major(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


VIEWS = {
    "contiguous": lambda t: t,
    "token-major": token_major,
    "cut from one projection": lambda t: torch.cat([t[..., :1], t, t], -1)[..., 1 : t.shape[-1] + 1],
    "expanded": lambda t: t[:, :1].expand_as(t),
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels apart, token-major": lambda t: t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "every second channel": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


# ---- the op


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("mask", "return_lse"), [(None, False), ("bool", True)])
def test_opcheck(gpu, view, mask, return_lse):
    gpu()
    tensors = [VIEWS[view](t) for t in qkv(9, 23)]
    if mask is not None:
        mask = torch.rand(2, 1, 9, 23, generator=torch.Generator().manual_seed(1)) < 0.7
    torch.library.opcheck(ops.int8_attention_compiled, (*tensors, mask, mask is None, 0.3, return_lse, "sm90"))


@pytest.mark.parametrize("d", [1, 32])
@pytest.mark.parametrize(("lq", "heads"), [(9, 4), (1, 4), (9, 1), (1, 1)])
@pytest.mark.parametrize("view", VIEWS)
def test_the_fake_strides_are_right_for_dimensions_of_one_too(gpu, view, lq, heads, d):
    gpu()
    tensors = [VIEWS[view](t) for t in qkv(lq, 23, d, heads=heads, kv_heads=1)]
    arguments = (*tensors, None, False, 0.3, True, "mma")
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.int8_attention_compiled(*(mode.from_tensor(a) for a in tensors), *arguments[3:])
    for a, b in zip(fake, ops.int8_attention_compiled(*arguments), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_backward_through_the_op_raises(gpu):
    gpu()
    tensors = [t.requires_grad_() for t in qkv(9, 23)]
    out, _ = ops.int8_attention_compiled(*tensors, None, False, 0.3, False, "sm90")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


def test_the_op_without_a_library_says_why(gpu):
    gpu(outcome=build.Failure(NO_NVCC))
    with pytest.raises(KernelError, match=NO_NVCC):
        ops.int8_attention_compiled(*qkv(9, 23), None, False, 0.3, False, "sm90")


# ---- the door


@pytest.mark.parametrize(("capability", "kernel"), [((9, 0), "sm90"), ((7, 5), "mma"), ((8, 9), "mma"), ((12, 0), "mma")])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_the_door_runs_this_gpus_kernel(gpu, capability, kernel, layout, return_lse):
    operators, report, tensors = gpu(capability), Report(), qkv()
    want, want_lse = reference.int8_attention(*tensors, scale=32**-0.5)
    given = tensors if layout == "HND" else [t.transpose(1, 2).contiguous() for t in tensors]
    got = attention(*given, enable_gqa=True, layout=layout, precision="int8", return_lse=return_lse, report=report)
    out, lse = got if return_lse else (got, None)
    assert torch.equal(out if layout == "HND" else out.transpose(1, 2), want)
    assert out.is_contiguous()  # in the layout it was asked for
    assert lse is None or torch.equal(lse, want_lse)
    (call,) = operators.calls
    assert (call["kernel"], call["scale"], call["lse"]) == (kernel, 32**-0.5, return_lse)
    (line,) = report.lines()
    assert (line["kernel"], line["fell_back"]) == (f"int8-{kernel}", False)
    assert line["reason"] == f"asked for, runs on sm_{capability[0]}{capability[1]}"
    assert report.accelerated == 1


def test_a_view_goes_to_the_kernel_as_it_is_and_out_lies_like_q(gpu):
    operators = gpu()
    for view in VIEWS.values():
        q, k, v = (view(t) for t in qkv())
        out = attention(q, k, v, enable_gqa=True, precision="int8")
        assert operators.calls[-1]["q"] == q.stride()
        like = torch.empty_like(q)
        assert out.stride() == (like if like.stride(3) == 1 else torch.empty(q.shape)).stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float16, torch.float32, torch.float64])
def test_every_mask_arrives_in_a_type_that_the_kernels_read(gpu, dtype, mask_dtype):
    operators = gpu()
    q, k, v = qkv(dtype=dtype)
    keep = torch.arange(LONG) % 3 > 0
    mask = keep if mask_dtype == torch.bool else torch.zeros(LONG, dtype=mask_dtype).masked_fill(~keep, -torch.inf)
    out = attention(q, k, v, mask=mask, scale=0.2, enable_gqa=True, precision="int8")
    assert torch.equal(out, attention(q, k, v, mask=keep, scale=0.2, enable_gqa=True, precision="int8"))
    assert [c["scale"] for c in operators.calls] == [0.2, 0.2]


@pytest.mark.parametrize(
    ("precision", "lk", "kernel"),
    [("auto", LONG, "int8-sm90"), ("auto", SHORT, "exact"), ("int8", SHORT, "int8-sm90"), ("fp4", SHORT, "int8-sm90")],
)
def test_auto_takes_the_kernel_for_long_calls_only(gpu, precision, lk, kernel):
    gpu()
    report = Report()
    attention(*qkv(lk=lk), enable_gqa=True, precision=precision, report=report)
    (line,) = report.lines()
    assert line["kernel"] == kernel
    if kernel == "exact":
        assert line["reason"] == "auto: exact is faster below 4096 keys"


def test_nobody_waits_to_look_for_nan(gpu, monkeypatch):
    gpu()
    q, k, v = qkv()
    monkeypatch.setattr(ops, "refuse_bad_numbers", lambda *_, **__: pytest.fail("looked at the values"))
    attention(q * torch.nan, k, v, enable_gqa=True, precision="int8")


def test_without_a_gradient_here_training_is_exact_and_inference_on_parameters_is_not(gpu, monkeypatch):
    monkeypatch.setattr(triton_training, "absent", lambda: "Triton is not installed")
    operators, report = gpu((8, 9)), Report()
    q, k, v = (torch.nn.Parameter(t) for t in qkv())
    attention(q, k, v, enable_gqa=True, precision="int8", report=report).sum().backward()
    assert report.lines()[0]["kernel"] == "exact"
    assert "Triton is not installed" in report.lines()[0]["reason"]
    assert not operators.calls
    with torch.no_grad():
        out = attention(q, k, v, enable_gqa=True, precision="int8")
    assert len(operators.calls) == 1
    assert not out.requires_grad


def test_autocast_gives_its_dtype(gpu):
    operators = gpu()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*qkv(), enable_gqa=True, precision="int8")
    assert out.dtype == torch.bfloat16
    assert len(operators.calls) == 1


@pytest.mark.parametrize(
    ("reason", "precision", "emulate", "kernel"),
    [
        (NO_NVCC, "auto", False, "exact"),
        (NO_NVCC, "fp4", False, "exact"),
        (NO_NVCC, "int8", False, "exact"),
        (NO_NVCC, "int8", True, "int8-emulated"),
        ("SAGE3_FORCE_REFERENCE is set", "int8", False, "exact"),
        ("SAGE3_FORCE_REFERENCE is set", "int8", True, "int8-emulated"),
    ],
)
def test_a_failed_build_is_in_every_report_and_attention_runs(gpu, reason, precision, emulate, kernel):
    operators, report, tensors = gpu(outcome=build.Failure(reason)), Report(), qkv()
    out = attention(*tensors, enable_gqa=True, precision=precision, emulate=emulate, report=report)
    want, _ = reference.exact_attention(*tensors)
    assert (out - want).norm() / want.norm() < 0.05
    (line,) = report.lines()
    assert line["kernel"] == kernel
    assert line["reason"].endswith(reason)
    assert reason in report.summary()
    assert not operators.calls


# ---- compiled by torch


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_equals_eager(gpu, layout, backend, dynamic):
    operators, report = gpu(), Report()

    def block(q, k, v):
        out, lse = attention(q * 1.0, k, v, precision="auto", layout=layout, enable_gqa=True, return_lse=True, report=report)
        return out * 2.0, lse

    graph = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    for lq in (33, 40):
        tensors = qkv(lq)
        if layout == "NHD":
            tensors = [t.transpose(1, 2).contiguous() for t in tensors]
        for a, b in zip(graph(*tensors), block(*tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a.stride() == b.stride()
    assert len(operators.calls) == 4
    (line,) = report.lines()
    assert (line["kernel"], line["calls"]) == ("int8-sm90", 4)


def test_a_failed_build_does_not_break_the_graph(gpu):
    gpu(outcome=build.Failure(NO_NVCC))
    report, tensors = Report(), qkv()

    def block(q, k, v):
        return attention(q, k, v, precision="int8", enable_gqa=True, report=report)

    graph = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(*tensors), block(*tensors))
    (line,) = report.lines()
    assert (line["kernel"], line["reason"], line["calls"]) == ("exact", f"int8 needs compiled kernels; {NO_NVCC}", 2)


# ---- who else decides: the node, the doctor


def flat(t):
    return t.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_the_node_runs_the_kernel_on_comfyui_calls(gpu, precision):
    operators, hook = gpu(), Hook(PrecisionPlan(precision))
    q, k, v = qkv(kv_heads=4)
    out = make_override(hook)(lambda *_, **__: pytest.fail("left to ComfyUI"), flat(q), flat(k), flat(v), 4)
    assert torch.equal(out, flat(reference.int8_attention(q, k, v, scale=32**-0.5)[0]))
    assert hook.report.accelerated == 1
    assert operators.calls[0]["q"] == token_major(q).stride()  # no copy between ComfyUI's memory and the kernel


def test_the_node_leaves_calls_to_comfyui_and_shows_why_the_build_failed(gpu):
    gpu(outcome=build.Failure(NO_NVCC))
    hook = Hook(PrecisionPlan("int8"))
    q, k, v = (flat(t) for t in qkv(kv_heads=4))
    assert make_override(hook)(lambda *_, **__: "ComfyUI's own", q, k, v, 4) == "ComfyUI's own"
    (line,) = hook.report.lines()
    assert (line["kernel"], line["reason"]) == ("exact", f"int8 needs compiled kernels; {NO_NVCC}")


@pytest.mark.parametrize("precision", ["auto", "int8", "fp4"])
def test_the_doctor_names_the_kernel_or_what_the_build_said(gpu, precision):
    gpu()
    decision = doctor._decision(torch.device("cuda", 0), doctor.Precision(precision))
    assert decision["kernel"] == "int8-sm90"
    gpu(outcome=build.Failure(NO_NVCC))
    decision = doctor._decision(torch.device("cuda", 0), doctor.Precision(precision))
    assert decision["kernel"] == "exact"
    assert NO_NVCC in decision["reason"]


def test_the_doctor_tests_the_compiled_kernel(gpu):
    operators = gpu()
    result = doctor.self_test(torch.device("cpu"), "int8")
    assert (result["kernel"], result["ok"]) == ("int8-sm90", True)
    assert len(operators.calls) == 1


# ---- nothing is built before it is needed


def test_nothing_is_built_on_a_cpu(monkeypatch):
    monkeypatch.setattr(build, "load", lambda *_: pytest.fail("asked for the library"))
    q, k, v = qkv()
    for precision in ("auto", "fp4", "int8", "exact"):
        for emulate in (False, True):
            attention(q, k, v, enable_gqa=True, precision=precision, emulate=emulate)
    for precision in doctor.Precision:
        doctor._decision(torch.device("cpu"), precision)
    with pytest.raises(InputError):
        attention(q, k, v, precision="int8")


def test_a_refused_call_builds_nothing(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(build, "load", lambda *_: pytest.fail("asked for the library"))
    q, k, v = qkv()
    with pytest.raises(InputError, match="enable_gqa"):
        attention(q, k, v, precision="int8")


def test_import_asks_for_no_library():
    code = """
import comfy_sage3, torch
from comfy_sage3.comfyui import override
from comfy_sage3.kernels import build
assert build.outcome() is None and not torch.cuda.is_initialized() and not torch.ops.loaded_libraries
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
