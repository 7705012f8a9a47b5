"""Did the video show what the prompt asked for? Judged from the pixels, without a network.

The scorer's own accuracy is its score on rendered ground truth (tests/demo/test_score.py holds it to 99 %).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Object, Scene
from .shapes import BACKGROUND_RGB, COLOUR_RGB, PAIR_SCALE, RADIUS, TRAVEL, signed_distance, unit_range

ASPECTS = ("colour", "shape", "background", "motion", "size", "speed")
FOREGROUND = 0.35  # how far a channel, in [-1, 1], must be from the background to count as an object
STILL = 0.10  # displacements below this fraction of the frame are no motion
FIT_SIDE = 64  # shapes are fitted on masks of this many pixels


def adherence(video: Tensor, scene: Scene, shapes: tuple[str, ...] = SHAPES) -> dict[str, bool | None]:
    """What of ``scene`` the video shows.

    video: (3, T, H, W) in [-1, 1]. ``shapes`` are those an object may be found to have, as ``signed_distance`` numbers them.
    Returns, for each of ``ASPECTS``, whether every object (or the background) came out as asked, and None where the scene
    leaves that aspect open.
    """
    video = video.float()
    border = torch.cat([video[:, :, :3].flatten(1), video[:, :, -3:].flatten(1)], 1)
    background = _nearest(border.median(1).values, BACKGROUND_RGB)
    away = video - unit_range(BACKGROUND_RGB).to(video)[background].view(3, 1, 1, 1)
    foreground = away.abs().amax(0) > FOREGROUND  # (T, H, W)

    verdicts: dict[str, list[bool]] = {aspect: [] for aspect in ASPECTS}
    if scene.background:
        verdicts["background"].append(BACKGROUNDS[background] == scene.background)
    for wished, found in _match(scene.objects, _objects(video, foreground, len(scene.objects), shapes)):
        for aspect, value in found.items():
            asked = getattr(wished, aspect)
            if asked is not None:
                verdicts[aspect].append(asked == value)
    return {aspect: all(v) if v else None for aspect, v in verdicts.items()}


def accuracy(videos: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """The share of videos (B, 3, T, H, W) that show each aspect, of those whose scene names it."""
    return shares([adherence(v, s) for v, s in zip(videos, scenes, strict=True)])


def shares(rows: list[dict[str, bool | None]]) -> dict[str, float]:
    """The share of verdicts of ``adherence`` that hold, for each aspect, of those that are not None."""
    result = {}
    for aspect in ASPECTS:
        values = [bool(r[aspect]) for r in rows if r[aspect] is not None]
        if values:
            result[aspect] = sum(values) / len(values)
    return result


def _nearest(rgb: Tensor, palette: Tensor) -> int:
    return int((unit_range(palette).to(rgb) - rgb).square().sum(-1).argmin())


def _objects(video: Tensor, foreground: Tensor, count: int, shapes: tuple[str, ...]) -> list[dict[str, str]]:
    """The attributes of up to ``count`` objects: one is the whole foreground, two are its two commonest colours."""
    if count == 0:
        return []
    masks = [foreground]
    if count > 1:
        palette = unit_range(COLOUR_RGB).to(video)
        label = (video[None] - palette.view(-1, 3, 1, 1, 1)).square().sum(1).argmin(0)
        area = torch.stack([(foreground & (label == c)).sum() for c in range(len(COLOURS))])
        masks = [foreground & (label == int(c)) for c in area.topk(count).indices]
    return [_attributes(video, mask, PAIR_SCALE if count > 1 else 1.0, shapes) for mask in masks]


def _match(wished: tuple[Object, ...], found: list[dict[str, str]]) -> list[tuple[Object, dict[str, str]]]:
    """Pair what was asked with what was found: by colour where it fits, the rest in order of area."""
    left, pairs = list(found), []
    for o in sorted(wished, key=lambda o: all(f["colour"] != o.colour for f in found)):
        fit = next((f for f in left if f["colour"] == o.colour), left[0])
        left.remove(fit)
        pairs.append((o, fit))
    return pairs


def _attributes(video: Tensor, mask: Tensor, scale: float, shapes: tuple[str, ...]) -> dict[str, str]:
    weight = mask.float()
    inner = (F.avg_pool2d(weight[:, None], 3, 1, 1)[:, 0] > 0.99).float()  # away from the blended outline
    inner = inner if inner.sum() > 0 else weight
    colour = _nearest((video * inner).sum((1, 2, 3)) / inner.sum().clamp_min(1), COLOUR_RGB)

    height, width = mask.shape[-2:]
    area = weight.sum((1, 2)).clamp_min(1)
    ys = (torch.arange(height, device=video.device) + 0.5) / height
    xs = (torch.arange(width, device=video.device) + 0.5) / width
    cy = (weight * ys[:, None]).sum((1, 2)) / area
    cx = (weight * xs).sum((1, 2)) / area
    dx, dy = float(cx[-1] - cx[0]), float(cy[-1] - cy[0])
    horizontal = abs(dx) > abs(dy)
    if max(abs(dx), abs(dy)) < STILL:
        motion = "still"
    elif horizontal:
        motion = "left" if dx < 0 else "right"
    else:
        motion = "up" if dy < 0 else "down"
    middle = mask.shape[0] // 2
    shape, radius = _fit_shape(weight[middle], float(cx[middle]), float(cy[middle]), len(shapes))
    assert motion in MOTIONS
    return {
        "colour": COLOURS[colour],
        "shape": shapes[shape],
        "motion": motion,
        "size": "small" if radius < float(RADIUS[0, 1] + RADIUS[1, 0]) / 2 * scale else "large",
        "speed": "slowly" if max(abs(dx), abs(dy)) < float(TRAVEL[0, 1] + TRAVEL[1, 0]) / 2 * scale else "quickly",
    }


def _fit_shape(mask: Tensor, cx: float, cy: float, count: int) -> tuple[int, float]:
    """The template (one of ``count`` shapes, radius) whose overlap with the mask (intersection over union) is best."""
    small = F.interpolate(mask[None, None], (FIT_SIDE, FIT_SIDE), mode="area")[0, 0]
    axis = (torch.arange(FIT_SIDE, device=mask.device) + 0.5) / FIT_SIDE
    radii = torch.linspace(0.08, 0.30, 23, device=mask.device)
    lifts = torch.linspace(-0.06, 0.04, 6, device=mask.device)  # a triangle's centroid is not its centre
    shapes = torch.arange(count, device=mask.device)
    x = (axis - cx).view(1, 1, 1, 1, -1)
    y = (axis - cy).view(1, 1, 1, -1, 1) - lifts.view(1, 1, -1, 1, 1)
    distance = signed_distance(shapes.view(-1, 1, 1, 1, 1), x, y, radii.view(1, -1, 1, 1, 1))
    template = (0.5 - distance * FIT_SIDE).clamp(0, 1)  # (shapes, radii, lifts, side, side)
    overlap = torch.minimum(template, small).sum((-1, -2)) / torch.maximum(template, small).sum((-1, -2)).clamp_min(1e-6)
    best = int(overlap.argmax())
    shape, rest = divmod(best, len(radii) * len(lifts))
    return shape, float(radii[rest // len(lifts)])
