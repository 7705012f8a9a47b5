"""The embedded engine: the bundled model in diffusers, its attention routed through this package's door.

diffusers offers no public way to add an attention backend, so the name ``dispatch_attention_fn`` that Wan's
attention processor looks up in its own module is replaced for as long as a run lasts, and put back whatever
happens.
"""

from __future__ import annotations

import importlib
import itertools
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..demo import load
from ..demo.prompts import parse
from ..demo.sample import decode, sample, schedule, velocity
from ..errors import EngineError, InputError
from ..metrics import attention_error
from ..precision import Precision
from ..report import Report
from .capture import (
    Attend,
    Captured,
    CapturedCall,
    Place,
    contestants,
    door,
    exact_second_way,
    replay,
    spread,
)
from .engine import Generation, Inspection, OnPreview, OnStep, Request, Side, Where
from .stopwatch import Stopwatch

WAN_MODULE = "diffusers.models.transformers.transformer_wan"
GET_DIFFUSERS = "pip install 'diffusers>=0.41,<0.43'"  # those that were run; 0.41 is the last for Python 3.10
HOOK = "dispatch_attention_fn"
EXACT = Side("exact", Precision.EXACT)
PREVIEW_SHARE = 0.2  # the most of a run's time that its previews may take: decoding is slow on a CPU

Route = Callable[[Place, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def wan_module() -> Any:
    """diffusers' Wan module; raises EngineError where it is missing or no longer routes attention by name."""
    try:
        module = importlib.import_module(WAN_MODULE)
    except ImportError as error:
        raise EngineError(f"The diffusers engine needs diffusers 0.36 or newer ({error}): {GET_DIFFUSERS}.") from None
    if not callable(getattr(module, HOOK, None)):
        raise EngineError(
            f"diffusers {_version('diffusers')} does not send Wan's attention through {HOOK}, so it cannot "
            f"be compared: {GET_DIFFUSERS}."
        )
    return module


@contextmanager
def routed(transformer: Any, route: Route) -> Iterator[None]:
    """Within this context every self- and cross-attention call of ``transformer`` goes to ``route``.

    ``route(place, q, k, v, options)`` gets q, k, v as (B, L, H, D) and mask, is_causal, scale, enable_gqa in
    ``options``. Calls from other models and other threads keep diffusers' own path. Raises EngineError when
    no call arrived although the transformer ran: a diffusers that takes another road must not pass for a
    comparison.
    """
    module = wan_module()
    original = getattr(module, HOOK)
    here = threading.local()  # hooks and calls of one forward share a thread; others see no place at all
    seen = {"blocks": 0, "calls": 0}

    def dispatch(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        place = getattr(here, "place", None)
        if place is None:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *args, **kwargs)
        if dropout_p or kwargs.get("parallel_config") is not None:
            raise EngineError("Attention dropout and context parallelism cannot be compared: switch them off.")
        seen["calls"] += 1
        options = {"mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return route(place, query, key, value, options)

    def enter(place: Place) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen["blocks"] += 1
            here.place = place

        return hook

    def leave(*_: Any) -> None:
        here.place = None

    with ExitStack() as undo:
        for layer, block in enumerate(transformer.blocks):
            for kind, module_ in (("self", block.attn1), ("cross", block.attn2)):
                undo.callback(module_.register_forward_pre_hook(enter(Place(layer, kind))).remove)
                undo.callback(module_.register_forward_hook(leave, always_call=True).remove)
        undo.callback(setattr, module, HOOK, original)
        setattr(module, HOOK, dispatch)
        yield
    if seen["blocks"] and not seen["calls"]:
        raise EngineError(f"diffusers {_version('diffusers')} ran Wan without calling {HOOK}: {GET_DIFFUSERS}.")


def route_at(attend: Attend, sigma: float) -> Route:
    """A route for a single noise level."""
    return lambda place, q, k, v, options: attend(q, k, v, where=Where(str(place.layer), sigma), **options)


class DiffusersEngine:
    """The bundled Wan in this process. Raises InputError for a device this machine lacks."""

    name = "diffusers"
    floor_method = "PyTorch's scaled_dot_product_attention against the chunked fp32 reference"

    def __init__(self, device: str = "auto", dtype: torch.dtype | None = None) -> None:
        self.device = pick_device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        wan_module()
        self.transformer = load.load_transformer(self.device, self.dtype)
        self.vae = load.load_vae(self.device, self.dtype)
        self._watch = Stopwatch(self.device)
        self.on_preview: OnPreview | None = None

    def describe(self) -> dict[str, str]:
        versions = {name: _version(name) for name in ("torch", "diffusers", "numpy")}
        return {
            "engine": self.name,
            "device": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": "bundled Wan 2.1 (8.0 M parameters)",
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            **versions,
        }

    def check(self, request: Request, sides: Sequence[Side]) -> None:
        parse(request.prompt)
        parse(request.negative)
        saved = next((side.saved for side in sides if side.saved), None)
        if saved:
            raise InputError(f"The plan {saved!r} is on a ComfyUI server: give the plan's file for the embedded model.")

    def warm_up(self, request: Request, side: Side, on_step: OnStep) -> None:
        self._sample(request.for_warm_up(), door(side, Report()), on_step)

    def generate(self, request: Request, side: Side, on_step: OnStep) -> Generation:
        report = Report()
        generation = self._sample(request, door(side, report), on_step)
        generation.report = report.lines()
        return generation

    def exact(self, request: Request, second_way: bool, on_step: OnStep) -> Generation:
        attend = exact_second_way if second_way else door(EXACT, Report())
        return self._sample(request, attend, on_step)

    def finish(self, generation: Generation) -> None:
        if generation.video is not None:
            return
        self._watch.synchronise()
        start = self._watch.mark()
        video = decode(self.vae, generation.handle)
        end = self._watch.mark()
        self._watch.synchronise()
        generation.decode_seconds = self._watch.between(start, end)
        generation.video = pixels_of(video)
        generation.handle = None

    def inspect(self, request: Request, a: Side, b: Side, on_step: OnStep) -> Inspection:
        captured = self._capture(request, a, lambda done, steps: on_step(done, 2 * steps))
        kernels = contestants(a, b, EXACT)
        count = (len(captured.calls) + len(captured.latents)) * len(kernels)
        measured = itertools.count(1)

        def tell() -> None:
            on_step(count + next(measured), 2 * count)

        return Inspection(replay(captured, kernels, tell), self._one_step(request, captured, kernels, tell))

    def close(self) -> None:
        del self.transformer, self.vae
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _sample(self, request: Request, attend: Attend, on_step: OnStep) -> Generation:
        """One run. What is shown and told between the steps is not part of their time, nor of the peak memory."""
        watch = self._watch
        sigmas = schedule(request.steps, request.shift or request.size.shift)
        calls: list[tuple[Any, Any]] = []
        steps: list[tuple[Any, Any]] = []  # when each began and ended
        began: Any = None
        peaks: list[int | None] = []
        preview = _Previews(self, self.on_preview)

        def route(place: Place, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            where = Where(str(place.layer), sigmas[len(steps)])
            start = watch.mark()
            out = attend(q, k, v, where=where, **options)
            calls.append((start, watch.mark()))
            return out

        def guessed(latents: Tensor) -> None:
            steps.append((began, watch.mark()))
            if preview.due():
                peaks.append(watch.peak_memory())
                preview.show(latents)
                watch.reset_peak_memory()

        def stepped(done: int, count: int) -> None:
            nonlocal began
            on_step(done, count)
            began = watch.mark()

        watch.synchronise()
        watch.reset_peak_memory()
        began = watch.mark()
        with routed(self.transformer, route):
            latents = self._run(request, stepped, guessed)
        watch.synchronise()
        peaks.append(watch.peak_memory())
        seconds = [watch.between(x, y) for x, y in steps]
        return Generation(
            seconds_total=sum(seconds),
            seconds_per_step=seconds,
            attention_seconds=sum(watch.between(x, y) for x, y in calls),
            peak_memory_bytes=max((p for p in peaks if p is not None), default=None),
            report=[],
            handle=latents,
        )

    def _run(self, request: Request, on_step: OnStep, on_guess: Callable[[Tensor], None] | None = None) -> Tensor:
        return sample(
            self.transformer,
            request.prompt,
            size=request.size,
            seed=request.seed,
            steps=request.steps,
            cfg=request.cfg,
            shift=request.shift,
            negative=request.negative,
            on_step=on_step,
            on_guess=on_guess,
        )

    def _capture(self, request: Request, side: Side, on_step: OnStep) -> Captured:
        """One run of ``side`` that keeps, of some steps, x_t and q, k, v of the conditional forward."""
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        per_step = 3 * request.size.tokens * width * config.num_layers * self.dtype.itemsize
        wanted = set(spread(request.steps, per_step))
        captured, attend = Captured(), door(side, Report())
        sigmas = schedule(request.steps, request.shift or request.size.shift)
        step, forwards = 0, 0

        def started(_: Any, args: tuple[Any, ...]) -> None:
            nonlocal forwards
            forwards += 1
            if step in wanted and forwards == 1:
                captured.latents.append((step, float(args[1][0]) / 1000, args[0].clone()))

        def route(place: Place, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            if step in wanted and forwards == 1:
                kept = (q.clone(), k.clone(), v.clone())
                captured.calls.append(CapturedCall(place, step, sigmas[step], kept, options))
            return attend(q, k, v, where=Where(str(place.layer), sigmas[step]), **options)

        def stepped(done: int, steps: int) -> None:
            nonlocal step, forwards
            step, forwards = done, 0
            on_step(done, steps)

        hook = self.transformer.register_forward_pre_hook(started)
        try:
            with routed(self.transformer, route):
                self._run(request, stepped)
        finally:
            hook.remove()
        return captured

    @torch.inference_mode()
    def _one_step(
        self, request: Request, captured: Captured, kernels: dict[str, Attend], tell: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """The guided velocity on the same x_t under each kernel, against exact attention the second way."""
        rows = []
        for step, sigma, x in captured.latents:
            truth = self._velocity(request, sigma, x, exact_second_way)
            row: dict[str, Any] = {"step": step, "sigma": sigma}
            for name, attend in kernels.items():
                row[name] = attention_error(self._velocity(request, sigma, x, attend), truth)
                tell()
            rows.append(row)
        return rows

    def _velocity(self, request: Request, sigma: float, x: Tensor, attend: Attend) -> Tensor:
        with routed(self.transformer, route_at(attend, sigma)):
            return velocity(self.transformer, x, sigma, [request.prompt], request.cfg, request.negative)


class _Previews:
    """The first frame of the video as it looks so far, decoded as often as ``PREVIEW_SHARE`` of the time allows."""

    def __init__(self, engine: DiffusersEngine, tell: OnPreview | None) -> None:
        self._engine, self._tell = engine, tell
        self._start, self._spent = time.monotonic(), 0.0

    def due(self) -> bool:
        return self._tell is not None and self._spent <= PREVIEW_SHARE * (time.monotonic() - self._start)

    def show(self, latents: Tensor) -> None:
        began = time.monotonic()
        frame = pixels_of(decode(self._engine.vae, latents[:, :, :1]))[0]
        if self._tell:
            self._tell(frame)
        self._spent += time.monotonic() - began


def pixels_of(video: Tensor) -> np.ndarray:
    """float (3, T, H, W) in [-1, 1] as uint8 (T, H, W, 3)."""
    pixels = ((video.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()


def pick_device(name: str) -> torch.device:
    """``auto`` (a CUDA GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``; InputError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise InputError(f"Unknown device {name!r}: choose auto, cpu, cuda or cuda:0.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("This machine has no CUDA GPU that PyTorch can use: choose --device cpu.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0.")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a person calls the device: the GPU's model, or the processor's and PyTorch's threads."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    except OSError:
        pass
    return f"CPU: {model}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))
