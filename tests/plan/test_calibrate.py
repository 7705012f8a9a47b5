"""Calibration: a sample's rows are those of the whole call, calls pool, and the plan is solved from what was measured."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.attention import attention
from comfy_sage3.errors import InputError
from comfy_sage3.plan import calibrate
from comfy_sage3.plan.calibrate import Calibration, Error, replay, spread
from comfy_sage3.plan.costs import Costs, costs_of
from comfy_sage3.precision import Precision

FP4, INT8, EXACT = Precision.FP4, Precision.INT8, Precision.EXACT
CPU = torch.device("cpu")


def tensors(batch=1, heads=2, tokens=64, keys=None, kv_heads=None, head_dim=32, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, tokens, head_dim, generator=g)
    k, v = (torch.randn(batch, kv_heads or heads, keys or tokens, head_dim, generator=g) for _ in range(2))
    return q.to(dtype), (k + 1).to(dtype), v.to(dtype)


def relative(out, want):
    return float((out.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_short_call_is_that_of_all_of_it(dtype):
    q, k, v = tensors(batch=2, heads=4, kv_heads=2, tokens=70, dtype=dtype)
    found = replay(q, k, v, [FP4, INT8], emulate=True)
    exact = attention(q.float(), k.float(), v.float(), enable_gqa=True, precision="exact")
    for p in (FP4, INT8):
        low = attention(q, k, v, enable_gqa=True, precision=p, emulate=True)
        assert found[p].relative == pytest.approx(relative(low, exact), rel=1e-3)
    assert found[INT8].relative < found[FP4].relative / 3


def test_a_samples_rows_are_exactly_those_of_the_whole_call(monkeypatch):
    monkeypatch.setattr(calibrate, "SHORT", 0)
    monkeypatch.setattr(calibrate, "BLOCKS", 2)
    monkeypatch.setattr(calibrate, "HEADS", 2)
    q, k, v = tensors(batch=1, heads=3, tokens=300)
    rows = [*range(128), *range(256, 300)]  # the first block and the last, which is not full
    heads = [0, 2]
    found = replay(q, k, v, [FP4, INT8], emulate=True)
    exact = attention(q, k, v, precision="exact")[:, heads][:, :, rows]
    for p in (FP4, INT8):
        low = attention(q, k, v, precision=p, emulate=True)[:, heads][:, :, rows]
        assert found[p].relative == pytest.approx(relative(low, exact), rel=1e-4)


@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 40), (2, 1, 300, 40), (1, 3, 1, 40), (2, 3, 300, 40)])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_follow_the_sample(monkeypatch, mask_shape, boolean):
    monkeypatch.setattr(calibrate, "SHORT", 0)
    monkeypatch.setattr(calibrate, "BLOCKS", 2)
    q, k, v = tensors(batch=2, heads=3, tokens=300, keys=40)
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = mask if boolean else torch.zeros(mask_shape).masked_fill(~mask, -torch.inf)
    found = replay(q, k, v, [INT8], mask=mask, scale=0.1, emulate=True)[INT8]
    rows = [*range(128), *range(256, 300)]
    exact = attention(q, k, v, mask=mask, scale=0.1, precision="exact")[:, :, rows]
    low = attention(q, k, v, mask=mask, scale=0.1, precision="int8", emulate=True)[:, :, rows]
    assert found.relative == pytest.approx(relative(low, exact), rel=1e-4)


def test_token_major_tensors_give_the_same_and_nothing_is_changed():
    q, k, v = tensors()
    before = [t.clone() for t in (q, k, v)]
    turned = replay(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), [FP4], layout="NHD", emulate=True)
    assert turned[FP4].relative == pytest.approx(replay(q, k, v, [FP4], emulate=True)[FP4].relative, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_what_cannot_serve_a_call_has_no_error():
    q, k, v = tensors()
    assert replay(q, k, v, [FP4, INT8]) == {FP4: None, INT8: None}  # no kernel on a CPU
    wide = tensors(head_dim=320, tokens=8)
    assert replay(*wide, [FP4, INT8], emulate=True) == {FP4: None, INT8: None}


def test_bad_numbers_in_the_inputs_give_no_error_rather_than_a_small_one():
    q, k, v = tensors()
    q[0, 0, 3, 3] = torch.nan
    assert replay(q, k, v, [FP4], emulate=True) == {FP4: None}


def test_a_zero_output_that_is_met_has_no_error():
    q, k, v = tensors()
    assert replay(q, k, torch.zeros_like(v), [INT8], emulate=True)[INT8].relative == 0.0
    assert Error(1.0, 0.0).relative is None


def test_memory_is_bounded_by_the_sample_not_by_the_call():
    q, k, v = tensors(batch=2, heads=24, tokens=2048, head_dim=64)
    seen = []
    for b, heads, rows in calibrate._samples(q.shape, k.shape, CPU):
        seen.append((b, heads.tolist(), len(rows)))
    assert seen == [(b, [0, 8, 15, 23], 512) for b in (0, 1)]
    huge = torch.Size((1, 24, 100_000, 128))
    together = [len(heads) for _, heads, _ in calibrate._samples(huge, huge, CPU)]
    assert together == [1, 1, 1, 1]


@given(st.integers(1, 500), st.integers(1, 40))
def test_spread_takes_the_ends(size, count):
    found = spread(size, count)
    assert found == sorted(set(found))
    assert len(found) <= min(size, count)
    assert count == 1 or (found[0], found[-1]) == (0, size - 1)


def calibration(**calls):
    made = Calibration(costs_of(CPU, emulate=True), emulate=True, min_tokens=16)
    q, k, v = tensors(tokens=32)
    for column in (0, 1):
        for layer, scale in calls.items():
            made.add(layer, column, q * scale, k, v, exact=lambda: None)
    return made


def test_calls_of_one_cell_are_pooled():
    once, twice = calibration(a=1.0), calibration(a=1.0)
    q, k, v = tensors(tokens=32)
    twice.add("a", 0, q, k, v, exact=lambda: None)
    for p in (FP4, INT8):
        one, two = (x.plan("m", [1.0, 0.5], [1.0, 0.5], "draft") for x in (once, twice))
        assert two.errors[p][0][0] == pytest.approx(one.errors[p][0][0])
        assert two.seconds[p][0][0] == pytest.approx(2 * one.seconds[p][0][0])
    k[0, 0, 0, 0] = torch.inf
    twice.add("a", 0, q, k, v, exact=lambda: None)  # one call that a precision cannot have: none has it
    assert twice.plan("m", [1.0, 0.5], [1.0, 0.5], "draft").errors[FP4][0] == (None, one.errors[FP4][0][1])


def test_every_step_belongs_to_its_nearest_column():
    plan = calibration(a=1.0).plan("m", [1.0, 0.1], [1.0, 0.8, 0.5, 0.3, 0.1], "draft")
    assert plan.steps == (3, 2)
    assert (plan.costs, plan.device, plan.emulated) == ("modelled", "NVIDIA GeForce RTX 5090", (FP4, INT8))


def test_the_plan_keeps_within_its_budget_and_uses_it(monkeypatch):
    cheap = {EXACT: 1.0, INT8: 0.5, FP4: 0.25}
    monkeypatch.setattr(calibrate, "modelled", lambda p, *shapes: cheap[p])
    made = calibration(a=1.0, b=8.0, c=0.1)
    loose = made.plan("m", [1.0, 0.5], [1.0, 0.5], "custom", 1.0)
    assert loose.counts() == {FP4: 6}
    assert loose.speedup == 4.0
    tight = made.plan("m", [1.0, 0.5], [1.0, 0.5], "custom", 0.6 * loose.mean_error)
    assert 0 < tight.mean_error <= 0.6 * loose.mean_error
    assert len(tight.counts()) > 1
    assert made.plan("m", [1.0, 0.5], [1.0, 0.5], "custom", 0.0).counts() == {EXACT: 6}


def test_a_layer_without_calls_at_a_column_stays_exact():
    made = calibration(a=1.0)
    q, k, v = tensors(tokens=32)
    made.add("late", 1, q, k, v, exact=lambda: None)
    plan = made.plan("m", [1.0, 0.5], [1.0, 0.5], "draft")
    assert plan.chosen[1][0] is EXACT
    assert plan.errors[FP4][1][0] is None
    assert plan.seconds[EXACT][1][0] is None
    assert plan.from_json(plan.to_json()) == plan


def test_nothing_measured_is_said():
    empty = Calibration(Costs("measured", "a GPU", (INT8,)), emulate=False, min_tokens=99)
    with pytest.raises(InputError, match="at least 99 tokens was seen"):
        empty.plan("m", [1.0], [1.0], "draft")


def test_nothing_of_a_call_is_kept():
    made = calibration(a=1.0)
    gc.collect()
    assert not [t for t in gc.get_referents(made, made.__dict__) if isinstance(t, torch.Tensor)]
    q, k, v = tensors(tokens=64)
    for i in range(3):
        made.add(f"layer {i}", 0, q, k, v, exact=lambda: None)
    del q, k, v
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) and o.shape[-2:] == (64, 32) for o in gc.get_objects()) == 0


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 200), st.integers(1, 200))
def test_any_shape_can_be_replayed(batch, heads, tokens, keys):
    q, k, v = tensors(batch, heads, tokens, keys, head_dim=16)
    found = replay(q, k, v, [FP4, INT8], emulate=True)
    assert all(0 <= e.relative < 1 for e in found.values())
