"""Nodes that only tests need: a prompt and a latent for a tiny model, a keeper of results, other people's patches."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import MODELS, TEXT, conditioning, random_weights

KEPT: dict[str, torch.Tensor] = {}  # what TinyKeep was given
KEPT_MODELS: dict[str, Any] = {}
COUNTS: dict[str, int] = {}  # calls that reached each TinyOverride
SLOT = "optimized_attention_override"


class TinyPrompt:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {}), "seed": ("INT", {}), "tokens": ("INT", {"default": TEXT})}}

    def make(self, name, seed, tokens):
        return (conditioning(MODELS[name.strip()], seed, tokens),)


class TinyLatent:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def make(self, name):
        return ({"samples": torch.zeros(1, *MODELS[name.strip()].latent)},)


class TinyKeep:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "tiny", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "model": ("MODEL",), "name": ("STRING", {})}}

    def keep(self, latent, model, name):
        KEPT[name] = latent["samples"].clone()
        KEPT_MODELS[name.strip()] = model
        return {}


class TinyOverride:
    """Somebody's attention override: counts, then passes on to what was there before it, as well-behaved ones do.

    Where it is not ``polite`` it computes attention itself, whatever was there.
    """

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {}), "polite": ("BOOLEAN", {"default": True})}}

    def patch(self, model, name, polite=True):
        model = model.clone()
        options = model.model_options["transformer_options"]
        previous = options.get(SLOT) if polite else None
        COUNTS[name] = 0

        def override(func, *args, **kwargs):
            COUNTS[name] += 1
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

        options[SLOT] = override
        return (model,)


class TinyControl:
    """A control net's residuals without its network."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "apply", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "layers": ("INT", {}),
                "tokens": ("INT", {}),
                "width": ("INT", {}),
            }
        }

    def apply(self, conditioning, layers, tokens, width):
        from comfy.controlnet import ControlBase

        class Residuals(ControlBase):
            def __init__(self):
                super().__init__()
                generator = torch.Generator().manual_seed(9)
                self.given = [torch.randn(1, tokens, width, generator=generator) for _ in range(layers)]

            def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
                return {"output": [g.to(x_noisy) for g in self.given]}

            def copy(self):
                made = Residuals()
                self.copy_to(made)
                return made

            def get_models(self):
                return []

        return (
            [[tensor, extra | {"control": Residuals(), "control_apply_to_uncond": True}] for tensor, extra in conditioning],
        )


class TinyCompile:
    """What the stock TorchCompileModel node does, with a compiler back end that needs no C++ compiler."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        set_torch_compile_wrapper(model=model, backend="eager")
        return (model,)


class TinyUNet:
    """A Stable Diffusion 1.5 of a fifth of its width; the stock loader knows one width only."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        from comfy import model_base, model_management, model_patcher, supported_models

        config = supported_models.SD15(
            {
                "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1],
                "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
                "transformer_depth_middle": 1, "num_heads": 2, "num_head_channels": -1, "use_spatial_transformer": True,
                "context_dim": 64, "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
                "use_temporal_attention": False, "dtype": torch.float32,
            }
        )  # fmt: skip
        made = model_base.BaseModel(config, device="cpu")
        made.diffusion_model.load_state_dict(random_weights(made.diffusion_model.state_dict()))
        cpu = torch.device("cpu")
        return (model_patcher.ModelPatcher(made, load_device=model_management.get_torch_device(), offload_device=cpu),)


NODES = {c.__name__: c for c in (TinyPrompt, TinyLatent, TinyKeep, TinyOverride, TinyControl, TinyCompile, TinyUNet)}


def register() -> None:
    """Offer these nodes to ComfyUI."""
    import nodes

    nodes.NODE_CLASS_MAPPINGS.update(NODES)
