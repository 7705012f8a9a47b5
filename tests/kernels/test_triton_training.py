"""8-bit attention that trains, in Triton: its kernels in Triton's interpreter on a CPU, against fp64 and the reference.

The interpreter is chosen when triton is imported, hence a process of its own. Sizes are beyond one tile (64).
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata

import pytest
import torch

from comfy_sage3.errors import InputError
from comfy_sage3.kernels import triton_training


def _obstacle():
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(x) for x in version.split(".")[:2]) < (3, 7):
        return "the interpreter of Triton before 3.7 fails with NumPy from 2.4 on"
    return ""


needs_triton = pytest.mark.skipif(bool(_obstacle()), reason=_obstacle())

LEAST = 0.9995  # cosine with fp64; dK, which both of its operands are rounded for, has 0.9998
# Of the reference's relative L1: the same products in 8 bits, scales are grouped a little differently.
OF_REFERENCE, BESIDES = 1.25, 0.004


@pytest.fixture(scope="module")
def interpreter():
    from . import triton_interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=triton_interpreter.start) as pool:
            yield lambda what, x=None: pool.submit(what, x).result(timeout=300)


def check(interpreter, least=LEAST, **case):
    from . import triton_interpreter

    case = triton_interpreter.Case(**case)
    found = interpreter(triton_interpreter.run, case)
    assert found["finite"]
    assert found["quiet"]
    assert found["lse"] < 0.05
    for name in ("out", "dq", "dk", "dv"):
        assert found["cosine"][name] > least, (name, found["cosine"])
        assert found["off"][name] < OF_REFERENCE * found["reference"][name] + BESIDES, (
            name,
            found["off"],
            found["reference"],
        )
    shapes = ((case.b, case.h, case.lq, case.d), *2 * ((case.b, case.hkv, case.lk, case.d),))
    assert found["like"] == [(shape, case.dtype, True) for shape in shapes]
    return found


@needs_triton
@pytest.mark.parametrize("d", [1, 37, 64, 80, 128, 160, 256])
def test_head_dims(interpreter, d):
    check(interpreter, 0.999 if d == 1 else LEAST, d=d)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(interpreter, dtype):
    check(interpreter, dtype=dtype, causal=True)


@needs_triton
@pytest.mark.parametrize(("lq", "lk"), [(63, 129), (65, 128), (130, 70), (129, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(interpreter, lq, lk, causal):
    if lk == 1:  # dS is 0, and what 8 bits leave of it has no direction
        from . import triton_interpreter

        found = interpreter(triton_interpreter.run, triton_interpreter.Case(lq=lq, lk=lk, causal=causal))
        assert found["finite"]
        assert found["cosine"]["dv"] > LEAST
    else:
        check(interpreter, lq=lq, lk=lk, causal=causal)


@needs_triton
@pytest.mark.parametrize(("queries", "keys"), [(32, 128), (128, 32), (128, 128), (32, 32)])
def test_tiles_that_are_not_square(interpreter, queries, keys):
    check(interpreter, lq=150, lk=200, h=1, hkv=1, causal=True, tiles=triton_training.Tiles(queries, keys, 4, 2))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 0, 0), (0, 0, 0, 0)])
def test_masks(interpreter, dtype, shape):
    found = check(interpreter, mask=dtype, mask_shape=shape, b=2, causal=shape[0] == 1)
    assert found["dead"] >= 2


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(interpreter, causal):
    check(interpreter, b=2, h=4, hkv=2, lq=130, causal=causal)


@needs_triton
@pytest.mark.parametrize("mask", [None, torch.bool])
def test_the_gradient_of_lse(interpreter, mask):
    check(interpreter, dlse=True, mask=mask, h=4)


@needs_triton
def test_a_negative_scale(interpreter):
    check(interpreter, scale=-0.2, dlse=True)


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
def test_dq_in_8_bits(interpreter, causal):
    check(interpreter, eight_bit_dq=True, causal=causal, lk=200)


@needs_triton
@pytest.mark.parametrize("dout", ["transposed", "expanded"])
def test_any_strides_of_the_gradient(interpreter, dout):
    check(interpreter, dout=dout)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_tiny_gradients_keep_their_digits(interpreter, dtype):
    from . import triton_interpreter

    found = interpreter(triton_interpreter.run, triton_interpreter.Case(dout="tiny", dtype=dtype, offset=0.0))
    digits = 6 if dtype == torch.float16 else 8  # below, fp16 itself has none
    assert min(x for i, x in enumerate(found["rows"]) if i % 8 < digits) > 0.999


@needs_triton
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_an_offset_of_k_changes_little(interpreter, offset):
    """Its mean is taken out first, and the LSE gets it back."""
    check(interpreter, offset=offset, dtype=torch.float32)


@needs_triton
def test_the_ops(interpreter):
    from . import triton_interpreter

    assert interpreter(triton_interpreter.ops) == []


@needs_triton
def test_calls_without_tokens_or_heads(interpreter):
    from . import triton_interpreter

    assert interpreter(triton_interpreter.nothing) == []


@pytest.mark.parametrize("d", [32, 40, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2)])
def test_what_is_kept_is_at_most_six_tenths_of_flash_attentions(d, heads, kv_heads):
    """q, k, v and out in bf16, and the LSE, which both keep."""
    b, lq, lk = 2, 1024, 1000
    q, k = torch.empty(b, heads, lq, d, device="meta"), torch.empty(b, kv_heads, lk, d, device="meta")
    kept = triton_training.attend(q, k, k, None, False, 0.2, False)[2:]
    ours = sum(x.numel() * x.element_size() for x in kept)
    assert ours <= 0.6 * (2 * (2 * q.numel() + 2 * k.numel()) + 4 * b * heads * lq)


def test_larger_head_dims_are_refused():
    with pytest.raises(InputError, match="at most 256, this call has 257"):
        triton_training.padded_head_dim(257)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("d", [1, 64, 80, 128, 256])
def test_there_are_tiles_for_every_gpu(capability, d):
    config = triton_training.config(capability, triton_training.padded_head_dim(d))
    for tiles in (config.forward, config.keys, config.queries):
        assert triton_training.TILE % tiles.queries == triton_training.TILE % tiles.keys == 0
        assert tiles.queries >= 32  # what a product of 8-bit operands contracts at least
        assert tiles.keys >= 32


def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(triton_training, "_has_triton", lambda: False)
    assert "not installed" in triton_training.absent()


def test_a_missing_compiler_and_the_switch_are_said(monkeypatch):
    monkeypatch.delenv("SAGE3_FORCE_REFERENCE", raising=False)
    monkeypatch.setattr(triton_training, "_has_triton", lambda: True)
    monkeypatch.setattr(triton_training, "_has_compiler", lambda: True)
    assert triton_training.absent() is None
    monkeypatch.setattr(triton_training, "_has_compiler", lambda: False)
    assert "gcc or clang" in triton_training.absent()
    monkeypatch.setenv("SAGE3_FORCE_REFERENCE", "1")
    assert triton_training.absent() == "SAGE3_FORCE_REFERENCE is set"
