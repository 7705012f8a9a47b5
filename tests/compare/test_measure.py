"""What is run, in which order, and what is computed from it."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from comfy_sage3.compare.capture import MAX_CAPTURED_BYTES, MAX_CAPTURED_STEPS, spread
from comfy_sage3.compare.engine import EMULATED_NOTE, Request, Side
from comfy_sage3.compare.measure import SCHEMA, SCHEMA_VERSION, compare, json_safe, pair
from comfy_sage3.compare.page import report_html
from comfy_sage3.compare.tables import command, headline, terminal
from comfy_sage3.demo.sizes import CPU_SIZE, GPU_SIZE, MIN_TOKENS, Size
from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.precision import Precision


def test_order_is_warm_up_then_interleaved_then_one_decode_each(standin, request_, sides):
    compare(standin, request_, *sides, repeats=3)
    assert standin.log == [
        *("check", "warm-up A", "warm-up B"),
        *("run A", "run B") * 3,
        *("decode exact", "decode fp4", "inspect", "exact second way", "decode second"),
    ]


def test_times_are_of_the_counted_runs_only(standin, request_, sides):
    timing = compare(standin, request_, *sides, repeats=3).metrics["timing"]
    assert timing["a"]["sampling_seconds"]["values"] == [4.0, 8.0, 6.0]
    assert timing["a"]["sampling_seconds"]["median"] == 6.0
    assert (timing["a"]["sampling_seconds"]["min"], timing["a"]["sampling_seconds"]["max"]) == (4.0, 8.0)
    assert (timing["a"]["sampling_seconds"]["q1"], timing["a"]["sampling_seconds"]["q3"]) == (5.0, 7.0)
    assert timing["b"]["step_seconds"]["values"] == [1.0, 1.0, 1.5, 1.5, 0.5, 0.5]
    assert timing["b"]["attention_seconds"]["median"] == 1.0
    assert timing["order"] == "ABABAB"
    assert timing["a"]["decode_seconds"] == 0.5


def test_an_emulated_side_shows_no_ratio_anywhere(standin, request_, sides):
    m = compare(standin, request_, *sides).metrics
    assert m["emulated"] is True
    assert m["note"] == m["timing"]["b"]["note"] == EMULATED_NOTE == "emulated: quality is real, speed is not"
    assert m["timing"]["a"]["note"] is None
    assert m["timing"]["a_over_b"] is None
    text = terminal(m)
    assert text.count(EMULATED_NOTE) >= 2
    assert "as fast" not in text
    assert "speedup" not in json.dumps(m)


def test_real_kernels_show_their_ratio(standin, request_, sides):
    m = compare(standin, request_, sides[0], Side("B", Precision.INT8)).metrics
    assert m["emulated"] is False
    assert m["timing"]["a_over_b"] == {"sampling_seconds": 3.0, "step_seconds": 3.0, "attention_seconds": 3.0}
    assert "sampling: B is 3.00x as fast as A" in terminal(m)
    assert EMULATED_NOTE not in terminal(m)


def test_a_fallback_is_named_and_shows_no_ratio(standin, request_, sides):
    standin.kernels["fp4"] = "exact"
    m = compare(standin, request_, *sides).metrics
    assert m["sides"]["b"]["fell_back"] is True
    assert m["timing"]["a_over_b"] is None
    assert "Side B did not run as fp4 throughout" in headline(m)[0]
    assert "fell back: told to" in terminal(m)


def test_calls_kept_exact_are_counted_and_are_no_fallback(standin, request_, sides):
    standin.short_calls = True
    m = compare(standin, request_, sides[0], Side("B", Precision.INT8)).metrics
    a, b = m["sides"]["a"], m["sides"]["b"]
    assert (a["kept_exact"], a["calls"], b["kept_exact"], b["calls"]) == (0, 24, 24, 48)
    assert b["min_tokens"] == MIN_TOKENS
    assert not b["fell_back"]
    assert m["timing"]["a_over_b"] is not None
    assert m["quality"]["replay"]["kept_exact"] == {"self": [], "cross": ["b"]}
    text = terminal(m)
    assert "B: 24 calls on exact (fewer than 64 tokens)" in text
    assert "B: 24 of 48 calls were kept exact by --min-tokens 64." in text
    assert "A: 0 of" not in text
    assert "(self-attention, against exact fp32)" in text
    assert "(cross-attention, against exact fp32; B kept exact)" in text
    assert f"--min-tokens {MIN_TOKENS}" in command(m)
    assert max(map(len, text.splitlines()[4:])) <= 100


def test_a_side_kept_exact_throughout_is_named_in_the_headline(standin, request_, sides):
    standin.kernels["fp4"] = "exact"
    m = compare(standin, request_, *sides).metrics
    m["sides"]["b"] |= {"fell_back": False, "kept_exact": 24}
    assert headline(m)[0].endswith("Side B never ran as fp4: 24 of 24 calls were kept exact by --min-tokens 64.")


def test_a_side_refuses_negative_min_tokens():
    with pytest.raises(InputError, match="min_tokens is -1: give 0 or more"):
        Side("B", Precision.FP4, min_tokens=-1)


def test_metrics_are_strict_json_of_the_stated_schema(standin, request_, sides):
    m = compare(standin, request_, *sides).metrics
    assert json.loads(json.dumps(m, allow_nan=False)) == m
    assert (m["schema"], m["schema_version"]) == (SCHEMA, SCHEMA_VERSION) == ("comfy_sage3.compare", 1)
    assert set(m) == {
        *("schema", "schema_version", "created", "request", "environment", "sides", "emulated", "note"),
        *("timing", "quality"),
    }
    assert m["request"]["seed"] == 1
    assert m["request"]["tokens"] == 2 * 1 * 2
    assert m["sides"]["b"]["report"][0]["reason"] == "told to"
    assert set(m["quality"]) == {"noise_floor_method", "replay", "one_step", "end_to_end", "adherence"}


def test_the_noise_floor_stands_next_to_every_layer(standin, request_, sides):
    q = compare(standin, request_, *sides).metrics["quality"]
    assert q["replay"]["summary"]["self"]["floor"] == {
        "cosine": 0.5,
        "relative_l1": 0.25,
        "rmse": 0.125,
        "max_abs": 2,
    }
    assert "floor" in q["one_step"]["summary"]
    end = q["end_to_end"]
    assert end["noise_floor"]["psnr"] > end["a_vs_b"]["psnr"]
    for name in ("motion_energy", "flicker"):
        assert set(end[name]) == {"a", "b", "noise_floor"}
    assert set(q["adherence"]) == {"a", "b", "noise_floor"}


def test_without_an_exact_side_the_floor_takes_two_runs_of_its_own(standin, request_):
    compare(standin, request_, Side("A", Precision.FP4), Side("B", Precision.INT8), repeats=1)
    assert [x for x in standin.log if x.startswith("exact")] == ["exact first way", "exact second way"]


def test_an_engine_that_cannot_hand_out_tensors_leaves_two_layers_out(standin, request_, sides):
    standin.inspects = False
    m = compare(standin, request_, *sides).metrics
    assert m["quality"]["replay"] is None
    assert m["quality"]["one_step"] is None
    assert "3. The finished videos" in terminal(m)


def test_pair_pools_the_error_of_all_frames_and_finds_the_worst():
    from skimage.metrics import peak_signal_noise_ratio

    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    b = a.copy()
    b[3] = rng.integers(0, 256, (16, 16, 3))
    b[4, 0, 0, 0] ^= 1
    found = pair(a, b)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    assert found["worst_frame"]["index"] == 3
    assert math.isinf(found["psnr_per_frame"][0])
    assert not found["identical"]


def test_identical_videos_are_called_identical():
    video = np.zeros((5, 16, 16, 3), np.uint8)
    found = json_safe(pair(video, video))
    assert found["identical"] is True
    assert found["psnr"] is None
    assert found["ssim"] == 1.0


def test_two_identical_sides_are_called_identical(standin, request_, sides):
    m = compare(standin, request_, sides[0], Side("B", Precision.EXACT), repeats=1).metrics
    verdict, numbers = headline(m)
    assert verdict.startswith("The two videos are identical, pixel for pixel, and followed the prompt equally well")
    assert numbers.startswith("Between the sides: no difference. Two exact runs (the noise floor) differ by PSNR")


def test_a_single_frame_is_called_a_picture_and_has_no_motion(standin, sides):
    standin.size = Size(16, 16, 5)
    one = Request("a red circle", Size(16, 16, 1), steps=1)
    finish = standin.finish

    def second_frame(generation):
        finish(generation)
        generation.video = generation.video[1:2]

    standin.finish = second_frame
    made = compare(standin, one, *sides, repeats=1)
    m = made.metrics
    assert m["quality"]["end_to_end"]["motion_energy"] == {"a": None, "b": None, "noise_floor": None}
    for told in (terminal(m), report_html(m, made.videos)):
        assert "4-bit attention drew nearly the same picture as exact attention" in told
        assert "The finished pictures (B against A)" in told
        assert "decoding the picture" in told
        seen = re.sub(
            '<style>.*?</style>|<script.*?</script>|<div class="controls" hidden>.*?</div>|<[^>]*>', "", told, flags=re.S
        )
        for word in ("video", "frame", "motion", "flicker"):
            assert word not in seen.lower(), word


def test_videos_of_two_shapes_are_an_engine_error(standin, request_, sides):
    standin.shapes_differ = True
    with pytest.raises(EngineError, match="differ in shape"):
        compare(standin, request_, *sides)


def test_progress_only_grows_and_ends_full(standin, request_, sides):
    told: list[tuple[float, str]] = []
    compare(standin, request_, *sides, repeats=2, on_progress=lambda *x: told.append(x))
    fractions = [f for f, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert "noise floor: exact attention a second way" in [doing for _, doing in told]
    assert fractions[-1] <= 1


def test_progress_may_cancel(standin, request_, sides):
    def stop(fraction: float, doing: str) -> None:
        if doing.startswith("B (fp4)"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(standin, request_, *sides, on_progress=stop)
    assert standin.log[-1] == "run A"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "number of steps is 0"),
        ({"steps": 101}, "number of steps is 101"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"cfg": 0.5}, "cfg is 0.5"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"size": Size(1296, 16, 5)}, "width is 1296"),
        ({"size": Size(16, 16, 133)}, "number of frames is 133"),
        ({"size": Size(1280, 1280, 129)}, "more than this comparison takes on"),
        ({"size": Size(832, 480, 81), "steps": 51}, "more than this comparison takes on"),
    ],
)
def test_requests_are_bounded(change, sentence):
    with pytest.raises(InputError, match=sentence):
        Request(**({"prompt": "a red circle", "size": Size(32, 32, 5)} | change))


def test_the_shift_is_the_sizes_own_unless_it_is_given():
    shifts = [Request("a red circle", size).shift for size in (CPU_SIZE, GPU_SIZE)]
    assert shifts == [CPU_SIZE.shift, GPU_SIZE.shift] == [3.0, 7.0]
    assert Request("a red circle", GPU_SIZE, shift=3.0).shift == 3.0
    assert Request("a red circle", GPU_SIZE).for_warm_up().shift == 7.0


@pytest.mark.parametrize("repeats", [0, 21])
def test_repeats_are_bounded(standin, request_, sides, repeats):
    with pytest.raises(InputError, match="number of repeats"):
        compare(standin, request_, *sides, repeats=repeats)
    assert standin.log == []


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 100])
def test_captured_steps_are_spread_and_bounded(steps):
    chosen = spread(steps, 1)
    assert len(chosen) == len(set(chosen)) <= MAX_CAPTURED_STEPS
    assert all(0 <= s < steps for s in chosen)
    if steps > 1:
        assert (chosen[0], chosen[-1]) == (0, steps - 1)
    assert spread(steps, MAX_CAPTURED_BYTES) == [steps // 2]
