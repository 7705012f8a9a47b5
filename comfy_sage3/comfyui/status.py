"""What the node says while it samples and after: the text, and the event that carries it to the browser."""

from __future__ import annotations

import logging
import time
from typing import Any

from ..report import Report
from . import routes
from .hook import Hook
from .workflow_id import workflow_of

EVENT = "sage3.status"
PAUSE = 0.25  # seconds between two events of a run
NEVER_CALLED = (
    "0 attention calls seen: this model never called ComfyUI's attention hook, so nothing was accelerated. "
    "Its own code, or another node's patch, computes attention elsewhere."
)
NO_LAYERS = "This model does not say which layer calls: exact_layers cannot tell them apart, and a plan treats them alike."
REPLACED = "Another node put its own attention in this one's place; it was put back, and serves what this node leaves."
log = logging.getLogger("comfy_sage3")
_last_sent: dict[str, float] = {}


def text(hook: Hook) -> str:
    """A few plain lines: calls accelerated, calls that fell back, and why."""
    lines = hook.report.lines()
    if not lines:
        return "Nothing sampled yet." if hook.running else NEVER_CALLED
    total = sum(x["calls"] for x in lines)
    kept = total - hook.report.accelerated - hook.report.fell_back
    head = f"{total} attention calls: {hook.report.accelerated} accelerated, {hook.report.fell_back} fell back"
    if kept:
        head += f", {kept} left exact"
    return "\n".join([head, *(f"{x['calls']} x {x['kernel']}: {x['reason']}" for x in lines), *notes(hook)])


def notes(hook: Hook) -> list[str]:
    """What there is to say of a run besides its calls."""
    said = [NO_LAYERS] if hook.tally.layers() == [""] else []
    if hook.replaced:
        said.append(REPLACED)
    if hook.usage is not None:
        said += [of_gradients(hook.report), hook.usage.text()]
    return [line for line in said if line]


def of_gradients(report: Report) -> str:
    """Through what the gradients of a training ran: "Gradients in 8 bits: 12 x int8-sm90."."""
    eight = ", ".join(f"{count} x {kernel}" for kernel, count in report.gradients().items()) or "none"
    through_exact = sum(x["calls"] for x in report.lines() if x["kernel"] == "exact")
    rest = f" {through_exact} calls ran through exact attention, and so did their gradients." if through_exact else ""
    return f"Gradients in 8 bits: {eight}.{rest}"


def payload(hook: Hook) -> dict[str, Any]:
    """The run as plain data: the event, and what Sage3 Report puts into the history.

    ``seconds`` are those of the attention calls, on a GPU by its own clock, null while the run goes on (nothing waits for
    the GPU); ``saved_seconds`` is null unless exact calls of the same shape were timed in the run.
    """
    lines, tally, steps = hook.report.lines(), hook.tally, hook.step_count
    calls = sum(x["calls"] for x in lines)
    low = hook.report.accelerated
    seconds = None if hook.running else tally.seconds_by_kernel()
    by_layer = {} if hook.running else tally.seconds_by_layer()
    saved = None if hook.running else tally.saved_seconds()
    emulated = any(x["kernel"].endswith("-emulated") for x in lines)
    return {
        "version": 1,
        "node": hook.node_id,
        "prompt": hook.prompt_id,
        "workflow": workflow_of(hook.prompt_id),
        "running": hook.running,
        "text": text(hook),
        "notes": notes(hook),
        "precision": hook.plan.precision.value,
        "planned": hook.table is not None,
        "emulated": emulated,
        "calls": calls,
        "accelerated": low,
        "fell_back": hook.report.fell_back,
        "exact": calls - low - hook.report.fell_back,
        "lines": lines,
        "step": min(hook.step + 1, steps) if hook.running else steps,
        "steps": steps,
        "layers": [
            {
                "layer": name,
                "calls": row.calls,
                "seconds": None if hook.running else by_layer.get(name),
                "kernels": dict(row.kernels),
                "fell_back": row.fell_back,
                "reasons": list(row.reasons),
            }
            for name, row in tally.rows.items()
        ],
        "map": {"layers": tally.layers(), "steps": steps, "cells": tally.cells(steps)},
        "seconds": seconds,
        "saved_seconds": None if emulated else saved,
        "gradients": hook.report.gradients(),
        "training": None if hook.usage is None or hook.running else hook.usage.data(),
    }


def progress(hook: Hook) -> None:
    """Tell the browsers that watch how far a run is, a few times a second at most."""
    if hook.node_id is None:
        return
    now = time.monotonic()
    if now - _last_sent.get(hook.node_id, 0.0) >= PAUSE:
        _last_sent[hook.node_id] = now
        _send(hook)


def publish(hook: Hook) -> None:
    """Log the outcome once and send it to the browsers that watch; silent where there is no server."""
    message = text(hook)
    log.log(logging.INFO if hook.report.lines() else logging.WARNING, "Sage3 Attention: %s", message)
    if hook.node_id is not None:
        _last_sent.pop(hook.node_id, None)
        _send(hook)


def _send(hook: Hook) -> None:
    try:
        from server import PromptServer
    except ImportError:  # ComfyUI's nodes used without its server
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    told = payload(hook)
    routes.remember(told)
    try:
        server.send_sync(EVENT, told)
    except Exception as error:  # a status that cannot be shown must not lose a finished video
        log.warning("Sage3 Attention: the status could not be sent to the browser: %s", error)


def current_prompt() -> str | None:
    """The id of the prompt being executed, or None outside ComfyUI's executor."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else context.prompt_id
