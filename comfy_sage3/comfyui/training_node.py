"""Sage3 Attention (training): the hook for ComfyUI's Train LoRA, where gradients must run through every call."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..kernels.devices import KERNELS
from ..precision import Precision, PrecisionPlan
from . import inputs, status
from .hook import Hook
from .install import install

NO_KERNEL = (
    "This version has no 8-bit kernel with gradients: calls that need gradients run through exact attention, so training is "
    "right, and not faster. With emulate they run in 8 bits in plain PyTorch, forward and backward, which is slow."
)


def has_kernel() -> bool:
    """Whether some GPU's kernel gives gradients in 8 bits."""
    return any(k.trainable and k.compiled is not None for k in KERNELS)


class Sage3TrainingAttention(io.ComfyNode):
    """The same patch as Sage3 Attention, with the choices that training has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sage3TrainingAttention",
            display_name="Sage3 Attention (training)",
            category="sage3",
            description=(
                "Put it between the model loader and Train LoRA. Attention that needs gradients runs in 8 bits, forward "
                "and backward, where a kernel for it exists, and through exact attention elsewhere: gradients are never "
                "lost without a word." + ("" if has_kernel() else " " + NO_KERNEL)
            ),
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "precision",
                    options=[Precision.INT8.value, Precision.EXACT.value],
                    default=Precision.INT8.value,
                    tooltip="int8: 8-bit forward and backward (4 bits have no backward). exact: leave the model as it is.",
                ),
                inputs.min_tokens("Calls with fewer query or key tokens stay exact: they are too short to gain."),
                io.Boolean.Input(
                    "emulate",
                    default=False,
                    tooltip="Run 8 bits in plain PyTorch where no kernel exists: real gradients, no speed.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, precision: str, min_tokens: int, emulate: bool) -> io.NodeOutput:
        note = "" if has_kernel() or emulate or precision == Precision.EXACT.value else NO_KERNEL
        hook = Hook(
            PrecisionPlan(Precision.parse(precision), min_tokens=min_tokens), emulate=emulate,
            node_id=cls.hidden.unique_id, note=note,
        )  # fmt: skip
        return io.NodeOutput(install(model, hook, status.publish, status.current_prompt, status.progress))
