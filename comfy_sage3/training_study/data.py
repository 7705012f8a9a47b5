"""The clips: the bundled model's own, or with a shape it never saw. Encoded once, kept as latents, drawn by number.

Which clips a step sees, at which noise levels and with which noise depends on the arm's seed and the step alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import load
from ..demo.prompts import ATTRIBUTES, MAX_OBJECTS, SHAPES, Scene, slot_vector
from ..demo.shapes import Labels, held_out, random_labels, scenes_of
from ..demo.train import LatentSet, TextTable, normalised
from .settings import Setting

CROSS = "cross"  # as shapes.signed_distance draws one past the end of SHAPES
SHAPES_WITH_CROSS = (*SHAPES, CROSS)
_SHAPE = list(ATTRIBUTES).index("shape")
_SEED, _HELD_OUT_SEED, _SCENES_SEED = 71, 72, 73
_STEPS_OF_A_SEED = 1_000_003


class Text(TextTable):
    """The text tokens of labels, which may be crosses."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        for i in range(MAX_OBJECTS):
            row = self.table[i * len(ATTRIBUTES) + _SHAPE]
            row[len(self.SPECIAL) + len(SHAPES)] = slot_vector(f"{i + 1}.shape={CROSS}").to(row)


def labels(setting: Setting, count: int, generator: torch.Generator, *, reserved: bool, pairs: float = 0.25) -> Labels:
    """``count`` scenes that hold a combination reserved for scoring (see ``shapes.held_out``), or hold none."""
    parts: list[Labels] = []
    while sum(map(len, parts)) < count:
        drawn = random_labels(2 * count + 32, generator, pairs=pairs)
        if setting.data == "cross":
            new = torch.rand(drawn.present.shape, generator=generator, device=generator.device) < 0.5
            drawn.objects[..., _SHAPE] = torch.where(new, len(SHAPES), drawn.objects[..., _SHAPE])
        parts.append(_rows(drawn, held_out(drawn) == reserved))
    joined = Labels(*(torch.cat([getattr(p, name) for p in parts]) for name in ("objects", "present", "background")))
    return _rows(joined, slice(count))


def scenes(setting: Setting) -> list[Scene]:
    """``setting.prompts`` scenes of one object in a combination that training never shows; the same for every arm."""
    if not setting.prompts:
        return []
    return scenes_with(
        labels(setting, setting.prompts, torch.Generator().manual_seed(_SCENES_SEED), reserved=True, pairs=0.0)
    )


def scenes_with(drawn: Labels) -> list[Scene]:
    """``shapes.scenes_of`` for labels whose first object may be a cross."""
    new = drawn.objects[:, 0, _SHAPE] == len(SHAPES)
    known = Labels(drawn.objects.clone(), drawn.present, drawn.background)
    known.objects[..., _SHAPE] %= len(SHAPES)
    found = []
    for scene, is_cross in zip(scenes_of(known), new.tolist(), strict=True):
        first, *rest = scene.objects
        found.append(replace(scene, objects=(replace(first, shape=CROSS), *rest)) if is_cross else scene)
    return found


def clips(folder: Path, setting: Setting, device: str, *, for_judging: bool = False) -> LatentSet:
    """The clips to train on, or those of the held-out loss; from ``folder`` where they have been encoded before."""
    from safetensors.torch import load_file, save_file

    count = setting.held_out if for_judging else setting.clips
    kind = "held-out" if for_judging else "train"
    path = folder / f"{setting.data}-{setting.size}-{kind}-{count}-{torch.device(device).type}.safetensors"
    if not path.exists():
        generator = torch.Generator(device).manual_seed(_HELD_OUT_SEED if for_judging else _SEED)
        drawn = labels(setting, count, generator, reserved=False)
        latents = normalised(load.load_vae(device), drawn, setting.shape, generator)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({"latents": latents.contiguous(), **vars(drawn)}, part)
        part.replace(path)
    read = load_file(path, device=device)
    return LatentSet(Labels(read["objects"], read["present"], read["background"]), read["latents"], setting.batch)


def batch(clips_: LatentSet, text: Text, generator: torch.Generator, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The clips (B, 16, T', H/8, W/8) and text tokens (B, 11, 4096) of one step; ``generator`` goes on to its noise."""
    generator.manual_seed(seed * _STEPS_OF_A_SEED + step)
    clean, drawn = clips_.draw(generator)
    return clean, text.tokens(drawn, generator, drop_all=0.1, drop=0.05)


def _rows(x: Labels, rows: Any) -> Labels:
    return Labels(x.objects[rows], x.present[rows], x.background[rows])
