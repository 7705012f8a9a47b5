"""Masks: every way to broadcast one, every type, dead rows, tiles that are all, nothing or mixed."""

from itertools import product

import pytest
import torch

from .calls import DEVICE, DTYPES, qkv, some_mask
from .exact import exact, problems, relative_l1

B, H, LQ, LK = 2, 4, 203, 391  # neither a multiple of a tile
BROADCAST = list(product(*((n, 1) for n in (B, H, LQ, LK))))
MASK_DTYPES = (torch.bool, *DTYPES)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_every_way_to_broadcast(kernel, mask_dtype):
    found = []
    for shape, causal in product(BROADCAST, (False, True)):
        tensors = qkv(LQ, LK, 64, b=B, h=H)
        mask = some_mask(shape, mask_dtype)
        found += problems(*kernel.with_lse(*tensors, mask, causal), *tensors, mask, causal, normal=False, lse_factor=2)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_every_type_of_inputs_and_mask(kernel, mask_dtype):
    found = []
    for dtype, d in product(DTYPES, (40, 96, 128, 256)):
        tensors = qkv(LQ, LK, d, b=B, h=H, hkv=2, dtype=dtype)
        mask = some_mask((B, 1, LQ, LK), mask_dtype)
        found += problems(*kernel.with_lse(*tensors, mask), *tensors, mask, normal=False, lse_factor=2)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=str)
def test_rows_that_attend_nothing_give_zero_and_minus_infinity(kernel, mask_dtype):
    tensors = qkv(LQ, LK, 64, b=B, h=H)
    mask = some_mask((B, H, LQ, LK), mask_dtype)
    hidden = False if mask_dtype == torch.bool else -torch.inf
    dead = torch.zeros(B, H, LQ, dtype=torch.bool, device=DEVICE)
    dead[0, 1, [0, 5, 63, 64, 202]] = True  # single rows
    dead[1, 2, 64:128] = True  # a tile
    dead[1, 3] = True  # a head
    mask[dead] = hidden
    for causal in (False, True):
        out, lse = kernel.with_lse(*tensors, mask, causal)
        assert not out[dead].count_nonzero()
        assert (lse[dead] == -torch.inf).all()
        found = problems(out, lse, *tensors, mask, causal, normal=False, lse_factor=2)
        assert not found, "\n".join(found)
    out, lse = kernel.with_lse(*tensors, torch.full_like(mask, hidden))
    assert not out.count_nonzero()
    assert (lse == -torch.inf).all()


def tiled(lq, lk, dtype, seed):
    """64 x 128 tiles that are all valid, all hidden, or mixed, at random."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    tiles = torch.randint(3, (1, 2, -(-lq // 64), -(-lk // 128)), generator=generator, device=DEVICE)
    kind = tiles.repeat_interleave(64, 2).repeat_interleave(128, 3)[:, :, :lq, :lk]
    kept = torch.rand(kind.shape, generator=generator, device=DEVICE) < 0.5
    kept = (kind == 0) | ((kind == 2) & kept)
    if dtype == torch.bool:
        return kept
    return torch.zeros(kind.shape, dtype=dtype, device=DEVICE).masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_tiles_all_valid_all_hidden_and_mixed(kernel, mask_dtype):
    found = []
    for (lq, lk), seed, causal in product(((512, 1024), (257, 1025), (1023, 203)), range(3), (False, True)):
        tensors = qkv(lq, lk, 128, h=2)
        mask = tiled(lq, lk, mask_dtype, seed)
        found += problems(*kernel.with_lse(*tensors, mask, causal), *tensors, mask, causal, normal=False, lse_factor=2)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("d", [64, 128])
def test_a_mask_that_hides_nothing_changes_nothing(kernel, d):
    tensors = qkv(257, 1025, d)
    plain, plain_lse = kernel.with_lse(*tensors)
    for mask in (
        torch.ones(1, 1, 257, 1025, dtype=torch.bool, device=DEVICE),
        torch.zeros(2, 1, 1, 1025, dtype=torch.bfloat16, device=DEVICE),
    ):
        out, lse = kernel.with_lse(*tensors, mask)
        assert relative_l1(out, plain) <= 1e-3
        torch.testing.assert_close(lse, plain_lse, rtol=0, atol=1e-3)


def test_causality_as_a_mask_is_causality(kernel):
    for lq, lk in ((257, 1025), (1025, 257)):
        q, k, v = qkv(lq, lk, 64)
        triangle = torch.ones(lq, lk, dtype=torch.bool, device=DEVICE).tril()[None, None]
        assert relative_l1(kernel(q, k, v, triangle), kernel(q, k, v, causal=True)) <= 1e-3


def test_a_padded_prompt_does_not_see_its_padding(kernel):
    """Keys that nobody may attend can hold anything finite: what they hold must not show in the weights."""
    q, k, v = qkv(257, 512, 64)
    mask = (torch.arange(512, device=DEVICE) < 203)[None, None, None]
    found = problems(*kernel.with_lse(q, k, v, mask), q, k, v, mask, normal=False, lse_factor=2)
    want, _ = exact(q, k[:, :, :203], v[:, :, :203])
    assert relative_l1(kernel(q, k, v, mask), want) <= 0.04
    assert not found, "\n".join(found)


@pytest.mark.parametrize("mask_dtype", DTYPES, ids=str)
def test_the_smallest_number_hides_as_well_as_minus_infinity(kernel, mask_dtype):
    """ComfyUI and transformers fill masks with finfo.min."""
    tensors = qkv(LQ, LK, 64)
    kept = some_mask((2, 1, LQ, LK), torch.bool)
    kept[..., 0] = True
    mask = torch.zeros(kept.shape, dtype=mask_dtype, device=DEVICE).masked_fill(~kept, torch.finfo(mask_dtype).min)
    found = problems(kernel(*tensors, mask), None, *tensors, kept, normal=False)
    assert not found, "\n".join(found)


def test_a_large_finite_bias(kernel):
    """A bias shared by a row moves its LSE; one on a key draws the row to it."""
    q, k, v = qkv(130, 257, 64)
    row = 500.0 * torch.randn(1, 1, 130, 1, device=DEVICE)
    out, lse = kernel.with_lse(q, k, v, row)
    plain, plain_lse = kernel.with_lse(q, k, v)
    assert relative_l1(out, plain) <= 0.01
    torch.testing.assert_close(lse, plain_lse + row[..., 0], rtol=1e-5, atol=5e-3)
    key = torch.zeros(1, 1, 1, 257, device=DEVICE)
    key[..., 200] = 1000.0
    assert relative_l1(kernel(q, k, v, key), v[:, :, 200:201].double().expand(-1, -1, 130, -1)) <= 0.03


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_masks_anywhere_in_memory(kernel, mask_dtype):
    """Transposed, cut out of a larger one, every second column, an odd offset: the same values, the same result."""
    tensors = qkv(LQ, LK, 64, b=B, h=H)
    mask = some_mask((B, H, LQ, LK), mask_dtype)
    hidden = torch.ones((), dtype=torch.bool) if mask_dtype == torch.bool else torch.tensor(float("nan"))

    def inside(shape, cut):
        base = torch.full(shape, hidden.item(), dtype=mask_dtype, device=DEVICE)
        base[cut] = mask
        return base[cut]

    views = {
        "transposed": mask.mT.contiguous().mT,
        "cut": inside((B, H + 1, LQ + 3, LK + 5), (slice(None), slice(1, None), slice(2, LQ + 2), slice(3, LK + 3))),
        "every second column": inside((B, H, LQ, 2 * LK), (..., slice(None, None, 2))),
        "batch last": mask.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }
    want = kernel(*tensors, mask)
    for name, view in views.items():
        assert relative_l1(kernel(*tensors, view), want) <= 1e-3, name
