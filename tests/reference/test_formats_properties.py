"""What holds for every value and every shape: bounds, symmetry, order, inverses. Brute force where there is one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.errors import InputError
from comfy_sage3.reference import formats

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = formats.decode_e4m3(torch.arange(127, dtype=torch.uint8))  # held against the definition in test_formats.py
ELEMENTS = {
    "e2m1": (formats.round_e2m1, formats.encode_e2m1, formats.decode_e2m1, E2M1),
    "e4m3": (formats.round_e4m3, formats.encode_e4m3, formats.decode_e4m3, E4M3),
}
SMALLEST_NORMAL = {"e2m1": 1.0, "e4m3": 2.0**-6}
WORST_RELATIVE = {"e2m1": 1 / 5, "e4m3": 1 / 17}  # halfway above a power of two, to the even one below
BLOCKS = [("nvfp4", 16), ("mxfp4", 32)]
GRANULARITIES = ["block", "token", "thread"]

numbers = st.one_of(  # the whole of fp32, and the ranges of e2m1, of e4m3 and of its subnormals
    st.floats(width=32, allow_nan=False),
    *(st.floats(-limit, limit, width=32) for limit in (8, 500, 2.0**-5)),
)
lists = st.lists(numbers, min_size=1, max_size=64)
element = pytest.mark.parametrize("name", ELEMENTS)
block = pytest.mark.parametrize(("name", "size"), BLOCKS)
seeds = st.integers(0, 2**32)


def same(a, b):
    """Equal, and of equal sign where zero."""
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def spiky(seed, *shape, low=-3, high=3):
    """Normal values, each times its own power of two between 2**low and 2**high."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.randint(low, high + 1, shape, generator=g).float().exp2()


# ------------------------------------------------------------------------------------------- element formats
@element
@given(values=lists)
def test_an_element_comes_back_as_what_it_rounds_to_and_stays_there(name, values):
    rounded, encode, decode, _ = ELEMENTS[name]
    x = torch.tensor(values)
    once = rounded(x)
    assert same(decode(encode(x)), once)
    assert same(rounded(once), once)
    assert torch.equal(encode(once), encode(x))


@element
@given(values=lists)
def test_rounding_takes_the_nearest_value_there_is(name, values):
    rounded, _, _, table = ELEMENTS[name]
    x = torch.tensor(values).clamp(-table[-1].item(), table[-1].item())
    distances = (x.double().abs()[:, None] - table.double()).abs()
    assert torch.equal((rounded(x).double() - x.double()).abs(), distances.amin(1))


@element
@given(values=lists)
def test_rounding_and_codes_keep_the_order(name, values):
    rounded, encode, _, _ = ELEMENTS[name]
    x = torch.tensor(values).sort().values
    assert (rounded(x).diff() >= 0).all()
    assert (encode(x.abs().sort().values).int().diff() >= 0).all()


@element
@given(values=lists)
def test_the_sign_is_a_bit_of_its_own(name, values):
    rounded, encode, _, table = ELEMENTS[name]
    x = torch.tensor(values)
    assert same(rounded(-x), -rounded(x))
    sign = 8 if name == "e2m1" else 128
    assert torch.equal(encode(-x) ^ sign, encode(x))


@element
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=16))
def test_nothing_is_larger_than_the_largest_value(name, values):
    rounded, _, _, table = ELEMENTS[name]
    top = table[-1].item()
    x = torch.tensor(values)
    beyond = x.abs() >= top
    assert torch.equal(rounded(x)[beyond], (top * x.sign())[beyond])
    assert (rounded(x).abs() <= top).all()


@element
@given(values=lists)
def test_the_relative_error_of_normal_values_is_bounded(name, values):
    rounded, _, _, table = ELEMENTS[name]
    x = torch.tensor(values).double().clamp(-table[-1].item(), table[-1].item())
    error = (rounded(x.float()).double() - x).abs()
    normal = x.abs() >= SMALLEST_NORMAL[name]
    assert (error[normal] <= x.abs()[normal] * WORST_RELATIVE[name] * (1 + 1e-12)).all()
    assert (error[~normal] <= table[1].double() / 2).all()


@given(st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=64))
def test_e8m0_is_the_power_of_two_at_or_below(values):
    x = torch.tensor(values)
    power = formats.decode_e8m0(formats.encode_e8m0(x))
    assert torch.equal(torch.frexp(power).mantissa, torch.full_like(power, 0.5))
    inside = x >= 2.0**-127
    assert ((power <= x) & (x < 2 * power.double()))[inside].all()
    assert (power[~inside] == 2.0**-127).all()
    assert torch.equal(formats.encode_e8m0(power), formats.encode_e8m0(x))


@given(st.lists(numbers.filter(lambda v: 0 <= v < 2.0**60), min_size=1, max_size=64), st.integers(1, 10))
def test_rounding_without_signs_is_rounding(values, bits):
    a, b = torch.tensor(values), torch.tensor(values)
    formats.round_float_(a, torch.empty_like(a), mantissa_bits=bits, min_exponent=-6)
    formats.round_magnitude_(b, torch.empty_like(b), mantissa_bits=bits, min_exponent=-6)
    assert torch.equal(a, b)


def test_nan_is_not_lost_where_the_format_has_one():
    nan = torch.tensor([math.nan, -math.nan])
    assert formats.round_e2m1(nan).isnan().all()
    assert formats.round_e4m3(nan).isnan().all()
    assert formats.decode_e4m3(formats.encode_e4m3(nan)).isnan().all()
    assert formats.decode_e8m0(formats.encode_e8m0(torch.tensor([math.nan, math.inf, -1.0]))).isnan().all()
    assert formats.encode_e2m1(nan).tolist() == [7, 7]  # as the hardware's conversion does


# -------------------------------------------------------------------------------------------------- packing
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(0, 20), seeds)
def test_packing_and_unpacking_are_inverses(outer, half, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (*outer, 2 * half), generator=g).to(torch.uint8)
    packed = formats.pack_e2m1(codes)
    assert packed.shape == (*outer, half)
    assert torch.equal(formats.unpack_e2m1(packed), codes)
    some = torch.randint(256, (*outer, half), generator=g).to(torch.uint8)
    assert torch.equal(formats.pack_e2m1(formats.unpack_e2m1(some)), some)


@given(st.integers(0, 20).map(lambda n: 2 * n + 1))
def test_an_odd_number_of_codes_is_refused(n):
    with pytest.raises(InputError, match=f"even number of 4-bit values, got {n}"):
        formats.pack_e2m1(torch.zeros(2, n, dtype=torch.uint8))


# --------------------------------------------------------------------------------------- block-scaled 4 bit
@block
@given(seed=seeds, count=st.integers(1, 3), low=st.sampled_from([-3, -14]))
def test_stored_blocks_decode_to_what_the_simulation_multiplies(name, size, seed, count, low):
    x = spiky(seed, 3, count * size, low=low)
    stored = formats.quantize_blocks(x, name)
    assert stored.packed.shape == (3, count * size // 2)
    assert stored.scales.shape == (3, count)
    assert torch.equal(stored.dequantize(), formats.round_blocks(x, -1, name))


@block
@given(seed=seeds)
def test_a_second_trip_changes_nothing_where_the_scale_is_normal(name, size, seed):
    x = spiky(seed, 4, 2 * size)
    x[:, ::size] = x[:, ::size].sign() * x[:, ::size].abs().clamp_min(0.1)  # 6 * 2**-6 and above: no subnormal scale
    once = formats.round_blocks(x, -1, name)
    assert torch.equal(formats.round_blocks(once, -1, name), once)


@block
@given(seed=seeds, low=st.sampled_from([-3, -14]), high=st.sampled_from([3, 14]))
def test_a_block_is_off_by_at_most_one_step_or_what_saturation_cuts(name, size, seed, low, high):
    x = spiky(seed, 4, 3, size, low=low, high=high).double()
    scale = formats.block_scales(x.float().abs().amax(-1, keepdim=True), name).double()
    rounded = formats.round_blocks(x.float(), -1, name).double()
    cut = (x.abs() - 6 * scale).clamp_min(0)
    assert ((rounded - x).abs() <= torch.maximum(scale, cut) * (1 + 1e-6)).all()
    assert (rounded.abs() <= 6 * scale).all()


@given(seed=seeds)
def test_an_nvfp4_block_is_off_by_at_most_three_17ths_of_its_maximum(seed):
    x = spiky(seed, 8, 16)
    x[:, 0] = 3.0  # a normal scale
    rounded = formats.round_blocks(x, -1)
    amax = x.abs().amax(-1, keepdim=True)
    assert ((rounded - x).abs() <= amax * (3 / 17) * (1 + 1e-6)).all()


@block
@given(seed=seeds)
def test_blocks_have_no_favourite_sign_place_or_neighbour(name, size, seed):
    x = spiky(seed, 2, 3, size)
    rounded = formats.round_blocks(x, -1, name)
    assert torch.equal(formats.round_blocks(-x, -1, name), -rounded)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(formats.round_blocks(x[..., order], -1, name), rounded[..., order])
    x[:, 1] *= 100
    again = formats.round_blocks(x, -1, name)
    assert torch.equal(again[:, ::2], rounded[:, ::2])


@block
@given(seed=seeds)
def test_within_a_block_the_order_is_kept(name, size, seed):
    x = spiky(seed, 5, size).sort(-1).values
    assert (formats.round_blocks(x, -1, name).diff(dim=-1) >= 0).all()


@block
@given(seed=seeds, exponent=st.integers(-3, 3))
def test_a_power_of_two_passes_through(name, size, seed, exponent):
    x = spiky(seed, 4, size)
    x[:, 0] = 6.0  # so that no scale leaves e4m3's normal range
    assert torch.equal(formats.round_blocks(x * 2.0**exponent, -1, name), formats.round_blocks(x, -1, name) * 2.0**exponent)


@block
@given(seed=seeds, shape=st.lists(st.integers(1, 3), min_size=2, max_size=4), data=st.data())
def test_blocks_run_along_any_dimension(name, size, seed, shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = size * data.draw(st.integers(1, 2))
    x = spiky(seed, *shape)
    expected = formats.round_blocks(x.movedim(dim, -1), -1, name).movedim(-1, dim)
    assert torch.equal(formats.round_blocks(x, dim, name), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(-20, 12), st.booleans(), st.sampled_from(["four_or_six", "search"]))
def test_a_chosen_scale_never_has_a_larger_squared_error(seed, exponent, with_second, choice):
    x = torch.randn(3, 4, 5, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    second = formats.second_level_scale(x) if with_second else None
    of_six, of_choice = (
        (formats.round_blocks(x, -1, second_level=second, choice=c) - x).unflatten(-1, (-1, 16)).square().sum(-1)
        for c in ("six", choice)
    )
    assert (of_choice <= of_six).all()
    if -5 <= exponent <= 5:
        assert of_choice.sum() < of_six.sum()


def test_a_searched_scale_is_the_best_of_all_that_are_near():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    best = torch.full((200,), torch.inf)
    for code in range(127):
        scale = formats.decode_e4m3(torch.tensor([code], dtype=torch.uint8))
        rounded = formats.round_e2m1((x / scale).nan_to_num(0.0, 0.0, 0.0)) * scale
        best = torch.minimum(best, (rounded - x).square().sum(-1))
    chosen = (formats.round_blocks(x, -1, choice="search") - x).square().sum(-1)
    assert (chosen <= best * 1.02).float().mean() > 0.97  # a better one may lie outside of the range


def test_a_block_with_nan_stays_nan_whatever_the_choice():
    x = torch.ones(2, 16)
    x[1, 3] = torch.nan
    for choice in ("six", "four_or_six", "search"):
        assert torch.equal(formats.round_blocks(x, -1, choice=choice).isnan().all(-1), torch.tensor([False, True]))


@block
@given(n=st.integers(1, 100), make=st.sampled_from([formats.quantize_blocks, lambda x, f: formats.round_blocks(x, -1, f)]))
def test_a_size_that_is_no_whole_number_of_blocks_is_refused_until_it_is_padded(name, size, n, make):
    x = torch.ones(2, n)
    if n % size:
        with pytest.raises(InputError, match=f"multiple of {size} values along dimension 1, got {n}: pad it"):
            make(x, name)
    padded = formats.pad_to(x, -1, size)
    result = make(padded, name)
    values = result if isinstance(result, torch.Tensor) else result.dequantize()
    assert torch.equal(values[:, n:], torch.zeros_like(values[:, n:]))
    # 1 comes back as 6 x 11/64 in nvfp4, for 1/6 rounds to the scale 11/64, and as itself in mxfp4.
    assert (values[:, :n] == (66 / 64 if name == "nvfp4" else 1.0)).all()


def test_zeros_stay_zeros_and_tiny_blocks_vanish():
    edge = 6 * 2.0**-10  # the scale would be half of e4m3's smallest value, and that tie goes to 0
    for amax, vanishes in ((0.0, True), (edge, True), (math.nextafter(edge, 1) + 1e-9, False)):
        rounded = formats.round_blocks(torch.full((16,), amax), -1)
        assert bool((rounded == 0).all()) is vanishes
        assert bool((formats.quantize_blocks(torch.full((16,), amax)).packed == 0).all()) is vanishes


def test_a_nan_spoils_its_own_block_only():
    x = torch.ones(2, 48)
    x[0, 20] = math.nan
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[0, 16:32] = True
    assert torch.equal(formats.quantize_blocks(x).dequantize().isnan(), bad)
    assert torch.equal(formats.round_blocks(x, -1).isnan(), bad)


def test_p_uses_few_scales_directly_and_all_of_them_when_stretched():
    scales = formats.block_scales(torch.linspace(0, 1, 200_001), "nvfp4").unique()
    assert (scales > 0).sum() == 35
    stretched = formats.block_scales(torch.logspace(-3, math.log10(2688), 200_001, dtype=torch.float32), "nvfp4")
    assert (stretched.unique() > 0).sum() == 126


@given(seed=seeds, exponent=st.integers(-40, 40))
def test_with_a_second_level_no_magnitude_is_too_small_or_too_large(seed, exponent):
    x = spiky(seed, 1, 2, 8, 32)
    factor = 2.0**exponent

    def trip(y):
        return formats.round_blocks(y, -1, second_level=formats.second_level_scale(y))

    assert torch.equal(trip(x * factor), trip(x) * factor)
    top = (x.abs() / formats.second_level_scale(x)).amax((-2, -1))
    assert torch.allclose(top, torch.full_like(top, 2688.0))


@given(seed=seeds, exponent=st.integers(-30, 30))
def test_stored_blocks_carry_the_second_level(seed, exponent):
    x = spiky(seed, 1, 1, 4, 32) * 2.0**exponent
    second = torch.tensor(2.0**exponent).view(1, 1, 1, 1)
    stored = formats.quantize_blocks(x, second_level=second)
    assert torch.equal(stored.dequantize(), formats.round_blocks(x, -1, second_level=second))


def test_the_second_level_of_zeros_is_one():
    x = torch.zeros(1, 2, 4, 16)
    assert torch.equal(formats.second_level_scale(x), torch.ones(1, 2, 1, 1))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 8), st.data())
def test_padding_appends_zeros_up_to_a_multiple(shape, multiple, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.ones(shape)
    padded = formats.pad_to(x, dim, multiple)
    assert padded.shape[dim] % multiple == 0
    assert 0 <= padded.shape[dim] - x.shape[dim] < multiple
    assert torch.equal(padded.narrow(dim, 0, x.shape[dim]), x)
    assert padded.sum() == x.sum()
    assert (padded is x) == (x.shape[dim] % multiple == 0)


# ------------------------------------------------------------------------------------------------ 8 bit
def groups_by_hand(tokens, granularity, role):
    """The sets of tokens that share a scale: a token, a tile, or what one lane of a warp holds."""
    if granularity == "token":
        return [{t} for t in range(tokens)]
    if granularity == "block":
        size = 128 if role == "q" else 64
        return [set(range(start, min(start + size, tokens))) for start in range(0, tokens, size)]

    def held(lane, start):
        """The rows (Q) or columns (K) of the accumulators of mma.m16n8k32 that one lane holds, over a warp's tile."""
        if role == "q":  # two m16 tiles: rows lane / 4 and lane / 4 + 8 of each
            return {start + 16 * tile + lane // 4 + half for tile in range(2) for half in (0, 8)}
        return {start + 8 * tile + lane % 4 * 2 + i for tile in range(8) for i in (0, 1)}  # eight n8 tiles

    starts = range(0, tokens, 32 if role == "q" else 64)
    distinct = {frozenset(t for t in held(lane, start) if t < tokens) for start in starts for lane in range(32)}
    return [set(group) for group in distinct if group]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("role", ["q", "k"])
@given(tokens=st.integers(1, 200))
@settings(max_examples=25)
def test_tokens_share_a_scale_exactly_where_one_thread_or_tile_does(granularity, role, tokens):
    found = formats.token_groups(tokens, granularity, role, torch.device("cpu")).tolist()
    shared = [{t for t, g in enumerate(found) if g == group} for group in set(found)]
    assert sorted(map(sorted, shared)) == sorted(map(sorted, groups_by_hand(tokens, granularity, role)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("role", ["q", "k"])
@given(tokens=st.integers(1, 200), width=st.integers(1, 20), seed=seeds)
@settings(max_examples=25)
def test_int8_scale_and_error_group_by_group(granularity, role, tokens, width, seed):
    x = spiky(seed, 2, tokens, width)
    q = formats.quantize_int8(x, granularity, role)
    assert q.codes.shape == x.shape
    assert q.codes.abs().max() <= 127
    per_token = q.scales[..., q.groups].unsqueeze(-1)
    by_hand = torch.empty(2, tokens)
    for group in groups_by_hand(tokens, granularity, role):
        by_hand[:, sorted(group)] = x[:, sorted(group)].abs().amax((-2, -1)).unsqueeze(-1)
    assert torch.equal(per_token.squeeze(-1), by_hand / 127)
    assert ((q.dequantize() - x).abs() <= per_token * (0.5 + 1e-4)).all()
    # Each group's largest value has the largest code: no bit of the range is left unused.
    largest = x.abs() == by_hand.unsqueeze(-1)
    assert (q.codes.abs()[largest] == 127).all()
    unused = torch.ones(q.scales.shape[-1], dtype=torch.bool)
    unused[q.groups] = False
    assert (q.scales[..., unused] == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(tokens=st.integers(1, 150), seed=seeds)
@settings(max_examples=25)
def test_int8_is_odd_and_a_second_trip_gives_the_same_codes(granularity, tokens, seed):
    x = spiky(seed, 1, tokens, 8)
    q = formats.quantize_int8(x, granularity, "k")
    negative = formats.quantize_int8(-x, granularity, "k")
    assert torch.equal(negative.codes, -q.codes)
    assert torch.equal(negative.scales, q.scales)
    again = formats.quantize_int8(q.dequantize(), granularity, "k")
    assert torch.equal(again.codes, q.codes)
    assert torch.allclose(again.scales, q.scales, rtol=1e-6, atol=0)


@given(tokens=st.integers(1, 200), seed=seeds)
@settings(max_examples=25)
def test_a_finer_granularity_never_has_a_larger_scale(tokens, seed):
    x = spiky(seed, 1, tokens, 8)
    for role in ("q", "k"):
        token, thread, block_ = (
            (q := formats.quantize_int8(x, g, role)).scales[..., q.groups] for g in ("token", "thread", "block")
        )
        assert (token <= thread).all()
        assert (thread <= block_).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_and_nan_in_int8_stay_in_their_group(granularity):
    x = torch.ones(1, 200, 4)
    x[:, 70] = 0
    x[:, 190, 2] = math.nan
    q = formats.quantize_int8(x, granularity, "k")
    found = q.dequantize()
    assert (found[:, 70] == 0).all()
    spoilt = q.groups == q.groups[190]
    assert found[:, spoilt].isnan().all()
    assert torch.equal(found[:, ~spoilt], x[:, ~spoilt])
    assert formats.quantize_int8(torch.zeros(1, 0, 4), granularity, "k").dequantize().shape == (1, 0, 4)


def test_an_unknown_granularity_is_refused():
    with pytest.raises(InputError, match="Unknown granularity 'row': use block, token or thread"):
        formats.token_groups(4, "row", "q", torch.device("cpu"))


@given(tokens=st.integers(1, 70), width=st.integers(1, 20), seed=seeds)
@settings(max_examples=50)
def test_v_in_eight_bits_is_bounded_channel_by_channel(tokens, width, seed):
    v = spiky(seed, 2, tokens, width) * torch.logspace(-4, 4, width)
    amax = v.abs().amax(-2, keepdim=True)
    codes, scale = formats.quantize_fp8_channels(v)
    fp8 = formats.round_fp8_channels(v)
    assert torch.equal(formats.decode_e4m3(codes) * scale, fp8)
    assert torch.equal(scale, amax / 448)
    assert ((fp8 - v).abs() <= torch.maximum(v.abs() / 17, scale * 2.0**-10) * (1 + 1e-5)).all()
    int8 = formats.round_int8_channels(v)
    assert ((int8 - v).abs() <= amax / 254 * (1 + 1e-4)).all()
    for trip, name in ((formats.round_fp8_channels, fp8), (formats.round_int8_channels, int8)):
        assert torch.equal(trip(-v), -name)
        assert torch.allclose(trip(name), name, rtol=1e-5, atol=0)


def test_a_channel_of_zeros_stays_zero():
    v = torch.zeros(1, 5, 3)
    v[..., 1] = 2.0
    for trip in (formats.round_fp8_channels, formats.round_int8_channels):
        assert torch.allclose(trip(v), v, rtol=1e-6, atol=0)
