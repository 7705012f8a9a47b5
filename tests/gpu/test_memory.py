"""Where inputs and outputs lie: any strides, any alignment, nothing touched beside them, no copies of the inputs."""

from itertools import product

import pytest
import torch

from . import calls
from .calls import DEVICE, qkv, randn, scale_of
from .exact import SAME, problems, relative_l1

NAN = float("nan")


def inside(x, shape, cut):
    """``x`` as a view into a larger tensor that holds NaN all around it."""
    base = torch.full(shape, NAN, dtype=x.dtype, device=x.device)
    base[cut] = x
    return base[cut]


def laid_out(x, how):
    """The values of ``x`` in memory that is not plainly contiguous."""
    b, h, n, d = x.shape
    everything = slice(None)
    if how == "token-major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "packed":  # as a projection to q, k and v leaves them
        base = torch.full((b, n, 3, h, d), NAN, dtype=x.dtype, device=x.device)
        base[:, :, 1] = x.transpose(1, 2)
        return base[:, :, 1].transpose(1, 2)
    if how == "every second channel":
        return inside(x, (b, h, n, 2 * d), (..., slice(None, None, 2)))
    if how == "channel-major":
        return x.mT.contiguous().mT
    if how == "cut":
        cut = (everything, slice(1, h + 1), slice(3, n + 3), slice(5, d + 5))
        return inside(x, (b, h + 2, n + 9, d + 8), cut)
    if how == "misaligned":
        base = torch.full((x.numel() + 8,), NAN, dtype=x.dtype, device=x.device)
        base[1 : x.numel() + 1] = x.flatten()
        return base[1 : x.numel() + 1].view(x.shape)
    if how == "every third token":
        return inside(x, (b, h, 3 * n, d), (everything, everything, slice(1, None, 3)))
    if how == "batch last":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    raise AssertionError(how)


LAYOUTS = (
    "token-major", "packed", "every second channel", "channel-major", "cut", "misaligned", "every third token", "batch last",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("how", LAYOUTS)
def test_any_strides(kernel, how, dtype):
    found = []
    for d, (lq, lk) in product((64, 72, 128), ((203, 257), (257, 1025))):
        tensors = qkv(lq, lk, d, dtype=dtype)
        views = [laid_out(x, how) for x in tensors]
        assert all(torch.equal(a, b) for a, b in zip(tensors, views, strict=True))
        want, (got, lse) = kernel(*tensors), kernel.with_lse(*views)
        error = relative_l1(got, want)
        if not error <= SAME:
            found.append(f"{how} {dtype} hd{d} {lq}x{lk}: differs from contiguous inputs by {error:.4f}")
        found += problems(got, lse, *tensors)
        fresh = torch.empty_like(views[0])
        if fresh.stride(3) == 1 and got.stride() != fresh.stride():
            found.append(f"{how} hd{d}: out has strides {got.stride()}, empty_like(q) {fresh.stride()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("which", ["batch", "heads", "tokens", "everything"])
def test_expanded_views(kernel, which):
    """Stride 0: one memory, many places."""
    q, k, v = qkv(203, 257, 64, b=3, h=4)
    if which == "batch":
        views = [x[:1].expand_as(x) for x in (q, k, v)]
    elif which == "heads":
        views = [q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)]
    elif which == "tokens":
        views = [q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v]
    else:
        views = [x[:1, :1, :1, :1].expand_as(x) for x in (q, k, v)]
    dense = [x.clone(memory_format=torch.contiguous_format) for x in views]
    out = kernel(*views)
    assert out.stride() == torch.empty_like(views[0]).stride()
    assert relative_l1(out, kernel(*dense)) <= SAME


def test_q_k_and_v_may_be_one_tensor(kernel):
    (x, _, _) = qkv(257, 257, 64)
    found = problems(kernel(x, x, x), None, x, x, x, normal=False)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("masked", [False, True])
def test_inputs_and_what_lies_around_them_stay_bit_for_bit(kernel, masked):
    bases = [torch.randint(0, 256, (2, 3, 301, 160), dtype=torch.uint8, device=DEVICE) for _ in range(3)]
    views = []
    for i, base in enumerate(bases):
        view = base.view(torch.bfloat16)[:, 1:, 7 : 7 + (203 if i == 0 else 257), 3:75]
        view.copy_(randn(*view.shape, seed=i))
        views.append(view)
    mask = calls.some_mask((2, 1, 203, 257), torch.float32) if masked else None
    before = [x.clone() for x in (*bases, *([mask] if mask is not None else []))]
    kernel.with_lse(*views, mask)
    torch.cuda.synchronize()
    after = [*bases, *([mask] if mask is not None else [])]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def attend(kernel, q, k, v, out, lse=None, mask=None, causal=False):
    """The two steps apart, as a caller with buffers of his own has them."""
    calls.poison()
    workspace = kernel.ops.int8_quantize(q, k, v, scale_of(q, None), lse)
    kernel.ops.int8_attend(workspace, q, k, mask, causal, out, lse, kernel.name)
    return workspace


@pytest.mark.parametrize("d", [40, 64, 72, 96, 128, 256])
def test_nothing_is_written_beside_the_output(kernel, d):
    for (lq, lk), dtype in product(((1, 97), (203, 257), (1025, 113)), (torch.bfloat16, torch.float32)):
        q, k, v = qkv(lq, lk, d, dtype=dtype)
        base = torch.full((2, 4, lq + 6, d + 16), 7.0, dtype=dtype, device=DEVICE)
        cut = (slice(None), slice(1, 3), slice(2, lq + 2), slice(8, d + 8))
        base[cut] = NAN
        lse = torch.full((q.shape[0] * q.shape[1] * lq + 2,), 7.0, device=DEVICE)
        inner = lse[1:-1].view(q.shape[:3])
        attend(kernel, q, k, v, base[cut], inner)
        found = problems(base[cut].clone(), inner.clone(), q, k, v)
        assert not found, "\n".join(found)
        base[cut] = 7.0
        assert (base == 7.0).all(), "written outside the output"
        assert lse[0] == lse[-1] == 7.0, "written outside the lse"


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_that_hold_nan_before_are_written_whole(kernel, causal):
    for lq, lk, d in ((1, 1, 1), (113, 257, 40), (257, 203, 64), (203, 1023, 96), (130, 130, 128), (70, 97, 256)):
        q, k, v = qkv(lq, lk, d)
        out = torch.full_like(q, NAN)
        lse = torch.full(q.shape[:3], NAN, device=DEVICE)
        attend(kernel, q, k, v, out, lse, causal=causal)
        found = problems(out, lse, q, k, v, causal=causal)
        assert not found, "\n".join(found)


def test_one_workspace_serves_many_calls(kernel):
    """Attention only reads the operands: again, and causal, and masked, all from one quantisation."""
    q, k, v = qkv(257, 1025, 128)
    outs = [torch.full_like(q, NAN) for _ in range(4)]
    workspace = attend(kernel, q, k, v, outs[0])
    before = workspace.clone()
    mask = calls.some_mask((1, 1, 257, 1025), torch.bool)
    for out, m, causal in ((outs[1], None, True), (outs[2], mask, False), (outs[3], None, False)):
        kernel.ops.int8_attend(workspace, q, k, m, causal, out, None, kernel.name)
    assert torch.equal(outs[0], outs[3])
    assert torch.equal(outs[1], kernel(q, k, v, causal=True))
    assert torch.equal(outs[2], kernel(q, k, v, mask))
    assert torch.equal(workspace, before)


def test_without_lse_there_is_none_and_the_output_is_the_same(kernel):
    q, k, v = qkv(203, 257, 64)
    out, lse = kernel.ops.int8_attention(q, k, v, None, False, 0.125, False, kernel.name)
    assert lse.numel() == 0
    assert torch.equal(out, kernel.with_lse(q, k, v)[0])


@pytest.mark.parametrize(("d", "h", "hkv"), [(64, 8, 8), (128, 8, 8), (128, 16, 2), (256, 4, 4)])
def test_the_extra_memory_is_little_more_than_the_inputs_in_eight_bits(kernel, d, h, hkv):
    q, k, v = qkv(8192, 8192, d, b=1, h=h, hkv=hkv)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = kernel.ops.int8_attention(q, k, v, None, False, scale_of(q, None), True, kernel.name)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    assert extra <= 1.6 * (q.numel() + k.numel() + v.numel())
