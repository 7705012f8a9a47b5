"""Generate a video with the bundled model: flow matching by Euler steps, then the VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .prompts import Scene, embed
from .sizes import Size, shift_of, tokens_of


def schedule(steps: int, shift: float) -> list[float]:
    """Noise levels sigma of ``steps`` Euler steps, from 1 to 0, shifted as Wan and ComfyUI's ModelSamplingSD3 do."""
    line = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in line]


def initial_noise(size: Size, seed: int) -> Tensor:
    """float32 (1, 16, T', H/8, W/8), drawn on the CPU so that every device starts from the same noise."""
    return torch.randn(1, *size.latent_shape, generator=torch.Generator().manual_seed(seed))


def velocity(
    transformer: Any, latents: Tensor, sigma: float, prompts: Sequence[str | Scene], cfg: float, negative: str = ""
) -> Tensor:
    """The model's velocity (noise - x0) at noise level ``sigma`` with classifier-free guidance, float32.

    ``latents`` (B, 16, T', H/8, W/8), one prompt each, ``negative`` what to steer away from. Positive and negative
    prompts are two calls, so that both see the same attention shapes.
    """
    parameter = next(transformer.parameters())
    device, dtype = parameter.device, parameter.dtype
    x = latents.to(device, dtype)
    time = torch.full((len(x),), sigma * 1000, device=device)

    def predict(texts: Sequence[str | Scene]) -> Tensor:
        states = torch.stack([embed(text) for text in texts]).to(device, dtype)
        return transformer(x, time, states, return_dict=False)[0].float()

    conditional = predict(prompts)
    if cfg == 1.0:
        return conditional
    unconditional = predict([negative] * len(prompts))
    return unconditional + cfg * (conditional - unconditional)


@torch.inference_mode()
def integrate(
    transformer: Any,
    noise: Tensor,
    prompts: Sequence[str | Scene],
    *,
    steps: int = 20,
    cfg: float = 3.0,
    shift: float | None = None,
    negative: str = "",
    on_step: Callable[[int, int], None] | None = None,
    on_guess: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Latents of a batch: Euler steps from ``noise`` (B, 16, T', H/8, W/8), one prompt each; see ``sample``."""
    if shift is None:
        shift = shift_of(tokens_of(noise.shape))
    for prompt in (*prompts, negative):
        embed(prompt)  # an unknown word is refused before any work
    x = noise.to(next(transformer.parameters()).device)
    sigmas = schedule(steps, shift)
    for i, (now, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        v = velocity(transformer, x, now, prompts, cfg, negative)
        x = x + (after - now) * v
        if on_guess:
            on_guess(x - after * v)
        if on_step:
            on_step(i + 1, steps)
    return x


def sample(
    transformer: Any,
    prompt: str,
    *,
    size: Size,
    seed: int,
    steps: int = 20,
    cfg: float = 3.0,
    shift: float | None = None,
    negative: str = "",
    on_step: Callable[[int, int], None] | None = None,
    on_guess: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Latents (1, 16, T', H/8, W/8), float32 on the model's device, for ``prompt``.

    ``shift`` is the time shift of the schedule; None means the size's own, which the model was trained with.
    ``on_step(done, steps)`` is called after every step and may raise to cancel; before it ``on_guess(x0)`` gets what the
    model takes for the finished latents so far. Raises InputError for an unknown word.
    """
    noise = initial_noise(size, seed)
    return integrate(
        transformer,
        noise,
        [prompt],
        steps=steps,
        cfg=cfg,
        shift=shift,
        negative=negative,
        on_step=on_step,
        on_guess=on_guess,
    )


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """The video of normalised latents: float32 (3, T, H, W) in [-1, 1] on the latents' device."""
    parameter = next(vae.parameters())
    mean, std = latent_statistics(vae, latents)
    z = (latents * std + mean).to(parameter.device, parameter.dtype)
    return vae.decode(z, return_dict=False)[0][0].float().clamp(-1, 1)


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Wan 2.1's per-channel latent mean and standard deviation, (1, 16, 1, 1, 1) on ``like``'s device."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(like)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(like)
    return mean, std
