"""The torch ops: schema, fake kernels, autograd and strides; compiled without a graph break."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from comfy_sage3 import Report, attention, reference
from comfy_sage3.kernels import exact, ops

ROOT = Path(__file__).parents[1]
FORWARD = {"exact": ops.exact_attention, "fp4": ops.fp4_attention, "int8": ops.int8_attention}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def inputs(seed=0, lq=19, lk=23, d=16, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, lq, d), (2, kv_heads, lk, d), (2, kv_heads, lk, d))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def some_mask(kind, lq=19, lk=23):
    """Random, one row fully masked; None, bool or additive."""
    if kind is None:
        return None
    keep = torch.rand(2, 1, lq, lk, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[:, :, 3] = False
    return keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)


def permuted(tensors):
    """The same values in token-major memory, as diffusers and ComfyUI hand them over."""
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]


CHECKS = [
    ("exact", False, None, True),
    ("exact", True, "bool", True),
    ("exact", True, "additive", False),
    ("fp4", False, "bool", False),
    ("fp4", True, None, False),
    ("fp4", True, "additive", False),
    ("int8", False, "additive", True),
    ("int8", True, None, True),
    ("int8", True, "bool", False),
]


@pytest.mark.parametrize(("name", "permute", "mask", "grad"), CHECKS)
def test_opcheck(name, permute, mask, grad):
    tensors = permuted(inputs()) if permute else inputs()
    tensors = [t.requires_grad_(grad) for t in tensors]
    torch.library.opcheck(FORWARD[name], (*tensors, some_mask(mask), True, 0.3))


def test_opcheck_of_exact_attention_with_lse():
    tensors = [t.requires_grad_() for t in permuted(inputs())]
    torch.library.opcheck(ops.exact_attention, (*tensors, some_mask("bool"), False, None, True))


@pytest.mark.parametrize("mask", [None, "bool"])
def test_opcheck_of_the_backward_ops(mask):
    q, k, v = permuted(inputs())
    mask = some_mask(mask)
    out, lse = reference.int8_attention(q, k, v, mask=mask)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(ops.int8_attention_backward, (dout, q, k, v, out, lse, mask))
    torch.library.opcheck(ops.exact_attention_backward, (dout, dlse, q, k, v, mask, True))
    torch.library.opcheck(ops.exact_attention_backward, (None, dlse, q, k, v, mask))


def plain(q, k, v, mask, is_causal, scale):
    """Attention written out in float64 for autograd to differentiate -> (out, lse); no chunks, no tricks."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keep = torch.ones(s.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        keep, s = keep & (mask > -torch.inf), s + mask.masked_fill(mask == -torch.inf, 0)
    if is_causal:
        keep = keep & torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    alive = keep.any(-1, keepdim=True)
    s = s.masked_fill(~keep & alive, -torch.inf)
    out = (torch.softmax(s, -1) * alive) @ v
    return out, s.logsumexp(-1).masked_fill(~alive[..., 0].expand(s.shape[:-1]), -torch.inf)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "additive", "row"])
def test_the_exact_gradient_of_out_and_lse(mask, is_causal, monkeypatch):
    monkeypatch.setattr(exact, "SCORES_AT_ONCE", 7 * 2 * 4 * 23)  # chunks of 7 query rows, a ragged last one
    mask = some_mask("bool")[:, :, :1] if mask == "row" else some_mask(mask)
    tensors = [t.requires_grad_() for t in inputs(dtype=torch.float64)]
    want = plain(*tensors, mask, is_causal, 0.4)
    got = ops.exact_attention(*tensors, mask if mask is None or mask.dtype == torch.bool else mask.double(),
                              is_causal, 0.4, True)  # fmt: skip
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(got[1].double())
    losses = [
        (out * out).sum() + (weights * lse.double().masked_fill(lse == -torch.inf, 0)).sum() for out, lse in (got, want)
    ]
    for a, b in zip(*(torch.autograd.grad(loss, tensors) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # lse passes through float32


def test_the_int8_op_adds_the_exact_gradient_of_its_lse():
    tensors = [t.requires_grad_() for t in inputs()]
    out, lse = ops.int8_attention(*tensors)
    weights = torch.randn_like(lse)
    both = torch.autograd.grad((out.sum(), (lse * weights).sum()), tensors, retain_graph=True)
    only_out = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    only_lse = torch.autograd.grad((lse * weights).sum(), tensors)
    true_lse = ops.exact_attention(*tensors, None, False, None, True)[1]
    exact_lse = torch.autograd.grad((true_lse * weights).sum(), tensors)
    for a, b, c, d in zip(both, only_out, only_lse, exact_lse, strict=True):
        torch.testing.assert_close(a, b + c)
        torch.testing.assert_close(c, d)
    assert only_lse[2].abs().max() == 0  # the lse does not depend on v


def test_int8_autograd_is_the_reference_backward():
    tensors = [t.requires_grad_() for t in permuted(inputs())]
    mask = some_mask("bool")
    out, lse = ops.int8_attention(*tensors, mask, True, 0.3)
    dout = torch.randn_like(out)
    plain_tensors = [t.detach() for t in tensors]
    want = reference.int8_attention_backward(
        dout, *plain_tensors, out.detach(), lse.detach(), mask=mask, is_causal=True, scale=0.3, options=reference.OUR_INT8
    )
    for a, b in zip(torch.autograd.grad(out, tensors, dout), want, strict=True):
        assert torch.equal(a, b)


def test_backward_through_the_fp4_op_raises():
    tensors = [t.requires_grad_() for t in inputs()]
    out, _ = ops.fp4_attention(*tensors)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


def test_a_second_derivative_raises_instead_of_being_wrong():
    tensors = [t.requires_grad_() for t in inputs()]
    out, _ = ops.int8_attention(*tensors)
    (first,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(first.sum(), tensors)


COMPILED = [
    ("exact", None, False, "HND", False),
    ("exact", "bool", True, "NHD", True),
    ("exact", "additive", False, "HND", True),
    ("fp4", None, True, "NHD", False),
    ("fp4", "bool", False, "NHD", False),
    ("fp4", "additive", True, "HND", True),  # falls to int8: these require grad
    ("int8", None, True, "HND", True),
    ("int8", "bool", True, "NHD", False),
    ("int8", "additive", False, "NHD", True),
    ("auto", None, False, "NHD", False),
]


@pytest.mark.parametrize(("precision", "mask", "is_causal", "layout", "grad"), COMPILED)
def test_compiled_in_one_graph_equals_eager(precision, mask, is_causal, layout, grad):
    report, eager_report, mask = Report(), Report(), some_mask(mask)
    tensors = inputs()
    if layout == "NHD":
        tensors = [t.transpose(1, 2).contiguous() for t in tensors]
    tensors = [t.requires_grad_(grad) for t in tensors]

    def call(q, k, v, report=report):
        return attention(q, k, v, mask=mask, is_causal=is_causal, layout=layout, precision=precision,
                         enable_gqa=True, emulate=True, report=report)  # fmt: skip

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    outs = [compiled(*tensors), compiled(*tensors), call(*tensors, report=eager_report)]
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[0], outs[1])
    (line,), (eager,) = report.lines(), eager_report.lines()
    assert line == {**eager, "calls": 2}  # counted as often as it ran, not as often as it was traced
    if grad:
        want, got = (torch.autograd.grad(o.square().sum(), tensors) for o in (outs[2], outs[0]))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["exact", "fp4", "int8"])
def test_dynamo_explains_no_graph_break(precision):
    mask = some_mask("bool")

    def call(q, k, v):
        out, lse = attention(q, k, v, mask=mask, enable_gqa=True, precision=precision, emulate=True, return_lse=True)
        return out * 2 + lse.masked_fill(lse == -torch.inf, 0)[..., None]

    explained = torch._dynamo.explain(call)(*inputs())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("precision", ["exact", "fp4"])
def test_new_lengths_and_scales_reuse_one_dynamic_graph(precision):
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def call(q, k, v):
        return attention(q, k, v, precision=precision, emulate=True, enable_gqa=True)

    for lq, lk in [(19, 23), (40, 23), (64, 130)]:
        q, k, v = inputs(lq=lq, lk=lk)
        want = attention(q, k, v, precision=precision, emulate=True, enable_gqa=True)
        torch.testing.assert_close(call(q, k, v), want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_under_autocast_compiled_equals_eager():
    def call(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, precision="fp4", emulate=True, enable_gqa=True)

    tensors = inputs()
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, call(*tensors))


def test_a_module_exports():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, precision="fp4", emulate=True, enable_gqa=True)

    tensors = tuple(inputs())
    program = torch.export.export(Attend(), tensors)
    assert torch.equal(program.module()(*tensors), Attend()(*tensors))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs g++")
def test_inductor_runs_the_whole_function():
    tensors = [t.requires_grad_() for t in permuted(inputs())]

    def call(q, k, v):
        return (attention(q * 1.5, k, v, precision="int8", emulate=True, enable_gqa=True) + 1).square()

    want = torch.autograd.grad(call(*tensors).sum(), tensors)
    got = torch.autograd.grad(torch.compile(call, fullgraph=True)(*tensors).sum(), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nan_is_refused_inside_a_compiled_graph_too():
    q, k, v = inputs()
    k[0, 0, 0, 0] = torch.nan
    compiled = torch.compile(lambda *t: attention(*t, enable_gqa=True), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="k contains NaN"):
        compiled(q, k, v)


IMPORTS = """
import importlib, importlib.util, sys, time, types
from pathlib import Path
import torch
start, before = time.process_time(), set(sys.modules)
import comfy_sage3
seconds = time.process_time() - start
assert seconds < 0.3, seconds
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"diffusers", "skimage", "scipy", "matplotlib", "gradio", "numpy", "triton"}, new
assert "torch._dynamo" not in sys.modules and not torch.cuda.is_initialized()

q = torch.randn(1, 2, 9, 16)
def works(package, name):
    report = package.Report()
    out = package.attention(q, q, q, precision="fp4", emulate=True, report=report)
    assert report.accelerated == 1 and out.shape == q.shape, name
    try:
        package.attention(q * torch.nan, q, q)
    except package.errors.InputError:
        return
    raise AssertionError(name)
works(comfy_sage3, "first import")

# ComfyUI loads the same folder as part of a pack whose name is a path
folder = Path(comfy_sage3.__file__).parent
sys.modules["/custom_nodes/a-pack"] = types.ModuleType("/custom_nodes/a-pack")
spec = importlib.util.spec_from_file_location(
    "/custom_nodes/a-pack.comfy_sage3", folder / "__init__.py", submodule_search_locations=[str(folder)])
pack = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = pack
spec.loader.exec_module(pack)
works(pack, "under another name")
works(comfy_sage3, "beside another copy")
assert pack.Report is not comfy_sage3.Report

# every load has ops of its own, so whoever holds those of an earlier load (here comfy_sage3.attention) may call them
ops = sys.modules["comfy_sage3.kernels.ops"]
held, names = ops.int8_attention, {ops.NAMESPACE, sys.modules[spec.name + ".kernels.ops"].NAMESPACE}
for _ in range(3):
    importlib.reload(ops)
    names.add(ops.NAMESPACE)
    works(comfy_sage3, "after a reload of the ops")
    assert torch.equal(held(q, q, q)[0], ops.int8_attention(q, q, q)[0])
for name in [n for n in sys.modules if n.split(".")[0] == "comfy_sage3"]:
    del sys.modules[name]
again = importlib.import_module("comfy_sage3")
assert again is not comfy_sage3
works(again, "imported again")
works(pack, "the other copy, still")
works(comfy_sage3, "the first copy, still")
names.add(sys.modules["comfy_sage3.kernels.ops"].NAMESPACE)
assert len(names) == 6 and "comfy_sage3" in names, names
for package, name in ((comfy_sage3, "first"), (again, "again"), (pack, "pack")):
    x = q.clone().requires_grad_()
    report = package.Report()
    package.attention(x, q, q, precision="int8", emulate=True, report=report).sum().backward()
    assert x.grad.abs().max() > 0 and report.accelerated == 1, name
for package in (comfy_sage3, again):
    report = package.Report()
    call = lambda x: package.attention(x, x, x, precision="fp4", emulate=True, report=report)
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(q), call(q))
print("all work")
"""


def test_import_is_cheap_and_repeatable_under_any_name():
    argv = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all work\n", done.stderr
