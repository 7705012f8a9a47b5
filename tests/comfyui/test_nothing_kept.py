"""The pack has no workspace: what a call took and made is free when the model lets go of it, and no copy stays behind."""

import gc

import pytest
import standin
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from comfy_sage3.comfyui import override as override_module
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.install import hooks_of, install
from comfy_sage3.precision import PrecisionPlan

H, TOKENS, HEAD_DIM = 2, 96, 16
KERNELS = {"exact": "exact", "int8": "int8-emulated", "fp4": "fp4-emulated"}


class Memory:
    """The memory of every call's tensors, held weakly: of q, k and v, and of the results."""

    def __init__(self, monkeypatch, containers):
        self.given, self.made, self.generator = [], [], torch.Generator().manual_seed(0)
        self.containers, self.attend = containers, standin.attend
        monkeypatch.setattr(standin, "attend", self.call)

    def call(self, *_, **kwargs):
        """The model's call, with tensors of its own that nobody else holds."""
        assert not alive(self.given), "the next call begins, and an earlier one's q, k or v is still there"
        assert alive(self.made) <= 2  # which the stand-in itself holds: the last step's result, and the last call's
        q, k, v = (torch.randn(1, TOKENS, H * HEAD_DIM, generator=self.generator) for _ in range(3))
        self.given += [StorageWeakRef(x.untyped_storage()) for x in (q, k, v)]
        if self.containers:
            q, k, v = map(standin.Container, (q, k, v))
        out = self.attend(q, k, v, **kwargs)
        self.made.append(StorageWeakRef(out.untyped_storage()))
        return out


def alive(memory):
    return sum(not ref.expired() for ref in memory)


def long_tensors():
    """By id, every tensor that Python knows of and that has a number or more for each token."""
    gc.collect()
    return {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.numel() >= TOKENS}


def tensors_in(value, seen=None):
    """The tensors in an object's attributes, and in what these hold."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    else:
        inside = [] if isinstance(value, type) or callable(value) else list(getattr(value, "__dict__", {}).values())
    return [found for x in inside for found in tensors_in(x, seen)]


def sampled(precision):
    """A model that has been sampled, and is still there."""
    hook = Hook(PrecisionPlan(precision), emulate=True, node_id="7")
    model = install(standin.Patcher(), hook, lambda hook: None, lambda: None)
    assert model.sample([1.0, 0.6, 0.3], calls=3).shape == (1, TOKENS, H * HEAD_DIM)
    return model


@pytest.mark.parametrize("containers", [False, True])
@pytest.mark.parametrize("precision", KERNELS)
def test_no_memory_of_a_call_outlives_it(comfy, monkeypatch, precision, containers):
    memory = Memory(monkeypatch, containers)
    before = long_tensors()
    model = sampled(precision)
    (hook,) = hooks_of(model)
    assert [(x["kernel"], x["calls"], x["fell_back"]) for x in hook.report.lines()] == [(KERNELS[precision], 9, False)]
    assert (len(memory.given), len(memory.made)) == (27, 9)
    assert alive(memory.given + memory.made) == 0
    assert long_tensors() <= before  # nor was a copy kept, in bits or otherwise


@pytest.mark.parametrize("precision", ["int8", "fp4"])
def test_the_guard_remembers_places_and_shapes_and_no_tensor(comfy, precision):
    (hook,) = hooks_of(sampled(precision))
    assert len(hook.guard._seen) == 3  # a first result for each layer
    assert tensors_in(hook.guard) == []


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_nothing_stays_of_a_call_whose_kernel_failed(comfy, monkeypatch, how):
    memory = Memory(monkeypatch, containers=False)

    def failing(q, k, v, **options):
        if how == "raises":
            raise RuntimeError("launch failed")
        return torch.full_like(q, torch.nan)

    monkeypatch.setattr(override_module, "attention", failing)
    before = long_tensors()
    model = sampled("int8")
    (hook,) = hooks_of(model)
    assert (hook.report.accelerated, hook.report.fell_back) == (0, 9)
    assert alive(memory.given + memory.made) == 0
    assert long_tensors() <= before
    assert tensors_in(hook.guard) == []
