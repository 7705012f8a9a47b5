"""Being run: again and again, beside other work, in graphs, compiled, on streams and devices of the caller's choice."""

import pytest
import torch

from comfy_sage3 import Report, attention
from comfy_sage3.kernels import ops

from . import calls
from .calls import DEVICE, qkv, randn, scale_of
from .exact import NORMAL, exact, problems, relative_l1

REPEATS = 50


def cases():
    """Name -> (q, k, v, mask, causal)."""
    return {
        "hd128": (*qkv(1025, 1023, 128, h=8), None, False),
        "hd64 causal": (*qkv(1023, 1025, 64, h=8), None, True),
        "grouped": (*qkv(257, 1025, 96, h=8, hkv=2), None, False),
        "masked": (*qkv(257, 1025, 80, h=4), calls.some_mask((2, 1, 257, 1025), torch.bool), False),
        "hd256": (*qkv(203, 1025, 256, h=4), None, True),
        "long": (*qkv(4096, 4096, 128, h=8), None, False),
    }


def test_fifty_repeats_are_bit_identical(kernel):
    for name, (q, k, v, mask, causal) in cases().items():
        want, want_lse = (x.clone() for x in kernel.with_lse(q, k, v, mask, causal))
        for i in range(REPEATS):
            out, lse = kernel.with_lse(q, k, v, mask, causal)
            assert torch.equal(out, want), f"{name}, repeat {i}"
            assert torch.equal(lse, want_lse), f"{name}, repeat {i}"


def test_fifty_repeats_are_bit_identical_beside_a_busy_stream(kernel):
    busy, a = torch.cuda.Stream(), randn(2048, 2048)
    b = torch.empty_like(a)
    for name, (q, k, v, mask, causal) in cases().items():
        want = kernel(q, k, v, mask, causal).clone()
        outs = []
        for i in range(REPEATS):
            with torch.cuda.stream(busy):
                for _ in range(2):
                    torch.mm(a, a, out=b)
                b.mul_(0.5)
            outs.append(kernel(q, k, v, mask, causal))
            if i % 10 == 9:
                for j, out in enumerate(outs):
                    assert torch.equal(out, want), f"{name}, repeat {i - 9 + j}"
                outs = []
        torch.cuda.synchronize()


def test_calls_on_two_streams_at_once_do_not_disturb_each_other(kernel):
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [qkv(1025, 1025, 128, h=8, seed=10 * i) for i in range(2)]
    want = [kernel(*x).clone() for x in inputs]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                q, k, v = inputs[i]
                outs[i].append(kernel.ops.int8_attention(q, k, v, None, False, scale_of(q, None), False, kernel.name)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want[i]) for i in range(2) for out in outs[i])


def test_work_is_ordered_on_the_callers_stream(kernel):
    """Inputs that a slow kernel before it writes, and that one after it overwrites: only the stream keeps them apart."""
    q, k, v = qkv(257, 1025, 64)
    want = kernel(q, k, v).clone()
    late = [torch.zeros_like(x) for x in (q, k, v)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about ten milliseconds
        for x, y in zip(late, (q, k, v), strict=True):
            x.copy_(y)
        out, _ = kernel.ops.int8_attention(*late, None, False, scale_of(q, None), False, kernel.name)
        for x in late:
            x.zero_()
    stream.synchronize()
    assert torch.equal(out, want)


def test_a_call_does_not_wait_for_the_device(kernel):
    q, k, v = qkv(257, 1025, 64)
    kernel.with_lse(q, k, v)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)  # about 0.2 seconds
    kernel.ops.int8_attention(q, k, v, None, False, scale_of(q, None), True, kernel.name)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("masked", [False, True])
def test_a_captured_graph_replays_with_new_inputs(kernel, masked):
    q, k, v = qkv(257, 1025, 128, h=4, hkv=2)
    mask = calls.some_mask((2, 1, 257, 1025), torch.bool) if masked else None

    def call():
        return kernel.ops.int8_attention(q, k, v, mask, not masked, scale_of(q, None), True, kernel.name)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for seed in (5, 6, 7):
        for x, new in zip((q, k, v), qkv(257, 1025, 128, h=4, hkv=2, seed=seed), strict=True):
            x.copy_(new)
        if mask is not None:
            mask.copy_(calls.some_mask((2, 1, 257, 1025), torch.bool, keep=0.1 * seed, seed=seed))
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        want, want_lse = kernel.with_lse(q, k, v, mask, not masked)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_inputs_of_another_device_than_the_current_one(kernel):
    q, k, v = (x.to("cuda:1") for x in qkv(203, 257, 64))
    with torch.cuda.device(0):
        out, _ = kernel.ops.int8_attention(q, k, v, None, False, scale_of(q, None), True, kernel.name)
        assert torch.cuda.current_device() == 0
    assert out.device == q.device
    assert relative_l1(out, exact(q, k, v)[0]) <= NORMAL


# ------------------------------------------------------------------------------------------------ through the door
def kernels_of(report):
    return {line["kernel"] for line in report.lines()}


@pytest.fixture
def expected():
    """What the door must choose here."""
    return "int8-sm90" if torch.cuda.get_device_capability() == (9, 0) else "int8-mma"


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_the_door_chooses_the_kernel_and_says_so(layout, expected):
    report = Report()
    q, k, v = qkv(1025, 1023, 128, h=4, hkv=2)
    given = (q, k, v) if layout == "HND" else [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = attention(*given, precision="int8", enable_gqa=True, layout=layout, return_lse=True, report=report)
    assert kernels_of(report) == {expected}
    assert report.fell_back == 0
    found = problems(out if layout == "HND" else out.transpose(1, 2), lse, q, k, v)
    assert not found, "\n".join(found)


def test_autocast_gives_its_dtype(expected):
    report = Report()
    tensors = qkv(257, 1025, 64, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = attention(*tensors, precision="int8", report=report)
    assert out.dtype == torch.bfloat16
    assert kernels_of(report) == {expected}
    assert relative_l1(out, exact(*tensors)[0]) <= NORMAL


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_compiled_without_a_graph_break(backend, layout, expected):
    if backend == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    report = Report()

    def block(q, k, v, mask):
        out, lse = attention(
            q * 1.0, k, v, mask=mask, precision="int8", layout=layout, return_lse=True, is_causal=mask is None, report=report
        )
        return out * 2.0, lse

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    q, k, v = qkv(257, 1025, 64)
    given = (q, k, v) if layout == "HND" else [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    for mask in (None, calls.some_mask((2, 1, 257, 1025), torch.bool)):
        got, want = compiled(*given, mask), block(*given, mask)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert kernels_of(report) == {expected}
    torch._dynamo.reset()


def test_the_registered_op_passes_opcheck(kernel):
    """Schema, fake kernel, strides."""
    q, k, v = qkv(97, 113, 64)
    mask = calls.some_mask((2, 1, 97, 113), torch.bool)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd_channels = [torch.cat([x, x], -1)[..., ::2] for x in (q, k, v)]
    for given in ((q, k, v, None), (q, k, v, mask), (*token_major, None), (*odd_channels, None)):
        for return_lse in (False, True):
            torch.library.opcheck(ops.int8_attention_compiled, (*given, False, 0.125, return_lse, kernel.name))


def test_a_wrong_kernel_name_is_an_error_not_a_crash(kernel):
    q, k, v = qkv(64, 64, 64)
    with pytest.raises(RuntimeError, match="no kernel"):
        kernel.ops.int8_attention(q, k, v, None, False, 1.0, False, "nonsense")
    assert torch.ones(1, device=DEVICE).item() == 1
