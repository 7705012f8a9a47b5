"""8-bit training on a CPU: everything that the door and autograd do, with the kernel emulated in plain PyTorch."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from comfy_sage3 import Report, training

from .training_cases import Block, Place, TrainingCases, cosine, exact, plain, train

CPU = Place("cpu", "int8-emulated", "int8-emulated", emulate=True)


@pytest.fixture
def place():
    return CPU


@pytest.fixture(autouse=True)
def _one_thread():
    """These products are so small that threads wait for each other most of the time, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestEmulated(TrainingCases):
    """On a CPU."""


# ---- odd shapes, dtypes and layouts, as gradcheck would walk through them


@st.composite
def situations(draw):
    b, hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lq, lk, d = (draw(st.one_of(st.integers(1, 9), st.integers(60, 140))) for _ in range(3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    tensors = [x.detach() for x in CPU.qkv(b, hkv * group, hkv, lq, lk, d, dtype, draw(st.integers(0, 10**6)))]
    kind = draw(st.sampled_from(["none", "bool", "additive"]))
    mask = None
    if kind != "none":
        keep = CPU.randn(b, 1, lq, lk, seed=lq + lk) < 0.5
        mask = keep if kind == "bool" else CPU.randn(1, hkv * group, lq, 1, seed=d).masked_fill(~keep, -math.inf)
    token_major, causal = draw(st.booleans()), draw(st.booleans())
    scale = draw(st.sampled_from([None, 0.05, -0.05]))
    return tensors, mask, causal, scale, token_major


@settings(max_examples=60)
@given(situations())
def test_the_gradient_of_any_call_is_near_the_exact_one(situation):
    tensors, mask, causal, scale, token_major = situation
    leaves = [(x.transpose(1, 2).contiguous() if token_major else x).requires_grad_() for x in tensors]
    out = CPU.attention(
        *leaves, mask, is_causal=causal, scale=scale, enable_gqa=True, layout="NHD" if token_major else "HND"
    )
    dout = CPU.randn(*out.shape, seed=3, dtype=out.dtype)
    got = torch.autograd.grad(out, leaves, dout)
    if token_major:
        got = [x.transpose(1, 2) for x in got]
        dout = dout.transpose(1, 2)
    want = exact(*tensors, dout, mask, causal, scale)[2:]
    q, k, v = (x.double() for x in tensors)
    ds = dout.double().norm(dim=-1).amax() * v.norm(dim=-1).amax()  # the most that a row of dS can be, P being at most 1
    scale = abs(tensors[0].shape[3] ** -0.5 if scale is None else scale)
    rows = dout.shape[2] * dout.shape[1] // v.shape[1]
    most = (
        scale * ds * k.norm(dim=-1).amax(),
        scale * ds * q.norm(dim=-1).amax() * rows**0.5,
        dout.double().norm(dim=-1).amax() * rows**0.5,
    )
    for name, like, a, e, bound in zip(("dq", "dk", "dv"), tensors, got, want, most, strict=True):
        # Both operands of dK and dV have e4m3's four digits, a sixteenth at worst; of a query or two no error averages out.
        off, least = (0.02, 0.995) if name == "dq" else (0.07, 0.97)
        assert (a.shape, a.dtype) == (like.shape, like.dtype), name
        assert a.isfinite().all(), name
        assert (a.double() - e).norm(dim=-1).amax() < off * bound, name
        if e.norm(dim=-1).amax() > 0.05 * bound:  # large enough to have a direction
            assert cosine(a, e) > least, name


# ---- many steps


@pytest.mark.parametrize("learning_rate", [0.01, 0.1])
def test_sixty_steps_of_training_stay_finite_and_go_where_exact_ones_go(learning_rate):
    """At the larger rate exact training leaps about, and is finite."""
    report = Report()
    eight = train(training.Sage3Attention(emulate=True, report=report), 60, learning_rate)
    sixteen = train(plain, 60, learning_rate)
    assert report.gradients() == {"int8-emulated": 120}
    assert all(math.isfinite(x) for x in eight + sixteen)
    if learning_rate == 0.01:
        assert max(eight[-10:]) < 0.1 * eight[0]  # it learns
        assert sum(eight) == pytest.approx(sum(sixteen), rel=0.02)


# ---- two processes that share a model


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _model(attend):
    torch.manual_seed(0)
    return nn.Sequential(Block(attend), Block(attend))


def _batch(rank):
    return CPU.randn(2, 90, 64, seed=20 + rank)


def _shard(rank, world, port, folder):
    """One of the processes: its half of every parameter, a batch of its own; writes the gathered gradients."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        report = Report()
        model = _model(training.Sage3Attention(emulate=True, report=report))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        whole = sum(p.numel() for p in model.parameters())
        mine = sum(p.to_local().numel() for p in model.parameters())
        model(_batch(rank)).square().mean().backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        told = {"share": mine / whole, "gradients": report.gradients(), "grad": gradients}
        torch.save(told, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # the interpreter's own end aborted once: on gloo's threads, perhaps, which the device mesh holds


def test_sharded_over_two_processes_the_gradients_are_those_of_one(tmp_path):
    """FSDP2 on gloo: parameters are gathered before each layer, gradients reduced and scattered after it."""
    context = torch.multiprocessing.get_context("spawn")
    port = _free_port()
    processes = [context.Process(target=_shard, args=(rank, 2, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        if process.is_alive():
            process.kill()
            pytest.fail("a process hangs")
    assert [process.exitcode for process in processes] == [0, 0]

    model = _model(training.Sage3Attention(emulate=True))
    sum(model(_batch(rank)).square().mean() for rank in range(2)).div(2).backward()
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert told["share"] == 0.5
        assert told["gradients"] == {"int8-emulated": 2}
        for name, p in model.named_parameters():
            torch.testing.assert_close(told["grad"][name], p.grad, rtol=1e-4, atol=1e-6)
