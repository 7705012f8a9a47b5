"""How long a step takes and how much memory it needs, each kind of arm alone on the machine."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from ..compare.diffusers_engine import routed
from ..demo.train import flow_loss
from .arm import StepTrainer
from .data import Text, batch, clips
from .forms import Attention
from .model import build
from .settings import Arm, Setting
from .store import SCHEMA, Store, machine

WARM, MEASURED = 5, 15  # steps
CPU_WARM, CPU_MEASURED = 1, 2


def name_of(setting: Setting, form: str) -> str:
    """The name of a pace among a study's results."""
    return f"pace.{setting.name}.{form}"


def measure(setting: Setting, form: str, store: Store, device: str, command: str) -> dict[str, Any]:
    """Time steps of this kind of arm, and write them down. ``seconds``: of each step; ``peak_bytes``: None on a CPU."""
    gpu = torch.device(device).type == "cuda"
    warm, measured = (WARM, MEASURED) if gpu else (CPU_WARM, CPU_MEASURED)
    arm, attention = Arm(setting, form, 0), Attention(form)
    drawn, text, generator = clips(store.data, setting, device), Text(device), torch.Generator(device)
    model = build(setting, 0, device)
    trainer = StepTrainer(arm, model, store.partial / "none", device)
    seconds = []
    with routed(model, attention.route):
        for step in range(warm + measured):
            if step == warm and gpu:
                torch.cuda.reset_peak_memory_stats()
            _wait(gpu)
            begun = time.perf_counter()
            clean, states = batch(drawn, text, generator, 0, step)
            trainer.descend(flow_loss(model, clean, states, setting.shape.shift, generator))
            _wait(gpu)
            seconds.append(time.perf_counter() - begun)
    result = {
        "schema": SCHEMA, "setting": setting.to_json(), "form": form, "command": command, **machine(device),
        "step_seconds": [round(s, 6) for s in seconds[warm:]],
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None, "calls": attention.counts(),
    }  # fmt: skip
    store.put(name_of(setting, form), result)
    del model, trainer, drawn
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return result


def median_ms(result: dict[str, Any]) -> float:
    """Milliseconds of a step."""
    return 1000 * statistics.median(result["step_seconds"])


def _wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()
