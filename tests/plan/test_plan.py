"""LayerPlan: what it chooses, what it sums up, and JSON that is read strictly or not at all."""

import json
import math
from dataclasses import replace

import pytest

from comfy_sage3.errors import InputError
from comfy_sage3.plan.plan import MOST_BYTES, Budget, LayerPlan
from comfy_sage3.plan.report import report
from comfy_sage3.precision import Precision

FP4, INT8, EXACT = Precision.FP4, Precision.INT8, Precision.EXACT


def made(**changes) -> LayerPlan:
    """Two layers at sigma 1 and 0.1, which stand for 1 and 3 steps; layer "single 0" makes no call at the first."""
    plan = LayerPlan(
        model="WanModel-0123456789abcdef",
        layers=("double 0", "single 0"),
        sigmas=(1.0, 0.1),
        steps=(1, 3),
        chosen=((FP4, INT8), (EXACT, EXACT)),
        errors={FP4: ((0.08, 0.1), (None, None)), INT8: ((0.01, 0.02), (None, 0.03))},
        seconds={EXACT: ((1.0, 1.0), (None, 2.0)), FP4: ((0.25, 0.25), (None, None)), INT8: ((0.5, 0.5), (None, 1.0))},
        budget=Budget("custom", 0.03, 0.09),
        bound=7.0,
        costs="modelled",
        device="a GPU",
        emulated=(FP4,),
        min_tokens=1024,
    )
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("sigma", "want"),
    [
        (1.0, FP4),
        (5.0, FP4),
        (0.4, FP4),
        (0.25, INT8),
        (0.1, INT8),
        (1e-9, INT8),
        (0.0, INT8),
        (-1.0, INT8),
        (math.nan, INT8),
    ],
)
def test_the_nearest_sigma_by_ratio_decides(sigma, want):
    assert made().choose("double 0", sigma) is want


def test_an_unknown_layer_stays_exact():
    assert made().choose("double 9", 1.0) is EXACT
    assert made().choose("", 1.0) is EXACT


def test_sums_count_steps_and_leave_out_layers_without_calls():
    plan = made()
    assert plan.counts() == {FP4: 1, INT8: 3, EXACT: 3}
    assert plan.mean_error == pytest.approx((0.08 + 3 * 0.02 + 3 * 0.0) / 7)
    assert plan.worst() == (0.08, "double 0", 1.0)
    assert plan.total_seconds(EXACT) == 1 + 3 + 3 * 2
    assert plan.total_seconds() == 0.25 + 3 * 0.5 + 3 * 2
    assert plan.total_seconds(FP4) == 0.25 + 3 * 0.25 + 3 * 2  # exact where fp4 cannot
    assert plan.speedup == pytest.approx(10 / 7.75)


def test_json_brings_back_the_plan():
    plan = made()
    assert LayerPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["version"] == 1


def changed(**values):
    return json.dumps(json.loads(made().to_json()) | values)


def row(**values):
    said = json.loads(made().to_json())
    said["layers"][0] |= values
    return json.dumps(said)


BAD = {
    "empty": ("", "not JSON"),
    "cut short": (made().to_json()[:300], "not JSON"),
    "another file": ('{"nodes": []}', '"format"'),
    "a list": ("[]", '"format"'),
    "deep": ("[" * 100_000, "not JSON"),
    "long": (" " * (MOST_BYTES + 1), "longer than"),
    "NaN": (made().to_json().replace("0.25", "NaN", 1), "NaN"),
    "twice": (made().to_json().replace('"bound"', '"model": "x", "bound"', 1), "twice"),
    "version 2": (changed(version=2), "version 2 and this version"),
    "version true": (changed(version=True), "version True and this version"),
    "more": (changed(author="me"), "nothing else"),
    "a path as model": (changed(model="../../etc"), "fingerprint"),
    "sigmas rising": (changed(sigmas=[0.1, 1.0]), "falling"),
    "sigma 0": (changed(sigmas=[1.0, 0.0]), "falling"),
    "no sigmas": (changed(sigmas=[], steps=[]), "falling"),
    "steps": (changed(steps=[1]), "1 values for 2 sigmas"),
    "no step": (changed(steps=[0, 4]), "whole number from 1"),
    "costs": (changed(costs="guessed"), "neither"),
    "no layers": (changed(layers=[]), "no layers"),
    "one layer twice": (changed(layers=[json.loads(made().to_json())["layers"][0]] * 2), "one name"),
    "a column short": (row(chosen=["fp4"]), "1 values for 2 sigmas"),
    "auto": (row(chosen=["auto", "int8"]), "not one of fp4"),
    "negative error": (row(errors={"fp4": [-1, 0.1], "int8": [0.01, 0.02]}), "number from 0 up"),
    "an error of true": (row(errors={"fp4": [True, 0.1], "int8": [0.01, 0.02]}), "number from 0 up"),
    "a huge number": (row(errors={"fp4": [10**400, 0.1], "int8": [0.01, 0.02]}), "number from 0 up"),
    "unmeasured": (row(errors={"fp4": [None, 0.1], "int8": [0.01, 0.02]}), "without a measured error"),
    "errors of one layer": (row(errors={"fp4": [0.08, 0.1]}), "same precisions"),
    "two lines": (changed(device="a\nb"), "one line"),
}


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_refused_in_one_sentence(case):
    text, why = BAD[case]
    with pytest.raises(InputError) as error:
        LayerPlan.from_json(text)
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((" again.", " it again."))


def test_the_report_counts_one_layer_and_one_step_as_one():
    assert report(made()).startswith("Plan for WanModel-0123456789abcdef: 2 layers, 4 steps, 2 of them measured.\n")
    one = {"errors": {FP4: ((0.08,),)}, "seconds": {EXACT: ((1.0,),), FP4: ((0.25,),)}, "chosen": ((FP4,),)}
    said = report(made(layers=("",), sigmas=(1.0,), steps=(1,), **one))
    assert said.startswith("Plan for WanModel-0123456789abcdef: 1 layer, 1 step, 1 of them measured.\n")


def test_the_report_says_what_was_modelled_and_what_is_left_to_gain():
    said = report(made())
    assert "fp4 in 1 of 7 layer steps" in said
    assert "0.0200 in the mean (budget custom: 0.03), at most 0.0800 (layer double 0 at sigma 1; limit 0.09)" in said
    assert "10.0 s exact, 7.8 s planned, 1.29 x" in said
    assert "No plan within the budget is faster than 1.43 x" in said
    assert "modelled for an a GPU" in said
    assert "measured on this a GPU" in report(made(costs="measured", emulated=()))
