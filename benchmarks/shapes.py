"""What is measured: square shapes, and the attention calls of real models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comfy_sage3.errors import InputError

WITH_GRADIENTS = ("square", "weights")  # groups
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # products of a pass, counted in forward ones


@dataclass(frozen=True)
class Shape:
    """One attention call: q (batch, heads, queries, head_dim), k and v (batch, heads, keys, head_dim).

    Scores have a standard deviation of ``score_std`` where q and k are N(0,1), and one key takes ``sink`` of every weight.
    """

    name: str
    group: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool = False
    score_std: float = 1.0
    sink: float = 0.0

    def flops(self, direction: str = "forward") -> float:
        """4 B H Lq Lk D, half when causal, 2.5 times it backward, 3.5 in both: as the FlashAttention papers count."""
        full = 4.0 * self.batch * self.heads * self.queries * self.keys * self.head_dim
        return full * (0.5 if self.causal else 1.0) * PASSES[direction]

    def elements(self) -> int:
        """Of q, k and v together."""
        return self.batch * self.heads * self.head_dim * (self.queries + 2 * self.keys)

    @property
    def text(self) -> str:
        """As a person reads it: B=4 H=32 N=8192 hd128 causal."""
        tokens = f"N={self.queries}" if self.queries == self.keys else f"Lq={self.queries} Lk={self.keys}"
        causal = " causal" if self.causal else ""
        sharp = f" scores x {self.score_std:g}" if self.score_std != 1.0 else ""
        sink = f" a key with {self.sink:.0%} of each weight" if self.sink else ""
        return f"B={self.batch} H={self.heads} {tokens} hd{self.head_dim}{causal}{sharp}{sink}"


def _square(head_dim: int) -> tuple[Shape, ...]:
    name = f"hd{head_dim}"
    return (
        Shape(f"{name}-2048", "square", 4, 32, 2048, 2048, head_dim),
        Shape(f"{name}-8192", "square", 4, 32, 8192, 8192, head_dim),
        Shape(f"{name}-8192-causal", "square", 4, 32, 8192, 8192, head_dim, causal=True),
        Shape(f"{name}-32768", "square", 1, 32, 32768, 32768, head_dim),
    )


def video_tokens(width: int, height: int, frames: int, text: int = 0) -> int:
    """Tokens of a latent video: a VAE of 8 x 8 pixels and 4 frames (the first alone), patches of 2 x 2, and text."""
    return (1 + (frames - 1) // 4) * (height // 16) * (width // 16) + text


def image_tokens(side: int, text: int = 0) -> int:
    """Tokens of a square latent image: a VAE of 8 x 8 pixels, patches of 2 x 2, and text."""
    return (side // 16) ** 2 + text


def _joint(name: str, group: str, heads: int, tokens: int, head_dim: int = 128, batch: int = 1) -> Shape:
    return Shape(name, group, batch, heads, tokens, tokens, head_dim)


SHAPES: tuple[Shape, ...] = (
    *_square(128),
    *_square(64),
    # The time of gradients depends on how alike the weights are. Scores of trained models are sharper than those of N(0,1),
    # and often have a key that takes much of every weight.
    Shape("hd128-8192-sharp", "weights", 4, 32, 8192, 8192, 128, score_std=2.25),
    Shape("hd128-8192-sharper", "weights", 4, 32, 8192, 8192, 128, score_std=4.0),
    Shape("hd128-8192-sink", "weights", 4, 32, 8192, 8192, 128, sink=0.5),
    # Wan 2.1 and 2.2 A14B: dim 5120, 40 heads; 1.3B: dim 1536, 12 heads. Self-attention; text comes by cross-attention.
    # Wan-Video/Wan2.1, wan/configs/wan_t2v_14B.py and wan_t2v_1_3B.py (vae_stride 4, 8, 8; patch_size 1, 2, 2).
    _joint("wan-14b-480p", "wan", 40, video_tokens(832, 480, 81)),
    _joint("wan-14b-720p", "wan", 40, video_tokens(1280, 720, 81)),
    _joint("wan-1.3b-480p", "wan", 12, video_tokens(832, 480, 81)),
    # HunyuanVideo: 24 heads of 128, 256 text tokens. Tencent/HunyuanVideo, hyvideo/modules/models.py
    # (HYVideo-T/2-cfgdistill) and hyvideo/config.py (--text-len 256); 720p is 1280 x 720 x 129 in its README.
    _joint("hunyuan-720p", "hunyuan", 24, video_tokens(1280, 720, 129, text=256)),
    # FLUX.1: 24 heads of 128, 512 text tokens. black-forest-labs/flux, src/flux/util.py (hidden_size 3072, num_heads 24).
    _joint("flux-1024", "flux", 24, image_tokens(1024, text=512)),
    # Qwen-Image: 24 heads of 128 (Qwen/Qwen-Image, transformer/config.json), 1328 x 1328 its own square size; text as long
    # as the prompt, here the 512 tokens at which diffusers' pipeline cuts it.
    _joint("qwen-image-1328", "qwen", 24, image_tokens(1328, text=512)),
    # SDXL: blocks of 640 and 1280 channels at 1/2 and 1/4 of a 128 x 128 latent, heads of 64, 77 text tokens, and a batch
    # of two for guidance. stabilityai/stable-diffusion-xl-base-1.0, unet/config.json.
    Shape("sdxl-4096", "sdxl", 2, 10, 4096, 4096, 64),
    Shape("sdxl-1024", "sdxl", 2, 20, 1024, 1024, 64),
    Shape("sdxl-4096-text", "sdxl", 2, 10, 4096, 77, 64),
    Shape("sdxl-1024-text", "sdxl", 2, 20, 1024, 77, 64),
    # CogVideoX-5B: 48 heads of 64, 226 text tokens, 720 x 480 x 49. THUDM/CogVideoX-5b, transformer/config.json.
    _joint("cogvideox-5b", "cogvideox", 48, video_tokens(720, 480, 49, text=226), head_dim=64),
)

QUICK = ("hd128-8192", "hd64-8192")


def usual(backward: bool) -> list[str]:
    """The groups that are measured where none are named."""
    return [s.group for s in SHAPES if backward or s.group != "weights"]


def chosen(names: Sequence[str]) -> tuple[Shape, ...]:
    """The shapes of these names and groups, in the table's order. Raises InputError naming what there is."""
    groups = list(dict.fromkeys(s.group for s in SHAPES))
    known = {*groups, *(s.name for s in SHAPES)}
    for name in names:
        if name not in known:
            every = ", ".join((*groups, *(s.name for s in SHAPES)))
            raise InputError(f"Unknown shape {name!r}: choose from {every}.")
    return tuple(s for s in SHAPES if s.name in names or s.group in names)
