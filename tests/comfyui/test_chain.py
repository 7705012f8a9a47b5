"""Other nodes' overrides before and after ours: nobody is lost, nobody runs twice."""

import functools

import pytest

from comfy_sage3.comfyui import status
from comfy_sage3.comfyui.chain import leads_to
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.install import SLOT, install
from comfy_sage3.precision import PrecisionPlan


def ours():
    """A stand-in for the function in the slot."""


class Keeper:
    def __init__(self, previous):
        self.previous = previous

    def __call__(self):
        return self.previous()

    def method(self):
        return self.previous()


def closure(previous):
    def override():
        return previous()

    return override


def default(previous):
    def override(previous=previous):
        return previous()

    return override


def wrapped(previous):
    @functools.wraps(previous)
    def override():
        return None

    return override


def listed(previous):
    held = {"earlier": [previous]}
    return lambda: held


KEEPING = {
    "itself": lambda f: f,
    "a closure": closure,
    "an object": Keeper,
    "a method": lambda f: Keeper(f).method,
    "a partial": lambda f: functools.partial(print, f),
    "a default": default,
    "what it wraps": wrapped,
    "a list in a dict in a closure": listed,
    "three deep": lambda f: closure(Keeper(closure(f))),
}


@pytest.mark.parametrize("how", KEEPING)
def test_an_override_that_keeps_ours_is_recognised(how):
    assert leads_to(KEEPING[how](ours), [ours])


@pytest.mark.parametrize("other", [None, print, lambda: 0, closure(print), Keeper(print), closure(None)])
def test_an_override_without_ours_is_recognised(other):
    assert not leads_to(other, [ours])


def test_a_circle_ends():
    a, b = Keeper(None), Keeper(None)
    a.previous, b.previous = b.method, a.method
    assert not leads_to(a.method, [ours])


def patched(comfy, model=None, **plan):
    hook = Hook(PrecisionPlan("fp4", **plan), emulate=True, node_id="7")
    return install(model or comfy.Patcher(), hook, lambda h: None, lambda: "p"), hook


def test_a_later_override_that_drops_ours_serves_what_ours_leaves(comfy):
    model, hook = patched(comfy, start=0.5)
    calls = []

    def later(func, *args, **kwargs):
        calls.append(func)
        return func(*args, **kwargs)

    model.sample([1.0, 0.75, 0.5], options={SLOT: later})
    assert (hook.report.accelerated, len(calls)) == (2, 4)
    assert "was put back" in status.text(hook)
    assert hook.overrides[1:] == hook.overrides[-1:]  # made once, not once a step


def test_a_later_override_that_keeps_ours_stays_on_top(comfy):
    model, hook = patched(comfy)
    kept = model.model_options["transformer_options"][SLOT]
    calls = []

    def later(func, *args, **kwargs):
        calls.append(func)
        return kept(func, *args, **kwargs) if len(calls) % 2 else func(*args, **kwargs)

    model.sample([1.0, 0.5], options={SLOT: later})
    assert (len(calls), hook.report.accelerated) == (4, 2)
    assert "was put back" not in status.text(hook)


def test_a_later_override_that_hides_that_it_keeps_ours_does_not_run_in_circles(comfy):
    model, hook = patched(comfy, start=0.5)
    kept = model.model_options["transformer_options"]

    def later(func, *args, **kwargs):
        return kept[SLOT](func, *args, **kwargs)  # found anew at each call

    later_hidden = types_hidden(later)
    model.sample([1.0, 0.25], options={SLOT: later_hidden})
    assert (hook.report.accelerated, sum(x["calls"] for x in hook.report.lines())) == (2, 4)


def types_hidden(function):
    """A callable whose insides cannot be looked at."""

    class Hidden:
        __slots__ = ("_call",)

        def __call__(self, *args, **kwargs):
            return self._call(*args, **kwargs)

    hidden = Hidden()
    hidden._call = function
    return hidden


def test_two_differently_patched_clones_do_not_meet(comfy):
    base = comfy.Patcher()
    (one, first), (two, second) = patched(comfy, base), patched(comfy, base, end=0.0)
    one.sample([1.0, 0.5])
    two.sample([1.0, 0.5])
    assert (first.report.accelerated, second.report.accelerated) == (4, 0)
    assert base.model_options == {"transformer_options": {}}


def test_unpatched_is_bit_identical(comfy):
    base = comfy.Patcher()
    before = base.sample([1.0])
    patched(comfy, base)[0].sample([1.0])
    assert (base.sample([1.0]) == before).all()
