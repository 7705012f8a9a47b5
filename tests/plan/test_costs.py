"""Costs: which precisions there are to choose from, and what the model says of them."""

import pytest
import torch

from comfy_sage3.plan.costs import MODEL_OF, Costs, costs_of, measured, modelled
from comfy_sage3.precision import Precision

FP4, FAST, INT8, EXACT = Precision.FP4, Precision.INT8_FAST, Precision.INT8, Precision.EXACT
CPU = torch.device("cpu")


def test_without_kernels_and_emulation_there_is_nothing_to_choose_from():
    found = costs_of(CPU, emulate=False)
    assert found.precisions == ()
    assert found.missing.endswith("this is a CPU")


def test_kernels_that_cannot_be_built_are_none(monkeypatch):
    monkeypatch.setattr("comfy_sage3.plan.costs.capability_of", lambda device: (9, 0))
    monkeypatch.setattr("comfy_sage3.kernels.compiled.failure", lambda capability: "no compiler was found")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = costs_of(torch.device("cuda"), emulate=False)
    assert found.precisions == ()
    assert "no compiler was found" in found.missing
    assert costs_of(torch.device("cuda"), emulate=True).emulated == (FP4, INT8)


def test_emulated_precisions_are_modelled_for_the_gpu_that_has_them():
    assert costs_of(CPU, emulate=True) == Costs("modelled", MODEL_OF, (FP4, INT8), (FP4, INT8))


@pytest.mark.parametrize(
    ("capability", "emulate", "want"),
    [
        ((9, 0), False, ("measured", "a GPU", (FAST, INT8), ())),
        ((9, 0), True, ("modelled", MODEL_OF, (FP4, INT8), (FP4,))),
        ((12, 0), False, ("measured", "a GPU", (FP4, INT8), ())),
        ((12, 0), True, ("measured", "a GPU", (FP4, INT8), ())),
        ((8, 9), False, ("measured", "a GPU", (INT8,), ())),
        ((7, 0), False, ("measured", "cuda", (), ())),
    ],
)
def test_what_a_gpu_can_choose_from(monkeypatch, capability, emulate, want):
    monkeypatch.setattr("comfy_sage3.plan.costs.capability_of", lambda device: capability)
    monkeypatch.setattr("comfy_sage3.kernels.compiled.failure", lambda capability: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = costs_of(torch.device("cuda"), emulate)
    assert (found.kind, found.device, found.precisions, found.emulated) == want


def test_long_calls_gain_and_short_ones_lose():
    def times(tokens):
        shape = (1, 8, tokens, 128)
        return [modelled(p, shape, shape) for p in (EXACT, INT8, FP4)]

    exact, int8, fp4 = times(32760)
    assert exact > int8 > fp4
    assert 3 < exact / fp4 < 4
    exact, int8, fp4 = times(64)
    assert exact < min(int8, fp4)


def test_the_model_meets_what_users_measured_within_seven_percent():
    reported = {1024: 278, 2048: 392, 4096: 535, 8192: 655, 16384: 727, 32768: 778}  # TFLOPS at B 4, H 32
    for tokens, tflops in reported.items():
        shape = (4, 32, tokens, 128)
        flops = 4 * 4 * 32 * tokens**2 * 128
        assert flops / modelled(FP4, shape, shape) / 1e12 == pytest.approx(tflops, rel=0.07)


def test_fewer_key_heads_cost_less_to_quantise():
    q = (1, 8, 4096, 128)
    assert modelled(FP4, q, (1, 2, 4096, 128)) < modelled(FP4, q, q)
    assert modelled(EXACT, q, (1, 2, 4096, 128)) == modelled(EXACT, q, q)


def test_timing_takes_the_median_of_runs_in_turn(monkeypatch):
    clock = iter(range(100))
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = measured({EXACT: lambda: order.append("exact"), INT8: lambda: order.append("int8")}, repeats=3)
    assert found == {EXACT: 1e-3, INT8: 1e-3}
    assert order == ["exact", "int8"] * 4
