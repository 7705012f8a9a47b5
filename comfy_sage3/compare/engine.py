"""What the comparison asks of a back end that makes videos, and the words both sides share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..demo.sizes import MIN_TOKENS, Size
from ..errors import InputError
from ..plan.plan import LayerPlan
from ..precision import Precision, PrecisionPlan
from ..report import ReportLine
from .given import Given

if TYPE_CHECKING:
    from ..demo.prompts import Scene

EMULATED_NOTE = "emulated: quality is real, speed is not"
EMULATED_SUFFIX = "-emulated"  # how the door names what computes a kernel's numbers without its speed

MAX_STEPS = 100
MAX_SIDE = 1280
MAX_FRAMES = 129
MAX_PIXELS = 832 * 480 * 81  # of the whole video: Wan 2.1's own size
MAX_WORK = MAX_PIXELS * 50  # pixels times steps: a full-size video at Wan's usual 50 steps
WARM_UP_STEPS = 2

OnStep = Callable[[int, int], None]
"""Called as ``on_step(done, steps)`` after every sampling step; may raise to cancel."""
OnPreview = Callable[[np.ndarray], None]
"""Called now and then while a run goes on with what the video looks like so far: one frame, uint8 (H, W, 3)."""
PLANNED = "plan"  # what a side with a plan is called where others are called by their precision


@dataclass(frozen=True)
class Request:
    """One video to make. Raises InputError for a value outside the bounds above.

    ``cfg`` is the classifier-free guidance scale (1 = off), ``shift`` the time shift of the flow schedule; None
    takes the size's own, the one the model was trained with; ``negative`` is what guidance steers away from.
    """

    prompt: str
    size: Size
    seed: int = 1
    steps: int = 20
    cfg: float = 3.0
    shift: float | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        _bounded("seed", self.seed, 0, 2**63 - 1)
        _bounded("number of steps", self.steps, 1, MAX_STEPS)
        _bounded("guidance scale cfg", self.cfg, 1.0, 20.0)
        shift = self.size.shift if self.shift is None else self.shift
        _bounded("shift", shift, 0.1, 20.0)
        object.__setattr__(self, "shift", shift)
        _bounded("width", self.size.width, 16, MAX_SIDE)
        _bounded("height", self.size.height, 16, MAX_SIDE)
        _bounded("number of frames", self.size.frames, 1, MAX_FRAMES)
        pixels = self.size.width * self.size.height * self.size.frames
        if pixels > MAX_PIXELS or pixels * self.steps > MAX_WORK:
            raise InputError(
                f"{self.size} at {self.steps} steps is more than this comparison takes on: give fewer "
                "pixels, frames or steps (832x480x81 at 50 steps is the most)."
            )

    @property
    def scene(self) -> Scene | None:
        """What the prompt describes, to look for in the video; raises InputError for words that are not known."""
        from ..demo.prompts import parse  # brings torch, which bad input need not wait for

        return parse(self.prompt)

    def data(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """For the record, with the ``shape`` (T, H, W, 3) that the video came out in."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "width": shape[2],
            "height": shape[1],
            "frames": shape[0],
            "tokens": self.size.tokens,
            "steps": self.steps,
            "cfg": self.cfg,
            "negative": self.negative,
            "shift": self.shift,
        }

    def for_warm_up(self) -> Request:
        """The same video in as few steps as touch every kernel."""
        return replace(self, steps=min(self.steps, WARM_UP_STEPS))


@dataclass(frozen=True)
class WorkflowRequest(Request):
    """What a workflow of the user's own makes: it has its own prompt, size and bounds. Make it with ``of``."""

    given: Given | None = None

    def __post_init__(self) -> None:
        """Nothing: ``given.read`` has looked at all of it."""

    @classmethod
    def of(cls, given: Given) -> WorkflowRequest:
        return cls(given.prompt, Size(16, 16, 1), given.seed, given.steps, given.cfg, given=given)

    @property
    def scene(self) -> None:
        """No one knows what another model's prompt is to look like."""

    def data(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return super().data(shape) | {"tokens": None, "shift": None, "workflow": self.given.name if self.given else ""}


def _bounded(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise InputError(f"The {name} is {value}: give {low} to {high}.")


@dataclass(frozen=True)
class Where:
    """Where in a run a call was made: the layer by its name in plans, and the noise level."""

    layer: str
    sigma: float


@dataclass(frozen=True)
class Side:
    """One contestant: how attention is wished for, and whether the reference may stand in for a kernel.

    Calls of fewer than ``min_tokens`` query or key tokens stay exact, as with the Sage3 Attention node. A plan takes the
    place of ``precision`` (then AUTO): ``table`` for an engine that holds the model, or the name under which a plan is
    ``saved`` on a ComfyUI server. Raises InputError for a negative ``min_tokens`` and for a plan beside a precision.
    """

    label: str
    precision: Precision
    emulate: bool = True
    min_tokens: int = MIN_TOKENS
    table: LayerPlan | None = None
    saved: str = ""

    def __post_init__(self) -> None:
        _ = self.plan  # which refuses what it cannot use
        if self.planned and (self.precision is not Precision.AUTO or (self.table is not None and self.saved)):
            raise InputError(f"Side {self.label} has a plan and something beside it: give a precision or one plan.")

    @property
    def planned(self) -> bool:
        """Whether a plan decides the precision layer by layer."""
        return self.table is not None or bool(self.saved)

    @property
    def wish(self) -> str:
        """The precision's name, or "plan"."""
        return PLANNED if self.planned else self.precision.value

    @property
    def plan(self) -> PrecisionPlan:
        """What decides the precision of each call, here and in the node."""
        return PrecisionPlan(self.precision, min_tokens=self.min_tokens)

    @property
    def name(self) -> str:
        """Label and precision, such as "A (exact)"."""
        return f"{self.label} ({self.wish})"

    def choose(self, where: Where | None, q_tokens: int, k_tokens: int) -> tuple[Precision, str]:
        """The precision for one call and, where this side itself keeps it exact, why ("" otherwise)."""
        if self.table is None:
            return self.plan.choose(None, q_tokens, k_tokens)
        if where is None:
            return Precision.EXACT, "the plan goes by layers"
        least = max(self.min_tokens, self.table.min_tokens)
        if min(q_tokens, k_tokens) < least:
            return Precision.EXACT, f"fewer than {least} tokens"
        wish = self.table.choose(where.layer, where.sigma)
        return wish, "exact by the plan" if wish is Precision.EXACT else ""


@dataclass
class Generation:
    """One run of one side.

    video: uint8 (T, H, W, 3), or None until the engine's ``finish``. Times are in seconds, memory in bytes;
    None means that this engine or device cannot tell. ``seconds_total`` is the sampling from prompt to
    latents: decoding is timed apart, for the attention under test has no part in it.
    """

    seconds_total: float
    seconds_per_step: list[float]
    report: list[ReportLine]
    attention_seconds: float | None = None
    peak_memory_bytes: int | None = None
    build_seconds: float | None = None
    video: np.ndarray | None = None
    decode_seconds: float | None = None
    handle: Any = None  # what the engine needs to finish: latents, or the server's file names


@dataclass
class Inspection:
    """What only an engine that holds the model can measure: the first two layers of quality.

    ``replay``: one row per captured call: layer, kind ("self" or "cross"), step, tokens, and for each of "a",
    "b" and "floor" the errors of ``metrics.attention_error`` against exact fp32 attention on the same q,
    k, v.
    ``one_step``: one row per captured step: step, sigma, and the same errors of the predicted velocity on the
    same x_t, against the model with exact attention computed the second way.
    """

    replay: list[dict[str, Any]] = field(default_factory=list)
    one_step: list[dict[str, Any]] = field(default_factory=list)


class Engine(Protocol):
    """A back end that makes videos with attention at a wished precision."""

    name: str
    floor_method: str  # how the noise floor's second exact computation differs from the first, in words
    on_preview: OnPreview | None  # set by who wants previews; their time and memory are not counted

    def describe(self) -> dict[str, str]:
        """Device, versions and model, as a person would want them in a report."""
        ...

    def check(self, request: Request, sides: Sequence[Side]) -> None:
        """Raise InputError or EngineError when this request cannot be served, before any work."""
        ...

    def warm_up(self, request: Request, side: Side, on_step: OnStep) -> None:
        """Build and touch everything that a run of ``side`` will use; its time is not measured."""
        ...

    def generate(self, request: Request, side: Side, on_step: OnStep) -> Generation:
        """One timed run."""
        ...

    def finish(self, generation: Generation) -> None:
        """Fill in ``video`` and ``decode_seconds`` of a generation this engine made."""
        ...

    def inspect(self, request: Request, a: Side, b: Side, on_step: OnStep) -> Inspection | None:
        """One run of side A, its q, k, v and x_t replayed through both kernels; None if it cannot.

        ``on_step`` is also called between the replays, with ``done`` of ``steps`` of the whole inspection.
        """
        ...

    def exact(self, request: Request, second_way: bool, on_step: OnStep) -> Generation:
        """One untimed run with exact attention, the usual or a second way: the noise floor's two ends."""
        ...

    def close(self) -> None:
        """Let go of the model or the connection."""
        ...


def is_emulated(report: Sequence[ReportLine]) -> bool:
    """Whether any call of a run was emulated: by the plain-PyTorch reference, or by another GPU's kernel."""
    return any(line["kernel"].endswith(EMULATED_SUFFIX) for line in report)


def kept_exact(report: Sequence[ReportLine], side: Side) -> int:
    """How many calls of a run the side's own plan kept exact: the reason is in the report."""
    if side.precision is Precision.EXACT:
        return 0
    return sum(line["calls"] for line in report if line["wished"] == Precision.EXACT.value)


def fell_back(report: Sequence[ReportLine]) -> bool:
    """Whether any call of a run was not served at the precision it asked for."""
    return any(line["fell_back"] for line in report)
