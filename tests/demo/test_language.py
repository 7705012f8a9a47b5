"""Prompts, data and the scorer of the bundled model."""

import pytest
import torch

from comfy_sage3.demo import prompts, score, shapes
from comfy_sage3.errors import InputError


def test_a_described_scene_parses_back():
    generator = torch.Generator().manual_seed(0)
    for scene in shapes.scenes_of(shapes.random_labels(200, generator, pairs=0.5)):
        assert prompts.parse(prompts.describe(scene)) == scene


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a red cirle", "circle"),
        ("a red blue circle", "two values for colour"),
        ("a red circle and a blue square and a white square", "3 objects"),
        ("red circle on a black navy background", "two backgrounds"),
        ("red " * 200, "characters"),
    ],
)
def test_bad_prompts_get_one_clear_sentence(text, says):
    with pytest.raises(InputError, match=says):
        prompts.parse(text)


def test_embeddings_are_signs_and_every_slot_value_has_its_own():
    a, b = prompts.embed("a red circle"), prompts.embed("a blue circle")
    assert a.shape == (prompts.TOKENS, prompts.TEXT_DIM)
    assert set(a.unique().tolist()) == {-1.0, 1.0}
    assert [i for i in range(prompts.TOKENS) if not torch.equal(a[i], b[i])] == [1]  # the first object's colour
    assert prompts.slot_vector("1.colour=red")[:16].tolist() == a[1, :16].tolist()


def test_the_same_seed_draws_the_same_pixels():
    scenes = shapes.held_out_scenes(4, seed=1)
    assert torch.equal(shapes.render(scenes, 5, 32, seed=2), shapes.render(scenes, 5, 32, seed=2))
    assert not torch.equal(shapes.render(scenes, 5, 32, seed=2), shapes.render(scenes, 5, 32, seed=3))


def test_the_scorer_is_right_on_rendered_truth():
    scenes = shapes.held_out_scenes(100, seed=31)
    found = score.accuracy(shapes.render(scenes, 9, 64, seed=32), scenes)
    for aspect in ("colour", "shape", "background", "motion"):
        assert found[aspect] >= 0.99


def test_the_scorer_notices_what_is_wrong():
    shown = prompts.parse("a large red circle moving left quickly on a black background")
    asked = prompts.parse("a small blue square moving right slowly on a grey background")
    verdict = score.adherence(shapes.render([shown], 9, 64, seed=1)[0], asked)
    assert verdict == dict.fromkeys(score.ASPECTS, False)
