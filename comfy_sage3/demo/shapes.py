"""The bundled model's data: videos of moving shapes, drawn analytically, deterministic by seed.

Shapes are signed distance functions with one pixel of anti-aliasing. Lengths are fractions of the frame's side;
a clip's speed is its whole displacement, so the same prompt means the same at every number of frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prompts import ATTRIBUTES, BACKGROUNDS, COLOURS, MAX_OBJECTS, MOTIONS, SHAPES, SIZES, SPEEDS, Object, Scene

COLOUR_RGB = torch.tensor([(230, 40, 40), (40, 190, 70), (50, 90, 240), (240, 210, 40), (170, 60, 220), (245, 245, 245)])
BACKGROUND_RGB = torch.tensor([(10, 10, 14), (100, 102, 108), (16, 24, 80)])
MOTION_XY = torch.tensor([(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (0.0, 0.0)])

RADIUS = torch.tensor([(0.14, 0.17), (0.22, 0.26)])  # small, large
TRAVEL = torch.tensor([(0.26, 0.32), (0.50, 0.58)])  # slowly, quickly
PAIR_SCALE = 0.8  # two objects share the frame: both are smaller and travel less


def unit_range(rgb: Tensor) -> Tensor:
    """8-bit RGB as float32 in [-1, 1]."""
    return rgb.float() / 127.5 - 1


@dataclass
class Labels:
    """A batch of scenes as indices. ``objects`` is int64 (B, 2, 5) in the order of ``prompts.ATTRIBUTES``;
    ``present`` is bool (B, 2); ``background`` is int64 (B,)."""

    objects: Tensor
    present: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.background)


def random_labels(batch: int, generator: torch.Generator, *, pairs: float = 0.25) -> Labels:
    """Uniform random scenes; a share of ``pairs`` has two objects, of different colours. On the generator's device."""
    device = generator.device
    draw = [
        torch.randint(len(words), (batch, MAX_OBJECTS), generator=generator, device=device) for words in ATTRIBUTES.values()
    ]
    objects = torch.stack(draw, -1)
    shift = torch.randint(1, len(COLOURS), (batch,), generator=generator, device=device)
    objects[:, 1, 1] = (objects[:, 0, 1] + shift) % len(COLOURS)
    present = torch.ones(batch, MAX_OBJECTS, dtype=torch.bool, device=device)
    present[:, 1] = torch.rand(batch, generator=generator, device=device) < pairs
    background = torch.randint(len(BACKGROUNDS), (batch,), generator=generator, device=device)
    return Labels(objects, present, background)


def labels_of(scenes: list[Scene], generator: torch.Generator) -> Labels:
    """Scenes as indices; what a scene leaves open is drawn from ``generator``."""
    labels = random_labels(len(scenes), generator)
    for i, scene in enumerate(scenes):
        labels.present[i] = torch.tensor([len(scene.objects) > j for j in range(MAX_OBJECTS)])
        if scene.background:
            labels.background[i] = BACKGROUNDS.index(scene.background)
        for j, o in enumerate(scene.objects):
            for a, (name, words) in enumerate(ATTRIBUTES.items()):
                if getattr(o, name):
                    labels.objects[i, j, a] = words.index(getattr(o, name))
    return labels


def scenes_of(labels: Labels) -> list[Scene]:
    """The scenes that labels stand for, every attribute named (a still object has no speed)."""
    scenes = []
    for rows, present, background in zip(
        labels.objects.tolist(), labels.present.tolist(), labels.background.tolist(), strict=True
    ):
        objects = []
        for row, here in zip(rows, present, strict=True):
            if here:
                size, colour, shape, motion, speed = row
                objects.append(
                    Object(
                        SIZES[size],
                        COLOURS[colour],
                        SHAPES[shape],
                        MOTIONS[motion],
                        None if MOTIONS[motion] == "still" else SPEEDS[speed],
                    )
                )
        scenes.append(Scene(tuple(objects), BACKGROUNDS[background]))
    return scenes


def held_out(labels: Labels) -> Tensor:
    """bool (B,): the scene holds a (colour, shape, motion) combination that training never shows."""
    colour, shape, motion = labels.objects[..., 1], labels.objects[..., 2], labels.objects[..., 3]
    reserved = (colour + 2 * shape + 3 * motion) % 8 == 0  # 15 of 120 combinations, every value in several
    return (reserved & labels.present).any(-1)


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """``count`` scenes of one object whose combination of colour, shape and motion training never showed."""
    generator = torch.Generator().manual_seed(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        labels = random_labels(256, generator, pairs=0.0)
        keep = held_out(labels)
        scenes += scenes_of(Labels(labels.objects[keep], labels.present[keep], labels.background[keep]))
    return scenes[:count]


def signed_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to the outline, negative inside; all arguments broadcast, y points down.

    ``shape`` indexes SHAPES; one past their end is a cross, which the bundled model was never shown (training_study).
    """
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    triangle = torch.maximum(y - 0.7 * radius, 0.866 * x.abs() - 0.5 * y - 0.62 * radius)
    diamond = (x.abs() + y.abs() - 1.15 * radius) * 0.7071
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    cross = torch.maximum(long - radius, short - 0.34 * radius)
    result = circle
    for index, distance in ((1, square), (2, triangle), (3, diamond), (4, cross)):
        result = torch.where(shape == index, distance, result)
    return result


def render_labels(
    labels: Labels, frames: int, height: int, width: int, generator: torch.Generator, *, window: int | None = None
) -> Tensor:
    """Draw a batch of scenes. Returns float32 (B, 3, frames, height, width) in [-1, 1] on the labels' device.

    ``window`` draws only a random square of that many pixels out of the ``height`` x ``width`` canvas, the same
    in every frame: cheap training crops with the edges of a large picture.
    """
    device, batch = labels.background.device, len(labels)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    size, colour, shape, motion, speed = labels.objects.unbind(-1)  # each (B, 2)
    pair = labels.present.all(-1)
    scale = torch.where(pair, PAIR_SCALE, 1.0)[:, None]
    low, high = RADIUS.to(device)[size].unbind(-1)
    radius = (low + (high - low) * uniform(batch, MAX_OBJECTS)) * scale
    low, high = TRAVEL.to(device)[speed].unbind(-1)
    direction = MOTION_XY.to(device)[motion]
    travel = direction * ((low + (high - low) * uniform(batch, MAX_OBJECTS)) * scale)[..., None]

    # The middle of the path: near the centre, less so across the motion; two objects take opposite quarters.
    jitter = (uniform(batch, MAX_OBJECTS, 2) - 0.5) * torch.where(direction == 0, 0.26, 0.10)
    corner = torch.where(uniform(batch, 2) < 0.5, -0.22, 0.22)
    corners = torch.stack([corner, -corner], 1)
    middle = 0.5 + torch.where(pair[:, None, None], corners + 0.4 * jitter, jitter)

    span = window or max(height, width)
    top = (torch.rand(batch, generator=generator, device=device) * (height - span + 1)).floor() if window else 0.0
    left = (torch.rand(batch, generator=generator, device=device) * (width - span + 1)).floor() if window else 0.0
    rows, columns = (window, window) if window else (height, width)
    offset_y = torch.as_tensor(top, device=device).reshape(-1, 1)
    offset_x = torch.as_tensor(left, device=device).reshape(-1, 1)
    grid_y = (torch.arange(rows, device=device)[None] + 0.5 + offset_y) / height
    grid_x = (torch.arange(columns, device=device)[None] + 0.5 + offset_x) / width

    time = torch.linspace(-0.5, 0.5, frames, device=device) if frames > 1 else torch.zeros(1, device=device)
    video = unit_range(BACKGROUND_RGB).to(device)[labels.background].view(batch, 3, 1, 1, 1)
    for j in range(MAX_OBJECTS):
        centre = middle[:, j, None] + travel[:, j, None] * time[None, :, None]  # (B, T, 2)
        x = grid_x[:, None, None, :] - centre[..., 0, None, None]
        y = grid_y[:, None, :, None] - centre[..., 1, None, None]
        distance = signed_distance(shape[:, j].view(-1, 1, 1, 1), x, y, radius[:, j].view(-1, 1, 1, 1))
        alpha = (0.5 - distance * min(height, width)).clamp(0, 1) * labels.present[:, j].view(-1, 1, 1, 1)
        paint = unit_range(COLOUR_RGB).to(device)[colour[:, j]].view(batch, 3, 1, 1, 1)
        video = torch.lerp(video.expand(batch, 3, *alpha.shape[1:]), paint, alpha[:, None])
    return video


def render(scenes: list[Scene], frames: int, size: int, seed: int) -> Tensor:
    """Draw scenes as ground-truth videos, float32 (B, 3, frames, size, size) in [-1, 1]; the same seed, the same pixels."""
    generator = torch.Generator().manual_seed(seed)
    return render_labels(labels_of(scenes, generator), frames, size, size, generator)
