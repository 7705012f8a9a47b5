"""The new shape: drawn, named and recognised, while the bundled model's own data stay what they were."""

from dataclasses import replace

import torch

from comfy_sage3.demo.prompts import SHAPES, Object, Scene, embed
from comfy_sage3.demo.shapes import held_out, random_labels, render_labels
from comfy_sage3.demo.train import TextTable
from comfy_sage3.training_study import settings
from comfy_sage3.training_study.data import CROSS, SHAPES_WITH_CROSS, Text, labels, scenes, scenes_with
from comfy_sage3.training_study.judge import verdicts

FINETUNE = next(s for s in settings.SETTINGS if s.name == "finetune")


def test_the_scorer_tells_crosses_from_all_other_shapes():
    drawn = labels(FINETUNE, 24, torch.Generator().manual_seed(1), reserved=True, pairs=0.0)
    asked = scenes_with(drawn)
    assert {s.objects[0].shape for s in asked} == set(SHAPES_WITH_CROSS)
    video = render_labels(drawn, 5, 64, 64, torch.Generator().manual_seed(2))
    found = verdicts(list(video), asked)
    assert found["new"] == found["old"] == found["all"] == 1.0
    wrong = [replace(s, objects=(replace(s.objects[0], shape=CROSS),)) for s in asked]
    assert verdicts(list(video), wrong)["new"] < 0.8


def test_training_never_shows_what_is_scored():
    for reserved in (True, False):
        drawn = labels(FINETUNE, 200, torch.Generator().manual_seed(3), reserved=reserved)
        assert len(drawn) == 200
        assert held_out(drawn).all() if reserved else not held_out(drawn).any()
    share = (drawn.objects[..., 2] == len(SHAPES)).float().mean()
    assert 0.4 < share < 0.6


def test_the_shipped_shapes_know_no_cross():
    shipped = next(s for s in settings.SETTINGS if s.name == "pretrain-few")
    drawn = labels(shipped, 200, torch.Generator().manual_seed(3), reserved=False)
    assert drawn.objects[..., 2].max() < len(SHAPES)


def test_a_cross_has_a_word_of_its_own_and_the_others_keep_theirs():
    mine, shipped = Text("cpu"), TextTable("cpu")
    differ = (mine.table != shipped.table).flatten(2).any(-1).nonzero().tolist()
    assert differ == [[2, 7], [7, 7]]  # the shapes of both objects, one past the known ones
    drawn = random_labels(1, torch.Generator().manual_seed(4), pairs=0.0)
    drawn.objects[0, 0] = torch.tensor([0, 0, len(SHAPES), 0, 0])
    drawn.background[0] = 0
    told = Scene((Object("small", "red", CROSS, "left", "slowly"),), "black")
    tokens = mine.tokens(drawn, torch.Generator(), drop_all=0.0, drop=0.0)[0]
    assert torch.equal(tokens, embed(told))


def test_every_arm_is_scored_on_the_same_prompts():
    few = replace(FINETUNE, prompts=12)
    assert scenes(few) == scenes(few)
    assert len(scenes(few)) == 12
    assert scenes(replace(few, prompts=0)) == []
