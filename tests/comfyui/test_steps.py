"""Which step runs is known without asking the GPU, and a sampler that cannot be counted is read instead."""

import types

import pytest
import torch

from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.install import install
from comfy_sage3.comfyui.steps import MOST_LOOKS
from comfy_sage3.precision import Precision, PrecisionPlan


class Unreadable(torch.Tensor):
    """A noise level on a GPU, as it were: reading it is what must not happen."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        raise AssertionError(f"{function.__name__} waits for the GPU")


def patched(comfy, **plan):
    hook = Hook(PrecisionPlan("fp4", **plan), emulate=True, node_id="7")
    return install(comfy.Patcher(), hook, lambda h: None, lambda: "p"), hook


def cells(hook):
    return hook.tally.cells(hook.step_count)


def test_a_window_is_applied_without_reading_the_noise_level_in_the_loop(comfy):
    model, hook = patched(comfy, start=0.5)
    entered = hook.enter_step
    hook.enter_step = lambda sampling, t: entered(sampling, torch.Tensor._make_subclass(Unreadable, t))
    model.sample([1.0, 0.75, 0.5, 0.25])
    assert cells(hook) == [["exact", "exact", "fp4-emulated", "fp4-emulated"]] * 2


def test_what_a_sampler_evaluates_between_two_steps_counts_as_the_later_one(comfy):
    model, hook = patched(comfy)
    model.sample([1.0, 0.75, 0.5], looks=2)
    assert hook.report.lines()[0]["calls"] == 12
    assert [sum(c.values()) for c in (hook.tally._cells[("0", step)] for step in range(3))] == [
        96 * 96, 2 * 96 * 96, 3 * 96 * 96,
    ]  # fmt: skip


@pytest.mark.parametrize("sampler", ["dpm_fast_function", "dpm_adaptive_function"])
def test_samplers_that_place_their_own_steps_are_read(comfy, sampler):
    model, hook = patched(comfy, start=0.5)
    own = types.SimpleNamespace(sampler_function=types.SimpleNamespace(__name__=sampler))
    begun = hook.begin
    # the schedule that was given says another thing than what the sampler evaluates
    hook.begin = lambda prompt, sampler, sigmas: begun(prompt, sampler, torch.ones(5))
    model.sample([1.0, 0.25], sampler=own)
    assert (hook.report.accelerated, hook.report.lines()[0]["calls"]) == (2, 2)


def test_a_sampler_that_never_calls_back_is_read_after_a_while(comfy):
    model, hook = patched(comfy, end=0.5)
    model.sample([0.9] * MOST_LOOKS + [0.1] * 3, calls=1, steps=False)
    assert (hook.report.accelerated, sum(x["calls"] for x in hook.report.lines())) == (MOST_LOOKS, MOST_LOOKS + 3)


def test_the_samplers_own_callback_is_called_as_it_was(comfy):
    model, _ = patched(comfy)
    seen = []
    model.sample([1.0, 0.5], callback=lambda step, x0, x, total: seen.append((step, total)))
    assert seen == [(0, 2), (1, 2)]


def test_steps_of_two_samplers_of_one_prompt_follow_each_other(comfy):
    model, hook = patched(comfy, end=0.4)
    model.sample([1.0, 0.7])
    model.sample([0.5, 0.2, 0.1])
    assert cells(hook) == [["fp4-emulated", "fp4-emulated", "exact", "exact", "exact"]] * 2


def test_a_plans_table_is_followed_per_layer_and_step(comfy):
    class Table:
        asked = []

        def choose(self, layer, sigma):
            self.asked.append((layer, round(sigma, 3)))
            return {("0", 1.0): Precision.FP4, ("1", 1.0): Precision.INT8, ("1", 0.5): Precision.FP4}.get(
                self.asked[-1], Precision.EXACT
            )

    table = Table()
    hook = Hook(PrecisionPlan("auto"), emulate=True, table=table)
    model = install(comfy.Patcher(), hook, lambda h: None, lambda: "p")
    model.sample([1.0, 0.5], looks=1)
    assert cells(hook) == [["fp4-emulated", "exact"], ["int8-emulated", "fp4-emulated"]]
    assert table.asked == [("0", 1.0), ("1", 1.0), ("0", 0.5), ("1", 0.5)]  # once a layer and step
    assert "exact by the plan" in [x["reason"] for x in hook.report.lines()]


def test_a_model_that_names_no_layers_has_one_row_in_the_plan():
    class Table:
        def choose(self, layer, sigma):
            return Precision.INT8 if (layer, sigma) == ("", 0.5) else Precision.EXACT

    hook = Hook(PrecisionPlan("auto"), table=Table())
    assert hook.wish(4096, 4096) == (Precision.EXACT, "outside a sampling, where the plan does not apply")
    hook.enter_step(None, torch.tensor([0.5]))
    assert hook.wish(4096, 4096) == (Precision.INT8, "")
