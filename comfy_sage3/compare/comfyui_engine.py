"""The ComfyUI engine: the bundled model on a running server, over HTTP and its event stream.

Both sides are the same prompt graph; only the settings of the Sage3 Attention node differ. What the node did
is read from the data that Sage3 Report leaves in the server's history. Tensors never leave the server, so
the first two layers of quality are not available here.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..demo.load import TRANSFORMER_FILE, VAE_FILE
from ..demo.prompts import parse
from ..errors import EngineError
from ..precision import Precision
from ..report import ReportLine
from ..workflow import ComfyClient
from .engine import Generation, Inspection, OnPreview, OnStep, Request, Side

Graph = dict[str, dict[str, Any]]
ATTENTION, SAMPLER, REPORT, DECODE, FRAMES = "attention", "sampler", "report", "decode", "frames"
NEEDED_NODES = (
    "Sage3Attention",
    "Sage3Report",
    "Sage3DemoPrompt",
    "ModelSamplingSD3",
    "EmptyHunyuanLatentVideo",
)
# How much of the schedule's very end each run leaves out, so that the server cannot answer from its cache.
# Even a hundred runs leave out no step: the last step begins 1 % before the end or earlier.
FRESH = 1e-6


@dataclass(frozen=True)
class Event:
    """One event of the server, with the moment it arrived here (seconds, monotonic)."""

    at: float
    node: str
    value: float
    maximum: float


class ComfyUIEngine:
    """The bundled model on the ComfyUI server at ``url``. Raises EngineError when it cannot be reached."""

    name = "comfyui"
    floor_method = "two runs of the server's own exact attention: it does not offer a second exact kernel"

    def __init__(self, url: str) -> None:
        self._client = ComfyClient(url)
        self._runs = 0
        self.on_preview: OnPreview | None = None
        try:
            self._stats = self._client.system_stats()
        except BaseException:
            self._client.close()
            raise

    def describe(self) -> dict[str, str]:
        system = self._stats.get("system", {})
        devices = self._stats.get("devices") or [{}]
        return {
            "engine": self.name,
            "server": self._client.url,
            "device": str(devices[0].get("name", "unknown")),
            "model": "bundled Wan 2.1 (8.0 M parameters)",
            "comfyui": str(system.get("comfyui_version", "unknown")),
            "torch": str(system.get("pytorch_version", "unknown")),
            "python": str(system.get("python_version", "unknown")).split(" ")[0],
            "system": str(system.get("os", "unknown")),
        }

    def check(self, request: Request, sides: Sequence[Side]) -> None:
        parse(request.prompt)
        parse(request.negative)
        for node in NEEDED_NODES:
            if node not in self._client.object_info(node):
                raise EngineError(
                    f"The ComfyUI server at {self._client.url} has no node {node}: put this pack into its "
                    "custom_nodes folder and restart it."
                )

    def warm_up(self, request: Request, side: Side, on_step: OnStep) -> None:
        self._run(self._fresh(request.for_warm_up(), side), on_step)

    def generate(self, request: Request, side: Side, on_step: OnStep) -> Generation:
        graph = self._fresh(request, side)
        entry, events = self._run(graph, on_step)
        total, steps = sampling_times(events, entry)
        return Generation(total, steps, read_report(entry), handle=graph)

    def exact(self, request: Request, second_way: bool, on_step: OnStep) -> Generation:
        return self.generate(request, Side("exact", Precision.EXACT), on_step)

    def finish(self, generation: Generation) -> None:
        if generation.video is not None:
            return
        graph: Graph = dict(generation.handle)
        graph["vae"] = _node("VAELoader", vae_name=VAE_FILE)
        graph[DECODE] = _node("VAEDecode", samples=[SAMPLER, 0], vae=["vae", 0])
        graph[FRAMES] = _node("PreviewImage", images=[DECODE, 0])  # lossless, in the temporary folder
        entry, events = self._run(graph, lambda done, steps: None)
        files = [f for f in self._client.files(entry) if f.node == FRAMES]
        if not files:
            raise EngineError("The ComfyUI server saved no frames: look into its log.")
        frames = [np.asarray(Image.open(io.BytesIO(self._client.download(f))).convert("RGB")) for f in files]
        generation.video = np.stack(frames)
        generation.decode_seconds = node_seconds(events, DECODE)
        generation.handle = None

    def inspect(self, request: Request, a: Side, b: Side, on_step: OnStep) -> Inspection | None:
        return None

    def close(self) -> None:
        self._client.close()

    def _fresh(self, request: Request, side: Side) -> Graph:
        """A graph no earlier run of ours asked for, that does the same."""
        self._runs += 1
        return prompt_graph(request, side, end_percent=1 - FRESH * self._runs)

    def _run(self, graph: Graph, on_step: OnStep) -> tuple[dict[str, Any], list[Event]]:
        """Run ``graph``: its history entry and its events. Cancelled on the server when stopped here."""
        events: list[Event] = []

        def heard(node: str, value: float, maximum: float) -> None:
            events.append(Event(time.monotonic(), node, value, maximum))
            if node == SAMPLER and maximum:
                on_step(round(value), round(maximum))

        prompt_id = self._client.submit(graph)
        try:
            entry = self._client.wait(prompt_id, heard)
        except BaseException:
            self._client.cancel(prompt_id)
            raise
        return entry, [*events, Event(time.monotonic(), "", 0, 0)]


def prompt_graph(request: Request, side: Side, end_percent: float = 1.0) -> Graph:
    """The request in ComfyUI's API format, up to the report after the sampler."""
    size = request.size
    return {
        "model": _node("UNETLoader", unet_name=TRANSFORMER_FILE, weight_dtype="default"),
        "shift": _node("ModelSamplingSD3", model=["model", 0], shift=request.shift),
        ATTENTION: _node(
            "Sage3Attention",
            model=["shift", 0],
            precision=side.precision.value,
            start_percent=0.0,
            end_percent=end_percent,
            min_tokens=side.min_tokens,
            emulate=side.emulate,
        ),
        "positive": _node("Sage3DemoPrompt", text=request.prompt),
        "negative": _node("Sage3DemoPrompt", text=request.negative),
        "latent": _node(
            "EmptyHunyuanLatentVideo", width=size.width, height=size.height, length=size.frames, batch_size=1
        ),
        SAMPLER: _node(
            "KSampler",
            model=[ATTENTION, 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=request.seed,
            steps=request.steps,
            cfg=request.cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        REPORT: _node("Sage3Report", model=[ATTENTION, 0], latent=[SAMPLER, 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sampling_times(events: Sequence[Event], entry: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds of the sampler node, and of each of its steps, from the moments its events arrived.

    Where no event was heard, the server's own times of the whole prompt stand in and there are no steps.
    Raises EngineError when the sampler did not run at all: an answer from the server's cache cannot be timed.
    """
    messages = {kind: data for kind, data in entry.get("status", {}).get("messages", ())}
    if SAMPLER in messages.get("execution_cached", {}).get("nodes", ()):
        raise EngineError(
            "The ComfyUI server answered from its cache: restart it and run the comparison again."
        )
    total = node_seconds(events, SAMPLER)
    if total is not None:
        moments = [e.at for e in events if e.node == SAMPLER]  # the first is its beginning
        return total, [y - x for x, y in zip(moments, moments[1:], strict=False)]
    try:
        start, end = (messages[k]["timestamp"] for k in ("execution_start", "execution_success"))
    except KeyError:
        raise EngineError(
            "The ComfyUI server sends no events, so it cannot be timed: check its /ws connection."
        ) from None
    return (end - start) / 1000, []


def node_seconds(events: Sequence[Event], node: str) -> float | None:
    """From a node's first event to the first event of the next one; None when it was not heard of."""
    start = next((i for i, e in enumerate(events) if e.node == node), None)
    if start is None:
        return None
    end = next((e for e in events[start:] if e.node != node), events[-1])
    return end.at - events[start].at


def read_report(entry: dict[str, Any]) -> list[ReportLine]:
    """The report lines of a history entry, as Sage3 Report gives them to scripts.

    Raises EngineError for an entry without them, which an older version of this pack on the server leaves.
    """
    lines = entry.get("outputs", {}).get(REPORT, {}).get("sage3")
    if not isinstance(lines, list) or not all(_is_line(line) for line in lines):
        raise EngineError(
            "The server's Sage3 Report does not say what ran as data: update this pack there and restart it."
        )
    return lines


def _is_line(line: Any) -> bool:
    kinds = {"wished": str, "kernel": str, "reason": str, "fell_back": bool, "calls": int}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())
