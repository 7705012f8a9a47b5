"""Tiny random models in the file formats of real ones, which ComfyUI's stock loaders take.

Each is an instance of ComfyUI's own network class with few and narrow layers, filled with seeded random numbers and saved
as safetensors; a few MB, made in a temporary folder. Runs inside ComfyUI's Python. What a model needs besides its file
(its prompt's width, its latent's shape) stands in ``MODELS``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT = 20  # tokens of a prompt: more than the tests' least length of a call, so that cross-attention is served too


@dataclass(frozen=True)
class Tiny:
    """``module`` and ``network`` name ComfyUI's class, ``config`` its arguments; ``latent`` is (C, [T,] H, W).

    ``calls`` lists one forward pass: (layer as ComfyUI names it, query tokens, key tokens, whether there is a mask).
    """

    module: str
    network: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    text_width: int
    calls: tuple[tuple[str, int, int, bool], ...]
    head_dim: int
    metadata: dict[str, Any] | None = None
    pooled: int | None = None  # width of the pooled prompt
    extras: dict[str, Any] = field(default_factory=dict)  # joins the conditioning
    cfg: float = 2.0


def _each(kind: str, layers: int, *calls: tuple[int, int, bool]) -> tuple[tuple[str, int, int, bool], ...]:
    """``calls`` of every one of ``layers`` layers; kind "" is a model that does not say which layer calls."""
    return tuple((f"{kind} {i}".strip() if kind != "-" else "", *call) for i in range(layers) for call in calls)


_WAN, _FLUX, _SD3, _HUNYUAN, _LTXV, _COG = 64, 64, 64, 64, 64, 64  # latent tokens

MODELS = {
    "wan": Tiny(
        "comfy.ldm.wan.model",
        "WanModel",
        {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 3, "in_dim": 16, "out_dim": 16, "text_dim": 4096},
        (16, 4, 8, 8),
        4096,
        _each("double", 3, (_WAN, _WAN, False), (_WAN, TEXT, False)),
        128,
    ),
    "flux": Tiny(
        "comfy.ldm.flux.model",
        "Flux",
        {
            "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 256,
            "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [16, 56, 56],
            "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
        },
        (16, 16, 16),
        64,
        _each("double", 2, (_FLUX + TEXT, _FLUX + TEXT, False)) + _each("single", 3, (_FLUX + TEXT, _FLUX + TEXT, False)),
        128,
        pooled=64,
        extras={"guidance": 3.5},
    ),
    "sd3": Tiny(
        "comfy.ldm.modules.diffusionmodules.mmdit",
        "MMDiT",
        {
            "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 4, "adm_in_channels": 64,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 256}},
            "num_patches": 256, "pos_embed_max_size": 16, "qk_norm": "rms",
        },
        (16, 16, 16),
        64,
        _each("-", 4, (_SD3 + TEXT, _SD3 + TEXT, False)),
        64,
        pooled=64,
    ),
    "hunyuan_video": Tiny(
        "comfy.ldm.hunyuan_video.model",
        "HunyuanVideo",
        {
            "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 64, "hidden_size": 256,
            "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256,
            "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
            "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
        },
        (16, 4, 8, 8),
        64,
        # two blocks refine the text before the numbered ones begin
        _each("-", 2, (TEXT, TEXT, True))
        + _each("double", 2, (_HUNYUAN + TEXT, _HUNYUAN + TEXT, True))
        + _each("single", 2, (_HUNYUAN + TEXT, _HUNYUAN + TEXT, True)),
        128,
        pooled=768,
        extras={"attention_mask": [1] * (TEXT - 5) + [0] * 5},
        cfg=1.0,  # ComfyUI's code takes the mask of one prompt only
    ),
    "ltxv": Tiny(
        "comfy.ldm.lightricks.model",
        "LTXVModel",
        {
            "in_channels": 128, "cross_attention_dim": 256, "attention_head_dim": 64, "num_attention_heads": 4,
            "caption_channels": 64, "num_layers": 3, "timestep_scale_multiplier": 1000.0,
        },
        (128, 4, 4, 4),
        64,
        _each("-", 3, (_LTXV, _LTXV, False), (_LTXV, TEXT, True)),
        64,
        metadata={
            "in_channels": 128, "cross_attention_dim": 256, "attention_head_dim": 64, "num_attention_heads": 4,
            "caption_channels": 64, "timestep_scale_multiplier": 1000.0,
        },
        extras={"attention_mask": [1] * (TEXT - 5) + [0] * 5, "frame_rate": 25},
    ),
    "cogvideox": Tiny(
        "comfy.ldm.cogvideo.model",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 16, "time_embed_dim": 64,
            "text_embed_dim": 64, "num_layers": 3, "use_rotary_positional_embeddings": True,
        },
        (16, 4, 8, 8),
        64,
        _each("-", 3, (_COG + TEXT, _COG + TEXT, False)),
        64,
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Save the model ``name`` in ``folder`` and return its file."""
    import importlib

    import comfy.ops
    from safetensors.torch import save_file

    tiny = MODELS[name]
    network = getattr(importlib.import_module(tiny.module), tiny.network)
    made = network(**tiny.config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    metadata = None if tiny.metadata is None else {"config": json.dumps({"transformer": tiny.metadata})}
    path = folder / f"tiny_{name}.safetensors"
    save_file(random_weights(made.state_dict()), path, metadata=metadata)
    return path


def random_weights(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """``state`` filled so that signals keep their size from layer to layer: norms 1, matrices N(0, 1/fan-in)."""
    generator = torch.Generator().manual_seed(seed)

    def filled(key: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return like.clone()
        noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        if like.ndim < 2:
            return (1.0 if key.endswith((".weight", "scale", "gamma")) else 0.0) + 0.02 * noise
        return noise * (like[0].numel() ** -0.5)

    return {key: filled(key, value).to(value.dtype).contiguous() for key, value in state.items()}


def conditioning(tiny: Tiny, seed: int, tokens: int = TEXT) -> list[Any]:
    """A random prompt: what the model's text encoders would give."""
    generator = torch.Generator().manual_seed(seed)
    extras = dict(tiny.extras)
    if "attention_mask" in extras:
        extras["attention_mask"] = torch.tensor([extras["attention_mask"]], dtype=torch.int64)
    if tiny.pooled is not None:
        extras["pooled_output"] = torch.randn(1, tiny.pooled, generator=generator)
    return [[torch.randn(1, tokens, tiny.text_width, generator=generator), extras]]
