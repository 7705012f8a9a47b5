"""The two sizes the bundled model is trained at, and the shape of their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError

MIN_TOKENS = 64  # least length of a low-bit call of the bundled model: above its 11 text tokens, below CPU_SIZE's 320
LONG = 2048  # self-attention tokens from which a sequence counts as long


def tokens_of(latent_shape: Sequence[int]) -> int:
    """Length of the self-attention sequence of latents (..., T', H/8, W/8): positions over the (1, 2, 2) patch."""
    t, h, w = latent_shape[-3:]
    return t * (h // 2) * (w // 2)


def shift_of(tokens: int) -> float:
    """The schedule shift the model is trained and sampled with: long sequences decide their layout at higher noise."""
    return 3.0 if tokens < LONG else 7.0


@dataclass(frozen=True)
class Size:
    """A video size in pixels and frames. Raises InputError unless sides are multiples of 16 and frames 4n + 1."""

    width: int
    height: int
    frames: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if value < 16 or value % 16:
                raise InputError(f"The {name} is {value}: give a multiple of 16, at least 16.")
        if self.frames < 1 or self.frames % 4 != 1:
            raise InputError(f"The number of frames is {self.frames}: give 1, 5, 9, ... (4n + 1).")

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(channels, latent frames, latent height, latent width) of the Wan VAE: 16 channels, 4x in time, 8x in space."""
        return 16, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        """Length of the self-attention sequence."""
        return tokens_of(self.latent_shape)

    @property
    def shift(self) -> float:
        """This size's own schedule shift, see ``shift_of``."""
        return shift_of(self.tokens)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """``cpu``, ``gpu`` or ``WIDTHxHEIGHTxFRAMES``; raises InputError for anything else."""
        if text in NAMED:
            return NAMED[text]
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(p.isdecimal() and len(p) < 6 for p in parts):
            raise InputError(f"Cannot read the size {text!r}: give cpu, gpu or WIDTHxHEIGHTxFRAMES such as 128x128x17.")
        return cls(*map(int, parts))


CPU_SIZE = Size(width=128, height=128, frames=17)  # 320 tokens
GPU_SIZE = Size(width=480, height=480, frames=33)  # 8,100 tokens: where attention dominates the step
NAMED = {"cpu": CPU_SIZE, "gpu": GPU_SIZE}
