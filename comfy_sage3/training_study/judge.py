"""How good a model has become: its loss on clips it never saw, and what its videos show of their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import fast_vae, load
from ..demo.prompts import Scene
from ..demo.sample import initial_noise, integrate, latent_statistics
from ..demo.score import adherence, shares
from ..demo.shapes import render_labels
from ..demo.train import bf16, velocity_loss
from .data import CROSS, SHAPES_WITH_CROSS, Text, clips, labels, scenes, scenes_with
from .settings import Setting

_ROWS = 64  # clips at once
_NOISE_SEED = 81
_FIRST_VIDEO_SEED = 5000


class Judge:
    """The fixed clips, noise and noise levels of a setting's held-out loss, the same for every arm."""

    def __init__(self, folder: Path, setting: Setting, device: str) -> None:
        self.setting, self.device = setting, device
        held = clips(folder, setting, device, for_judging=True)
        generator = torch.Generator(device).manual_seed(_NOISE_SEED)
        self.clean = held.latents.float()
        self.states = Text(device).tokens(held.labels, generator, drop_all=0.0, drop=0.0)
        self.noise = torch.randn(self.clean.shape, generator=generator, device=device)
        # The noise levels of training, one quantile a clip.
        share = (torch.arange(len(self.clean), device=device) + 0.5) / len(self.clean)
        level = torch.sigmoid(torch.special.ndtri(share))
        shift = setting.shape.shift
        self.sigma = shift * level / (1 + (shift - 1) * level)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """The training loss, on the held-out clips, with whatever attention the model is routed to."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(0, len(self.clean), _ROWS):
            rows = slice(i, i + _ROWS)
            loss = velocity_loss(model, self.clean[rows], self.noise[rows], self.sigma[rows], self.states[rows])
            total += loss.double() * len(self.clean[rows])
        return float(total) / len(self.clean)

    def prompts(self, model: Any) -> dict[str, Any]:
        """The share of videos, drawn with exact attention, that show what was asked; see ``verdicts``."""
        asked = scenes(self.setting)
        vae = load.load_vae(self.device)
        videos = []
        for i in range(0, len(asked), _ROWS):
            rows = asked[i : i + _ROWS]
            noise = torch.cat([initial_noise(self.setting.shape, _FIRST_VIDEO_SEED + i + j) for j in range(len(rows))])
            with bf16(self.device), torch.inference_mode():
                latents = integrate(model, noise, rows, shift=self.setting.shape.shift)
                mean, std = latent_statistics(vae, latents)
                videos += list(fast_vae.decode(vae, latents * std + mean).float().clamp(-1, 1))
        return verdicts(videos, asked)

    @torch.no_grad()
    def truth(self, count: int = 40) -> dict[str, Any]:
        """The scorer's verdict on drawn clips that went through the VAE and back: the most that a model can reach."""
        generator = torch.Generator().manual_seed(_NOISE_SEED)
        setting = self.setting
        drawn = labels(setting, count, generator, reserved=True, pairs=0.0)
        asked = scenes_with(drawn)
        size = setting.shape
        video = render_labels(drawn, size.frames, size.height, size.width, generator).to(self.device)
        vae = load.load_vae(self.device)
        with bf16(self.device):
            back = fast_vae.decode(vae, fast_vae.encode(vae, video)[0]).float().clamp(-1, 1)
        return verdicts(list(back), asked)


def verdicts(videos: list[Tensor], asked: list[Scene]) -> dict[str, Any]:
    """Shares by aspect; ``new`` and ``old``: of the shape, where a cross was asked for and where not; ``all``: of videos
    right in everything."""
    rows = [adherence(v, s, SHAPES_WITH_CROSS) for v, s in zip(videos, asked, strict=True)]
    found: dict[str, Any] = {"prompts": len(rows), **shares(rows)}
    for name, wanted in (("new", True), ("old", False)):
        mine = [bool(r["shape"]) for r, s in zip(rows, asked, strict=True) if (s.objects[0].shape == CROSS) == wanted]
        if mine:
            found[name] = sum(mine) / len(mine)
    found["all"] = sum(all(v is not False for v in r.values()) for r in rows) / max(1, len(rows))
    return found
