"""The GPU tests without a GPU: they skip for one reason each, their summary says so, and their oracle is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from comfy_sage3 import reference
from tests.gpu import exact

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_they_skip_and_the_summary_says_why(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_bad_numbers.py", "--gpu-summary", str(tmp_path / "s.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("needs an NVIDIA GPU") == 1
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["passed"], found["failed"], found["device"]) == (0, 0, None)
    assert found["skip_reasons"] == {"needs an NVIDIA GPU": found["skipped"]}
    assert str(tmp_path) not in json.dumps(found)


def tensors(lq=37, lk=53, d=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, d, generator=generator, dtype=torch.float64) for h, n in ((4, lq), (2, lk), (2, lk))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_the_oracle_is_pytorchs_attention(causal, additive):
    q, k, v = tensors()
    mask = torch.rand(2, 1, 37, 53, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, :, :, 0] = True
    both = mask & torch.ones(37, 53, dtype=torch.bool).tril() if causal else mask
    given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=both, enable_gqa=True)
    out, lse = exact.exact(q, k, v, given, causal)
    torch.testing.assert_close(out, want)
    _, want_lse = reference.exact_attention(q, k, v, mask=mask, is_causal=causal)
    torch.testing.assert_close(lse.float(), want_lse)


def test_the_oracle_gives_zero_and_minus_infinity_for_dead_rows():
    q, k, v = tensors()
    mask = torch.ones(1, 1, 37, 53, dtype=torch.bool)
    mask[:, :, 5] = False
    out, lse = exact.exact(q, k, v, mask)
    assert not out[:, :, 5].count_nonzero()
    assert (lse[:, :, 5] == -torch.inf).all()
    assert out.isfinite().all()


def good(lk=257):
    q, k, v = (x.float() for x in tensors(130, lk, 64))
    out, lse = exact.exact(q, k, v)
    return [out.float(), lse.float(), q, k, v]


def test_the_judge_finds_nothing_wrong_with_a_right_result():
    assert not exact.problems(*good())


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda out, lse: out.mul_(1.05), "relative L1"),
        (lambda out, lse: out[0, 0, 7].zero_(), "worst row"),
        (lambda out, lse: out[1, 1, 3].fill_(torch.nan), "not finite"),
        (lambda out, lse: lse.add_(0.05), "lse is off"),
        (lambda out, lse: lse[0, 0, 0].sub_(0.5), "lse is off"),
        (lambda out, lse: lse[0, 0, 0].fill_(-torch.inf), "lse is -inf elsewhere"),
    ],
)
def test_the_judge_names_what_is_wrong(harm, found):
    result = good()
    harm(*result[:2])
    assert found in "\n".join(exact.problems(*result))


def test_where_eight_bits_are_hard_the_reference_sets_the_bound():
    q, k, v = (x.float() for x in tensors(130, 257, 64))
    rough, lse = reference.int8_attention(q, k, v, scale=4.0, options=exact.Int8Options(pv="int8"))
    assert not exact.problems(rough, lse, q, k, v, scale=4.0, normal=False, lse_factor=0)
    assert exact.problems(rough, lse, q, k, v, scale=4.0, normal=True, lse_factor=0)
