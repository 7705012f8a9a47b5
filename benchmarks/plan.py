"""What an error budget does to a video: the bundled model with plans of growing budgets, against its exact run.

    python -m benchmarks.plan [--size 128x128x17] [--steps 12] [--out benchmarks/results/plan.md]

For every prompt: one exact run that is calibrated at four steps, then one run for each budget with the plan solved under
it, emulated where this machine has no kernel. Prints a Markdown table: the plan's mean error, its shares of precisions, and
how far the final video is from the exact one. Costs are those of a call of 32760 tokens and 40 heads of 128 (Wan 14B, 832 x
480, 81 frames), modelled, so that the plan weighs precisions as it would for a model that needs it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from comfy_sage3.attention import attention
from comfy_sage3.compare.capture import Place
from comfy_sage3.compare.diffusers_engine import routed
from comfy_sage3.demo.load import load_transformer, load_vae
from comfy_sage3.demo.sample import decode, sample, schedule
from comfy_sage3.demo.sizes import MIN_TOKENS, Size
from comfy_sage3.metrics import psnr
from comfy_sage3.plan.calibrate import Calibration, spread
from comfy_sage3.plan.costs import MODEL_OF, Costs, modelled
from comfy_sage3.plan.plan import MODELLED, LayerPlan
from comfy_sage3.precision import Precision

PROMPTS = (
    "a large red circle moving left quickly on a black background",
    "a small blue square moving up slowly on a black background",
)
ALL_FP4, ALL_INT8 = "fp4 everywhere", "int8 everywhere"
BUDGETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.10)
SHAPE = (1, 40, 32760, 128)
COLUMNS, CFG = 4, 3.0


class _Long(Calibration):
    """Errors of the calls that are made, costs of a long one."""

    def _seconds(self, *args: Any) -> dict[Precision, float]:
        return {p: modelled(p, SHAPE, SHAPE) for p in (Precision.EXACT, *self.costs.precisions)}


class Run:
    """The bundled model at one size: exact and calibrated, or with a plan."""

    def __init__(self, size: Size, steps: int, device: str) -> None:
        self.size, self.steps = size, steps
        self.transformer, self.vae = load_transformer(device), load_vae(device)
        self.sigmas = schedule(steps, size.shift)[:-1]
        self.columns = spread(steps, COLUMNS)
        self.done = 0

    def video(self, prompt: str, route: Any) -> torch.Tensor:
        """(T, H, W, 3) in [0, 1]."""
        self.done = 0

        def stepped(done: int, steps: int) -> None:
            self.done = done

        with routed(self.transformer, route):
            latents = sample(self.transformer, prompt, size=self.size, seed=1, steps=self.steps, cfg=CFG, on_step=stepped)
        return (decode(self.vae, latents).permute(1, 2, 3, 0) + 1).cpu() / 2

    def exact(self, prompt: str) -> tuple[torch.Tensor, Calibration]:
        """The exact video, and what was measured on the way."""
        measured = _Long(Costs(MODELLED, MODEL_OF, (Precision.FP4, Precision.INT8)), emulate=True, min_tokens=MIN_TOKENS)

        def route(place: Place, q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            if self.done in self.columns and min(q.shape[1], k.shape[1]) >= MIN_TOKENS:
                column = self.columns.index(self.done)
                measured.add(str(place.layer), column, q, k, v, exact=lambda: None, layout="NHD")
            return attention(q, k, v, layout="NHD", precision="exact", **options)

        return self.video(prompt, route), measured

    def planned(self, prompt: str, choose: Any) -> torch.Tensor:
        """The video with ``choose(layer, sigma)`` in every long call."""

        def route(place: Place, q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            long = min(q.shape[1], k.shape[1]) >= MIN_TOKENS
            wish = choose(str(place.layer), self.sigmas[self.done]) if long else Precision.EXACT
            return attention(q, k, v, layout="NHD", precision=wish, emulate=True, **options)

        return self.video(prompt, route)


def rows(run: Run) -> list[str]:
    """The table's rows, means over the prompts."""
    found: dict[str, list[tuple[float, float, float, dict[Precision, int]]]] = {}
    for prompt in PROMPTS:
        exact, measured = run.exact(prompt)
        for budget in (*BUDGETS, ALL_INT8, ALL_FP4):
            custom = budget if isinstance(budget, float) else 0.0
            plan = measured.plan("demo", [run.sigmas[c] for c in run.columns], run.sigmas, "custom", custom)
            if isinstance(budget, str):
                plan = everywhere(plan, Precision.FP4 if budget == ALL_FP4 else Precision.INT8)
            video = run.planned(prompt, plan.choose)
            quality = float(psnr(video, exact).mean())
            print(f"{prompt[:24]:24} {budget!s:15} {plan.mean_error:.4f} {plan.speedup:.2f} x {quality:.1f} dB", flush=True)
            found.setdefault(str(budget), []).append((plan.mean_error, plan.speedup, quality, plan.counts()))
    return [_row(budget, of_prompts) for budget, of_prompts in found.items()]


def everywhere(plan: LayerPlan, precision: Precision) -> LayerPlan:
    """``plan`` with one precision in every cell."""
    from dataclasses import replace

    return replace(plan, chosen=tuple((precision,) * len(plan.sigmas) for _ in plan.layers))


def _row(budget: str, found: list[tuple[float, float, float, dict[Precision, int]]]) -> str:
    error, speed, quality = (statistics.fmean(x[i] for x in found) for i in range(3))  # type: ignore[misc]
    total = sum(sum(x[3].values()) for x in found)
    shares = (sum(x[3].get(p, 0) for x in found) / total for p in (Precision.FP4, Precision.INT8, Precision.EXACT))
    return f"| {budget} | {error:.4f} | {' / '.join(f'{s:.0%}' for s in shares)} | {speed:.2f} x | {quality:.1f} dB |"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="128x128x17", help="width x height x frames")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    table = [
        "| budget | mean error | fp4 / int8 / exact | attention, modelled | PSNR of the video |",
        "| --- | ---: | --- | ---: | ---: |",
        *rows(Run(Size.parse(args.size), args.steps, args.device)),
    ]
    print("\n".join(table))
    if args.out:
        args.out.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
