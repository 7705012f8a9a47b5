"""The nodes: Sage3 Attention, Sage3 Report, Sage3 Demo Prompt."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..demo.load import TRANSFORMER_FILE, VAE_FILE, verify, weights_folder
from ..demo.prompts import embed, parse
from ..errors import InputError, WeightsError
from ..precision import Precision, PrecisionPlan
from . import status
from .fingerprint import check
from .hook import Hook
from .inputs import advanced, min_tokens, percent, where_known
from .install import hooks_of, install
from .layers import LayerList

log = logging.getLogger("comfy_sage3")
FALL_BACK, STOP = "fall back", "stop"
EXAMPLE = "a large red circle moving left quickly on a black background"


def register_weights() -> None:
    """Let the stock UNETLoader and VAELoader list the bundled weights, if they are what was shipped."""
    import folder_paths

    for kind, name in (("diffusion_models", TRANSFORMER_FILE), ("vae", VAE_FILE)):
        try:
            verify(weights_folder() / name)
        except WeightsError as error:  # the attention node is of use without them
            log.error("The bundled demo model is not offered: %s", error)
        else:
            folder_paths.add_model_folder_path(kind, str(weights_folder()))


class Sage3Attention(io.ComfyNode):
    """Patch a model's attention; what happened is shown on the node after sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return where_known(
            io.Schema,
            known={"search_aliases": ["sage attention", "sageattention", "sageattn3", "fp4 attention", "int8 attention"]},
            node_id="Sage3Attention",
            display_name="Sage3 Attention",
            category="sage3",
            description=(
                "Run this model's attention in 4 or 8 bits where the GPU has a kernel for it, and leave "
                "every other call to the attention ComfyUI would have used. After sampling the node says "
                "what happened and why."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "precision",
                    options=[p.value for p in Precision],
                    default=Precision.AUTO.value,
                    tooltip="auto: the fastest on this device. fp4: SageAttention3 (Blackwell). "
                    "int8: 8-bit (NVIDIA GPUs from Turing on). int8-fast: quicker and coarser on Hopper, elsewhere "
                    "int8. exact: leave the model as it is.",
                ),
                percent("start_percent", 0.0, "Where in the schedule to begin. Early steps decide the composition."),
                percent("end_percent", 1.0, "Where in the schedule to stop. Late steps decide the detail."),
                min_tokens(
                    "Calls with fewer query or key tokens stay exact: they are too short to gain, and text cross-attention "
                    "is among them."
                ),
                advanced(
                    io.Boolean.Input,
                    "emulate",
                    default=False,
                    tooltip="Run the chosen method in plain PyTorch where no kernel exists: real quality, no speed.",
                ),
                advanced(
                    io.String.Input,
                    "exact_layers",
                    default="",
                    optional=True,
                    tooltip='Layers that stay exact, such as "0, 1, 28-29", or "double 0-2, single 37" where a model has '
                    "kinds. Needs a model that says which layer calls (ComfyUI 0.5 or newer; the report says if not).",
                ),
                advanced(
                    io.Combo.Input,
                    "on_trouble",
                    options=[FALL_BACK, STOP],
                    default=FALL_BACK,
                    optional=True,
                    tooltip="When a kernel fails, or a layer's first result is not finite or disagrees with exact "
                    "attention: fall back to exact attention and say so, or stop.",
                ),
                io.Custom("SAGE3_PLAN").Input(
                    "plan",
                    optional=True,
                    tooltip="From Sage3 Precision Plan or Sage3 Load Plan: a precision per layer and step, in place of "
                    "the one above. The window, min_tokens and exact_layers still hold.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, start_percent: float | None = None, end_percent: float | None = None, exact_layers: str | None = None
    ) -> bool | str:
        # a linked value is None here; execute checks it
        if start_percent is not None and end_percent is not None and start_percent > end_percent:
            return f"start_percent {start_percent} lies after end_percent {end_percent}: swap them."
        try:
            LayerList.parse(exact_layers or "")
        except InputError as error:
            return f"exact_layers: {error}"
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        precision: str,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        emulate: bool,
        exact_layers: str = "",
        on_trouble: str = FALL_BACK,
        plan: Any = None,
    ) -> io.NodeOutput:
        if plan is not None:
            plan = check(plan, model)
            min_tokens = max(min_tokens, plan.min_tokens)  # shorter calls were not measured
        wishes = PrecisionPlan(Precision.parse(precision), start_percent, end_percent, min_tokens)
        hook = Hook(
            wishes, emulate=emulate, node_id=cls.hidden.unique_id, exact_layers=LayerList.parse(exact_layers),
            stop_on_trouble=on_trouble == STOP, table=plan,
        )  # fmt: skip
        return io.NodeOutput(install(model, hook, status.publish, status.current_prompt, status.progress))


class Sage3Report(io.ComfyNode):
    """The outcome as an output of the workflow: a headless run finds it in /history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sage3Report",
            display_name="Sage3 Report",
            category="sage3",
            description=(
                "Says what Sage3 Attention did for this model: calls accelerated, calls that fell back, and "
                "why. Put it after the sampler: the model is the one that was sampled, the latent the result. "
                "After Train LoRA, connect its loss_map to 'after': the report then has the loss of every step too."
            ),
            inputs=[
                io.Model.Input("model"),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Connect the sampler's result: the report is made after it."
                ),
                io.AnyType.Input(
                    "after", optional=True, tooltip="Anything else that is made by running the model, such as a LoRA's loss."
                ),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model"),
                io.Latent.Output("latent_out", display_name="latent"),
                io.String.Output("report", display_name="report"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any] | None = None, after: Any = None) -> io.NodeOutput:
        if latent is None and after is None:
            raise InputError(
                "Sage3 Report has to run after the sampler: connect the sampler's result to 'latent', "
                "or anything else that was made with this model to 'after'."
            )
        hooks = hooks_of(model)
        message = "\n".join(status.text(h) for h in hooks)
        if not hooks:
            message = "This model did not go through a Sage3 Attention node: attention is ComfyUI's own."
        losses = _losses_of(after)
        if losses:
            message += f"\nLoss over {len(losses)} steps: {losses[0]:.4g} at first, {losses[-1]:.4g} at last."
        shown: dict[str, Any] = {
            "text": [message],
            "sage3": [line for h in hooks for line in h.report.lines()],
            "sage3_run": [status.payload(h) for h in hooks],
        }
        if losses:
            shown["sage3_loss"] = losses
        return io.NodeOutput(model, latent, message, ui=shown)


def _losses_of(after: Any) -> list[float]:
    """The losses in Train LoRA's loss_map, {"loss": [...]}; none in anything else."""
    losses = after.get("loss") if isinstance(after, dict) else None
    if not isinstance(losses, list) or not all(isinstance(x, (int, float)) for x in losses):
        return []
    return [float(x) for x in losses]


class Sage3DemoPrompt(io.ComfyNode):
    """Words to conditioning for the bundled model, which has no text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sage3DemoPrompt",
            display_name="Sage3 Demo Prompt",
            category="sage3",
            description=(
                f"A prompt for the bundled demo model, such as '{EXAMPLE}'. Leave it empty for the negative prompt."
            ),
            inputs=[io.String.Input("text", multiline=True, default=EXAMPLE)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        if text is not None:  # None: the text comes from another node, and execute checks it
            try:
                parse(text)
            except InputError as error:
                return str(error)
        return True

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput([[embed(text).unsqueeze(0), {}]])
