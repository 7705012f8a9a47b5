"""Load the bundled weights into diffusers' Wan classes, after checking that they are what was shipped.

Weights are safetensors only; a file whose SHA-256 is not the one in weights.json is refused before any of it is read
as tensors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError, WeightsError

TRANSFORMER_FILE = "sage3_demo_wan.safetensors"
VAE_FILE = "sage3_demo_vae.safetensors"
CARD_FILE = "weights.json"

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}


def weights_folder() -> Path:
    """Where the bundled weights lie."""
    return Path(__file__).parent / "weights"


def card() -> dict[str, Any]:
    """weights.json: how the weights were made, their scores, and the SHA-256 of each file."""
    path = weights_folder() / CARD_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: install the package again, or run git checkout on that folder.") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not readable JSON ({error}): restore it from the repository.") from None


def verify(path: Path) -> None:
    """Raise WeightsError unless the file is whole, is safetensors, and has the SHA-256 that weights.json names."""
    restore = "restore it from the repository or install the package again"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"The weight file {path} is missing: {restore}.") from None
    except OSError as error:
        raise WeightsError(f"The weight file {path} cannot be read ({error.strerror}): check its permissions.") from None
    if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise WeightsError(f"{path} is a pickle, not safetensors, and could run code when opened: {restore}.")
    expected = card()["files"].get(path.name)
    if expected is None:
        raise WeightsError(f"{path.name} is not one of the bundled weight files: give one of {', '.join(card()['files'])}.")
    if len(data) != expected["bytes"]:
        raise WeightsError(f"{path} has {len(data)} bytes where {expected['bytes']} were shipped: {restore}.")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise WeightsError(f"{path} was altered (its SHA-256 is not the shipped one): {restore}.")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a verified weight file, by Wan's own key names."""
    verify(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a valid safetensors file ({error}): restore it from the repository.") from None
    return tensors


def new_transformer() -> Any:
    """An untrained diffusers WanTransformer3DModel of the bundled shape (8.0 M parameters)."""
    return _diffusers().WanTransformer3DModel(**TRANSFORMER_CONFIG)


def new_vae() -> Any:
    """An untrained diffusers AutoencoderKLWan of the bundled shape (3.6 M parameters)."""
    return _diffusers().AutoencoderKLWan(**VAE_CONFIG)


def load_transformer(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The bundled transformer as a diffusers WanTransformer3DModel, in eval mode."""
    state = _single_file().convert_wan_transformer_to_diffusers(read(weights_folder() / TRANSFORMER_FILE))
    return _filled(new_transformer(), state, device, dtype)


def load_vae(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The bundled VAE as a diffusers AutoencoderKLWan, in eval mode."""
    state = _single_file().convert_wan_vae_to_diffusers(read(weights_folder() / VAE_FILE))
    return _filled(new_vae(), state, device, dtype)


def _filled(module: Any, state: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> Any:
    module.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=True)
    # Not module.to(dtype=...): diffusers warns that this loses what some models keep in float32; ours keeps nothing.
    return torch.nn.Module.to(module.eval().requires_grad_(False), device=device, dtype=dtype)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise EngineError(f"The embedded engine needs diffusers ({error}): pip install 'comfy-sage3[demo]'.") from None
    return diffusers


def _single_file() -> Any:
    _diffusers()
    from diffusers.loaders import single_file_utils

    return single_file_utils
