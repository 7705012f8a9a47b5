"""The hook on a model: counting per prompt, the step window, chaining, and what the node says."""

import logging
import sys

import pytest
import torch

from comfy_sage3.comfyui import hook as hook_module
from comfy_sage3.comfyui import install as install_module
from comfy_sage3.comfyui import status
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.install import SLOT, hooks_of, install
from comfy_sage3.precision import PrecisionPlan


def counts(hook):
    report = hook.report
    return sum(x["calls"] for x in report.lines()), report.accelerated, report.fell_back


def patched(comfy, precision="fp4", prompt=lambda: "p", done=lambda hook: None, model=None, **plan):
    hook = Hook(PrecisionPlan(precision, **plan), emulate=True, node_id="7")
    return install(model or comfy.Patcher(), hook, done, prompt), hook


def test_the_given_model_is_left_alone(comfy):
    model = comfy.Patcher()
    clone, hook = patched(comfy, model=model)
    assert model.model_options == {"transformer_options": {}}
    assert not model.wrappers
    assert hooks_of(model) == ()
    assert hooks_of(clone) == (hook,)
    assert hooks_of(clone.clone()) == (hook,)


def test_a_model_has_one_override_made_once(comfy, monkeypatch):
    """Clones and runs share it: what is in the slot is the same function at every step."""
    made = []
    real = install_module.make_override
    monkeypatch.setattr(install_module, "make_override", lambda *args: made.append(real(*args)) or made[-1])
    model, hook = patched(comfy)
    for sampled in (model, model.clone(), model):
        sampled.sample([1.0, 0.5])
    assert made == hook.overrides == [model.model_options["transformer_options"][SLOT]]


def test_what_serves_calls_that_look_alike_is_decided_once_a_sampling(comfy, monkeypatch):
    decided, wished = [], []
    choose, wish_of = hook_module.choose, Hook._wish_of
    monkeypatch.setattr(hook_module, "choose", lambda *args, **kwargs: decided.append(1) or choose(*args, **kwargs))
    monkeypatch.setattr(Hook, "_wish_of", lambda self, layer: wished.append(str(layer)) or wish_of(self, layer))
    model, hook = patched(comfy, end=0.5)
    model.sample([1.0, 0.75, 0.5, 0.25], calls=3)
    assert counts(hook) == (12, 9, 0)
    assert len(decided) == 1
    assert wished == ["layer 0", "layer 1", "layer 2"] * 4  # once a layer and step


def test_counts_start_anew_with_each_prompt_and_add_up_within_one(comfy):
    prompts = iter(["a", "a", "b", None, None])
    model, hook = patched(comfy, prompt=lambda: next(prompts))
    seen = []
    for _ in range(5):
        model.sample([1.0, 0.5])
        seen.append(counts(hook)[0])
    assert seen == [4, 8, 4, 4, 4]


@pytest.mark.parametrize(("window", "inside"), [((0, 1), 5), ((0, 0.5), 3), ((0.4, 1), 3), ((0.2, 0.6), 2), ((0.3, 0.3), 0)])
def test_the_window_is_compared_in_sigma(comfy, window, inside):
    model, hook = patched(comfy, start=window[0], end=window[1])
    model.sample([1.0, 0.75, 0.5, 0.25, 0.1])  # percent 0, 25, 50, 75, 90
    total, accelerated, fell_back = counts(hook)
    assert (total, accelerated, fell_back) == (10, 2 * inside, 0)


def test_the_whole_schedule_never_reads_sigma(comfy):
    """On a GPU reading it would wait for the device."""
    _, hook = patched(comfy)
    hook.enter_step(None, None)  # reading these would raise
    assert hook.inside_window


def test_a_model_sampling_node_placed_later_is_respected(comfy):
    class Late(comfy.Sampling):
        def percent_to_sigma(self, percent):
            return 10 * super().percent_to_sigma(percent)

    model, hook = patched(comfy, start=0.5, end=1.0)
    hook.enter_step(comfy.Sampling(), torch.tensor([4.0]))
    assert not hook.inside_window
    hook.enter_step(Late(), torch.tensor([4.0]))
    assert hook.inside_window


def test_the_outcome_is_told_even_when_sampling_fails(comfy):
    told = []
    model, hook = patched(comfy, done=told.append)
    with pytest.raises(ZeroDivisionError):
        model.run("outer_sample", lambda **kwargs: 1 / 0)
    assert told == [hook]


def test_two_nodes_in_a_row(comfy):
    first, one = patched(comfy, precision="int8")
    second, two = patched(comfy, precision="fp4", end=0.5, model=first)
    assert hooks_of(second) == (one, two)
    second.sample([1.0, 0.25])
    assert counts(two) == (4, 2, 0)
    assert counts(one) == (2, 2, 0)


def test_status_text_names_every_outcome(comfy):
    model, hook = patched(comfy, min_tokens=64)
    model.sample([1.0, 0.5])
    model.sample([1.0], tokens=32)
    hook.count(None, "fp4", "exact", "a reason", True)
    text = status.text(hook)
    head, *rows = text.splitlines()
    assert head == "7 attention calls: 4 accelerated, 1 fell back, 2 left exact"
    assert "1 x exact: a reason" in rows
    assert "2 x exact: fewer than 64 tokens" in rows
    (emulated,) = [r for r in rows if r.startswith("4 x fp4-emulated")]
    assert "the quality is real, the speed is not" in emulated


def test_a_model_that_never_calls_the_hook_is_reported(comfy, caplog):
    model, hook = patched(comfy, done=status.publish)
    with caplog.at_level(logging.INFO):
        model.sample([1.0], calls=0)
    assert "0 attention calls seen: this model never called" in status.text(hook)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    ((event, data),) = comfy.Server.instance.sent
    assert event == "sage3.status"
    assert data["text"] == status.text(hook)


def test_the_event_names_the_node_and_the_numbers(comfy):
    model, hook = patched(comfy, done=status.publish)
    model.sample([1.0])
    ((_, data),) = comfy.Server.instance.sent
    assert (data["node"], data["accelerated"], data["fell_back"]) == ("7", 2, 0)
    assert data["lines"] == hook.report.lines()


@pytest.mark.parametrize("fault", ["no server", "no instance", "broken"])
def test_no_status_display_is_no_failure(comfy, monkeypatch, fault):
    if fault == "no server":
        monkeypatch.setitem(sys.modules, "server", None)
    elif fault == "no instance":
        monkeypatch.setattr(comfy.Server, "instance", None)
    else:
        monkeypatch.setattr(comfy.Server, "send_sync", lambda *a: 1 / 0)
    model, hook = patched(comfy, done=status.publish)
    assert model.sample([1.0]) is not None
    assert counts(hook)[1] == 2


def test_current_prompt_outside_the_executor(comfy, monkeypatch):
    assert status.current_prompt() == "prompt-1"
    monkeypatch.setattr(sys.modules["comfy_execution.utils"], "get_executing_context", lambda: None)
    assert status.current_prompt() is None


def test_the_slot_name(comfy):
    model, _ = patched(comfy)
    assert SLOT in model.model_options["transformer_options"]
