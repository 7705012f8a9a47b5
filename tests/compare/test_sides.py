"""A side by precision or by plan, and a plan that is honoured layer by layer."""

import pytest

from comfy_sage3.compare.engine import Side, Where
from comfy_sage3.compare.sides import read_side
from comfy_sage3.errors import InputError
from comfy_sage3.plan.plan import Budget, LayerPlan
from comfy_sage3.precision import Precision

EXACT, FP4, INT8 = Precision.EXACT, Precision.FP4, Precision.INT8


@pytest.fixture
def plan():
    """Layer 0 exact at first, then fp4; layer 1 int8 at first, then exact. Layers 2 to 5 are not in it."""
    table = ((0.5, 0.5), (0.5, 0.5))
    return LayerPlan(
        model="m",
        layers=("0", "1"),
        sigmas=(1.0, 0.1),
        steps=(1, 1),
        chosen=((EXACT, FP4), (INT8, EXACT)),
        errors={FP4: table, INT8: table},
        seconds={FP4: table, INT8: table, EXACT: table},
        budget=Budget("custom", 1.0, 1.0),
        bound=0.0,
        costs="modelled",
        device="none",
        min_tokens=32,
    )


def test_a_side_is_a_precision_or_a_plans_file(tmp_path, plan):
    assert read_side("A", "int8").precision is INT8
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    side = read_side("B", str(path))
    assert side.table == plan
    assert (side.wish, side.name) == ("plan", "B (plan)")
    with pytest.raises(InputError, match="cannot be read"):
        read_side("B", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="give a precision or one plan"):
        Side("B", FP4, table=plan)
    with pytest.raises(InputError, match="give a precision or one plan"):
        Side("B", Precision.AUTO, table=plan, saved="x")


def test_a_plan_chooses_by_layer_and_noise_and_keeps_short_calls_exact(plan):
    side = Side("B", Precision.AUTO, min_tokens=16, table=plan)
    assert side.choose(Where("0", 0.9), 64, 64) == (EXACT, "exact by the plan")
    assert side.choose(Where("0", 0.1), 64, 64) == (FP4, "")
    assert side.choose(Where("1", 0.9), 64, 64) == (INT8, "")
    assert side.choose(Where("5", 0.9), 64, 64) == (EXACT, "exact by the plan")
    assert side.choose(Where("0", 0.1), 64, 20) == (EXACT, "fewer than 32 tokens")
    assert side.choose(None, 64, 64)[0] is EXACT


def test_the_embedded_engine_runs_what_the_plan_says(plan):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from comfy_sage3.compare.diffusers_engine import DiffusersEngine
    from comfy_sage3.compare.engine import Request
    from comfy_sage3.demo.sizes import Size

    engine = DiffusersEngine("cpu")
    request = Request("a red circle", Size(64, 64, 9), steps=2, cfg=1.0, shift=1.0)  # 48 tokens, sigma 1 and 0.5
    report = engine.generate(request, Side("B", Precision.AUTO, min_tokens=0, table=plan), lambda done, steps: None).report
    calls = {line["kernel"]: line["calls"] for line in report if line["kernel"] != "exact"}
    assert calls == {"int8-emulated": 2}  # layer 1's self-attention in both steps: 0.5 is nearer to 1 than to 0.1
    assert sum(line["calls"] for line in report) == 2 * 6 * 2
    assert {line["reason"] for line in report if line["kernel"] == "exact"} == {"exact by the plan", "fewer than 32 tokens"}


def test_an_engine_refuses_the_other_engines_kind_of_plan(plan):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from comfy_sage3.compare.diffusers_engine import DiffusersEngine
    from comfy_sage3.compare.engine import Request
    from comfy_sage3.demo.sizes import Size

    request = Request("a red circle", Size(64, 64, 1))
    with pytest.raises(InputError, match="on a ComfyUI server"):
        DiffusersEngine("cpu").check(request, [Side("B", Precision.AUTO, saved="draft")])
