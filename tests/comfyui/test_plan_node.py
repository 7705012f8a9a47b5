"""Sage3 Precision Plan and Sage3 Load Plan, against the stand-in: measure, solve, save, load, refuse, stop."""

import json
import os
import sys
import types

import pytest
import torch
from torch import nn

from comfy_sage3.comfyui import plan_files
from comfy_sage3.comfyui.calibration import Calibrator
from comfy_sage3.comfyui.fingerprint import check, fingerprint_of
from comfy_sage3.comfyui.install import SLOT
from comfy_sage3.errors import InputError
from comfy_sage3.plan.plan import LayerPlan
from comfy_sage3.precision import Precision

FP4, INT8, EXACT = Precision.FP4, Precision.INT8, Precision.EXACT
SETTINGS = {
    "positive": [], "negative": [], "seed": 1, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple",
    "denoise": 1.0, "budget": "custom", "custom_error": 1.0, "calibrated_steps": 2, "min_tokens": 16, "emulate": True,
    "file_name": "",
}  # fmt: skip


class Network(nn.Module):
    def __init__(self, seed=0, width=8):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)


@pytest.fixture
def user(comfy, tmp_path):
    """ComfyUI's user directory."""
    sys.modules["folder_paths"].folders["user"] = [str(tmp_path)]
    return tmp_path


@pytest.fixture
def node(user):
    from comfy_sage3.comfyui import plan_node

    return plan_node


@pytest.fixture
def model(comfy):
    made = comfy.Patcher()
    made.model = types.SimpleNamespace(diffusion_model=Network())
    made.backup = {}
    return made


@pytest.fixture
def cheap(monkeypatch):
    """Costs of a long call, whatever the length: at 96 tokens exact attention is the fastest."""
    cost = {EXACT: 1.0, INT8: 0.5, FP4: 0.25}
    monkeypatch.setattr("comfy_sage3.plan.calibrate.modelled", lambda p, *shapes: cost[p])


def run(node, model, tokens=96, **settings):
    return node.Sage3PrecisionPlan.execute(model=model, latent_image={"tokens": tokens}, **(SETTINGS | settings))


def test_it_measures_at_some_steps_and_plans_for_all(node, model, cheap):
    out = run(node, model)
    plan, image, said, latent = out.args
    assert plan.layers == ("0", "1")
    assert plan.sigmas == (1.0, 0.25)
    assert plan.steps == (3, 1)  # a half lies as near to one as to a quarter, by ratio: the noisier has it
    assert plan.chosen == ((FP4, FP4), (FP4, FP4))
    assert plan.model == fingerprint_of(model)
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert said == out.ui["text"][0]
    assert "fp4 in 8 of 8 layer steps" in said
    assert latent["tokens"] == 96


def test_the_run_itself_is_the_models_own_bit_for_bit(node, model, comfy):
    (plain,) = comfy.KSampler.common(model.clone(), 1, 4, 3.0, "euler", "simple", [], [], {"tokens": 96})
    assert torch.equal(run(node, model).args[3]["samples"], plain["samples"])


def test_nothing_is_left_on_the_model(node, model):
    run(node, model)
    assert model.model_options == {"transformer_options": {}}
    assert model.wrappers == {}
    assert model.attachments == {}


def test_an_override_that_was_there_serves_the_run(node, model, comfy):
    calls = []

    def earlier(func, *args, **kwargs):
        calls.append(func)
        return func(*args, **kwargs)

    model.model_options["transformer_options"][SLOT] = earlier
    run(node, model)
    assert len(calls) == 4 * 2  # no replay among them


def test_the_budget_is_kept(node, model, cheap):
    all_fp4 = run(node, model).args[0]
    plan = run(node, model, custom_error=0.5 * all_fp4.mean_error).args[0]
    assert 0 < plan.mean_error <= 0.5 * all_fp4.mean_error
    assert FP4 not in plan.counts() or INT8 in plan.counts()
    assert run(node, model, custom_error=0.0).args[0].counts() == {EXACT: 8}


@pytest.mark.parametrize(
    ("columns", "want"), [(1, [0.5]), (2, [1.0, 0.25]), (4, [1.0, 0.75, 0.5, 0.25]), (50, [1.0, 0.75, 0.5, 0.25])]
)
def test_columns_are_spread_over_the_schedule(node, model, columns, want):
    assert list(run(node, model, calibrated_steps=columns).args[0].sigmas) == want


def test_a_sampler_that_looks_twice_at_a_step_has_one_column_there(node, model, cheap):
    once, twice = (run(node, model, sampler_name=s).args[0] for s in ("euler", "heun"))
    assert twice.sigmas == once.sigmas
    assert twice.errors[FP4][0][0] == pytest.approx(once.errors[FP4][0][0])
    assert twice.total_seconds() == 2 * once.total_seconds()


def test_steps_that_a_sampler_never_meets_are_taken_from_the_next_look():
    look = Calibrator(3, emulate=True, min_tokens=0)
    look.begin([1.0, 0.8, 0.6, 0.4, 0.2])
    columns = []
    for sigma in (1.0, 0.9, 0.55, 0.55, 0.5, 0.7, 0.19, 0.01):
        look.enter_step(sigma)
        columns.append(look._column)
    assert look.sigmas == [1.0, 0.55, 0.19]
    assert columns == [0, None, 1, 1, None, None, 2, None]


def test_calls_without_a_layer_are_one_row(node, model, comfy, monkeypatch):
    monkeypatch.setattr("comfy_sage3.comfyui.calibration.Layer.of", lambda options: None)
    out = run(node, model)
    assert out.args[0].layers == ("",)
    assert "goes by steps only" in out.args[2]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"min_tokens": 97}, "None of the 8 attention calls of this sampling had 97 tokens.* lower min_tokens"),
        ({"emulate": False}, "No 4- or 8-bit kernel can run here .*this is a CPU.* turn emulate on"),
        ({"budget": "lavish"}, "choose one of draft, balanced, faithful or custom"),
        ({"custom_error": 7.0}, "give a relative error from 0 to 1"),
    ],
)
def test_what_cannot_be_planned_is_said(node, model, settings, why):
    with pytest.raises(InputError, match=why):
        run(node, model, **settings)
    assert model.model_options == {"transformer_options": {}}


def test_a_model_that_never_asks_is_recognised(node, model, monkeypatch):
    monkeypatch.setattr(type(model), "sample", lambda self, *args, **kwargs: torch.zeros(1))
    with pytest.raises(InputError, match="never called ComfyUI's attention hook"):
        run(node, model)


def test_a_model_behind_sage3_attention_is_refused(node, model):
    from comfy_sage3.comfyui.nodes import Sage3Attention

    (patched,) = Sage3Attention.execute(model, "fp4", 0.0, 1.0, 0, True).args
    patched.model = model.model
    with pytest.raises(InputError, match="connect the model as it was before that node"):
        run(node, patched)


def test_cancelling_stops_the_sampling_and_leaves_nothing_behind(node, model, comfy, monkeypatch):
    monkeypatch.setattr(comfy.KSampler, "interrupted", True)
    with pytest.raises(comfy.Interrupted):
        run(node, model, file_name="half")
    assert model.model_options == {"transformer_options": {}}
    assert plan_files.saved() == []


def test_a_compiled_model_is_measured_all_the_same(node, model, comfy, cheap):
    import torch._dynamo

    eager = run(node, model).args[0]
    attend = comfy.attend
    try:
        comfy.attend = torch.compile(attend, backend="eager")
        compiled = run(node, model).args[0]
    finally:
        comfy.attend = attend
        torch._dynamo.reset()
    assert compiled == eager


def test_the_plan_is_what_sage3_attention_follows(node, model, cheap, comfy):
    from comfy_sage3.comfyui.install import hooks_of
    from comfy_sage3.comfyui.nodes import Sage3Attention

    plan = run(node, model, calibrated_steps=4).args[0]
    chosen = ((FP4, INT8, EXACT, INT8), (INT8, EXACT, FP4, FP4))
    from dataclasses import replace

    plan = replace(plan, chosen=chosen)
    (patched,) = Sage3Attention.execute(model, "auto", 0.0, 1.0, 16, True, plan=plan).args
    comfy.KSampler.common(patched, 1, 4, 3.0, "euler", "simple", [], [], {"tokens": 96})
    (hook,) = hooks_of(patched)
    kernels = [[k.removesuffix("-emulated") for k in row] for row in hook.tally.cells(4)]
    assert kernels == [[p.value for p in row] for row in chosen]


def test_sage3_attention_refuses_another_models_plan_and_keeps_short_calls_exact(node, model, cheap):
    from comfy_sage3.comfyui.install import hooks_of
    from comfy_sage3.comfyui.nodes import Sage3Attention

    plan = run(node, model).args[0]
    (patched,) = Sage3Attention.execute(model, "auto", 0.0, 1.0, 0, True, plan=plan).args
    assert hooks_of(patched)[0].plan.min_tokens == SETTINGS["min_tokens"]  # shorter ones were not measured
    model.model = types.SimpleNamespace(diffusion_model=Network(seed=1))
    with pytest.raises(InputError, match="made for another model"):
        Sage3Attention.execute(model, "auto", 0.0, 1.0, 0, True, plan=plan)
    with pytest.raises(InputError, match="no precision plan"):
        Sage3Attention.execute(model, "auto", 0.0, 1.0, 0, True, plan={"layers": []})


# saving and loading


def test_a_saved_plan_is_offered_and_loaded(node, model, user):
    plan = run(node, model, file_name="my plan").args[0]
    assert (user / "sage3_plans" / "my plan.json").is_file()
    (options,) = [i.options["options"] for i in node.Sage3LoadPlan.define_schema().options["inputs"] if i.id == "plan_name"]
    assert options == ["my plan"]
    loaded, image, said = node.Sage3LoadPlan.execute(model, "my plan").args
    assert loaded == plan
    assert image.shape[3] == 3
    assert plan.model in said


def test_without_plans_the_list_says_so(node):
    (options,) = [i.options["options"] for i in node.Sage3LoadPlan.define_schema().options["inputs"] if i.id == "plan_name"]
    assert options == [node.NONE_SAVED]


def test_another_models_plan_is_refused(node, model):
    run(node, model, file_name="a")
    model.model = types.SimpleNamespace(diffusion_model=Network(seed=1))
    with pytest.raises(InputError, match="made for another model .* make one for this model with Sage3 Precision Plan"):
        node.Sage3LoadPlan.execute(model, "a")


def test_a_plan_made_again_is_read_again(node, model, user):
    run(node, model, file_name="a")
    before = node.Sage3LoadPlan.fingerprint_inputs(plan_name="a", model=model)
    assert node.Sage3LoadPlan.fingerprint_inputs(plan_name="a", model=model) == before
    os.utime(user / "sage3_plans" / "a.json", ns=(1, 1))
    assert node.Sage3LoadPlan.fingerprint_inputs(plan_name="a", model=model) != before
    assert node.Sage3LoadPlan.fingerprint_inputs(plan_name="b", model=model) == "none"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../../evil", "evil"), ("/etc/passwd", "etc_passwd"), ("C:\\x", "C_x"), ("a\x00b", "a_b"), ("..", ""), ("  . ", ""),
        ("", ""), ("con", "con_"), ("NUL.txt", "NUL.txt_"), ("x" * 300, "x" * 80), ("Wan 2.2 (14B)", "Wan 2.2 (14B)"),
        ("плат 计划", "плат 计划"),
    ],
)  # fmt: skip
def test_names_cannot_leave_the_folder(name, file):
    assert plan_files.clean(name) == file
    assert plan_files.clean(file) == file


def test_a_name_of_which_nothing_is_left_is_refused_before_sampling(node, user):
    assert node.Sage3PrecisionPlan.validate_inputs(budget="draft", custom_error=0.1, file_name="../..") != True  # noqa: E712
    assert node.Sage3PrecisionPlan.validate_inputs(budget="draft", custom_error=0.1, file_name="") is True
    assert node.Sage3PrecisionPlan.validate_inputs() is True
    assert "from 0 to 1" in node.Sage3PrecisionPlan.validate_inputs(budget="custom", custom_error=2.0)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "none", "broken"])
def test_only_plans_of_the_folder_are_read(node, model, user, name):
    (user / "secret.json").write_text("{}")
    (user / "sage3_plans").mkdir()
    (user / "sage3_plans" / "broken.json").write_text('{"format": "something else"}')
    with pytest.raises(InputError, match="There is no saved plan|not a precision plan"):
        node.Sage3LoadPlan.execute(model, name)


def test_a_plan_is_saved_whole_or_not_at_all(node, model, user, monkeypatch):
    run(node, model, file_name="a")
    before = (user / "sage3_plans" / "a.json").read_text()

    def broken(self):
        raise RuntimeError("disk")

    monkeypatch.setattr(LayerPlan, "to_json", broken)
    with pytest.raises(RuntimeError, match="disk"):
        run(node, model, file_name="a")
    assert [p.name for p in (user / "sage3_plans").iterdir()] == ["a.json"]
    assert (user / "sage3_plans" / "a.json").read_text() == before
    assert json.loads(before)["format"] == "comfy_sage3.plan"


# fingerprints


def test_a_fingerprint_survives_patches_reloading_and_wrapping(model):
    want = fingerprint_of(model)
    network = model.model.diffusion_model
    assert want.startswith("Network-")
    again = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=Network()))
    assert fingerprint_of(again) == want
    for name, p in network.named_parameters():  # as a LoRA is written into the weights
        model.backup[f"diffusion_model.{name}"] = types.SimpleNamespace(weight=p.data.clone())
        p.data = p.data + 1
    assert fingerprint_of(model) == want
    model.backup.clear()
    assert fingerprint_of(model) != want


def test_a_compiled_network_has_the_fingerprint_of_its_own(model):
    want = fingerprint_of(model)
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="eager")
    assert fingerprint_of(model) == want


@pytest.mark.parametrize("other", [Network(seed=1), Network(width=9), nn.Sequential(*Network().blocks)])
def test_another_checkpoint_or_architecture_has_another(model, other):
    assert fingerprint_of(types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=other))) != fingerprint_of(model)


def test_a_fine_tune_that_changes_one_kind_of_layer_has_another(model):
    want = fingerprint_of(model)
    with torch.no_grad():
        for block in model.model.diffusion_model.blocks:
            block.weight.mul_(1.001)
    assert fingerprint_of(model) != want


def test_what_is_no_plan_is_refused(model):
    with pytest.raises(InputError, match="no precision plan"):
        check({"a": 1}, model)
