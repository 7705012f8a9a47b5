"""Arms differ in attention alone; what is cut short goes on; what breaks is said."""

import json
from dataclasses import replace

import pytest
import torch

from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.training_study import arm as arm_module
from comfy_sage3.training_study import pace, settings
from comfy_sage3.training_study.arm import train
from comfy_sage3.training_study.data import Text, batch, clips
from comfy_sage3.training_study.model import build
from comfy_sage3.training_study.run import run, told
from comfy_sage3.training_study.settings import Arm


def first_loss_and_weights(monkeypatch, setting, form, store):
    """What an arm starts from and is shown first: its weights, and all that flow_loss is given."""
    seen = {}
    real = arm_module.flow_loss

    def spying(model, clean, states, shift, generator):
        if "clean" not in seen:
            seen.update(clean=clean.clone(), states=states.clone(), noise=generator.get_state())
            seen["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
        return real(model, clean, states, shift, generator)

    monkeypatch.setattr(arm_module, "flow_loss", spying)
    seen["result"] = train(Arm(setting, form, 0), store, "cpu", "")
    return seen


def test_arms_of_one_seed_start_alike_and_see_the_same(monkeypatch, tiny, store):
    exact, int8 = (first_loss_and_weights(monkeypatch, tiny, form, store) for form in ("exact", "int8"))
    for name in ("clean", "states", "noise", "weights"):
        assert torch.equal(exact[name], int8[name]), name
    a, b = exact["result"], int8["result"]
    assert a["losses"] != b["losses"]  # the attention does differ
    assert a["losses"][0] == pytest.approx(b["losses"][0], rel=0.02)
    assert a["held_out"][0]["loss"] == pytest.approx(b["held_out"][0]["loss"], rel=0.02)


def test_another_seed_is_another_run(tiny, store):
    drawn, text, generator = clips(store.data, tiny, "cpu"), Text("cpu"), torch.Generator()
    again = [batch(drawn, text, generator, seed, step)[0] for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    assert not torch.equal(again[0], again[3])
    one, two = (torch.cat([p.flatten() for p in build(tiny, seed, "cpu").parameters()]) for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("form", "kernel", "counted"),
    [
        ("exact", "exact", {}),
        ("exact-again", "exact, another kernel", {}),
        ("int8", "int8-emulated", {"int8-emulated": 4}),
        ("int8-unsmoothed", "int8 in plain PyTorch, unsmoothed", {}),
    ],
)
def test_an_arm_says_which_kernels_ran_forward_and_backward(tiny, store, form, kernel, counted):
    calls = train(Arm(tiny, form, 0), store, "cpu", "")["calls"]
    assert calls["forward"] == calls["backward"] == {kernel: 4}  # steps; a model of one layer
    assert calls["gradients"] == counted


def test_the_reference_is_what_int8_is_on_a_cpu_and_smoothing_makes_a_difference(tiny, store):
    losses = {
        form: train(Arm(tiny, form, 0), store, "cpu", "")["losses"] for form in ("int8", "int8-reference", "int8-unsmoothed")
    }
    assert losses["int8"] == losses["int8-reference"]
    assert losses["int8-unsmoothed"] != losses["int8"]


def test_a_fallback_does_not_pass_for_8_bits(tiny, store, monkeypatch):
    monkeypatch.setattr("comfy_sage3.training_study.forms.attention", fallen_back)
    with pytest.raises(EngineError, match="asks for int8 and got exact"):
        train(Arm(tiny, "int8", 0), store, "cpu", "")


def fallen_back(q, k, v, *, precision, report, **_):
    report.record(precision, "exact", "no kernel here", precision != "exact")
    return v


class AfterTwoLooks:
    """A deadline that comes at the third look at the clock."""

    looks = 0

    def __le__(self, _now):
        self.looks += 1
        return self.looks > 2


def test_an_arm_that_is_cut_goes_on_to_the_very_same_result(tiny, store):
    arm = Arm(tiny, "int8", 1)
    whole = train(arm, store, "cpu", "")
    assert train(arm, store, "cpu", "", deadline=AfterTwoLooks()) is None
    notes = json.loads((store.partial / f"{arm.name}.json").read_text())
    assert notes["step"] == 2
    resumed = train(arm, store, "cpu", "")
    for name in ("losses", "held_out", "final", "calls", "non_finite_gradients"):
        assert resumed[name] == whole[name], name
    assert len(resumed["losses"]) == tiny.steps
    assert not list(store.partial.iterdir())  # neither checkpoint nor notes stay behind


def test_notes_of_other_settings_are_not_gone_on_from(tiny, store):
    arm = Arm(tiny, "exact", 0)
    assert train(arm, store, "cpu", "", deadline=AfterTwoLooks()) is None
    other = Arm(replace(tiny, rate=5e-4), "exact", 0)
    after_a_cut, fresh = (train(other, store, "cpu", "")["losses"] for _ in range(2))
    assert after_a_cut == fresh


def test_a_loss_that_is_no_number_ends_the_arm_and_is_said(monkeypatch, tiny, store):
    real = arm_module.flow_loss
    count = iter(range(10))

    def breaking(*given):
        loss = real(*given)
        return loss * float("nan") if next(count) == 2 else loss

    monkeypatch.setattr(arm_module, "flow_loss", breaking)
    result = train(Arm(tiny, "exact", 0), store, "cpu", "")
    assert result["diverged"] == 3
    assert [loss is None for loss in result["losses"]] == [False, False, True]
    assert result["non_finite_gradients"] == 1
    assert result["final"] == {"own": None, "exact": None}
    assert told(result) == "no finite loss or gradient at step 3"
    assert json.loads((store.arms / "pretrain-few.exact.seed0.json").read_text())["diverged"] == 3


def test_a_run_does_what_is_missing_and_then_nothing(tiny, store):
    one = replace(tiny, seeds=1, forms=("exact",))
    said = []
    outcome = run([one], store.out, "cpu", command="the command", say=said.append)
    assert outcome == {"done": ["pace.pretrain-few.exact", "pretrain-few.exact.seed0"], "cut": [], "failed": []}
    assert "held-out loss" in said[-1]
    result = json.loads((store.arms / "pretrain-few.exact.seed0.json").read_text())
    assert result["command"] == "the command"
    assert result["device"] == "CPU"
    assert run([one], store.out, "cpu", command="", say=said.append) == {"done": [], "cut": [], "failed": []}
    with pytest.raises(InputError, match="made with other settings"):
        run([replace(one, rate=1.0)], store.out, "cpu", command="", say=said.append)


def test_a_spent_budget_leaves_everything_for_the_next_run_also_side_by_side(tiny, store):
    outcome = run([tiny], store.out, "cpu", command="", workers=2, budget=0, say=lambda _: None)
    assert outcome["done"] == outcome["failed"] == []
    assert len(outcome["cut"]) == 2 + 4


def test_an_arm_that_fails_does_not_stop_the_others(monkeypatch, tiny, store):
    from comfy_sage3.training_study import run as run_module

    def failing(arm, *given):
        if arm.form == "exact":
            raise RuntimeError("out of memory\nand more")
        return {"diverged": 1}

    monkeypatch.setattr(run_module, "train", failing)
    monkeypatch.setattr(pace, "measure", lambda *given: {"peak_bytes": None, "step_seconds": [1.0]})
    said = []
    outcome = run([replace(tiny, seeds=1)], store.out, "cpu", command="", say=said.append)
    assert outcome["failed"] == ["pretrain-few.exact.seed0"]
    assert "pretrain-few.int8.seed0" in outcome["done"]
    assert any(line.endswith("RuntimeError: out of memory") for line in said)


def test_without_norm_the_layers_have_none(tiny):
    with_norm, without = build(tiny, 0, "cpu"), build(replace(tiny, qk_norm=False), 0, "cpu")
    assert isinstance(without.blocks[0].attn1.norm_q, torch.nn.Identity)
    a, b = dict(with_norm.named_parameters()), dict(without.named_parameters())
    assert set(a) - set(b) == {f"blocks.0.{x}.{n}.weight" for x in ("attn1", "attn2") for n in ("norm_q", "norm_k")}
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_adapters_start_as_the_model_they_adapt_and_are_all_that_is_trained(tiny):
    plain, adapted = build(tiny, 0, "cpu"), build(replace(tiny, rank=4), 0, "cpu")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(".down." in name or ".up." in name for name in trained)
    x, time, text = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 11, 4096)
    assert torch.equal(plain(x, time, text)[0], adapted(x, time, text)[0])


def test_a_pace_is_measured_and_told_in_milliseconds(tiny, store):
    result = pace.measure(replace(tiny, rank=4), "int8", store, "cpu", "")
    assert len(result["step_seconds"]) == pace.CPU_MEASURED
    assert pace.median_ms(result) > 0
    assert result["calls"]["backward"] == {"int8-emulated": 3}
    assert result["peak_bytes"] is None


def test_all_of_seed_0_comes_first():
    names = [a.name for a in settings.arms(settings.SETTINGS)]
    seeds = [int(name.rsplit("seed", 1)[1]) for name in names]
    assert seeds == sorted(seeds)
    assert len(set(names)) == len(names)
    assert not any(name.startswith("lora") for name in names)


@pytest.mark.parametrize(
    ("only", "forms", "seeds", "message"),
    [
        (["nothing"], [], None, "There is no setting 'nothing'"),
        ([], ["int4"], None, "There is no form 'int4'"),
        ([], [], 0, "0 seeds are too few"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(only, forms, seeds, message):
    with pytest.raises(InputError, match=message):
        settings.chosen(settings.SETTINGS, only, forms, seeds)
