"""A workflow of the user's own as what is compared: its Sage3 Attention node is set, the rest stays as it is.

Nothing of it is believed: every node must be of a known kind, every value plain, before any of it is sent to a server.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..workflow.document import Workflow

ATTENTION, REPORT, LOAD_PLAN = "Sage3Attention", "Sage3Report", "Sage3LoadPlan"
SAMPLERS = frozenset({"KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced"})
DECODERS = frozenset({"VAEDecode", "VAEDecodeTiled"})
# ComfyUI's own nodes that load models, make conditioning, sample and decode. None of them runs code, calls a service,
# or writes a file; what saves and shows (below) is taken out before anything is sent.
_KINDS = """
    BasicGuider BasicScheduler BetaSamplingScheduler CFGGuider CFGNorm CLIPLoader CLIPSetLastLayer CLIPTextEncode
    CLIPTextEncodeFlux CLIPTextEncodeSD3 CLIPVisionEncode CLIPVisionLoader CheckpointLoaderSimple ComfyMathExpression
    ComfySwitchNode ConditioningCombine ConditioningZeroOut DualCFGGuider DualCLIPLoader EmptyFlux2LatentImage
    EmptyHunyuanLatentVideo EmptyHunyuanVideo15Latent EmptyLTXVLatentVideo EmptyLatentImage EmptyMochiLatentVideo
    EmptyQwenImageLayeredLatentImage EmptySD3LatentImage FluxGuidance Flux2Scheduler FreeU_V2 ImageScale
    ImageScaleToTotalPixels KSampler KSamplerAdvanced KSamplerSelect LTXVConditioning LTXVImgToVideo LTXVScheduler
    LoadImage LoraLoader LoraLoaderModelOnly ModelSamplingAuraFlow ModelSamplingDiscrete ModelSamplingFlux
    ModelSamplingLTXV ModelSamplingSD3 PrimitiveBoolean PrimitiveFloat PrimitiveInt PrimitiveString
    PrimitiveStringMultiline QuadrupleCLIPLoader RandomNoise RescaleCFG SD3SkipLayerGuidance SamplerCustom
    SamplerCustomAdvanced SkipLayerGuidanceDiT SplitSigmas TripleCLIPLoader UNETLoader VAEDecode VAEDecodeTiled VAEEncode
    VAELoader Wan22ImageToVideoLatent WanFirstLastFrameToVideo WanImageToVideo
"""
KINDS = frozenset(_KINDS.split()) | {ATTENTION, REPORT, LOAD_PLAN, "Sage3DemoPrompt"}
SHOWING = frozenset(
    {"CreateVideo", "PreviewAny", "PreviewImage", "SaveAnimatedPNG", "SaveAnimatedWEBP", "SaveImage", "SaveLatent"}
    | {"SaveVideo", "SaveWEBM", "Note", "MarkdownNote"}
)
MOST_NODES, MOST_INPUTS, MOST_TEXT, MOST_BYTES = 300, 60, 20_000, 4 << 20


@dataclass(frozen=True)
class Given:
    """A checked workflow, without what saves or shows.

    ``attention``: the nodes to set; ``samplers``: what is timed; ``reports``: what says what ran; ``pictures``: the one
    decoder whose frames are compared. ``prompt``, ``seed``, ``steps``: what the workflow says of itself.
    """

    name: str
    graph: Workflow
    attention: tuple[str, ...]
    reports: tuple[str, ...]
    samplers: tuple[str, ...]
    pictures: str
    prompt: str
    seed: int
    steps: int
    cfg: float

    def settings(self) -> dict[str, Any]:
        """The inputs of the first Sage3 Attention node."""
        return self.graph[self.attention[0]]["inputs"]

    def part(self, wanted: tuple[str, ...]) -> Workflow:
        """A copy of the nodes that ``wanted`` need."""
        needed: set[str] = set()
        rest = list(wanted)
        while rest:
            key = rest.pop()
            if key not in needed:
                needed.add(key)
                rest += [source for _, source, _ in links(self.graph[key])]
        return {key: copy.deepcopy(node) for key, node in self.graph.items() if key in needed}


def read_text(name: str, text: str) -> Given:
    """Read an API-format workflow. Raises InputError, in one sentence, for anything that is not to be sent."""
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise InputError(f"The workflow {name} is larger than {MOST_BYTES >> 20} MB: give a smaller one.")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InputError(f"The workflow {name} is not valid JSON: export it from ComfyUI with 'Export (API)'.") from None
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise InputError(f"{name} is in the editor's format, which a server cannot run: export it with 'Export (API)'.")
    return read(name, data)


def read(name: str, data: Any) -> Given:
    """As ``read_text``, of parsed JSON."""
    if not isinstance(data, dict) or not 0 < len(data) <= MOST_NODES:
        raise InputError(f"{name} is not a workflow of at most {MOST_NODES} nodes: export one with 'Export (API)'.")
    for key, node in data.items():
        _check(name, key, node)
    graph: Workflow = {
        key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
        for key, node in data.items()
        if node["class_type"] not in SHOWING
    }
    for key, node in graph.items():
        for word, source, _ in links(node):
            if source not in graph:
                raise InputError(f"Input {word} of node {key} in {name} comes from a node that is not there, or that saves.")
    _acyclic(name, graph)
    by_kind = lambda kinds: tuple(k for k, node in graph.items() if node["class_type"] in kinds)  # noqa: E731
    attention, reports, samplers = by_kind({ATTENTION}), by_kind({REPORT}), by_kind(SAMPLERS)
    if not attention:
        raise InputError(f"{name} has no Sage3 Attention node: put one between the model loader and the sampler.")
    if not reports:
        raise InputError(f"{name} has no Sage3 Report node, which says what ran: put one after the sampler.")
    if not samplers:
        raise InputError(f"{name} has no sampler of a known kind ({', '.join(sorted(SAMPLERS))}).")
    pictures = by_kind(DECODERS)
    if len(pictures) != 1:
        raise InputError(f"{name} decodes {len(pictures)} pictures or videos: leave one, to be made with both sides.")
    for key in attention:
        end = graph[key]["inputs"].get("end_percent", 1.0)
        if isinstance(end, (list, bool, str)):
            raise InputError(f"end_percent of node {key} in {name} is connected: give it a number.")
    return Given(name, graph, attention, reports, samplers, pictures[0], **_said(graph, samplers))


def links(node: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(input, source node, its output) of every connected input."""
    for word, value in node["inputs"].items():
        if isinstance(value, list):
            yield word, value[0], value[1]


def _check(name: str, key: Any, node: Any) -> None:
    whole = isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    if not whole or not isinstance(key, str) or len(key) > 40:
        raise InputError(f"{name} is not a workflow in API format: export it with 'Export (API)'.")
    kind = node["class_type"]
    if kind not in KINDS and kind not in SHOWING:
        raise InputError(f"{name} has a node of the kind {kind[:60]!r}, which is not on the list of those that may be sent.")
    if len(node["inputs"]) > MOST_INPUTS:
        raise InputError(f"Node {key[:40]} of {name} has more than {MOST_INPUTS} inputs.")
    for word, value in node["inputs"].items():
        link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
        number = isinstance(value, (int, float)) and math.isfinite(value)
        text = isinstance(value, str) and len(value) <= MOST_TEXT
        if not (link or number or text or value is None) or len(word) > 80:
            raise InputError(f"Input {word[:40]!r} of node {key[:40]} in {name} is neither a plain value nor a connection.")


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _acyclic(name: str, graph: Workflow) -> None:
    left = {key: {source for _, source, _ in links(node)} for key, node in graph.items()}
    while left:
        ready = {key for key, needs in left.items() if not needs}
        if not ready:
            raise InputError(f"{name} has a circle of connections: export it again from ComfyUI.")
        left = {key: needs - ready for key, needs in left.items() if key not in ready}


def _said(graph: Workflow, samplers: tuple[str, ...]) -> dict[str, Any]:
    """Prompt, seed, steps and guidance as the workflow's nodes say, for the record; plain defaults where they do not."""
    inputs = [node["inputs"] for node in graph.values()]

    def number(names: tuple[str, ...], otherwise: float) -> float:
        for values in inputs:
            for word in names:
                if type(values.get(word)) in (int, float):
                    return values[word]
        return otherwise

    texts = [v[w] for v in inputs for w in ("text", "clip_l", "t5xxl") if isinstance(v.get(w), str) and v[w].strip()]
    steps = number(("steps",), 20)
    return {
        "prompt": texts[0][:500] if texts else "",
        "seed": int(number(("seed", "noise_seed"), 0)),
        "steps": max(1, min(int(steps), 10_000)),
        "cfg": float(number(("cfg", "guidance"), 1.0)),
    }
