"""The 4-bit operands of the kernel: the choice of scales replayed number by number, and what holds for any tensor."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from comfy_sage3.reference import formats, operands, smoothing

E2M1 = [Fraction(v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ one block
def fp16(x):
    """The fp16 number nearest to a Fraction, ties to even."""
    near = np.float16(float(x))
    around = [near, np.nextafter(near, np.float16(np.inf)), np.nextafter(near, np.float16(-np.inf))]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - x), int(v.view(np.uint16)) & 1))


def nearest(y, grid):
    """Nearest, ties to the even index."""
    return min(range(len(grid)), key=lambda i: (abs(grid[i] - y), i % 2))


def e4m3(code):
    exponent, mantissa = code >> 3, code & 7
    return Fraction(mantissa, 512) if exponent == 0 else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


def nearest_away(x, grid):
    """The index of the nearest number of an ascending grid, of two as near the larger one's."""
    return max(range(len(grid)), key=lambda i: (-abs(grid[i] - x), i))


def fixed(x):
    """x with the last bit that fp16 has for 2^-14 of it."""
    return Fraction(float(np.float16(float(x) * 2.0**-14))) * 2**14


def quantize_by_hand(block):
    """(scale code, codes) of sixteen finite floats, in exact arithmetic where the kernel rounds nothing."""
    halves = [np.float16(abs(x)) for x in block]
    sixth = np.float32(max(halves)) * np.float32(1 / 6)
    first = nearest(Fraction(float(sixth)), [e4m3(c) for c in range(127)])
    grid = [*E2M1, Fraction(8), Fraction(12), Fraction(16), Fraction(24)]
    best = None
    for step in (0, -1, 5):
        code = first + step
        if not 0 < code < 127:
            continue  # 0: no number to divide by
        scale = e4m3(code)
        inverse = np.float16(np.float32(1) / np.float32(float(scale)))
        y = [Fraction(float(h * inverse)) for h in halves]
        sums = [Fraction(0), Fraction(0)]
        for i, number in enumerate(y):
            off = Fraction(float(fp16(grid[nearest_away(fixed(number), grid)] - number)))
            sums[i // 4 % 2] = Fraction(float(fp16(sums[i // 4 % 2] + off * off)))
        error = np.float32(float(fp16(sums[0] + sums[1]))) * np.float32(float(scale * scale))
        if (best is None and code == first) or (best is not None and error < best[0]):
            best = error, code, [nearest_away(fixed(min(number, Fraction(6))), E2M1) for number in y]
    if best is None:
        return 0, [0] * 16
    return best[1], [code + 8 * bool(np.signbit(x)) for code, x in zip(best[2], block, strict=True)]


@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0, 1000.0])
def test_the_choice_of_scales_is_that_of_a_replay_in_fractions(size):
    blocks = size * randn(40, 16, seed=3)
    codes, scales = formats.quantize_blocks_quick(blocks)
    for block, code, scale in zip(blocks.numpy(), codes.tolist(), scales.tolist(), strict=True):
        assert (scale, code) == quantize_by_hand(block)


def test_three_tries_are_nearly_as_good_as_nine():
    x = randn(2000, 16)

    def error(choice):
        return float((formats.round_blocks(x, -1, choice=choice) - x).norm() / x.norm())

    six, quick, search = error("six"), error("quick"), error("search")
    assert search < quick < search + 0.25 * (six - search)


def test_quick_blocks_run_along_any_dimension_and_take_a_second_level():
    x = randn(2, 3, 48, 5)
    level = torch.full((2, 3, 1, 1), 0.25)
    along = formats.round_blocks(x, 2, second_level=level, choice="quick")
    last = formats.round_blocks(x.movedim(2, -1).contiguous(), -1, second_level=level, choice="quick")
    assert torch.equal(along, last.movedim(-1, 2))


def test_blocks_at_the_ends_of_e4m3():
    blocks = torch.zeros(6, 16)
    blocks[1, 3] = 2.0**-12  # a sixth of it rounds to 0
    blocks[2, 3] = -60000.0  # beyond 448 * 6
    blocks[3, 3] = 1e30
    blocks[4, 3] = torch.nan
    blocks[5, 3] = -torch.inf
    codes, scales = formats.quantize_blocks_quick(blocks)
    assert scales.tolist() == [0, 0, 126, 126, 0x7F, 0x7F]
    assert codes[:, 3].tolist() == [0, 0, 15, 7, 0, 0]
    assert codes.count_nonzero() == 2


# ------------------------------------------------------------------------------------------------ means and levels
def test_a_sample_is_512_tokens_spread_over_all():
    assert smoothing.sample_tokens(300, torch.device("cpu")).tolist() == list(range(300))
    for tokens in (513, 4096, 100_000):
        sample = smoothing.sample_tokens(tokens, torch.device("cpu"))
        steps = sample.diff()
        assert sample.numel() == 512
        assert 0 <= sample[0] < sample[-1] < tokens
        assert steps.min() >= 0
        assert steps.max() <= 2 * tokens / 512 + 1


def test_halving_means_are_means():
    q = torch.randint(-8, 8, (1, 2, 300, 5), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    assert torch.equal(smoothing.halving_means(q), smoothing.query_means(q))


@pytest.mark.parametrize("exponent", [-130, -126, -20, 0, 20, 120])
def test_levels_are_powers_of_two_that_follow_the_tile(exponent):
    x = torch.zeros(1, 1, 256, 16)
    x[0, 0, 5, 3] = 1.5 * 2.0**exponent
    levels = operands.tile_levels(x)
    assert levels.tolist() == [[[2.0 ** max(exponent - 9, -126), 1.0]]]
    assert (1 / levels).isfinite().all()


def test_a_head_of_values_has_the_level_of_its_rms():
    v = 3.0 * randn(1, 2, 1000, 32)
    mean = smoothing.sampled_mean(v)
    assert operands.value_levels(v, mean).tolist() == [[[4.0], [4.0]]]
    for size, level in ((2.0**-3, 0.5), (2.0**100, 2.0**102), (2.0**-126, 2.0**-124), (0.0, 1.0), (torch.nan, 1.0)):
        assert (operands.value_levels(v * size, mean * size) == level).all()


# ------------------------------------------------------------------------------------------------ operands
def made(q, k, v, scale=0.1):
    return operands.quantize_queries(q, scale), operands.quantize_keys(k), operands.quantize_values(v)


def test_operands_stand_for_what_they_were_made_from():
    q, k, v = (randn(2, 2, n, 40, seed=n) + 5 for n in (300, 401, 402))
    queries, keys, values = made(q, k, v)
    for x, operand in ((k, keys), (v, values)):
        error = operand.values()[:, :, : x.shape[2], :40] + operand.means[..., :40] - x
        assert error.norm() < 0.1 * (x - 5).norm()
    means = smoothing.spread_means(queries.means, 300)
    assert (queries.values()[:, :, :300] + means)[..., :40].sub(q).norm() < 0.1 * (q - 5).norm()
    negative = operands.quantize_queries(q, -0.1)
    assert torch.equal(negative.values(), -queries.values())
    for operand, tokens in ((queries, 300), (keys, 401), (values, 402)):
        assert operand.codes.shape[2] % 128 == 0
        assert operand.values()[:, :, tokens:].count_nonzero() == 0


@pytest.mark.parametrize("exponent", [-100, -7, 9, 100])
def test_the_unit_of_a_tensor_changes_no_code(exponent):
    x = randn(1, 2, 300, 32)
    for a, b in zip(made(x, x, x), made(*[x * 2.0**exponent] * 3), strict=True):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)
        assert torch.equal(a.levels * 2.0**exponent, b.levels)


def test_constants_leave_nothing():
    x = torch.full((1, 1, 700, 16), 1 / 3)
    for operand in made(x[:, :, :128], x, x):
        assert operand.codes.count_nonzero() == 0
        assert (torch.frexp(operand.levels).mantissa == 0.5).all()


def test_what_is_not_finite_makes_scales_nan():
    sampled = set(smoothing.sample_tokens(1300, torch.device("cpu")).tolist())
    token = next(t for t in range(600, 700) if t not in sampled)
    for bad, which in itertools.product((math.nan, math.inf), range(3)):
        x = randn(1, 1, 1300, 32)
        x[0, 0, token, 3] = bad
        scales = made(x, x, x)[which].scales
        assert (scales[0, 0, token] == 0x7F).all() if which < 2 else scales[0, 0, token // 16, 3] == 0x7F
        assert (scales[0, 0, 0] != 0x7F).all()


def test_no_tokens_at_all():
    for operand in made(*[torch.zeros(1, 2, 0, 16)] * 3):
        assert operand.codes.shape == (1, 2, 0, 16)
        assert operand.values().shape == (1, 2, 0, 16)
