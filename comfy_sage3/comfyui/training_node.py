"""Sage3 Attention (training): the hook for ComfyUI's Train LoRA, where gradients must run through every call."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..precision import Precision, PrecisionPlan
from . import inputs, status
from .hook import Hook
from .install import install
from .usage import Usage


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
                "and backward, where a kernel for it exists (NVIDIA GPUs of sm_80 to sm_90, sm_120 and sm_121; all but "
                "Hopper by Triton), and through exact attention elsewhere: gradients are never lost without a word. After "
                "training the node says what ran, how long it took and how much memory."
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
        usage = Usage(torch.device(getattr(model, "load_device", "cpu")))
        hook = Hook(
            PrecisionPlan(Precision.parse(precision), min_tokens=min_tokens), emulate=emulate,
            node_id=cls.hidden.unique_id, usage=usage,
        )  # fmt: skip
        return io.NodeOutput(install(model, hook, status.publish, status.current_prompt, status.progress))
