"""The nodes Sage3 Precision Plan and Sage3 Load Plan: measure, solve, show, save, and read again."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io

from ..errors import InputError
from ..plan.heatmap import draw
from ..plan.plan import LayerPlan
from ..plan.report import report
from ..plan.solve import BUDGETS, budget_of
from . import inputs, plan_files
from .calibration import Calibrator
from .fingerprint import check, fingerprint_of

CUSTOM = "custom"
NONE_SAVED = "(no plan saved yet)"
PlanType = io.Custom("SAGE3_PLAN")


def _image(plan: LayerPlan) -> torch.Tensor:
    """The heat map as ComfyUI has images: (1, height, width, 3) float32 in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.asarray(draw(plan), dtype=np.float32) / 255.0)[None]


class Sage3PrecisionPlan(io.ComfyNode):
    """Sample once exactly, measure what fp4 and int8 would have cost each layer, and plan."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from comfy.samplers import KSampler

        return io.Schema(
            node_id="Sage3PrecisionPlan",
            display_name="Sage3 Precision Plan",
            category="sage3",
            description=(
                "Samples once with exact attention, measures at some steps how far 4- and 8-bit attention would be off in "
                "each layer, and finds the fastest precision for every layer and step within an error budget."
            ),
            inputs=[
                io.Model.Input("model", tooltip="As it is to be sampled, LoRAs included, before Sage3 Attention."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image", tooltip="Of the size that is to be sampled: errors depend on it."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=10_000),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=list(KSampler.SAMPLERS)),
                io.Combo.Input("scheduler", options=list(KSampler.SCHEDULERS)),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                io.Combo.Input(
                    "budget",
                    options=[*BUDGETS, CUSTOM],
                    default="balanced",
                    tooltip="Mean relative error of the attention outputs, over layers and steps: "
                    + ", ".join(f"{name} {error:g}" for name, error in BUDGETS.items())
                    + ", or your own.",
                ),
                io.Float.Input(
                    "custom_error",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="The mean relative error allowed when the budget is custom.",
                ),
                io.Int.Input(
                    "calibrated_steps",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="At how many steps to measure, spread over the schedule; the others follow the nearest one.",
                ),
                inputs.min_tokens(
                    "Calls with fewer query or key tokens are not measured and stay exact. As in Sage3 Attention."
                ),
                io.Boolean.Input(
                    "emulate",
                    default=False,
                    tooltip="Plan for a GPU with 4-bit kernels where this one has none: errors are real, computed in plain "
                    "PyTorch; times are modelled.",
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Save the plan under this name, for Sage3 Load Plan. Empty: not saved.",
                ),
            ],
            outputs=[
                PlanType.Output("plan", display_name="plan"),
                io.Image.Output("heat_map", display_name="heat map"),
                io.String.Output("report", display_name="report"),
                io.Latent.Output("latent", display_name="latent"),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, budget: str | None = None, custom_error: float | None = None, file_name: str | None = None
    ) -> bool | str:
        try:
            if budget is not None and custom_error is not None:
                budget_of(budget, custom_error)
        except InputError as error:
            return str(error)
        if file_name and file_name.strip() and not plan_files.clean(file_name):
            return f"A plan cannot be saved as {file_name!r}: use letters and digits."
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        budget: str,
        custom_error: float,
        calibrated_steps: int,
        min_tokens: int,
        emulate: bool,
        file_name: str,
    ) -> io.NodeOutput:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from nodes import common_ksampler  # ComfyUI's: what its KSampler node runs, with its progress bar and previews

        budget_of(budget, custom_error)  # before minutes of sampling, not after
        look = Calibrator(
            calibrated_steps,
            emulate=emulate,
            min_tokens=min_tokens,
            on_call=throw_exception_if_processing_interrupted,
        )
        seen = look.attach(model)
        (latent,) = common_ksampler(
            seen, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=denoise
        )
        if look.calibration is None:
            raise InputError(_nothing_seen(look))
        plan = look.calibration.plan(fingerprint_of(model), look.sigmas, look.schedule, budget, custom_error)
        said = report(plan)
        if file_name.strip():
            said += f"\nSaved as {plan_files.save(file_name, plan).name}."
        shown = {"text": [said], "sage3_plan": [json.loads(plan.to_json())]}  # in the history, for scripts
        return io.NodeOutput(plan, _image(plan), said, latent, ui=shown)


def _nothing_seen(look: Calibrator) -> str:
    if not look.calls:
        return (
            "This model never called ComfyUI's attention hook, so there is nothing to plan: its own code, or another node's "
            "patch, computes attention elsewhere; remove such a patch."
        )
    return (
        f"None of the {look.calls} attention calls of this sampling had {look.min_tokens} tokens and could be measured: "
        "lower min_tokens, or make the picture larger."
    )


class Sage3LoadPlan(io.ComfyNode):
    """A saved plan, if it is this model's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = plan_files.saved()
        return io.Schema(
            node_id="Sage3LoadPlan",
            display_name="Sage3 Load Plan",
            category="sage3",
            description="Reads a plan that Sage3 Precision Plan saved, and refuses one that was made for another model.",
            inputs=[
                io.Model.Input("model", tooltip="The model the plan is to be used with; LoRAs do not matter."),
                io.Combo.Input("plan_name", options=names or [NONE_SAVED]),
            ],
            outputs=[
                PlanType.Output("plan", display_name="plan"),
                io.Image.Output("heat_map", display_name="heat map"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, plan_name: str, **others: Any) -> str:
        """Changes when the file does, so that a plan made anew is read anew."""
        path = plan_files.folder() / f"{plan_files.clean(plan_name)}{plan_files.SUFFIX}"
        try:
            stat = path.stat()
        except OSError:
            return "none"
        return f"{stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(cls, model: Any, plan_name: str) -> io.NodeOutput:
        plan = check(plan_files.load(plan_name), model)
        return io.NodeOutput(plan, _image(plan), report(plan))
