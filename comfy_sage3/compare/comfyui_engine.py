"""The ComfyUI engine: the bundled model, or a workflow of the user's own, on a running server.

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
from ..errors import EngineError, InputError
from ..precision import Precision
from ..report import ReportLine
from ..workflow import ComfyClient
from .engine import Generation, Inspection, OnPreview, OnStep, Request, Side
from .given import LOAD_PLAN, Given

Graph = dict[str, dict[str, Any]]
MOST_PIXELS = 2**26  # of a preview: more is no preview
SHORT_STEPS = 2  # of a warm-up
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
    """The bundled model, or ``given``, on the ComfyUI server at ``url``. Raises EngineError when it cannot be reached.

    The steps' times include the server's own previews where they are wanted, on both sides alike.
    """

    name = "comfyui"
    floor_method = "two runs of the server's own exact attention: it does not offer a second exact kernel"

    def __init__(self, url: str, given: Given | None = None) -> None:
        self._client = ComfyClient(url)
        self._given = given
        self._samplers = given.samplers if given else (SAMPLER,)
        self._reports = given.reports if given else (REPORT,)
        self._decoder = given.pictures if given else DECODE
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
            "model": f"that of {self._given.name}" if self._given else "bundled Wan 2.1 (8.0 M parameters)",
            "comfyui": str(system.get("comfyui_version", "unknown")),
            "torch": str(system.get("pytorch_version", "unknown")),
            "python": str(system.get("python_version", "unknown")).split(" ")[0],
            "system": str(system.get("os", "unknown")),
        }

    def check(self, request: Request, sides: Sequence[Side]) -> None:
        if any(side.table for side in sides):
            raise InputError("A ComfyUI server has its own plans: choose one that is saved there.")
        needed: tuple[str, ...] = NEEDED_NODES
        if self._given:
            needed = tuple(dict.fromkeys(node["class_type"] for node in self._given.graph.values()))
        else:
            parse(request.prompt)
            parse(request.negative)
        for node in (*needed, *([LOAD_PLAN] if any(side.saved for side in sides) else [])):
            if node not in self._client.object_info(node):
                raise EngineError(
                    f"The ComfyUI server at {self._client.url} has no node {node}: put this pack into its "
                    "custom_nodes folder and restart it."
                    if node.startswith("Sage3")
                    else f"The ComfyUI server at {self._client.url} has no node {node}: update it, or leave that node out."
                )

    def warm_up(self, request: Request, side: Side, on_step: OnStep) -> None:
        self._run(self._fresh(request, side, short=True), on_step)

    def generate(self, request: Request, side: Side, on_step: OnStep) -> Generation:
        graph = self._fresh(request, side)
        entry, events = self._run(graph, on_step)
        total, steps = sampling_times(events, entry, self._samplers)
        return Generation(total, steps, read_report(entry, self._reports), handle=graph)

    def exact(self, request: Request, second_way: bool, on_step: OnStep) -> Generation:
        return self.generate(request, Side("exact", Precision.EXACT), on_step)

    def finish(self, generation: Generation) -> None:
        if generation.video is not None:
            return
        graph: Graph = dict(generation.handle)
        if self._given:
            graph |= {key: node for key, node in self._given.part((self._decoder,)).items() if key not in graph}
        else:
            graph["vae"] = _node("VAELoader", vae_name=VAE_FILE)
            graph[DECODE] = _node("VAEDecode", samples=[SAMPLER, 0], vae=["vae", 0])
        graph[FRAMES] = _node("PreviewImage", images=[self._decoder, 0])  # lossless, in the temporary folder
        entry, events = self._run(graph, lambda done, steps: None)
        files = [f for f in self._client.files(entry) if f.node == FRAMES]
        if not files:
            raise EngineError("The ComfyUI server saved no frames: look into its log.")
        frames = [np.asarray(Image.open(io.BytesIO(self._client.download(f))).convert("RGB")) for f in files]
        generation.video = np.stack(frames)
        generation.decode_seconds = node_seconds(events, self._decoder)
        generation.handle = None

    def inspect(self, request: Request, a: Side, b: Side, on_step: OnStep) -> Inspection | None:
        return None

    def close(self) -> None:
        self._client.close()

    def _fresh(self, request: Request, side: Side, short: bool = False) -> Graph:
        """A graph no earlier run of ours asked for, that does the same; ``short``: in as few steps as touch every kernel."""
        self._runs += 1
        if self._given:
            return given_graph(self._given, side, FRESH * self._runs, short)
        return prompt_graph(request.for_warm_up() if short else request, side, end_percent=1 - FRESH * self._runs)

    def _show(self, picture: bytes) -> None:
        """Hand on a preview that the server sent, unless it is none."""
        if self.on_preview is None:
            return
        try:
            with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG", "WEBP")) as image:
                if image.width * image.height > MOST_PIXELS:
                    return
                frame = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError):
            return
        self.on_preview(frame)

    def _run(self, graph: Graph, on_step: OnStep) -> tuple[dict[str, Any], list[Event]]:
        """Run ``graph``: its history entry and its events. Cancelled on the server when stopped here."""
        events: list[Event] = []

        def heard(node: str, value: float, maximum: float) -> None:
            events.append(Event(time.monotonic(), node, value, maximum))
            if node in self._samplers and maximum:
                on_step(round(value), round(maximum))

        wanted = self._show if self.on_preview else None
        prompt_id = self._client.submit(graph, previews=wanted is not None)
        try:
            entry = self._client.wait(prompt_id, heard, on_picture=wanted)
        except BaseException:
            self._client.cancel(prompt_id)
            raise
        return entry, [*events, Event(time.monotonic(), "", 0, 0)]


def prompt_graph(request: Request, side: Side, end_percent: float = 1.0) -> Graph:
    """The request in ComfyUI's API format, up to the report after the sampler."""
    size = request.size
    graph = {
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
        "latent": _node("EmptyHunyuanLatentVideo", width=size.width, height=size.height, length=size.frames, batch_size=1),
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
    if side.saved:
        _plan(graph, ATTENTION, side.saved)
    return graph


def given_graph(given: Given, side: Side, less: float, short: bool = False) -> Graph:
    """The given workflow up to its reports, its Sage3 Attention nodes set to ``side``'s precision or plan.

    ``less`` of the schedule's very end is left out (see FRESH). ``short`` cuts plain samplers down to a warm-up.
    """
    graph = given.part((*given.reports, *given.samplers))
    for key in given.attention:
        if key not in graph:
            continue
        inputs = graph[key]["inputs"]
        inputs["precision"] = side.precision.value
        inputs["end_percent"] = max(float(inputs.get("start_percent") or 0.0), inputs.get("end_percent", 1.0) - less)
        inputs.pop("plan", None)
        if side.saved:
            _plan(graph, key, side.saved)
    for key in given.samplers if short else ():
        steps = graph[key]["inputs"].get("steps")
        if graph[key]["class_type"] == "KSampler" and isinstance(steps, int):
            graph[key]["inputs"]["steps"] = min(steps, SHORT_STEPS)
    return graph


def _plan(graph: Graph, attention: str, name: str) -> None:
    """Let the attention node take the plan that is saved on the server under ``name``."""
    inputs = graph[attention]["inputs"]
    graph[f"{attention}-plan"] = _node(LOAD_PLAN, model=inputs["model"], plan_name=name)
    inputs["plan"] = [f"{attention}-plan", 0]


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sampling_times(
    events: Sequence[Event], entry: dict[str, Any], samplers: Sequence[str] = (SAMPLER,)
) -> tuple[float, list[float]]:
    """Seconds of the sampler nodes, and of each of their steps, from the moments their events arrived.

    Where no event was heard, the server's own times of the whole prompt stand in and there are no steps.
    Raises EngineError when the sampler did not run at all: an answer from the server's cache cannot be timed.
    """
    messages = {kind: data for kind, data in entry.get("status", {}).get("messages", ())}
    if set(samplers) & set(messages.get("execution_cached", {}).get("nodes", ())):
        raise EngineError("The ComfyUI server answered from its cache: restart it and run the comparison again.")
    totals = [seconds for node in samplers if (seconds := node_seconds(events, node)) is not None]
    if totals:
        steps: list[float] = []
        for node in samplers:
            moments = [e.at for e in events if e.node == node]  # the first is its beginning
            steps += [y - x for x, y in zip(moments, moments[1:], strict=False)]
        return sum(totals), steps
    try:
        start, end = (messages[k]["timestamp"] for k in ("execution_start", "execution_success"))
    except KeyError:
        raise EngineError("The ComfyUI server sends no events, so it cannot be timed: check its /ws connection.") from None
    return (end - start) / 1000, []


def node_seconds(events: Sequence[Event], node: str) -> float | None:
    """From a node's first event to the first event of the next one; None when it was not heard of."""
    start = next((i for i, e in enumerate(events) if e.node == node), None)
    if start is None:
        return None
    end = next((e for e in events[start:] if e.node != node), events[-1])
    return end.at - events[start].at


def read_report(entry: dict[str, Any], reports: Sequence[str] = (REPORT,)) -> list[ReportLine]:
    """The report lines of a history entry, as Sage3 Report gives them to scripts.

    Raises EngineError for an entry without them, which an older version of this pack on the server leaves.
    """
    found = [entry.get("outputs", {}).get(node, {}).get("sage3") for node in reports]
    lines = [line for part in found if isinstance(part, list) for line in part]
    if not all(isinstance(part, list) for part in found) or not all(_is_line(line) for line in lines):
        raise EngineError("The server's Sage3 Report does not say what ran as data: update this pack there and restart it.")
    return lines


def _is_line(line: Any) -> bool:
    kinds = {"wished": str, "kernel": str, "reason": str, "fell_back": bool, "calls": int}
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items())
