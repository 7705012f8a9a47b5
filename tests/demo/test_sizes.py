"""Video sizes: what is a size, what its latents and tokens are, and the settings that depend on them."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comfy_sage3.demo import sizes
from comfy_sage3.demo.prompts import TOKENS
from comfy_sage3.demo.sizes import CPU_SIZE, GPU_SIZE, Size
from comfy_sage3.errors import InputError
from comfy_sage3.precision import MIN_TOKENS as USUAL_MIN_TOKENS

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"

sides = st.integers(1, 40).map(lambda n: 16 * n)
lengths = st.integers(0, 30).map(lambda n: 4 * n + 1)
valid = st.builds(Size, sides, sides, lengths)


def latents_by_hand(pixels: int) -> int:
    """Length of an axis after the VAE's three halvings, one convolution of stride 2 at a time."""
    for _ in range(3):
        pixels = len(range(0, pixels, 2))
    return pixels


def latent_frames_by_hand(frames: int) -> int:
    """The first frame stands alone; then one latent frame for each four, the last of which may be cut short."""
    return 1 + len(range(1, frames, 4))


@given(valid)
@settings(max_examples=50)
def test_latents_and_tokens_against_counting(size):
    channels, t, h, w = size.latent_shape
    assert channels == 16
    assert t == latent_frames_by_hand(size.frames)
    assert (h, w) == (latents_by_hand(size.height), latents_by_hand(size.width))
    patches = {(f, y // 2, x // 2) for f in range(t) for y in range(h) for x in range(w)}
    assert size.tokens == len(patches) == sizes.tokens_of((1, *size.latent_shape))


@given(valid)
def test_a_size_reads_back_what_it_prints(size):
    assert Size.parse(str(size)) == size
    assert Size.parse(str(size).upper()) == size


def test_the_named_sizes():
    assert Size.parse("cpu") == CPU_SIZE == Size(128, 128, 17)
    assert Size.parse("gpu") == GPU_SIZE == Size(480, 480, 33)
    assert (CPU_SIZE.tokens, GPU_SIZE.tokens) == (320, 8100)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "xx", "CPU ", "small", "128x128", "128x128x17x1", "128 x 128 x 17", "128,128,17"),
        *("-128x128x17", "+128x128x17", "128.0x128x17", "1e3x128x17", "0x80x128x17", "128x128x", "nanx128x17"),
        *("9999999999x128x17", "²x128x17"),
    ],
)
def test_what_is_no_size_is_refused_in_one_sentence(text):
    with pytest.raises(InputError, match="^Cannot read the size .*: give cpu, gpu or WIDTHxHEIGHTxFRAMES") as told:
        Size.parse(text)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0x16x5", "The width is 0: give a multiple of 16, at least 16"),
        ("100x96x5", "The width is 100"),
        ("96x24x5", "The height is 24"),
        ("96x8x5", "The height is 8"),
        ("96x96x0", "The number of frames is 0: give 1, 5, 9"),
        ("96x96x16", "The number of frames is 16"),
    ],
)
def test_a_size_the_model_cannot_draw_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        Size.parse(text)


@given(st.integers(-50, 1500), st.integers(-50, 1500), st.integers(-9, 200))
def test_exactly_multiples_of_16_and_4n_plus_1_frames_are_sizes(width, height, frames):
    good = width > 0 < height and not width % 16 and not height % 16 and frames > 0 and frames in range(1, 201, 4)
    try:
        size = Size(width, height, frames)
    except InputError:
        assert not good
    else:
        assert good
        assert (size.width, size.height, size.frames) == (width, height, frames)


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_an_input_error(text):
    assume(text not in sizes.NAMED)
    try:
        size = Size.parse(text)
    except InputError:
        return
    assert [int(part) for part in text.lower().split("x")] == [size.width, size.height, size.frames]


@given(valid)
def test_the_shift_changes_once_from_short_to_long(size):
    assert size.shift == sizes.shift_of(size.tokens) == (3.0 if size.tokens < 2048 else 7.0)


def test_both_trained_sizes_have_their_own_shift():
    assert (CPU_SIZE.shift, GPU_SIZE.shift) == (3.0, 7.0)
    assert (sizes.shift_of(sizes.LONG - 1), sizes.shift_of(sizes.LONG)) == (3.0, 7.0)


def test_a_size_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CPU_SIZE.width = 64


def test_the_least_length_keeps_the_prompt_exact_and_the_video_in_low_precision():
    assert TOKENS < sizes.MIN_TOKENS <= CPU_SIZE.tokens


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("text_to_video", USUAL_MIN_TOKENS),  # Sage3 Attention as it comes
        ("text_to_video_ab", sizes.MIN_TOKENS),
        ("text_to_video_ab_latent", sizes.MIN_TOKENS),
        ("calibrate_then_run", sizes.MIN_TOKENS),
    ],
)
def test_the_workflows_use_this_sizes_shift_and_a_least_length_that_lets_the_video_in(name, least):
    nodes = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text()).values()
    inputs = {kind: [n["inputs"] for n in nodes if n["class_type"] == kind] for kind in {n["class_type"] for n in nodes}}
    (video,) = inputs["EmptyHunyuanLatentVideo"]
    size = Size(video["width"], video["height"], video["length"])
    assert {x["shift"] for x in inputs["ModelSamplingSD3"]} == {size.shift}
    assert {x["min_tokens"] for x in inputs["Sage3Attention"]} == {least}
    assert TOKENS < least <= size.tokens
