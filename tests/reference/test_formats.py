"""Formats against exhaustive tables written out here, not derived from the code under test."""

import itertools
import math

import pytest
import torch

from comfy_sage3.reference import formats

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
CODES = E2M1 + [-v for v in E2M1]
# Ties go to the code with an even mantissa bit, that is the even index in E2M1.
TIES = [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]


def test_all_sixteen_e2m1_codes_decode_and_encode_back():
    codes = torch.arange(16, dtype=torch.uint8)
    values = formats.decode_e2m1(codes)
    assert values.tolist() == CODES
    assert math.copysign(1, values[8].item()) == -1
    assert torch.equal(formats.encode_e2m1(values), codes)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_e2m1_tie_goes_to_even_and_its_neighbours_to_the_nearest(sign):
    for tie, even in TIES:
        low, high = next((a, b) for a, b in itertools.pairwise(E2M1) if a < tie < b)
        below = torch.nextafter(torch.tensor(tie), torch.tensor(0.0))
        above = torch.nextafter(torch.tensor(tie), torch.tensor(9.0))
        got = formats.round_e2m1(sign * torch.stack([below, torch.tensor(tie), above]))
        assert got.tolist() == [sign * low, sign * even, sign * high]


def test_e2m1_saturates_at_six():
    big = torch.tensor([6.0, 6.5, 1e30, -7.0])
    assert formats.round_e2m1(big).tolist() == [6.0, 6.0, 6.0, -6.0]


def test_packing_puts_two_codes_in_a_byte_and_back():
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = formats.pack_e2m1(codes)
    assert packed.shape == (256, 1)
    assert packed.unique().numel() == 256
    assert torch.equal(formats.unpack_e2m1(packed), codes)


def e4m3_table() -> list[float]:
    """The OCP e4m3 values by definition: bias 7, subnormals, no infinity, NaN at 0x7f and 0xff."""
    table = []
    for code in range(256):
        sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table.append(math.nan if code & 0x7F == 0x7F else -value if sign else value)
    return table


def test_all_256_e4m3_codes_decode_and_round_to_themselves():
    table = torch.tensor(e4m3_table())
    decoded = formats.decode_e4m3(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert torch.equal(decoded.nan_to_num(-1e9), table.nan_to_num(-1e9))
    finite = table[table.isfinite()]
    assert torch.equal(formats.round_e4m3(finite), finite)


def test_every_e4m3_tie_goes_to_even_and_overflow_saturates():
    table = e4m3_table()[:127]
    for code, (low, high) in enumerate(itertools.pairwise(table)):
        even = low if code % 2 == 0 else high
        assert formats.round_e4m3(torch.tensor([(low + high) / 2])).item() == even
    assert formats.round_e4m3(torch.tensor([449.0, 1e9, -1e9])).tolist() == [448.0, 448.0, -448.0]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_nvfp4_blocks_stay_within_the_step_of_their_block(head_dim):
    x = torch.randn(2, 3, 40, head_dim, generator=torch.Generator().manual_seed(0))
    rounded = formats.round_blocks(x.clone(), -1)
    amax = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True)
    error = (rounded - x).abs().unflatten(-1, (-1, 16))
    # The widest e2m1 step is 2 (4 to 6), half of it is 1/6 of the maximum; the e4m3 scale adds up to 1/16 of that
    # and, where it rounds down, saturation of up to 1/16 of the maximum.
    assert (error <= amax * (1 / 6) * (1 + 1 / 16) + 1e-6).all()


def test_second_level_scale_rescues_tiny_values():
    x = torch.randn(1, 1, 32, 64, generator=torch.Generator().manual_seed(0)) * 1e-4
    plain = formats.round_blocks(x.clone(), -1)
    second = formats.round_blocks(x.clone(), -1, second_level=formats.second_level_scale(x))
    assert plain.abs().max() == 0
    assert ((second - x).norm() / x.norm()) < 0.15


@pytest.mark.parametrize("granularity", ["block", "token", "thread"])
@pytest.mark.parametrize("role", ["q", "k"])
def test_int8_error_is_at_most_half_a_step_of_its_group(granularity, role):
    x = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(1))
    q = formats.quantize_int8(x, granularity, role)
    assert q.codes.dtype == torch.int8
    scale = q.scales[..., q.groups]
    decoded = q.codes.float() * scale[..., None]
    assert ((decoded - x).abs() <= scale[..., None] * 0.5001).all()


def test_fp8_channels_have_one_scale_per_channel():
    v = torch.randn(1, 2, 100, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 32)
    error = (formats.round_fp8_channels(v) - v).abs()
    assert (error <= v.abs() / 16 + v.abs().amax(-2, keepdim=True) * 2**-16).all()
