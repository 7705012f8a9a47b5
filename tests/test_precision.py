"""What a caller may wish for, and the window in which the wish holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_sage3.errors import InputError
from comfy_sage3.precision import Precision, PrecisionPlan


@pytest.mark.parametrize("name", ["auto", "fp4", "int8", "int8-fast", "exact"])
def test_every_name_and_member_parses(name):
    assert Precision.parse(name).value == name
    assert Precision.parse(Precision(name)) is Precision(name)


@pytest.mark.parametrize("name", ["", "FP4", "fp8", None, 4])
def test_anything_else_is_refused_with_the_choices(name):
    with pytest.raises(InputError, match="choose one of auto, fp4, int8, int8-fast, exact"):
        Precision.parse(name)


@pytest.mark.parametrize("window", [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.4), (float("nan"), 1.0)])
def test_an_impossible_window_is_refused(window):
    with pytest.raises(InputError, match="0 <= start <= end <= 1"):
        PrecisionPlan(start=window[0], end=window[1])


def test_negative_min_tokens_is_refused():
    with pytest.raises(InputError, match="0 or more"):
        PrecisionPlan(min_tokens=-1)


def test_the_window_includes_both_ends_and_says_when_a_step_is_outside():
    plan = PrecisionPlan("fp4", start=0.1, end=0.9)
    assert plan.choose(0.1, 99, 99) == (Precision.FP4, "")
    assert plan.choose(0.9, 99, 99) == (Precision.FP4, "")
    assert plan.choose(None, 99, 99) == (Precision.FP4, "")
    precision, reason = plan.choose(0.95, 99, 99)
    assert precision is Precision.EXACT
    assert reason == "step at 95% is outside the window 10% to 90%"


def test_short_calls_stay_exact_counting_the_shorter_side():
    plan = PrecisionPlan("int8", min_tokens=1024)
    assert plan.choose(0.5, 1024, 1024) == (Precision.INT8, "")
    assert plan.choose(0.5, 8192, 77) == (Precision.EXACT, "fewer than 1024 tokens")
    assert plan.choose(0.5, 77, 8192) == (Precision.EXACT, "fewer than 1024 tokens")


def test_a_plan_for_exact_needs_no_reason():
    assert PrecisionPlan("exact", start=0.5, min_tokens=64).choose(0.0, 1, 1) == (Precision.EXACT, "")


fractions = st.floats(0, 1)


@given(fractions, fractions, fractions, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_a_plan_gives_its_precision_or_exact_with_a_reason(a, b, progress, least, q_tokens, k_tokens):
    plan = PrecisionPlan("fp4", min(a, b), max(a, b), least)
    precision, reason = plan.choose(progress, q_tokens, k_tokens)
    inside = plan.start <= progress <= plan.end and q_tokens >= least and k_tokens >= least
    assert precision is (Precision.FP4 if inside else Precision.EXACT)
    assert bool(reason) != inside
