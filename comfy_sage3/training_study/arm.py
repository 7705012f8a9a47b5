"""Train one arm, and write down all that is asked of it."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compare.diffusers_engine import routed
from ..demo.train import Trainer, flow_loss
from ..files import put
from .data import Text, batch, clips
from .forms import Attention
from .judge import Judge
from .model import build
from .settings import Arm
from .store import SCHEMA, Store, machine

LOOKS = 10  # how often an arm's held-out loss is measured on the way
GPU_CHECK = 20  # steps between two looks for a loss that is no number, each of which waits for the GPU


class StepTrainer(Trainer):
    """The bundled model's trainer on a number of steps in place of seconds."""

    def __init__(self, arm: Arm, module: Any, folder: Path, device: str) -> None:
        self.total, self.warmup = max(1, arm.setting.steps), max(1, arm.setting.warmup)
        args = argparse.Namespace(out=folder, budget=1.0, slice=0.0, device=device)
        super().__init__(arm.name, module, args, arm.setting.rate, arm.setting.decay)

    @property
    def progress(self) -> float:
        """Share of the steps that are done."""
        return self.step / self.total

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        path = self.path
        self.path = path.with_suffix(".part")
        self._save()
        if self.path.exists():
            os.replace(self.path, path)
        self.path = path


def train(arm: Arm, store: Store, device: str, command: str, deadline: float = math.inf) -> dict[str, Any] | None:
    """The arm's result, written to ``store`` too; None where ``deadline`` (as ``time.time`` counts) came first.

    What was done by then lies in a checkpoint, from which the next call goes on. Training ends at a loss or a gradient that
    is no finite number: that is a result as well. Raises EngineError where the attention asked for is not to be had.
    """
    setting = arm.setting
    run = _Run(arm, store, device)
    with routed(run.model, run.attention.route):
        while run.step < setting.steps and run.diverged is None:
            if time.time() >= deadline:
                run.save()
                return None
            run.advance()
        finished = run.finish()
    if setting.prompts and run.diverged is None:
        finished["adherence"] = run.judge.prompts(run.model)
        if not setting.steps:
            finished["truth"] = run.judge.truth()
    result = {
        "schema": SCHEMA, "setting": setting.to_json(), "form": arm.form, "seed": arm.seed, "command": command,
        **machine(device), **finished,
    }  # fmt: skip
    store.write(arm, result)
    run.forget()
    return result


class _Run:
    """One arm on its way. Losses and the norms of gradients stay on the device between two checks."""

    def __init__(self, arm: Arm, store: Store, device: str) -> None:
        self.arm, self.setting, self.device = arm, arm.setting, device
        self.gpu = torch.device(device).type == "cuda"
        self.check = GPU_CHECK if self.gpu else 1
        self.look = max(1, self.setting.steps // LOOKS)
        self.attention = Attention(arm.form)
        self.clips = clips(store.data, self.setting, device)
        self.judge = Judge(store.data, self.setting, device)
        self.text, self.generator = Text(device), torch.Generator(device)
        self.model = build(self.setting, arm.seed, device)
        self.trainer = StepTrainer(arm, self.model, store.partial, device)
        self.losses: list[float | None] = []
        self.held_out: list[dict[str, float | None]] = []
        self.non_finite_gradients, self.seconds, self.peak = 0, 0.0, 0
        self.diverged: int | None = None
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.notes = store.partial / f"{arm.name}.json"
        self._resume()

    @property
    def step(self) -> int:
        return self.trainer.step

    def advance(self) -> None:
        """Up to the next check or look, whichever is nearer."""
        if self.step % self.look == 0:
            self._look()
        stop = min(self.step + self.check, self.setting.steps, (self.step // self.look + 1) * self.look)
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()  # a look at the held-out loss is not training
        begun = time.perf_counter()
        while self.step < stop:
            clean, states = batch(self.clips, self.text, self.generator, self.arm.seed, self.step)
            loss = flow_loss(self.model, clean, states, self.setting.shape.shift, self.generator)
            self.waiting.append((loss.detach(), self.trainer.descend(loss)))
        self._note()  # waits for the device
        self.seconds += time.perf_counter() - begun
        if self.gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def _note(self) -> None:
        if not self.waiting:
            return
        pairs = torch.stack([torch.stack(pair).float() for pair in self.waiting]).tolist()
        self.waiting.clear()
        for loss, norm in pairs:
            if self.diverged is not None:
                return  # steps after the fault tell nothing
            self.losses.append(_finite(loss))
            self.non_finite_gradients += not math.isfinite(norm)
            if not math.isfinite(loss) or not math.isfinite(norm):  # the weights are lost: clipping makes them NaN
                self.diverged = len(self.losses)

    def _look(self) -> None:
        if self.held_out and self.held_out[-1]["step"] == self.step:
            return
        forward, backward = self.attention.forward.copy(), self.attention.backward.copy()
        loss = self.judge.loss(self.model)
        self.attention.forward, self.attention.backward = forward, backward  # counted are the calls of training
        self.held_out.append({"step": self.step, "loss": _finite(loss)})

    def finish(self) -> dict[str, Any]:
        """The last looks, with the averaged weights, which the model is left with."""
        counts = self.attention.counts()
        final: dict[str, float | None] = {"own": None, "exact": None}
        if self.diverged is None:
            self._look()
            self.model.load_state_dict(self.trainer.finished(), strict=not self.setting.rank)
            final["own"] = _finite(self.judge.loss(self.model))
            with self.attention.exactly():
                final["exact"] = _finite(self.judge.loss(self.model))
        return {
            "losses": self.losses, "held_out": self.held_out, "final": final, "diverged": self.diverged,
            "non_finite_gradients": self.non_finite_gradients, "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak or None, "calls": counts,
        }  # fmt: skip

    def save(self) -> None:
        """Checkpoint and notes; notes without their checkpoint count nothing."""
        self.trainer.save()
        kept = {
            "step": self.step, "setting": self.setting.to_json(), "losses": self.losses, "held_out": self.held_out,
            "non_finite_gradients": self.non_finite_gradients, "seconds": self.seconds, "peak": self.peak,
            "calls": self.attention.counts(),
        }  # fmt: skip
        put(self.notes, json.dumps(kept).encode())

    def _resume(self) -> None:
        if not self.step:
            return
        try:
            kept = json.loads(self.notes.read_text("utf-8"))
        except (OSError, ValueError):
            kept = {}
        if kept.get("step") != self.step or kept.get("setting") != self.setting.to_json():
            self.trainer.path.unlink()  # of another try: begin anew
            self.model = build(self.setting, self.arm.seed, self.device)
            self.trainer = StepTrainer(self.arm, self.model, self.trainer.path.parent, self.device)
            return
        self.losses, self.held_out = kept["losses"], kept["held_out"]
        self.non_finite_gradients, self.seconds, self.peak = kept["non_finite_gradients"], kept["seconds"], kept["peak"]
        self.attention.go_on_from(kept["calls"])

    def forget(self) -> None:
        """Remove checkpoint and notes: the result holds all there is to know."""
        for path in (self.trainer.path, self.notes):
            path.unlink(missing_ok=True)


def _finite(value: float) -> float | None:
    return round(value, 7) if math.isfinite(value) else None
