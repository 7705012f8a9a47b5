"""Where the 4-bit operands lie: every place taken once, and by the thread that the product wants it from.

Fragments as csrc/include/sage3/nvfp4.cuh has them, which test_nvfp4.py holds against the PTX ISA: lane 4 g + t.
"""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from comfy_sage3.kernels.sources import find_tree

from .test_nvfp4 import cxx, pointer

DIMS = (64, 128, 256)
TILE = 128


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = tmp_path_factory.mktemp("nvfp4_format") / "host.so"
    source = Path(__file__).with_name("nvfp4_format_host.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{find_tree().root / 'include'}"]
    made = subprocess.run([cxx(), *flags, "-o", library, source], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return ctypes.CDLL(str(library))


def tables(function, d, *shapes):
    made = [np.empty(shape, dtype=np.int32) for shape in shapes]
    function(d, *map(pointer, made))
    return made


def columns(host):
    column, token, delta = (np.empty(TILE, dtype=np.int32) for _ in range(3))
    host.tokens(pointer(column), pointer(token), pointer(delta))
    return column, token, delta


@pytest.mark.parametrize("d", DIMS)
def test_every_half_byte_belongs_to_one_number(host, d):
    for table in tables(host.codes, d, *[(TILE, d)] * 3):
        assert np.array_equal(np.sort(table, None), np.arange(TILE * d))
    code_bytes, query, key, value, _ = tables(host.sizes, d, (5,))[0]
    assert code_bytes == TILE * d // 2
    assert query % 16 == key % 16 == value % 16 == 0  # a bulk copy's unit


@pytest.mark.parametrize("d", DIMS)
def test_every_scale_has_a_byte_of_its_own_in_the_record(host, d):
    query, key, value = tables(host.scales, d, (TILE, d // 16), (TILE, d // 16), (8, d))
    code_bytes, *records, _ = tables(host.sizes, d, (5,))[0]
    for table in (query, key, value):
        assert np.unique(table).size == table.size
    assert query.max() < records[0] - code_bytes - 16
    assert key.max() == records[1] - code_bytes - 17  # no byte is nobody's
    assert value.max() == records[2] - code_bytes - 1


def test_columns_and_tokens_are_each_others_inverse(host):
    column, token, _ = columns(host)
    assert np.array_equal(column[token], np.arange(TILE))
    assert np.array_equal(token[column], np.arange(TILE))


def test_a_threads_scores_of_four_tiles_are_eight_tokens_side_by_side(host):
    """Which is what it must hold of P: columns 2t and 2t + 1 of four n8 tiles are tokens 8t .. 8t + 7."""
    _, token, _ = columns(host)
    for group in range(4):
        for t in range(4):
            mine = [token[32 * group + 8 * tile + 2 * t + e] for tile in range(4) for e in range(2)]
            assert mine == list(range(32 * group + 8 * t, 32 * group + 8 * t + 8))


@pytest.mark.parametrize("d", DIMS)
def test_queries_lie_as_the_a_operand(host, d):
    """A lane's four words of a step of 64 channels lie together: rows g and g + 8, channels 8t.. and 32 + 8t.."""
    query, *_ = tables(host.codes, d, *[(TILE, d)] * 3)
    for warp in range(8):
        for step in range(d // 64):
            for lane in range(32):
                g, t = divmod(lane, 4)
                at = ((warp * (d // 64) + step) * 32 + lane) * 32
                for word, (row, k) in enumerate(((g, 8 * t), (g + 8, 8 * t), (g, 32 + 8 * t), (g + 8, 32 + 8 * t))):
                    mine = query[16 * warp + row, 64 * step + k : 64 * step + k + 8]
                    assert np.array_equal(mine, at + 8 * word + np.arange(8))


@pytest.mark.parametrize("d", DIMS)
def test_keys_and_values_lie_as_b_operands(host, d):
    """Both words of a product lie together, and those of two products make 16 bytes of a lane."""
    _, key, value = tables(host.codes, d, *[(TILE, d)] * 3)
    _, token, _ = columns(host)

    def check(table, lane):
        g, t = divmod(lane, 4)
        first = table[g, 8 * t]
        assert first % 16 == 0
        assert first // 32 % 32 == lane
        assert np.array_equal(table[g, 8 * t : 8 * t + 8], first + np.arange(8))
        assert np.array_equal(table[g, 32 + 8 * t : 40 + 8 * t], first + 8 + np.arange(8))

    for lane in range(32):
        for tile in range(16):
            for step in range(d // 64):
                check(key[token[8 * tile : 8 * tile + 8], 64 * step : 64 * step + 64], lane)
        for tile in range(d // 8):
            for step in range(2):
                check(value[64 * step : 64 * step + 64, 8 * tile : 8 * tile + 8].T, lane)


@pytest.mark.parametrize("d", DIMS)
def test_scales_lie_in_the_lanes_that_the_selectors_name(host, d):
    """A: lane 4g + 2s + row / 8 for s = step % 2; B: lane 4 column + s for s = n8 tile % 4. Words of four scales."""
    query, key, value = tables(host.scales, d, (TILE, d // 16), (TILE, d // 16), (8, d))
    column, *_ = columns(host)
    for token in range(TILE):
        for block in range(d // 16):
            step, at = block // 4, query[token, block]
            assert at % 4 == block % 4
            assert at // 4 % 32 == 4 * (token % 8) + 2 * (step % 2) + token % 16 // 8
            assert at // 128 == token // 16 * max(d // 128, 1) + step // 2
            lane, at = 4 * (column[token] % 8) + column[token] // 8 % 4, key[token, block]
            assert at % 4 == block % 4
            assert at // 16 == step * 32 + lane  # four n8 tiles' words side by side
            assert at // 4 % 4 == column[token] // 32
    for channel in range(d):
        for block in range(8):
            width = min(d, 128)  # head dim 256 is attended to in two halves
            at, word = value[block, channel], block // 4 * (width // 32) + channel % width // 32
            at -= channel // width * (8 * width)
            assert at % 4 == block % 4
            assert at // 16 == word // 4 * 32 + 4 * (channel % 8) + channel // 8 % 4
            assert at // 4 % 4 == word % 4


def test_delta_lies_as_the_accumulator_twice(host):
    """Rows g and g + 8 of columns 2t and 2t + 1: (d0, d1, d0, d1) for each n8 tile and t."""
    column, _, delta = columns(host)
    both = np.concatenate((delta, delta + 2))
    assert np.array_equal(np.sort(both), np.arange(2 * TILE))
    assert np.array_equal(delta // 16, column // 8)
    assert np.array_equal(delta // 4 % 4, column % 8 // 2)
    assert np.array_equal(delta % 4, column % 2)


@pytest.mark.parametrize("causal", [False, True])
def test_every_tile_of_every_head_is_one_job(host, causal):
    made = np.empty((15, 2), dtype=np.int32)
    host.jobs(5, 3, causal, pointer(made))
    assert {tuple(pair) for pair in made.tolist()} == {(head, tile) for head in range(3) for tile in range(5)}
    assert not causal or (np.diff(made[:, 1]) <= 0).all()  # the longest first


@pytest.mark.parametrize("keys", [1, 128, 129, 100_000])
def test_the_parts_of_the_workspace_follow_each_other(host, keys):
    shape, made = np.array([2, 6, 3, 1000, keys, 96], dtype=np.int32), np.empty(10, dtype=np.int64)
    host.workspace(pointer(shape), pointer(made))
    *begins, end, chunk = made.tolist()
    jobs, key_tiles = 2 * 6 * 8, -(-keys // 128)
    tiles = 2 * 3 * key_tiles
    _, query, key, value, delta = tables(host.sizes, 128, (5,))[0].tolist()
    sizes = (jobs * query, tiles * key, tiles * value, jobs * 512, 6 * 512, 6 * 512, 6 * 4, chunk * key_tiles * 4 * delta)
    assert all(begin % 256 == 0 for begin in begins)
    for begin, size, after in zip(begins, sizes, [*begins[1:], end], strict=True):
        assert begin + size <= after < begin + size + 256
    assert 1 <= chunk <= jobs
