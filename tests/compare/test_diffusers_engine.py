"""The embedded engine: Wan's attention goes through the door while a run lasts, and only then."""

from __future__ import annotations

import dataclasses
import importlib
import threading

import numpy as np
import pytest
import torch

from comfy_sage3.compare import diffusers_engine
from comfy_sage3.compare.diffusers_engine import DiffusersEngine, pick_device, routed, wan_module
from comfy_sage3.compare.engine import Request, Side, is_emulated
from comfy_sage3.demo.sizes import Size
from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.precision import Precision

pytest.importorskip("diffusers")

SIZE = Size(32, 32, 5)
REQUEST = Request("a large red circle moving left on a black background", SIZE, seed=3, steps=2)
EXACT = Side("A", Precision.EXACT)
FP4 = Side("B", Precision.FP4, min_tokens=0)  # the videos here are shorter than any real one
LAYERS, KINDS, BRANCHES = 6, 2, 2


@pytest.fixture(scope="module")
def engine():
    return DiffusersEngine("cpu")


def quiet(done: int, steps: int) -> None:
    pass


def forward(engine, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(1, *SIZE.latent_shape)
    with torch.inference_mode():
        return engine.transformer(x, torch.full((1,), 500.0), torch.randn(1, 11, 4096), return_dict=False)[0]


def test_every_self_and_cross_attention_call_comes_by_once_with_its_place(engine):
    seen = []

    def route(place, q, k, v, options):
        seen.append((place.layer, place.kind, tuple(q.shape), k.shape[1], set(options)))
        return torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), scale=options["scale"]
        ).transpose(1, 2)

    expected = forward(engine)
    with routed(engine.transformer, route):
        out = forward(engine)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    options = {"mask", "is_causal", "scale", "enable_gqa"}
    shape = (1, SIZE.tokens, 2, 128)
    assert seen == [
        (layer, kind, shape, SIZE.tokens if kind == "self" else 11, options)
        for layer in range(LAYERS)
        for kind in ("self", "cross")
    ]


def test_the_patch_is_undone_after_success_and_after_an_error(engine):
    original = wan_module().dispatch_attention_fn
    block = engine.transformer.blocks[0].attn1
    hooks = len(block._forward_pre_hooks), len(block._forward_hooks)

    def fail(place, q, k, v, options):
        raise RuntimeError("kernel failed")

    with pytest.raises(RuntimeError, match="kernel failed"), routed(engine.transformer, fail):
        forward(engine)
    assert wan_module().dispatch_attention_fn is original
    assert (len(block._forward_pre_hooks), len(block._forward_hooks)) == hooks
    engine.generate(REQUEST, EXACT, quiet)
    assert wan_module().dispatch_attention_fn is original
    assert (len(block._forward_pre_hooks), len(block._forward_hooks)) == hooks


def test_cancelling_a_step_undoes_the_patch(engine):
    original = wan_module().dispatch_attention_fn

    def cancel(done, steps):
        raise KeyboardInterrupt

    for run in (
        lambda: engine.generate(REQUEST, FP4, cancel),
        lambda: engine.inspect(REQUEST, EXACT, FP4, cancel),
    ):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert wan_module().dispatch_attention_fn is original
    assert not engine.transformer._forward_pre_hooks


@pytest.mark.parametrize("where", ["first replay", "last replay", "last velocity"])
def test_an_inspection_can_be_cancelled_between_its_measurements(engine, where):
    """Not only while it samples: a stop that comes later than that is heard at the next call, kernel or velocity."""
    original, seen = wan_module().dispatch_attention_fn, []
    engine.inspect(REQUEST, EXACT, FP4, lambda done, steps: seen.append((done, steps)))
    replays, velocities = 3 * REQUEST.steps * LAYERS * 2, 3 * REQUEST.steps
    assert len(seen) == REQUEST.steps + replays + velocities
    assert [done / steps for done, steps in seen] == sorted(done / steps for done, steps in seen)
    assert seen[-1][0] == seen[-1][1]
    at = {"first replay": REQUEST.steps, "last replay": REQUEST.steps + replays - 1, "last velocity": len(seen) - 1}[where]
    seen.clear()

    def cancel(done, steps):
        seen.append(done)
        if len(seen) == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.inspect(REQUEST, EXACT, FP4, cancel)
    assert wan_module().dispatch_attention_fn is original
    assert not engine.transformer._forward_pre_hooks


def test_other_models_and_other_threads_keep_diffusers_own_path(engine):
    calls = []
    q = torch.randn(1, 4, 2, 8)

    def route(place, *_):
        calls.append(place)
        raise AssertionError("not ours")

    with routed(engine.transformer, route):
        wan_module().dispatch_attention_fn(q, q, q)
        thread = threading.Thread(target=lambda: wan_module().dispatch_attention_fn(q, q, q))
        thread.start()
        thread.join()
    assert calls == []


def test_a_transformer_that_ran_without_a_call_is_an_error(engine):
    block = engine.transformer.blocks[0].attn1

    def enter_and_call_nothing():
        with routed(engine.transformer, None):
            for hook in block._forward_pre_hooks.values():
                hook(block, ())

    with pytest.raises(EngineError, match="without calling dispatch_attention_fn"):
        enter_and_call_nothing()


def test_a_diffusers_that_routes_otherwise_is_refused(monkeypatch):
    monkeypatch.delattr(importlib.import_module(diffusers_engine.WAN_MODULE), "dispatch_attention_fn")
    with pytest.raises(EngineError, match=r"diffusers [\d.]+ does not send Wan's attention .* pip install 'diffusers>="):
        DiffusersEngine("cpu")


def test_a_missing_diffusers_is_one_sentence(monkeypatch):
    monkeypatch.setattr(diffusers_engine, "WAN_MODULE", "diffusers_that_is_not_there.wan")
    with pytest.raises(EngineError, match="needs diffusers 0.36 or newer"):
        wan_module()


def test_a_run_reports_its_calls_and_times(engine):
    g = engine.generate(REQUEST, FP4, quiet)
    assert sum(line["calls"] for line in g.report) == LAYERS * KINDS * BRANCHES * REQUEST.steps
    assert {line["kernel"] for line in g.report} == {"fp4-emulated"}
    assert is_emulated(g.report)
    assert len(g.seconds_per_step) == REQUEST.steps
    assert 0 < g.attention_seconds < g.seconds_total
    assert sum(g.seconds_per_step) <= g.seconds_total
    assert g.peak_memory_bytes is None


def test_short_calls_stay_exact_with_a_reason(engine):
    g = engine.generate(REQUEST, Side("B", Precision.FP4, min_tokens=9), quiet)  # self has 8 tokens, text 11
    half = LAYERS * BRANCHES * REQUEST.steps
    assert [(x["kernel"], x["calls"], x["fell_back"], x["reason"]) for x in g.report] == [
        ("exact", 2 * half, False, "fewer than 9 tokens")
    ]
    wide = dataclasses.replace(REQUEST, size=Size(64, 64, 17), steps=1)  # 80 tokens
    lines = engine.generate(wide, Side("B", Precision.FP4), quiet).report
    assert {(x["wished"], x["kernel"], x["calls"], x["fell_back"]) for x in lines} == {
        ("fp4", "fp4-emulated", 12, False),
        ("exact", "exact", 12, False),
    }
    exact = engine.generate(wide, Side("A", Precision.EXACT), quiet).report
    assert [(x["reason"], x["calls"]) for x in exact] == [("asked for", 24)]


def test_without_emulation_the_fallback_and_its_reason_are_reported(engine):
    g = engine.generate(REQUEST, Side("B", Precision.FP4, emulate=False, min_tokens=0), quiet)
    assert [line["kernel"] for line in g.report] == ["exact"]
    assert g.report[0]["fell_back"]
    assert g.report[0]["reason"]


def test_the_same_seed_gives_the_same_video_and_fp4_another(engine):
    first, again, fp4 = (engine.generate(REQUEST, side, quiet) for side in (EXACT, EXACT, FP4))
    torch.testing.assert_close(first.handle, again.handle, rtol=0, atol=0)
    assert not torch.equal(first.handle, fp4.handle)
    engine.finish(first)
    assert first.video.shape == (SIZE.frames, SIZE.height, SIZE.width, 3)
    assert first.video.dtype == np.uint8
    assert first.decode_seconds > 0
    assert first.handle is None


def test_exact_computed_a_second_way_is_nearly_the_same(engine):
    usual, second, fp4 = (
        engine.exact(REQUEST, False, quiet).handle,
        engine.exact(REQUEST, True, quiet).handle,
        engine.generate(REQUEST, FP4, quiet).handle,
    )
    floor, error = (usual - second).abs().mean(), (usual - fp4).abs().mean()
    assert 0 < floor < 1e-4
    assert error > 10 * floor


def test_inspection_measures_every_layer_and_step_against_exact(engine):
    found = engine.inspect(REQUEST, EXACT, FP4, quiet)
    places = [(r["step"], r["layer"], r["kind"]) for r in found.replay]
    assert places == [(s, n, k) for s in range(2) for n in range(LAYERS) for k in ("self", "cross")]
    for row in found.replay:
        assert row["q_tokens"] == SIZE.tokens
        assert row["k_tokens"] == (SIZE.tokens if row["kind"] == "self" else 11)
        assert row["a"] == row["floor"]  # side A is exact, computed the usual way
        assert row["floor"]["relative_l1"] < 1e-5 < row["b"]["relative_l1"] < 1
        # Cross-attention reads 11 text tokens whose few, large weights 4 bits hold badly: why the node has min_tokens.
        assert row["b"]["cosine"] > (0.95 if row["kind"] == "self" else 0.6)
    assert [r["step"] for r in found.one_step] == [0, 1]
    assert found.one_step[0]["sigma"] == pytest.approx(1.0)
    for row in found.one_step:
        assert row["floor"]["rmse"] < row["b"]["rmse"]


def test_warm_up_is_short(engine):
    steps = []
    engine.warm_up(Request(REQUEST.prompt, SIZE, steps=9), EXACT, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]


def test_an_unknown_word_is_refused_before_any_work(engine):
    with pytest.raises(InputError, match="does not know the word"):
        engine.check(Request("a red unicorn", SIZE), (EXACT, FP4))


def test_the_description_names_device_and_versions(engine):
    described = engine.describe()
    assert described["device"].startswith("CPU: ")
    assert described["torch"] == torch.__version__
    assert all(isinstance(v, str) and v for v in described.values())


@pytest.mark.parametrize("name", ["tpu", "cpu:0", "cuda:x", "", "cuda:-1"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(InputError, match="Unknown device"):
        pick_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="no CUDA GPU"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="There is no cuda:1"):
        pick_device("cuda:1")
