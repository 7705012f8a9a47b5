"""Key names of the shipped files: Wan's own, as ComfyUI's stock loaders read them, from diffusers' modules.

diffusers converts the other way by itself (``convert_wan_transformer_to_diffusers`` and its VAE sibling);
tests/demo/test_native.py holds the two to be inverse.
"""

from __future__ import annotations

import re

from torch import Tensor

_TRANSFORMER = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
_VAE = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.", ".residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"^((?:en|de)coder)\.conv_in\.", r"\1.conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)


def transformer_to_native(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers WanTransformer3DModel state dict under Wan's own key names."""
    return {_rename(key, _TRANSFORMER): value for key, value in state.items()}


def vae_to_native(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers AutoencoderKLWan state dict under Wan's own key names."""
    return {_flatten_up_block(_rename(key, _VAE)): value for key, value in state.items()}


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _flatten_up_block(key: str) -> str:
    """diffusers groups three residual blocks and an upsampler; Wan numbers them through."""

    def index(match: re.Match[str]) -> str:
        block, kind, inner = int(match[1]), match[2], int(match[3])
        return f".upsamples.{4 * block + (3 if kind == 'upsamplers' else inner)}."

    return re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", index, key)
