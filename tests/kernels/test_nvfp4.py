"""The emulated NVFP4 instructions on the host, against formats and layouts written down a second time, here.

Layouts: PTX ISA, "mma.sync.aligned.m16n8k64 with block scaling", fragments and scale selectors.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.kernels.jit.cuda import find_cuda
from comfy_sage3.kernels.jit.machine import Machine, ToolchainError
from comfy_sage3.kernels.sources import find_tree
from comfy_sage3.reference import formats

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ALL_SCALES = formats.decode_e4m3(torch.arange(127, dtype=torch.uint8)).double().numpy()
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
A_WORDS = ((G, 8 * T), (G + 8, 8 * T), (G, 32 + 8 * T), (G + 8, 32 + 8 * T))  # row, first of eight k
B_WORDS = ((8 * T, G), (32 + 8 * T, G))  # first of eight k, column
C_ROWS, C_COLUMNS = np.stack((G, G, G + 8, G + 8), 1), np.stack((2 * T, 2 * T + 1, 2 * T, 2 * T + 1), 1)


def cxx():
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler (g++ or clang++, or CXX)")
    return compiler


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    compiler = cxx()
    library = tmp_path_factory.mktemp("nvfp4") / "host.so"
    source = Path(__file__).with_name("nvfp4_host.cpp")
    include = find_tree().root / "include"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    made = subprocess.run([compiler, *flags, f"-I{include}", "-o", library, source], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return ctypes.CDLL(str(library))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def encode(host, x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    codes = np.empty(x.shape, dtype=np.uint8)
    host.encode(pointer(x), x.size, pointer(codes))
    return codes


def fragments(a, b, row_scales, column_scales, selector_a, selector_b, rng):
    """Codes a (16, 64), b (64, 8) and scale codes (16, 4), (8, 4) as 32 lanes hold them; unused scales are noise."""
    lanes = rng.integers(0, 2**32, (32, 8), dtype=np.uint64).astype(np.uint32)

    def words(codes):  # (32, 8) -> (32,)
        return (codes.astype(np.uint64) << (4 * np.arange(8, dtype=np.uint64))).sum(1).astype(np.uint32)

    eight = np.arange(8)
    for word, (row, k) in enumerate(A_WORDS):
        lanes[:, word] = words(a[row[:, None], k[:, None] + eight])
    for word, (k, column) in enumerate(B_WORDS):
        lanes[:, 4 + word] = words(b[k[:, None] + eight, column[:, None]])
    bytes_ = lanes.view(np.uint8).reshape(32, 8, 4)
    for row in range(16):
        bytes_[4 * (row % 8) + 2 * selector_a + row // 8, 6] = row_scales[row]
    for column in range(8):
        bytes_[4 * column + selector_b, 7] = column_scales[column]
    return lanes


def product(host, a, b, row_scales, column_scales, c=None, selector_a=0, selector_b=0, seed=0):
    """(16, 8) as the emulation has it."""
    lanes = fragments(a, b, row_scales, column_scales, selector_a, selector_b, np.random.default_rng(seed))
    c = np.zeros((16, 8)) if c is None else c
    start = np.ascontiguousarray(c[C_ROWS, C_COLUMNS], dtype=np.float32)
    out = np.empty((32, 4), dtype=np.float32)
    host.mma(pointer(lanes), selector_a, selector_b, pointer(start), pointer(out))
    d = np.empty((16, 8), dtype=np.float32)
    d[C_ROWS, C_COLUMNS] = out
    return d


def definition(a, b, row_scales, column_scales, c=0.0):
    """In double: products of codes and scales are exact there, and so are sums of moderate scales."""
    x = VALUES[a] * ALL_SCALES[row_scales].repeat(16, 1)
    y = VALUES[b] * ALL_SCALES[column_scales].repeat(16, 1).T
    return (x @ y + c).astype(np.float32)


def test_codes_of_every_half_precision_number(host):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    assert np.array_equal(encode(host, every.float().numpy()), formats.encode_e2m1(every).numpy())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=32))
def test_codes_of_any_float(host, xs):
    x = np.array(xs, dtype=np.float32)
    assert np.array_equal(encode(host, x), formats.encode_e2m1(torch.from_numpy(x)).numpy())


def test_codes_on_either_side_of_every_tie(host):
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], dtype=np.float32)
    ties = np.concatenate([ties, -ties])
    x = np.concatenate([ties, *(np.nextafter(ties, np.float32(side)) for side in (np.inf, -np.inf))])
    assert np.array_equal(encode(host, x), formats.encode_e2m1(torch.from_numpy(x)).numpy())


def test_every_scale_with_and_without_its_sign_bit(host):
    codes = np.arange(256, dtype=np.uint8)
    values = np.empty(256, dtype=np.float32)
    host.decode_scales(pointer(codes), 256, pointer(values))
    assert np.array_equal(values[:128], values[128:], equal_nan=True)
    assert np.array_equal(values[:127], ALL_SCALES.astype(np.float32))
    assert np.isnan(values[127])


ONE = 0x38  # e4m3


@pytest.mark.parametrize("selector_b", range(4))
@pytest.mark.parametrize("selector_a", range(2))
def test_every_element_and_scale_has_its_place(host, selector_a, selector_b):
    """One element of A at a time, against a B that names its row and column: 1024 places, every scale different."""
    rng = np.random.default_rng(selector_a * 4 + selector_b)
    b = rng.integers(0, 16, (64, 8), dtype=np.uint8)
    row_scales = rng.permutation(120)[: 16 * 4].reshape(16, 4).astype(np.uint8)
    column_scales = rng.permutation(120)[: 8 * 4].reshape(8, 4).astype(np.uint8)
    for place in range(16 * 64):
        a = np.zeros((16, 64), dtype=np.uint8)
        a.flat[place] = 5
        got = product(host, a, b, row_scales, column_scales, None, selector_a, selector_b, seed=place)
        assert np.array_equal(got, definition(a, b, row_scales, column_scales)), divmod(place, 64)


def test_every_pair_of_codes(host):
    scales_a, scales_b = np.full((16, 4), ONE, dtype=np.uint8), np.full((8, 4), ONE, dtype=np.uint8)
    for x in range(16):
        for at in range(0, 64, 8):  # every nibble of every word
            a, b = np.zeros((16, 64), dtype=np.uint8), np.zeros((64, 8), dtype=np.uint8)
            for i in range(8):
                a[:, at + i] = x if i % 2 else 0
                b[at + i] = (np.arange(8) + 8 * (i // 2 % 2)) % 16
            assert np.array_equal(product(host, a, b, scales_a, scales_b), definition(a, b, scales_a, scales_b))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 1), st.integers(0, 3))
def test_random_products_are_exact_but_for_one_rounding(host, seed, selector_a, selector_b):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 16, shape, dtype=np.uint8) for shape in ((16, 64), (64, 8)))
    row_scales, column_scales = (rng.integers(32, 80, shape, dtype=np.uint8) for shape in ((16, 4), (8, 4)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    got = product(host, a, b, row_scales, column_scales, c, selector_a, selector_b, seed)
    assert np.array_equal(got, definition(a, b, row_scales, column_scales, c.astype(np.float64)))


def test_a_scale_that_is_no_number_reaches_its_row_and_column_only(host):
    a, b = np.full((16, 64), 2, dtype=np.uint8), np.full((64, 8), 2, dtype=np.uint8)
    row_scales, column_scales = np.full((16, 4), ONE, dtype=np.uint8), np.full((8, 4), ONE, dtype=np.uint8)
    row_scales[5, 2], column_scales[3, 1] = 0x7F, 0x7F
    got = product(host, a, b, row_scales, column_scales)
    hit = np.zeros((16, 8), dtype=bool)
    hit[5], hit[:, 3] = True, True
    assert np.array_equal(np.isnan(got), hit)


# ------------------------------------------------------------------------------------------------ CUTLASS
def cutlass_headers():
    """CUTLASS_PATH, else what ``pip install nvidia-cutlass`` brings."""
    if path := os.environ.get("CUTLASS_PATH"):
        return Path(path) / "include"
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin).parent / "source" / "include" if spec and spec.origin else None


@pytest.fixture(scope="module")
def cutlass(tmp_path_factory):
    """Operand -> (32, values) of indices, as CUTLASS's traits of the instruction say."""
    headers = cutlass_headers()
    if headers is None or not (headers / "cute/atom/mma_traits_sm120.hpp").is_file():
        pytest.skip("needs CUTLASS's headers: pip install nvidia-cutlass, or CUTLASS_PATH")
    try:
        cuda = find_cuda(Machine(), None, ["120a"]).include_dirs()
    except ToolchainError as missing:
        pytest.skip(f"needs CUDA's headers: {missing}")
    program = tmp_path_factory.mktemp("cutlass") / "layouts"
    source = Path(__file__).with_name("nvfp4_cutlass.cpp")
    folders = [f"-I{folder}" for folder in (headers, *cuda)]
    made = subprocess.run([cxx(), "-std=c++17", "-w", *folders, "-o", program, source], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: np.array(rest, dtype=int).reshape(32, -1) for name, *rest in map(str.split, lines)}


def test_the_fragments_are_those_of_cutlass(cutlass):
    eight = np.arange(8)
    a = [row[:, None] + 16 * (k[:, None] + eight) for row, k in A_WORDS]
    b = [column[:, None] + 8 * (k[:, None] + eight) for k, column in B_WORDS]
    assert np.array_equal(cutlass["a"], np.concatenate(a, 1))
    assert np.array_equal(cutlass["b"], np.concatenate(b, 1))
    assert np.array_equal(cutlass["c"], C_ROWS + 16 * C_COLUMNS)


def test_the_lanes_of_scales_are_those_of_cutlass(cutlass):
    """Lane 4g + 2s + r has row g + 8r for every s, lane 4n + s column n: a scale for each of 64 k."""
    k = np.arange(64)
    assert np.array_equal(cutlass["scale_a"], (G + 8 * (T % 2))[:, None] + 16 * k)
    assert np.array_equal(cutlass["scale_b"], G[:, None] + 8 * k)
