"""Nodes that only tests need: a prompt and a latent for a tiny model, a keeper of results, other people's patches."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import MODELS, TEXT, conditioning, random_weights

KEPT: dict[str, torch.Tensor] = {}  # what TinyKeep was given
KEPT_MODELS: dict[str, Any] = {}
COUNTS: dict[str, int] = {}  # calls that reached each TinyOverride
UNET_LATENT = (4, 16, 16)
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
        name = name.strip()  # with what makes it another value to ComfyUI's cache
        return ({"samples": torch.zeros(1, *(UNET_LATENT if name == "unet" else MODELS[name].latent))},)


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

    ``how``: "polite"; "rude" computes attention itself, whatever was there; "official" does so by ComfyUI's own setter;
    "late" and "late rude" go into the slot before every look at the model, as ComfyUI's sparse attention does.
    """

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {}), "how": ("STRING", {"default": "polite"})}}

    def patch(self, model, name, how="polite"):
        from comfy.ldm.modules.attention import optimized_attention
        from comfy.patcher_extension import CallbacksMP

        model = model.clone()
        COUNTS[name] = 0
        previous = None

        def override(func, *args, **kwargs):
            COUNTS[name] += 1
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

        def official(*args, **kwargs):
            COUNTS[name] += 1
            return optimized_attention(*args, **kwargs)

        def put(options):
            nonlocal previous
            if options.get(SLOT) is not override:
                previous = None if "rude" in how else options.get(SLOT)
                options[SLOT] = override

        def prepare(patcher, timestep, model_options=None):  # 0.3.64 gives the first two
            put((model_options or patcher.model_options)["transformer_options"])

        if how == "official":
            model.set_model_optimized_attention(official)
        elif how.startswith("late"):
            model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, name, prepare)
        else:
            put(model.model_options["transformer_options"])
        return (model,)


class TinyResiduals:
    """A control net's residuals without its network."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING", "CONDITIONING"), "apply", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        prompts = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        return {"required": prompts | {"layers": ("INT", {}), "tokens": ("INT", {}), "width": ("INT", {})}}

    def apply(self, positive, negative, layers, tokens, width):
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

        control = {"control": Residuals(), "control_apply_to_uncond": False}  # one for both, so that they are a batch
        return tuple([[tensor, extra | control] for tensor, extra in prompt] for prompt in (positive, negative))


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


UNET = {
    "image_size": 32, "in_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "num_heads": 2,
    "num_head_channels": -1, "use_spatial_transformer": True, "context_dim": 64, "use_linear_in_transformer": False,
    "adm_in_channels": None, "legacy": False, "use_temporal_attention": False, "dtype": torch.float32,
}  # fmt: skip


class TinyUNet:
    """A Stable Diffusion 1.5 of a fifth of its width; the stock loader knows one width only."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        from comfy import model_base, model_management, model_patcher, supported_models

        config = supported_models.SD15(UNET | {"out_channels": 4})
        made = model_base.BaseModel(config, device="cpu")
        made.diffusion_model.load_state_dict(random_weights(made.diffusion_model.state_dict()))
        cpu = torch.device("cpu")
        return (model_patcher.ModelPatcher(made, load_device=model_management.get_torch_device(), offload_device=cpu),)


class TinyControlNet:
    """A control net for TinyUNet. Its last convolutions are 0 before training; here they are random as all the rest."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONTROL_NET",), "make", "tiny"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        from comfy import model_management, ops
        from comfy.cldm.cldm import ControlNet as Network
        from comfy.controlnet import ControlNet

        network = Network(**UNET, hint_channels=3, operations=ops.disable_weight_init)
        network.load_state_dict(random_weights(network.state_dict(), seed=3))
        return (ControlNet(network, load_device=model_management.get_torch_device()),)


NODES = {
    c.__name__: c
    for c in (TinyPrompt, TinyLatent, TinyKeep, TinyOverride, TinyResiduals, TinyControlNet, TinyCompile, TinyUNet)
}


def register() -> None:
    """Offer these nodes to ComfyUI."""
    import nodes

    nodes.NODE_CLASS_MAPPINGS.update(NODES)
